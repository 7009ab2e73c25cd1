//! The way to the bucket: the store, the catalog in it, and what the agents are told of both.

use std::path::Path;
use std::sync::Arc;

use agent_api::{Credentials, RepositoryAccess, Secret};
use catalog::Catalog;
use pipeline::store::ObjectStore;
use pipeline::store::s3::{CredentialSource, S3Config, S3Store};
use uuid::Uuid;

use crate::failure::{Failure, Result};
use crate::settings::Settings;

/// Opens the store that the settings name. No request is sent.
///
/// # Errors
/// If no repository is named, or a setting cannot be meant.
pub(crate) fn store(settings: &Settings) -> Result<Arc<dyn ObjectStore>> {
    let repo = settings.repo()?;
    let config = S3Config {
        bucket: repo.bucket.clone(),
        prefix: repo.prefix.clone(),
        endpoint: settings.s3_endpoint().map(str::to_owned),
        region: settings.s3_region().map(str::to_owned),
        ca_pem: ca_pem(settings)?.map(String::into_bytes),
        credentials: credentials(settings),
        ..S3Config::default()
    };
    Ok(Arc::new(S3Store::new(config)?))
}

/// Opens the repository, which is there.
///
/// # Errors
/// If it is not there or cannot be read.
pub(crate) async fn open(settings: &Settings) -> Result<Catalog> {
    let store = store(settings)?;
    let place = store.describe();
    Catalog::open(store)
        .await
        .map_err(|error| Failure::from(error).at_store(&place))
}

/// Opens the repository, or makes it.
///
/// # Errors
/// If it cannot be read or written.
pub(crate) async fn open_or_create(settings: &Settings, operation: Uuid) -> Result<Catalog> {
    let store = store(settings)?;
    let place = store.describe();
    let opened = Catalog::open_or_create(store, operation).await;
    opened.map_err(|error| Failure::from(error).at_store(&place))
}

fn ca_pem(settings: &Settings) -> Result<Option<String>> {
    let read = |path: &Path| {
        std::fs::read_to_string(path)
            .map_err(|error| Failure::file(path, "read", &error).next("check `--s3-ca-file`"))
    };
    settings.s3_ca_file().map(read).transpose()
}

fn credentials(settings: &Settings) -> CredentialSource {
    if let Some(file) = settings.s3_credentials_file() {
        return CredentialSource::File(file.to_owned());
    }
    match settings.s3_credentials_command() {
        Some(argv) => CredentialSource::Command(argv.to_vec()),
        None => CredentialSource::Environment,
    }
}

/// What an agent is told. Credentials go along, over mutual TLS and to be kept in memory only, if
/// `lend` says that the agent has none of its own.
///
/// # Errors
/// If there are no credentials to lend.
pub(crate) async fn access(settings: &Settings, lend: bool) -> Result<RepositoryAccess> {
    let repo = settings.repo()?;
    let keys = if lend {
        Some(credentials(settings).resolve().await?)
    } else {
        None
    };
    let credentials = match keys {
        Some(CredentialSource::Static {
            access_key_id,
            secret_access_key,
            session_token,
        }) => Some(Credentials {
            access_key_id,
            secret_access_key: Secret(secret_access_key),
            session_token: session_token.map(Secret),
        }),
        _ => None,
    };
    Ok(RepositoryAccess {
        bucket: repo.bucket.clone(),
        prefix: repo.prefix.clone(),
        endpoint: settings.s3_endpoint().map(str::to_owned),
        region: settings.s3_region().map(str::to_owned),
        ca_pem: ca_pem(settings)?,
        credentials,
    })
}
