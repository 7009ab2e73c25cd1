//! TLS of the agent: 1.3 only, and nobody without a certificate of our authority.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::identity::{AGENT_URI, IdentityError, check_role, check_time};
use rustls::crypto::aws_lc_rs;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::TlsFiles;

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{name}: cannot read {path}: {source}")]
    Unreadable {
        /// The setting that names it.
        name: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{name}: {path}: {problem}")]
    Content {
        /// The setting that names it.
        name: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The agent's own certificate does not do.
    #[error(
        "--tls-crt: {path}: {problem}; `gs_pitr certs issue --name NAME --san HOST` makes a new one"
    )]
    Own {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: IdentityError,
    },
    /// Certificate and key do not go together, or TLS 1.3 is not to be had.
    #[error("--tls-crt and --tls-key: {0}")]
    Pair(#[from] rustls::Error),
}

fn content(name: &'static str, path: &Path, problem: &impl ToString) -> TlsError {
    TlsError::Content {
        name,
        path: path.to_owned(),
        problem: problem.to_string(),
    }
}

fn read(name: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Unreadable {
        name,
        path: path.to_owned(),
        source,
    })
}

fn certificates(name: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(name, path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let all = all.map_err(|error| content(name, path, &error))?;
    if all.is_empty() {
        return Err(content(name, path, &"there is no certificate in it"));
    }
    Ok(all)
}

/// Reads the files and checks that they can serve.
///
/// # Errors
/// [`TlsError`], with the setting and the file.
pub fn load(files: &TlsFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = certificates("--tls-crt", &files.certificate)?;
    if let Some(own) = chain.first() {
        check_time(own)
            .and_then(|()| check_role(own, AGENT_URI))
            .map_err(|problem| TlsError::Own {
                path: files.certificate.clone(),
                problem,
            })?;
    }
    let key = PrivateKeyDer::from_pem_slice(&read("--tls-key", &files.key)?)
        .map_err(|error| content("--tls-key", &files.key, &error))?;
    let mut roots = RootCertStore::empty();
    for root in certificates("--tls-ca", &files.authority)? {
        roots
            .add(root)
            .map_err(|error| content("--tls-ca", &files.authority, &error))?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| content("--tls-ca", &files.authority, &error))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // Every connection shows its certificate anew: a resumed session would outlive its expiry.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
