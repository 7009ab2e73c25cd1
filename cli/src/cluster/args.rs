//! Flags that lead to the proxies. They are those of the older `gs_pitr`, written in Go, and some more.

use std::path::{Path, PathBuf};

use agent_api::{ErrorKind, Secret};
use agent_sql::proxy::ProxyTls;
use clap::Args;
use clap::builder::BoolishValueParser;

use super::password;
use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::proxy::ProxySettings;
use crate::settings::values::{Address, Named};
use crate::settings::{Options, Settings};

/// Port of a proxy, where none is given.
const PROXY_PORT: u16 = 3307;
/// Port of the agents, where none is given.
const AGENT_PORT: u16 = 18080;

/// Of the flags in the help.
const HEADING: &str = "ShardingSphere-Proxy";

/// The proxies of a ShardingSphere cluster.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ProxyArgs {
    /// A proxy of the cluster; it names the others, and the data nodes
    #[arg(help_heading = HEADING,
        long,
        short = 'H',
        env = "GS_PITR_PROXY_HOST",
        hide_env_values = true,
        value_name = "HOST"
    )]
    host: Option<String>,
    /// Its port [default: 3307]
    #[arg(help_heading = HEADING, long, short = 'P', env = "GS_PITR_PROXY_PORT", hide_env_values = true, value_name = "PORT",
        value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// User of all proxies
    #[arg(help_heading = HEADING,
        long,
        short,
        env = "GS_PITR_PROXY_USERNAME",
        hide_env_values = true,
        value_name = "USER"
    )]
    username: Option<String>,
    /// Its password, which every process of this host can see here: rather set `GS_PITR_PROXY_PASSWORD`, give
    /// `--password-file`, or give none and be asked
    #[arg(help_heading = HEADING, long, short, value_name = "PASSWORD", value_parser = password::argument())]
    password: Option<Secret>,
    /// File (mode 0600) with the password in its first line
    #[arg(help_heading = HEADING,
        long,
        env = "GS_PITR_PROXY_PASSWORD_FILE",
        hide_env_values = true,
        value_name = "FILE"
    )]
    password_file: Option<PathBuf>,
    /// More proxies, as they are reached from here
    #[arg(help_heading = HEADING,
        long,
        env = "GS_PITR_PROXIES",
        hide_env_values = true,
        value_name = "HOST:PORT,...",
        value_delimiter = ','
    )]
    proxies: Option<Vec<Address>>,
    /// A proxy that is listed as LISTED (`host:port`) is reached at HOST:PORT
    #[arg(help_heading = HEADING,
        long,
        env = "GS_PITR_PROXY_MAP",
        hide_env_values = true,
        value_name = "LISTED=HOST:PORT,...",
        value_delimiter = ','
    )]
    proxy_map: Option<Vec<Named>>,
    /// Talk TLS to the proxies
    #[arg(help_heading = HEADING, long, env = "GS_PITR_PROXY_TLS", hide_env_values = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
        value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    proxy_tls: Option<bool>,
    /// Certificates (PEM) that the proxies' are signed by; implies `--proxy-tls`
    #[arg(help_heading = HEADING,
        long,
        env = "GS_PITR_PROXY_CA",
        hide_env_values = true,
        value_name = "FILE"
    )]
    proxy_ca: Option<PathBuf>,
    /// Port of the agent on each data node's host [default: 18080]
    #[arg(help_heading = HEADING, long, short, env = "GS_PITR_AGENT_PORT", hide_env_values = true, value_name = "PORT",
        value_parser = clap::value_parser!(u16).range(1..))]
    agent_port: Option<u16>,
    /// The agent of data node NODE (`host:port`, as the proxy has it) is at HOST:PORT
    #[arg(help_heading = HEADING,
        long,
        env = "GS_PITR_AGENTS",
        hide_env_values = true,
        value_name = "NODE=HOST:PORT,...",
        value_delimiter = ','
    )]
    agents: Option<Vec<Named>>,
    /// No longer needed: backups go to the bucket
    #[arg(help_heading = HEADING, long, short = 'B', value_name = "DIR", hide = true)]
    dn_backup_path: Option<PathBuf>,
}

impl From<&ProxyArgs> for Options {
    fn from(args: &ProxyArgs) -> Self {
        let args = args.clone();
        Self::from(ProxySettings {
            host: args.host,
            port: args.port,
            username: args.username,
            password_file: args.password_file,
            proxies: args.proxies,
            map: args.proxy_map,
            tls: args.proxy_tls,
            ca: args.proxy_ca,
            agent_port: args.agent_port,
            agents: args.agents,
        })
    }
}

/// The way to the proxies, with all that is asked of the operator.
#[derive(Debug, Clone)]
pub(crate) struct ProxyAccess {
    /// Proxies that the operator names, none twice.
    pub(crate) configured: Vec<Address>,
    /// Where listed proxies are reached.
    pub(crate) map: Vec<Named>,
    /// Their user.
    pub(crate) user: String,
    /// Its password; `None`: none is known, and a proxy that wants one says so.
    pub(crate) password: Option<Secret>,
    /// Whether and how TLS is talked.
    pub(crate) tls: ProxyTls,
    /// Port of the agents.
    pub(crate) agent_port: u16,
    /// Agents that are elsewhere.
    pub(crate) agents: Vec<Named>,
}

impl ProxyArgs {
    /// The way to the proxies; `None` if no place names one. Tells of flags that have no meaning any more, and asks for
    /// the password if nobody gave it and there is somebody to ask: so it is called before anything begins, while
    /// Ctrl-C still ends the program at once.
    ///
    /// # Errors
    /// What is missing or cannot be read.
    pub(crate) fn access(
        &self,
        settings: &Settings,
        printer: &Printer,
    ) -> Result<Option<ProxyAccess>> {
        if self.dn_backup_path.is_some() {
            no_backup_path(printer);
        }
        if self.password.is_some() {
            password::seen(printer);
        }
        let given = settings.proxy();
        if !given.is_given() {
            return self.must_be_bare().map(|()| None);
        }
        let first = given.host.as_ref().map(|host| address(host, given.port));
        let mut configured: Vec<Address> = Vec::new();
        let more = given.proxies.iter().flatten().cloned();
        for proxy in first.transpose()?.into_iter().chain(more) {
            if !configured.contains(&proxy) {
                configured.push(proxy);
            }
        }
        let user = given.username.clone().ok_or_else(|| {
            Failure::usage("no user of the proxy is given")
                .next("give `--username`, or set `GS_PITR_PROXY_USERNAME`")
        })?;
        let file = given.password_file.as_deref();
        let password = password::find(self.password.as_ref(), file, &user)?;
        Ok(Some(ProxyAccess {
            configured,
            map: given.map.clone().unwrap_or_default(),
            user,
            password,
            tls: tls(given)?,
            agent_port: given.agent_port.unwrap_or(AGENT_PORT),
            agents: given.agents.clone().unwrap_or_default(),
        }))
    }

    /// As [`Self::access`], for a command that has to do with all data nodes: the proxies say which these are.
    ///
    /// # Errors
    /// As [`Self::access`].
    pub(crate) fn access_to_all(
        &self,
        settings: &Settings,
        printer: &Printer,
    ) -> Result<Option<ProxyAccess>> {
        let access = self.access(settings, printer)?;
        if access.is_some() && settings.has_nodes() {
            let message = "the proxy says which data nodes there are: `--nodes` is not looked at";
            printer.warning(None, message);
        }
        Ok(access)
    }

    /// As [`Self::access`], for a command that is of no use without a proxy.
    ///
    /// # Errors
    /// If no place names one.
    pub(crate) fn needed(&self, settings: &Settings, printer: &Printer) -> Result<ProxyAccess> {
        self.access(settings, printer)?.ok_or_else(|| {
            Failure::usage("no proxy is given")
                .next("give `--host` and `--username`, or set `GS_PITR_PROXY_HOST`")
        })
    }

    /// Flags that say something of a proxy nobody named are a mistake.
    fn must_be_bare(&self) -> Result<()> {
        let flags = [
            ("--port", self.port.is_some()),
            ("--username", self.username.is_some()),
            ("--password", self.password.is_some()),
            ("--proxy-map", self.proxy_map.is_some()),
            ("--proxy-ca", self.proxy_ca.is_some()),
        ];
        match flags.into_iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((flag, _)) => Err(Failure::usage(format!("`{flag}` is given, and no proxy"))
                .next("give `--host`, or set `GS_PITR_PROXY_HOST`")),
        }
    }
}

/// Says that `--dn-backup-path` does nothing.
pub(super) fn no_backup_path(printer: &Printer) {
    let message = "`--dn-backup-path` is no longer needed and is not looked at: backups go straight to the bucket (`--repo`), and no byte of them to a disk of the data nodes";
    printer.warning(None, message);
}

/// The proxy of `--host` and `--port`.
fn address(host: &str, port: Option<u16>) -> Result<Address> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let address = Address {
        host: bare.to_owned(),
        port: port.unwrap_or(PROXY_PORT),
    };
    // What cannot be written as an address and read again is none.
    let same = address.to_string().parse::<Address>();
    if same.as_ref() == Ok(&address) {
        return Ok(address);
    }
    Err(
        Failure::usage(format!("`--host {host}` is no host name or address"))
            .next("give the host alone, and the port by `--port`"),
    )
}

fn tls(given: &ProxySettings) -> Result<ProxyTls> {
    let ca = given.ca.as_deref();
    if !given.tls.unwrap_or(ca.is_some()) {
        return Ok(ProxyTls::Off);
    }
    let read = |path: &Path| {
        std::fs::read(path).map_err(|error| {
            let message = format!("cannot read `{}`: {error}", path.display());
            Failure::new(ErrorKind::Certificate, message).next("check `--proxy-ca`")
        })
    };
    Ok(ProxyTls::On {
        ca_pem: ca.map(read).transpose()?,
    })
}

/// What the older `gs_pitr` wanted for a command that needs none of it any more.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct FormerArgs {
    #[arg(long, short = 'H', hide = true)]
    host: Option<String>,
    #[arg(long, short = 'P', hide = true)]
    port: Option<u16>,
    #[arg(long, short, hide = true)]
    username: Option<String>,
    #[arg(long, short, hide = true, value_parser = password::argument())]
    password: Option<Secret>,
    #[arg(long, short, hide = true)]
    agent_port: Option<u16>,
    #[arg(long, short = 'B', hide = true)]
    dn_backup_path: Option<PathBuf>,
}

impl FormerArgs {
    /// Says which of them are there for nothing.
    pub(crate) fn tell(&self, command: &str, printer: &Printer) {
        let flags = [
            ("--host", self.host.is_some()),
            ("--port", self.port.is_some()),
            ("--username", self.username.is_some()),
            ("--password", self.password.is_some()),
            ("--agent-port", self.agent_port.is_some()),
            ("--dn-backup-path", self.dn_backup_path.is_some()),
        ];
        let given = flags.iter().filter(|(_, given)| *given);
        let given: Vec<_> = given.map(|(flag, _)| format!("`{flag}`")).collect();
        if !given.is_empty() {
            let message = format!(
                "{} can be left away: `gs_pitr {command}` works on the bucket and asks neither proxies nor agents",
                given.join(", ")
            );
            printer.warning(None, &message);
        }
        if self.password.is_some() {
            password::seen(printer);
        }
    }
}
