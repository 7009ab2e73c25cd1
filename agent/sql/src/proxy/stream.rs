//! The way to a proxy: its socket, with TLS around it if that is asked for.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;

use super::{ProxyOptions, ProxyTls};
use crate::error::{SqlError, chain};
use crate::login::Socket;

/// Asks whether the server speaks TLS (D 55.2.10): length 8, code 80877103.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Bytes both ways.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// Connects; nothing is said yet of who we are.
pub(super) async fn connect(options: &ProxyOptions) -> Result<Box<dyn Duplex>, SqlError> {
    let unreachable = |message: String| SqlError::Unreachable {
        target: options.target(),
        message,
    };
    let mut socket = Socket::open(&options.host, options.port)
        .await
        .map_err(|error| unreachable(error.to_string()))?;
    let ProxyTls::On { ca_pem } = &options.tls else {
        return Ok(Box::new(socket));
    };
    let tls = |what: String| unreachable(format!("TLS: {what}"));
    let config = config(ca_pem.as_deref()).map_err(tls)?;
    let name = ServerName::try_from(options.host.clone())
        .map_err(|error| tls(format!("{}: {error}", options.host)))?;
    let failed = |error: std::io::Error| tls(chain(&error));
    socket.write_all(&SSL_REQUEST).await.map_err(failed)?;
    socket.flush().await.map_err(failed)?;
    // Exactly one byte: what came behind it in clear would be taken for something said inside TLS.
    match socket.read_u8().await.map_err(failed)? {
        b'S' => {}
        b'N' => {
            return Err(SqlError::Setting {
                name: "proxy-frontend-ssl-enabled",
                value: "false".to_owned(),
                needed: "true".to_owned(),
            });
        }
        _ => return Err(tls("what answers there is no proxy".to_owned())),
    }
    let connector = TlsConnector::from(Arc::new(config));
    let stream = connector.connect(name, socket).await.map_err(failed)?;
    Ok(Box::new(stream))
}

fn config(ca_pem: Option<&[u8]>) -> Result<ClientConfig, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let Some(pem) = ca_pem else {
        let anybody = Arc::new(Anybody::new(&provider));
        let builder = builder.dangerous();
        return Ok(builder
            .with_custom_certificate_verifier(anybody)
            .with_no_client_auth());
    };
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(pem) {
        let root = root.map_err(|error| format!("the authority: {error}"))?;
        roots
            .add(root)
            .map_err(|error| format!("the authority: {error}"))?;
    }
    if roots.is_empty() {
        return Err("there is no certificate in the authority's file".to_owned());
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// Takes any certificate whose key signs the handshake: encrypted, to whoever it is.
#[derive(Debug)]
struct Anybody {
    algorithms: WebPkiSupportedAlgorithms,
}

impl Anybody {
    fn new(provider: &CryptoProvider) -> Self {
        Self {
            algorithms: provider.signature_verification_algorithms,
        }
    }
}

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
