//! The SDK's client, set up for what this backend promises.

use std::sync::Arc;

use aws_credential_types::provider::SharedCredentialsProvider;
use aws_runtime::auth::PayloadSigningOverride;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextMut;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, ConfigBag, IdentityCache, Intercept, Region, RequestChecksumCalculation,
    ResponseChecksumValidation, RuntimeComponents, SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::BoxError;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::{Builder as HttpBuilder, tls};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use super::S3Config;
use super::credentials::Provider;
use crate::store::{Detail, StoreError};

/// A body that is not taken at all for this long ends its attempt.
const STALL: std::time::Duration = std::time::Duration::from_secs(30);

/// Makes the client. Sends nothing.
pub(super) fn client(config: &S3Config, keys: &Arc<Provider>) -> Result<Client, StoreError> {
    let keys: Arc<dyn aws_credential_types::provider::ProvideCredentials> =
        Arc::<Provider>::clone(keys) as _;
    let mut builder = aws_sdk_s3::config::Builder::new()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new(region(config)))
        .force_path_style(config.path_style.unwrap_or(config.endpoint.is_some()))
        .credentials_provider(SharedCredentialsProvider::from(keys))
        // The provider keeps keys itself and sees at once when a file changes.
        .identity_cache(IdentityCache::no_cache())
        // We send SHA-256 ourselves; anything more wraps bodies in aws-chunked, which other stores than
        // Amazon's take badly.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        // `attempts` repeats: the SDK would not say whether an earlier attempt was lost.
        .retry_config(RetryConfig::disabled())
        // Whole attempts are timed by `attempts`, by their size.
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(config.connect_timeout)
                .build(),
        )
        // Downloads have a deadline of their own, which does not run while the reader is busy.
        .stalled_stream_protection(
            StalledStreamProtectionConfig::enabled()
                .upload_enabled(true)
                .download_enabled(false)
                .grace_period(STALL)
                .build(),
        )
        .http_client(http_client(config)?);
    builder.set_endpoint_url(config.endpoint.clone());
    Ok(Client::from_conf(builder.build()))
}

/// The region to sign for.
pub(super) fn region(config: &S3Config) -> String {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    config
        .region
        .clone()
        .or_else(|| variable("AWS_REGION"))
        .or_else(|| variable("AWS_DEFAULT_REGION"))
        .unwrap_or_else(|| "us-east-1".to_owned())
}

fn http_client(config: &S3Config) -> Result<SharedHttpClient, StoreError> {
    let trust = match &config.ca_pem {
        Some(pem) => {
            check_certificates(pem).map_err(|problem| {
                StoreError::Invalid(Detail::new("set up", "CA file", problem))
            })?;
            tls::TrustStore::empty().with_pem_certificate(pem.clone())
        }
        // Nothing is verified over plain http, so no roots are read.
        None if !is_https(config) => tls::TrustStore::empty(),
        None => tls::TrustStore::default(),
    };
    let context = tls::TlsContext::builder()
        .with_trust_store(trust)
        .build()
        .map_err(|error| {
            StoreError::Invalid(Detail::new("set up", "TLS", super::failure::chain(&error)))
        })?;
    Ok(HttpBuilder::new()
        .tls_provider(tls::Provider::Rustls(CryptoMode::AwsLc))
        .tls_context(context)
        .build_https())
}

pub(super) fn is_https(config: &S3Config) -> bool {
    config
        .endpoint
        .as_ref()
        .is_none_or(|endpoint| endpoint.starts_with("https://"))
}

/// The client panics on a file that is no certificate, so it is looked at first.
fn check_certificates(pem: &[u8]) -> Result<(), String> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("not a PEM file: {error}"))?;
        roots
            .add(certificate)
            .map_err(|error| format!("a certificate in it cannot be used: {error}"))?;
    }
    if roots.is_empty() {
        return Err("there is no certificate in it".into());
    }
    Ok(())
}

/// Signs a body by the SHA-256 (in hex) that is known already, so that it is not computed twice.
#[derive(Debug)]
pub(super) struct SignDigest(pub(super) String);

impl Intercept for SignDigest {
    fn name(&self) -> &'static str {
        "SignDigest"
    }

    fn modify_before_signing(
        &self,
        _context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let payload = PayloadSigningOverride::Precomputed(self.0.clone());
        config.interceptor_state().store_put(payload);
        Ok(())
    }
}
