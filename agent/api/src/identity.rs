//! Who may be whom: the URI names in certificates.

use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// URI name that a client certificate must carry to give orders to an agent.
pub const OPERATOR_URI: &str = "gs-pitr:operator";
/// URI name that an agent's certificate must carry, beside its host's names.
pub const AGENT_URI: &str = "gs-pitr:agent";

/// Why a certificate is not what it should be; the words a person gets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It is no X.509 certificate.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
    /// It was issued for something else.
    #[error("it does not carry the URI name {expected}")]
    WrongRole {
        /// The name it should carry.
        expected: &'static str,
    },
    /// Its time is over.
    #[error("it expired on {0}")]
    Expired(String),
    /// Its time has not begun; one of the clocks may be wrong.
    #[error("it is not valid before {0}")]
    NotYetValid(String),
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, IdentityError> {
    X509Certificate::from_der(certificate)
        .map(|(_, parsed)| parsed)
        .map_err(|error| IdentityError::Unreadable(error.to_string()))
}

/// Checks that `certificate` carries the URI name `expected`. Who signed it is not asked here.
///
/// # Errors
/// [`IdentityError::WrongRole`], [`IdentityError::Unreadable`].
pub fn check_role(
    certificate: &CertificateDer<'_>,
    expected: &'static str,
) -> Result<(), IdentityError> {
    let certificate = parse(certificate)?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| IdentityError::Unreadable(error.to_string()))?;
    let is_expected =
        |name: &GeneralName<'_>| matches!(name, GeneralName::URI(uri) if *uri == expected);
    if names.is_some_and(|names| names.value.general_names.iter().any(is_expected)) {
        return Ok(());
    }
    Err(IdentityError::WrongRole { expected })
}

/// Checks that `certificate` is valid by this host's clock.
///
/// # Errors
/// [`IdentityError::Expired`], [`IdentityError::NotYetValid`], [`IdentityError::Unreadable`].
pub fn check_time(certificate: &CertificateDer<'_>) -> Result<(), IdentityError> {
    let certificate = parse(certificate)?;
    let validity = certificate.validity();
    let now = x509_parser::time::ASN1Time::now();
    if now > validity.not_after {
        return Err(IdentityError::Expired(validity.not_after.to_string()));
    }
    if now < validity.not_before {
        return Err(IdentityError::NotYetValid(validity.not_before.to_string()));
    }
    Ok(())
}
