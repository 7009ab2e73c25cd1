//! The repository's store, opened with the agent's own credentials or with those the client sent.

use std::sync::Arc;

use agent_api::{ApiError, ErrorKind, RepositoryAccess};
use pipeline::store::ObjectStore;
use pipeline::store::s3::{CredentialSource, S3Config, S3Store};

use crate::config::OwnCredentials;
use crate::failure::store_error;

/// Opens the store. Sends no request.
///
/// The agent's own credentials come first. The client's can only have arrived over mutual TLS or, where
/// the operator asked for plain HTTP, over loopback: nothing else is ever served. They live in memory for
/// as long as the operation, and nowhere else.
///
/// # Errors
/// [`ErrorKind::StoreDenied`] if neither side has credentials; what the store says of the rest.
pub fn open(
    access: &RepositoryAccess,
    own: Option<&OwnCredentials>,
) -> Result<Arc<dyn ObjectStore>, ApiError> {
    let config = S3Config {
        bucket: access.bucket.clone(),
        prefix: access.prefix.clone(),
        endpoint: access.endpoint.clone(),
        region: access.region.clone(),
        ca_pem: access.ca_pem.clone().map(String::into_bytes),
        credentials: credentials(access, own)?,
        ..S3Config::default()
    };
    let store = S3Store::new(config).map_err(|error| store_error(&error))?;
    Ok(Arc::new(store))
}

fn credentials(
    access: &RepositoryAccess,
    own: Option<&OwnCredentials>,
) -> Result<CredentialSource, ApiError> {
    match (own, &access.credentials) {
        (Some(OwnCredentials::Environment), _) => Ok(CredentialSource::Environment),
        (Some(OwnCredentials::File(path)), _) => Ok(CredentialSource::File(path.clone())),
        (Some(OwnCredentials::Command(argv)), _) => Ok(CredentialSource::Command(argv.clone())),
        (None, Some(sent)) => Ok(CredentialSource::Static {
            access_key_id: sent.access_key_id.clone(),
            secret_access_key: sent.secret_access_key.0.clone(),
            session_token: sent.session_token.as_ref().map(|token| token.0.clone()),
        }),
        (None, None) => {
            let message = "the agent has no S3 credentials of its own, and the client sent none";
            let error = ApiError::new(ErrorKind::StoreDenied, message);
            Err(error.next(
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for gs_pitr, or give the agent \
                 --s3-credentials-file",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use agent_api::{Credentials, Secret};

    use super::*;

    fn access(credentials: Option<Credentials>) -> RepositoryAccess {
        RepositoryAccess {
            bucket: "b".to_owned(),
            prefix: String::new(),
            endpoint: Some("https://127.0.0.1:1".to_owned()),
            region: None,
            ca_pem: None,
            credentials,
        }
    }

    fn sent() -> Credentials {
        Credentials {
            access_key_id: "ID".to_owned(),
            secret_access_key: Secret("TOP".to_owned()),
            session_token: Some(Secret("TOKEN".to_owned())),
        }
    }

    #[test]
    fn own_credentials_come_first_and_none_is_an_error() {
        let own = OwnCredentials::File("/x".into());
        let source = credentials(&access(Some(sent())), Some(&own)).unwrap();
        assert!(matches!(source, CredentialSource::File(_)));
        let source = credentials(&access(Some(sent())), None).unwrap();
        assert!(matches!(source, CredentialSource::Static { .. }));
        let error = credentials(&access(None), None).unwrap_err();
        assert_eq!(error.kind, ErrorKind::StoreDenied);
    }

    #[test]
    fn no_secret_is_printed() {
        let access = access(Some(sent()));
        let store = open(&access, None).unwrap();
        let printed = format!("{access:?} {store:?} {}", store.describe());
        assert!(
            !printed.contains("TOP") && !printed.contains("TOKEN"),
            "{printed}"
        );
    }
}
