//! Where the proxies are, and how the agents of their data nodes are found: from flags, environment and file.

use std::path::PathBuf;

use serde::Deserialize;

use super::values::{Address, Named};

/// What one place says; `None`: nothing. No place but the flag and the environment holds a password.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ProxySettings {
    #[serde(rename = "proxy-host")]
    pub(crate) host: Option<String>,
    #[serde(rename = "proxy-port")]
    pub(crate) port: Option<u16>,
    #[serde(rename = "proxy-username")]
    pub(crate) username: Option<String>,
    #[serde(rename = "proxy-password-file")]
    pub(crate) password_file: Option<PathBuf>,
    pub(crate) proxies: Option<Vec<Address>>,
    #[serde(rename = "proxy-map")]
    pub(crate) map: Option<Vec<Named>>,
    #[serde(rename = "proxy-tls")]
    pub(crate) tls: Option<bool>,
    #[serde(rename = "proxy-ca")]
    pub(crate) ca: Option<PathBuf>,
    #[serde(rename = "agent-port")]
    pub(crate) agent_port: Option<u16>,
    pub(crate) agents: Option<Vec<Named>>,
}

impl ProxySettings {
    /// The keys of the configuration file.
    pub(super) const KEYS: [&str; 10] = [
        "proxy-host",
        "proxy-port",
        "proxy-username",
        "proxy-password-file",
        "proxies",
        "proxy-map",
        "proxy-tls",
        "proxy-ca",
        "agent-port",
        "agents",
    ];

    /// What `self` says, and where it says nothing, what `lower` says.
    #[must_use]
    pub(super) fn combine(self, lower: Self) -> Self {
        Self {
            host: self.host.or(lower.host),
            port: self.port.or(lower.port),
            username: self.username.or(lower.username),
            password_file: self.password_file.or(lower.password_file),
            proxies: self.proxies.or(lower.proxies),
            map: self.map.or(lower.map),
            tls: self.tls.or(lower.tls),
            ca: self.ca.or(lower.ca),
            agent_port: self.agent_port.or(lower.agent_port),
            agents: self.agents.or(lower.agents),
        }
    }

    /// Whether a proxy is named.
    pub(crate) fn is_given(&self) -> bool {
        self.host.is_some() || self.proxies.as_ref().is_some_and(|all| !all.is_empty())
    }
}
