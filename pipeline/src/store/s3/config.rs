//! Where an S3 store is and how it is talked to.

use std::fmt;
use std::time::Duration;

use super::credentials::CredentialSource;
use super::failure::Subject;
use crate::store::{Key, StoreError};

/// Where the store is and how to talk to it. [`Default`] has no bucket.
#[derive(Clone)]
pub struct S3Config {
    /// The bucket's name.
    pub bucket: String,
    /// What all keys begin with, without `/` at its ends; empty for none.
    pub prefix: String,
    /// `https://host:port` or `http://host:port`; none for Amazon's own.
    pub endpoint: Option<String>,
    /// The region to sign for; none: `AWS_REGION`, `AWS_DEFAULT_REGION`, `us-east-1`.
    pub region: Option<String>,
    /// Whether the bucket stands in the path and not in the host's name; none: if there is an endpoint.
    pub path_style: Option<bool>,
    /// PEM certificates to trust instead of the system's.
    pub ca_pem: Option<Vec<u8>>,
    /// Where the keys come from.
    pub credentials: CredentialSource,
    /// The longest wait for a connection with TLS.
    pub connect_timeout: Duration,
    /// The longest wait for an answer once a request is sent, and for more bytes of a body.
    pub reply_timeout: Duration,
    /// Bytes per second: an upload's attempt may also take the time that its body needs at this rate.
    pub slowest_upload: u64,
    /// The longest wait for a multipart upload to be put together.
    pub complete_timeout: Duration,
    /// Attempts per call, the first included.
    pub attempts: u32,
    /// The pause after the first attempt; it doubles after each.
    pub first_pause: Duration,
    /// The longest pause between attempts.
    pub longest_pause: Duration,
}

impl Default for S3Config {
    fn default() -> Self {
        Self {
            bucket: String::new(),
            prefix: String::new(),
            endpoint: None,
            region: None,
            path_style: None,
            ca_pem: None,
            credentials: CredentialSource::Environment,
            connect_timeout: Duration::from_secs(5),
            reply_timeout: Duration::from_mins(1),
            slowest_upload: 128 << 10,
            complete_timeout: Duration::from_mins(10),
            attempts: 6,
            first_pause: Duration::from_millis(200),
            longest_pause: Duration::from_secs(10),
        }
    }
}

impl fmt::Debug for S3Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Config")
            .field("bucket", &self.bucket)
            .field("prefix", &self.prefix)
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("credentials", &self.credentials)
            .finish_non_exhaustive()
    }
}

impl S3Config {
    /// Puts it into one form, and refuses what cannot be meant.
    pub(super) fn check(&mut self) -> Result<(), StoreError> {
        let invalid = |what: &str, words: &str| {
            let subject = Subject {
                operation: "set up",
                key: what,
            };
            StoreError::Invalid(subject.detail(words))
        };
        if self.bucket.is_empty() || self.bucket.contains('/') {
            return Err(invalid("bucket", "a bucket's name is needed, without `/`"));
        }
        if let Some(endpoint) = &mut self.endpoint {
            let rest = endpoint
                .strip_prefix("https://")
                .or_else(|| endpoint.strip_prefix("http://"));
            let host = rest.map(|rest| rest.trim_end_matches('/'));
            if host.is_none_or(|host| host.is_empty() || host.contains(['/', ' ', '?', '@'])) {
                let words = "not of the form https://host:port or http://host:port";
                return Err(invalid(endpoint, words));
            }
            endpoint.truncate(endpoint.trim_end_matches('/').len());
        }
        self.prefix = self.prefix.trim_matches('/').to_owned();
        if !self.prefix.is_empty() && Key::new(self.prefix.clone()).is_err() {
            return Err(invalid(&self.prefix, "not a valid prefix"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::S3Store;
    use super::*;

    fn config(endpoint: &str) -> S3Config {
        S3Config {
            bucket: "bucket".into(),
            prefix: "/a/b/".into(),
            endpoint: Some(endpoint.into()),
            ..S3Config::default()
        }
    }

    #[tokio::test]
    async fn what_cannot_be_meant_is_refused() {
        for endpoint in ["host:9000", "ftp://host", "https://", "https://a/b"] {
            let refused = S3Store::new(config(endpoint));
            assert!(matches!(refused, Err(StoreError::Invalid(_))), "{endpoint}");
        }
        let no_bucket = S3Config {
            bucket: String::new(),
            ..config("http://h")
        };
        assert!(matches!(
            S3Store::new(no_bucket),
            Err(StoreError::Invalid(_))
        ));
        for pem in [
            "",
            "nonsense",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            let bad_ca = S3Config {
                ca_pem: Some(pem.into()),
                ..config("https://h")
            };
            assert!(matches!(S3Store::new(bad_ca), Err(StoreError::Invalid(_))));
        }
    }
}
