//! Why a request never got an answer, in words that name the mend.

use std::error::Error;
use std::io;

use rustls::{AlertDescription, CertificateError};

use crate::client::tls::ISSUE_OPERATOR;
use crate::error::{ApiError, ErrorKind};

const LOOK_AT_THE_AGENT: &str = "check that pitr-agent runs there, and host, port and firewall";

/// The error and all its sources in one line; reqwest's own line only says that something failed.
pub(super) fn words(error: &dyn Error) -> String {
    let mut all: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if !all.last().is_some_and(|last| last.contains(&text)) {
            all.push(text);
        }
        next = error.source();
    }
    all.join(": ")
}

/// What TLS said, wherever it hides in the chain of sources.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        let inside = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        if let Some(inside) = inside {
            let inside: &(dyn Error + 'static) = inside;
            // An io::Error's source() skips the error it wraps.
            if let Some(found) = tls_error(inside) {
                return Some(found);
            }
        }
        next = error.source();
    }
    None
}

fn io_kind(error: &(dyn Error + 'static)) -> Option<io::ErrorKind> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<io::Error>() {
            return Some(found.kind());
        }
        next = error.source();
    }
    None
}

/// The error of a request to the agent at `address` on `host`.
pub(super) fn of(address: &str, host: &str, error: &reqwest::Error) -> ApiError {
    if let Some(tls) = tls_error(error) {
        return of_tls(address, host, tls);
    }
    let (kind, what) = match io_kind(error) {
        Some(io::ErrorKind::ConnectionRefused) => (
            ErrorKind::AgentUnreachable,
            "refused the connection: nothing listens there".to_owned(),
        ),
        _ if error.is_timeout() && error.is_connect() => (
            ErrorKind::AgentUnreachable,
            "could not be reached in time".to_owned(),
        ),
        _ if error.is_timeout() => (
            ErrorKind::AgentUnreachable,
            "has not answered in time".to_owned(),
        ),
        _ if error.is_connect() => (
            ErrorKind::AgentUnreachable,
            format!("cannot be reached: {}", words(error)),
        ),
        Some(_) => (
            ErrorKind::AgentUnreachable,
            format!("broke the connection: {}", words(error)),
        ),
        None => (
            ErrorKind::AgentUnreachable,
            format!(
                "gave no proper answer (one of the two sides may speak HTTPS and the other plain HTTP): {}",
                words(error)
            ),
        ),
    };
    let message = format!("the agent at {address} {what}");
    ApiError::new(kind, message).next(LOOK_AT_THE_AGENT)
}

fn of_tls(address: &str, host: &str, error: &rustls::Error) -> ApiError {
    let (kind, what, next) = match error {
        rustls::Error::AlertReceived(alert) => of_alert(*alert),
        rustls::Error::InvalidCertificate(why) => of_certificate(host, why),
        rustls::Error::InvalidMessage(_) => (
            ErrorKind::Certificate,
            "does not speak TLS; it may run with --insecure-http".to_owned(),
            "start it with --tls-crt, --tls-key and --tls-ca, or use --insecure-http here too"
                .to_owned(),
        ),
        rustls::Error::PeerIncompatible(_) => (
            ErrorKind::Certificate,
            format!("does not speak TLS 1.3: {error}"),
            LOOK_AT_THE_AGENT.to_owned(),
        ),
        other => (
            ErrorKind::Certificate,
            format!("broke off the TLS handshake: {other}"),
            "look at the agent's log on that host".to_owned(),
        ),
    };
    ApiError::new(kind, format!("the agent at {address} {what}")).next(next)
}

/// The agent refuses us.
fn of_alert(alert: AlertDescription) -> (ErrorKind, String, String) {
    let what = match alert {
        AlertDescription::CertificateRequired => "asks for a client certificate and got none",
        AlertDescription::UnknownCA => {
            "does not know the authority that signed the operator's certificate; its --tls-ca is another one"
        }
        // Two authorities of the same name, as two runs of `certs init` make them.
        AlertDescription::DecryptError => {
            "does not know the authority that signed the operator's certificate, although its own \
             has the same name; its --tls-ca is another one"
        }
        AlertDescription::CertificateExpired => "says that the operator's certificate is expired",
        AlertDescription::CertificateRevoked => "says that the operator's certificate is revoked",
        AlertDescription::ProtocolVersion => {
            let what = "does not speak TLS 1.3".to_owned();
            return (ErrorKind::Certificate, what, LOOK_AT_THE_AGENT.to_owned());
        }
        _ => {
            let what = format!("refuses the operator's certificate (TLS alert {alert:?})");
            return (ErrorKind::Certificate, what, ISSUE_OPERATOR.to_owned());
        }
    };
    (
        ErrorKind::Certificate,
        what.to_owned(),
        ISSUE_OPERATOR.to_owned(),
    )
}

/// We refuse the agent.
fn of_certificate(host: &str, why: &CertificateError) -> (ErrorKind, String, String) {
    let issue = format!("gs_pitr certs issue --name {host} --san {host}, installed at the agent");
    let (what, next) = match why {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => (
            "has a certificate that --tls-ca did not sign".to_owned(),
            format!("use the right --tls-ca, or {issue}"),
        ),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            ("has a certificate that is expired".to_owned(), issue)
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => (
            "has a certificate that is not valid yet".to_owned(),
            "compare the clocks of both hosts".to_owned(),
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => (
            format!("has a certificate that is not made for the name {host}"),
            issue,
        ),
        CertificateError::ApplicationVerificationFailure => (
            "has a certificate that is not an agent's (no URI name gs-pitr:agent)".to_owned(),
            issue,
        ),
        other => (
            format!("has a certificate that cannot be used: {other}"),
            issue,
        ),
    };
    (ErrorKind::Certificate, what, next)
}
