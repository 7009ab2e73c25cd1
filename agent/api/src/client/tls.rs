//! TLS of the client: 1.3 only, our authority only, and an agent at the other end.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::client::ClientTls;
use crate::error::{ApiError, ErrorKind};
use crate::identity::{AGENT_URI, IdentityError, OPERATOR_URI, check_role, check_time};

/// What makes a new operator's certificate.
pub(super) const ISSUE_OPERATOR: &str = "gs_pitr certs issue --operator";

fn unusable(what: &str, why: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorKind::Certificate, format!("{what}: {why}"))
}

pub(super) fn config(tls: &ClientTls) -> Result<ClientConfig, ApiError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for root in certificates("the authority (--tls-ca)", &tls.ca_pem)? {
        roots
            .add(root)
            .map_err(|error| unusable("the authority (--tls-ca)", error))?;
    }
    let own = certificates("the operator's certificate (--tls-crt)", &tls.cert_pem)?;
    if let Some(leaf) = own.first() {
        check_own(leaf)?;
    }
    let key = PrivateKeyDer::from_pem_slice(&tls.key_pem)
        .map_err(|error| unusable("the operator's key (--tls-key)", error))?;
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| unusable("the authority (--tls-ca)", error))?;
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| unusable("TLS 1.3", error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AgentVerifier { inner: verifier }))
        .with_client_auth_cert(own, key)
        .map_err(|error| unusable("the operator's certificate and key", error))
}

fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, ApiError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|error| unusable(what, error))?;
    if all.is_empty() {
        return Err(unusable(what, "there is no certificate in it"));
    }
    Ok(all)
}

/// Said here, before the agent refuses it with fewer words.
fn check_own(leaf: &CertificateDer<'_>) -> Result<(), ApiError> {
    let checked = check_time(leaf).and_then(|()| check_role(leaf, OPERATOR_URI));
    checked.map_err(|error| {
        unusable("the operator's certificate (--tls-crt)", error).next(ISSUE_OPERATOR)
    })
}

/// webpki's checks, and that the certificate is an agent's: one of another kind by the same authority
/// does not do.
#[derive(Debug)]
struct AgentVerifier {
    inner: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for AgentVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.inner.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )?;
        match check_role(end_entity, AGENT_URI) {
            Ok(()) => Ok(verified),
            Err(IdentityError::WrongRole { .. }) => {
                Err(CertificateError::ApplicationVerificationFailure.into())
            }
            Err(_) => Err(CertificateError::BadEncoding.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
