//! Certificates for the mutual TLS between `gs_pitr` and its agents: made, renewed and looked at.

use std::net::IpAddr;
use std::path::Path;

use agent_api::ErrorKind;
use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::X509Certificate;
use x509_parser::time::ASN1Time;

use crate::failure::{Failure, Result};

/// The URI that makes a certificate an operator's.
pub(crate) const OPERATOR: &str = "gs-pitr:operator";
/// The URI that makes a certificate an agent's.
pub(crate) const AGENT: &str = "gs-pitr:agent";

/// A certificate and its key, as PEM.
pub(crate) struct Pair {
    /// The certificate.
    pub(crate) cert: String,
    /// The key (PKCS#8).
    pub(crate) key: String,
}

/// Who a leaf is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    /// `gs_pitr` itself.
    Operator,
    /// A `pitr-agent`, reached under these names and addresses.
    Agent(Vec<San>),
}

/// A name or an address that a client may reach an agent under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum San {
    /// A DNS name.
    Dns(String),
    /// An IP address.
    Ip(IpAddr),
}

impl std::str::FromStr for San {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Ip(address));
        }
        let label_ok = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
        };
        let name = text.strip_prefix("*.").unwrap_or(text);
        if text.len() <= 253 && name.split('.').all(label_ok) {
            Ok(Self::Dns(text.to_ascii_lowercase()))
        } else {
            Err("it is neither a DNS name nor an IP address (give it without a port)".into())
        }
    }
}

/// What a certificate says.
#[derive(Debug)]
pub(crate) struct Facts {
    /// Valid from (UTC).
    pub(crate) not_before: Timestamp,
    /// Valid until (UTC).
    pub(crate) not_after: Timestamp,
    /// Its common name.
    pub(crate) name: String,
    /// Whether it may sign others.
    pub(crate) is_ca: bool,
    /// The URIs it is for.
    pub(crate) uris: Vec<String>,
    subject: Vec<u8>,
    issuer: Vec<u8>,
    public_key: Vec<u8>,
    key_id: Option<Vec<u8>>,
}

fn internal(what: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(ErrorKind::Internal, format!("cannot {what}: {error}"))
}

fn bad(path: &Path, why: &str) -> Failure {
    let message = format!("`{}` {why}", path.display());
    Failure::new(ErrorKind::Certificate, message)
}

impl Facts {
    /// Reads the first certificate of `pem`, which came from `path`.
    ///
    /// # Errors
    /// A certificate failure if it is none.
    pub(crate) fn read(path: &Path, pem: &str) -> Result<Self> {
        let not_one = || bad(path, "is not a certificate in PEM");
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| not_one())?;
        if pem.label != "CERTIFICATE" {
            return Err(not_one());
        }
        let cert = pem.parse_x509().map_err(|_| not_one())?;
        Self::of(&cert).ok_or_else(not_one)
    }

    /// Reads a certificate as it comes over the wire (DER).
    pub(crate) fn of_der(der: &[u8]) -> Option<Self> {
        let (_, cert) = x509_parser::parse_x509_certificate(der).ok()?;
        Self::of(&cert)
    }

    fn of(cert: &X509Certificate<'_>) -> Option<Self> {
        let moment = |time: ASN1Time| Timestamp::from_second(time.timestamp()).ok();
        let name = cert.subject().iter_common_name().next();
        let name = name
            .and_then(|name| name.as_str().ok())
            .unwrap_or("(no name)");
        let mut uris = Vec::new();
        if let Ok(Some(names)) = cert.subject_alternative_name() {
            uris.extend(
                names
                    .value
                    .general_names
                    .iter()
                    .filter_map(|name| match name {
                        GeneralName::URI(uri) => Some((*uri).to_owned()),
                        _ => None,
                    }),
            );
        }
        let key_id =
            cert.extensions()
                .iter()
                .find_map(|extension| match extension.parsed_extension() {
                    ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
                    _ => None,
                });
        Some(Self {
            not_before: moment(cert.validity().not_before)?,
            not_after: moment(cert.validity().not_after)?,
            name: name.to_owned(),
            is_ca: cert.is_ca(),
            uris,
            subject: cert.subject().as_raw().to_vec(),
            issuer: cert.issuer().as_raw().to_vec(),
            public_key: cert.public_key().raw.to_vec(),
            key_id,
        })
    }
}

/// A CA: what signs leaves.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    facts: Facts,
}

/// Makes a CA named `name`, valid for `days`.
///
/// # Errors
/// If the system has no randomness.
pub(crate) fn make_authority(name: &str, days: u32) -> Result<Pair> {
    let key = KeyPair::generate().map_err(|error| internal("make a key", &error))?;
    let mut params = params(name, days)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let cert = params.self_signed(&key);
    let cert = cert.map_err(|error| internal("make a certificate", &error))?;
    Ok(Pair {
        cert: cert.pem(),
        key: key.serialize_pem(),
    })
}

impl Authority {
    /// The CA whose certificate and key are in these files.
    ///
    /// # Errors
    /// A certificate failure if a file is missing, is something else, or they do not belong together.
    pub(crate) fn load(cert_path: &Path, key_path: &Path) -> Result<Self> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|error| {
                bad(path, &format!("cannot be read: {error}")).next("gs_pitr certs init")
            })
        };
        let facts = Facts::read(cert_path, &read(cert_path)?)?;
        if !facts.is_ca {
            return Err(bad(cert_path, "is not the certificate of a CA"));
        }
        let key = KeyPair::from_pem(&read(key_path)?)
            .map_err(|error| bad(key_path, &format!("is not a key in PEM: {error}")))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished(&facts.name);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        if let Some(id) = &facts.key_id {
            params.key_identifier_method = KeyIdMethod::PreSpecified(id.clone());
        }
        let issuer = Issuer::new(params, key);
        if rcgen::PublicKeyData::subject_public_key_info(issuer.key()) != facts.public_key {
            let why = format!("is not the key of `{}`", cert_path.display());
            return Err(bad(key_path, &why));
        }
        if facts.not_after <= Timestamp::now() {
            let why = format!("expired at {}", facts.not_after);
            let next = "move it away and run `gs_pitr certs init`; every agent then needs a new certificate";
            return Err(bad(cert_path, &why).next(next));
        }
        Ok(Self { issuer, facts })
    }

    /// When the CA's own certificate expires.
    pub(crate) fn not_after(&self) -> Timestamp {
        self.facts.not_after
    }

    /// Makes a leaf named `name`, valid for `days` but not longer than the CA. `key` is used again if
    /// there is one.
    ///
    /// # Errors
    /// If the CA was made by another program in a way that this one cannot repeat.
    pub(crate) fn issue(
        &self,
        name: &str,
        role: &Role,
        days: u32,
        key: Option<&str>,
    ) -> Result<Pair> {
        let key = match key {
            Some(pem) => KeyPair::from_pem(pem),
            None => KeyPair::generate(),
        };
        let key = key.map_err(|error| internal("make or read a key", &error))?;
        let mut params = params(name, days)?;
        let end = ASN1Time::from_timestamp(self.facts.not_after.as_second());
        if let Ok(end) = end
            && end.to_datetime() < params.not_after
        {
            params.not_after = end.to_datetime();
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let (uri, usage) = match role {
            Role::Operator => (OPERATOR, ExtendedKeyUsagePurpose::ClientAuth),
            Role::Agent(_) => (AGENT, ExtendedKeyUsagePurpose::ServerAuth),
        };
        params.extended_key_usages = vec![usage];
        let text = |text: &str| {
            text.try_into().map_err(|error: rcgen::Error| {
                Failure::usage(format!("`{text}` cannot stand in a certificate: {error}"))
            })
        };
        params.subject_alt_names.push(SanType::URI(text(uri)?));
        if let Role::Agent(sans) = role {
            for san in sans {
                params.subject_alt_names.push(match san {
                    San::Dns(name) => SanType::DnsName(text(name)?),
                    San::Ip(address) => SanType::IpAddress(*address),
                });
            }
        }
        let cert = params
            .signed_by(&key, &self.issuer)
            .map_err(|error| internal("sign a certificate", &error))?;
        self.check(cert.der())?;
        Ok(Pair {
            cert: cert.pem(),
            key: key.serialize_pem(),
        })
    }

    /// A leaf whose issuer is not written exactly as the CA's subject is would be trusted by nobody.
    fn check(&self, leaf: &[u8]) -> Result<()> {
        let parsed = x509_parser::parse_x509_certificate(leaf);
        let (_, leaf) = parsed.map_err(|error| internal("read the new certificate", &error))?;
        match Facts::of(&leaf) {
            Some(leaf) if leaf.issuer == self.facts.subject => Ok(()),
            _ => {
                let message =
                    "this CA was not made by `gs_pitr certs init`, and its name cannot be repeated";
                let next = format!(
                    "make the certificate with the program that made the CA; it needs the URI SAN `{OPERATOR}` or `{AGENT}`"
                );
                Err(Failure::new(ErrorKind::Certificate, message).next(next))
            }
        }
    }
}

fn distinguished(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// What every certificate of ours has: a name, a random serial number, and a validity that begins
/// five minutes ago, for clocks that are behind.
fn params(name: &str, days: u32) -> Result<CertificateParams> {
    let now = Timestamp::now();
    let time = |moment: Timestamp| {
        let time = ASN1Time::from_timestamp(moment.as_second());
        time.map(|time| time.to_datetime())
            .map_err(|error| internal("write a date", &error))
    };
    let end = now.checked_add(SignedDuration::from_hours(i64::from(days) * 24));
    let end = end.map_err(|_| Failure::usage("`--days` reaches beyond the calendar"))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = distinguished(name);
    params.not_before = time(now - SignedDuration::from_mins(5))?;
    params.not_after = time(end)?;
    let mut serial: [u8; 16] = rand::random();
    serial[0] = serial[0] & 0x7f | 0x40; // positive, and always 16 bytes long
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

/// Checks the operator's certificate before it is shown to an agent: the answer of a TLS library to
/// an expired one tells nobody what to do.
///
/// # Errors
/// A certificate failure with the command that mends it.
pub(crate) fn check_operator(path: &Path, pem: &str) -> Result<Facts> {
    const RENEW: &str = "gs_pitr certs issue --operator";
    let facts = Facts::read(path, pem)?;
    let now = Timestamp::now();
    if facts.not_after <= now {
        return Err(bad(path, &format!("expired at {}", facts.not_after)).next(RENEW));
    }
    if facts.not_before > now {
        let why = format!("is valid only from {}", facts.not_before);
        return Err(bad(path, &why).next("set this machine's clock"));
    }
    if !facts.uris.iter().any(|uri| uri == OPERATOR) {
        let why = format!("is not an operator's certificate: it lacks the URI SAN `{OPERATOR}`");
        return Err(bad(path, &why).next(RENEW));
    }
    Ok(facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses() {
        assert_eq!("DB1.example".parse(), Ok(San::Dns("db1.example".into())));
        assert_eq!("::1".parse(), Ok(San::Ip("::1".parse().unwrap())));
        for bad in ["", "db1:18080", "a b", "-a", "a..b", "http://a"] {
            assert!(bad.parse::<San>().is_err(), "{bad}");
        }
    }
}
