//! Certificates of every kind, right and wrong ones.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use agent_api::client::{ClientTls, Transport};
use agent_api::identity::{AGENT_URI, OPERATOR_URI};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType, date_time_ymd,
};

/// A certificate and its key, PEM.
#[derive(Debug, Clone)]
pub(crate) struct Leaf {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        Self::named("gs_pitr CA")
    }

    pub(crate) fn named(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    fn leaf(&self, uri: Option<&str>, expired: bool) -> Leaf {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::IpAddress("127.0.0.1".parse().unwrap())];
        let uri = uri.map(|uri| SanType::URI(uri.try_into().unwrap()));
        params.subject_alt_names.extend(uri);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        if expired {
            params.not_after = date_time_ymd(2020, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Leaf {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        }
    }

    pub(crate) fn agent(&self) -> Leaf {
        self.leaf(Some(AGENT_URI), false)
    }

    pub(crate) fn operator(&self) -> Leaf {
        self.leaf(Some(OPERATOR_URI), false)
    }

    pub(crate) fn expired_operator(&self) -> Leaf {
        self.leaf(Some(OPERATOR_URI), true)
    }

    /// Signed, and for neither role.
    pub(crate) fn nobody(&self) -> Leaf {
        self.leaf(None, false)
    }

    /// A client that trusts this authority and shows `leaf`.
    pub(crate) fn transport(&self, leaf: &Leaf) -> Transport {
        Transport::MutualTls(ClientTls {
            ca_pem: self.pem.clone().into_bytes(),
            cert_pem: leaf.certificate.clone().into_bytes(),
            key_pem: leaf.key.clone().into_bytes(),
        })
    }
}

/// The three files of an agent.
pub(crate) struct Files {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) authority: PathBuf,
}

impl Files {
    pub(crate) fn write(directory: &Path, leaf: &Leaf, authority: &Authority) -> Self {
        let files = Self {
            certificate: directory.join("agent.crt"),
            key: directory.join("agent.key"),
            authority: directory.join("ca.crt"),
        };
        fs::write(&files.certificate, &leaf.certificate).unwrap();
        fs::write(&files.key, &leaf.key).unwrap();
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&files.authority, &authority.pem).unwrap();
        files
    }

    pub(crate) fn flags(&self) -> Vec<String> {
        let flags = [
            ("--tls-crt", &self.certificate),
            ("--tls-key", &self.key),
            ("--tls-ca", &self.authority),
        ];
        flags
            .iter()
            .flat_map(|(flag, path)| [(*flag).to_owned(), path.display().to_string()])
            .collect()
    }
}
