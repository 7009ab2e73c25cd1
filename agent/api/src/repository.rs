//! The repository, and the way to it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How to reach the repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepositoryAccess {
    /// Bucket name.
    pub bucket: String,
    /// Prefix within it, without slashes at the ends; may be empty.
    pub prefix: String,
    /// Endpoint URL; `None`: AWS's own.
    pub endpoint: Option<String>,
    /// Region.
    pub region: Option<String>,
    /// Certificates (PEM) that the endpoint's is signed by, beside the system's.
    pub ca_pem: Option<String>,
    /// Credentials for agents that have none of their own.
    pub credentials: Option<Credentials>,
}

/// S3 credentials, kept in memory only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// Access key id.
    pub access_key_id: String,
    /// Secret access key.
    pub secret_access_key: Secret,
    /// Session token.
    pub session_token: Option<Secret>,
}

/// A string that no log, error or debug print shows.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}
