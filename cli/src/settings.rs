//! Options from five places. The first that says something wins: flag, environment, profile,
//! configuration file, default.

mod args;
mod file;
pub(crate) mod proxy;
pub(crate) mod values;

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Deserialize;

pub(crate) use args::{GlobalArgs, LevelArgs, NodesArgs, ReadArgs, RetentionArgs, TransferArgs};

use crate::failure::{Failure, Result};
use proxy::ProxySettings;
use values::{Address, Argv, ByteRate, RepoUrl};

/// The shortest life of a lease, in seconds: dates of stores have whole seconds.
pub(crate) const MIN_LEASE_TTL: i64 = 5;

/// How results and events are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Format {
    /// For people: results on stdout, all else on stderr
    #[default]
    Text,
    /// JSON lines on stdout, the last one is the result
    Json,
}

/// What one place says; `None`: nothing.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Options {
    repo: Option<RepoUrl>,
    s3_endpoint: Option<String>,
    s3_region: Option<String>,
    s3_ca_file: Option<PathBuf>,
    s3_credentials_file: Option<PathBuf>,
    s3_credentials_command: Option<Argv>,
    tls_crt: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    tls_ca: Option<PathBuf>,
    insecure_http: Option<bool>,
    agent_timeout: Option<u32>,
    lease_ttl: Option<u32>,
    output: Option<Format>,
    no_progress: Option<bool>,
    nodes: Option<Vec<Address>>,
    jobs: Option<u32>,
    bandwidth: Option<ByteRate>,
    level: Option<i32>,
    keep_full: Option<u32>,
    keep_days: Option<u32>,
    /// Read by itself, see `file`.
    #[serde(skip)]
    proxy: ProxySettings,
}

impl Options {
    /// How results are written.
    pub(crate) fn format(&self) -> Format {
        self.output.unwrap_or_default()
    }

    /// What `self` says, and where it says nothing, what `lower` says.
    #[must_use]
    pub(crate) fn combine(self, lower: Self) -> Self {
        // One credential source is a choice against the other, so the pair moves together.
        let chosen = self.s3_credentials_file.is_some() || self.s3_credentials_command.is_some();
        let (credentials_file, credentials_command) = if chosen {
            (self.s3_credentials_file, self.s3_credentials_command)
        } else {
            (lower.s3_credentials_file, lower.s3_credentials_command)
        };
        Self {
            repo: self.repo.or(lower.repo),
            s3_endpoint: self.s3_endpoint.or(lower.s3_endpoint),
            s3_region: self.s3_region.or(lower.s3_region),
            s3_ca_file: self.s3_ca_file.or(lower.s3_ca_file),
            s3_credentials_file: credentials_file,
            s3_credentials_command: credentials_command,
            tls_crt: self.tls_crt.or(lower.tls_crt),
            tls_key: self.tls_key.or(lower.tls_key),
            tls_ca: self.tls_ca.or(lower.tls_ca),
            insecure_http: self.insecure_http.or(lower.insecure_http),
            agent_timeout: self.agent_timeout.or(lower.agent_timeout),
            lease_ttl: self.lease_ttl.or(lower.lease_ttl),
            output: self.output.or(lower.output),
            no_progress: self.no_progress.or(lower.no_progress),
            nodes: self.nodes.or(lower.nodes),
            jobs: self.jobs.or(lower.jobs),
            bandwidth: self.bandwidth.or(lower.bandwidth),
            level: self.level.or(lower.level),
            keep_full: self.keep_full.or(lower.keep_full),
            keep_days: self.keep_days.or(lower.keep_days),
            proxy: self.proxy.combine(lower.proxy),
        }
    }
}

/// What holds after all places were asked.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// `~/.gs_pitr`, or `GS_PITR_HOME`.
    pub(crate) home: PathBuf,
    options: Options,
    verbose: u8,
    yes: bool,
}

impl Settings {
    /// Reads the configuration file and combines the places. `command` is what the command's own
    /// flags say.
    ///
    /// # Errors
    /// A usage failure that names the file and the key, or the profile that does not exist.
    pub(crate) fn resolve(args: &GlobalArgs, command: Options) -> Result<Self> {
        let home = home()?;
        let lower = file::read(&home, args.config.as_deref(), args.profile.as_deref())?;
        let options = command.combine(Options::from(args)).combine(lower);
        Ok(Self {
            home,
            options,
            verbose: args.verbose,
            yes: args.yes,
        })
    }

    /// How results are written.
    pub(crate) fn format(&self) -> Format {
        self.options.format()
    }

    /// Whether bars may be drawn, if there is a terminal.
    pub(crate) fn progress(&self) -> bool {
        !self.options.no_progress.unwrap_or(false)
    }

    /// How much is logged: 0, 1 or more.
    pub(crate) fn verbose(&self) -> u8 {
        self.verbose
    }

    /// Whether questions are answered yes.
    pub(crate) fn yes(&self) -> bool {
        self.yes
    }

    /// The repository's place.
    ///
    /// # Errors
    /// If no place names it.
    pub(crate) fn repo(&self) -> Result<&RepoUrl> {
        self.options.repo.as_ref().ok_or_else(|| {
            Failure::usage("no repository is given")
                .next("give `--repo s3://BUCKET/PREFIX`, or set `GS_PITR_REPO`")
        })
    }

    /// Whether a repository is named.
    pub(crate) fn has_repo(&self) -> bool {
        self.options.repo.is_some()
    }

    /// Whether agents are named.
    pub(crate) fn has_nodes(&self) -> bool {
        self.options
            .nodes
            .as_ref()
            .is_some_and(|nodes| !nodes.is_empty())
    }

    /// The proxies, and how the agents of their data nodes are found.
    pub(crate) fn proxy(&self) -> &ProxySettings {
        &self.options.proxy
    }

    /// The store's endpoint; `None`: AWS's own.
    pub(crate) fn s3_endpoint(&self) -> Option<&str> {
        self.options.s3_endpoint.as_deref()
    }

    /// The bucket's region.
    pub(crate) fn s3_region(&self) -> Option<&str> {
        self.options.s3_region.as_deref()
    }

    /// Certificates for the store's TLS.
    pub(crate) fn s3_ca_file(&self) -> Option<&Path> {
        self.options.s3_ca_file.as_deref()
    }

    /// File with S3 credentials.
    pub(crate) fn s3_credentials_file(&self) -> Option<&Path> {
        self.options.s3_credentials_file.as_deref()
    }

    /// Command that prints S3 credentials.
    pub(crate) fn s3_credentials_command(&self) -> Option<&[String]> {
        let command = self.options.s3_credentials_command.as_ref();
        command.map(|argv| argv.0.as_slice())
    }

    fn cert(&self, given: Option<&PathBuf>, name: &str) -> PathBuf {
        given.map_or_else(|| self.certs_dir().join(name), Clone::clone)
    }

    /// Where certificates are made and looked for.
    pub(crate) fn certs_dir(&self) -> PathBuf {
        self.home.join("certs")
    }

    /// Our certificate for the agents.
    pub(crate) fn tls_crt(&self) -> PathBuf {
        self.cert(self.options.tls_crt.as_ref(), "operator.crt")
    }

    /// Its key.
    pub(crate) fn tls_key(&self) -> PathBuf {
        self.cert(self.options.tls_key.as_ref(), "operator.key")
    }

    /// CA of the agents' certificates.
    pub(crate) fn tls_ca(&self) -> PathBuf {
        self.cert(self.options.tls_ca.as_ref(), "ca.crt")
    }

    /// Whether the agents speak plain HTTP.
    pub(crate) fn insecure_http(&self) -> bool {
        self.options.insecure_http.unwrap_or(false)
    }

    /// How long an agent may be silent.
    pub(crate) fn agent_timeout(&self) -> std::time::Duration {
        std::time::Duration::from_secs(self.options.agent_timeout.unwrap_or(60).into())
    }

    /// How long a lease lives without a renewal.
    pub(crate) fn lease_ttl(&self) -> std::time::Duration {
        std::time::Duration::from_secs(self.options.lease_ttl.unwrap_or(60).into())
    }

    /// The agents' addresses.
    ///
    /// # Errors
    /// If there are none, or one stands there twice.
    pub(crate) fn nodes(&self) -> Result<&[Address]> {
        let nodes = self.options.nodes.as_deref().unwrap_or_default();
        if nodes.is_empty() {
            return Err(Failure::usage("no agents are given")
                .next("give `--nodes HOST:PORT,...` (or the cluster's proxy with `--host`, where a command has that), or set `GS_PITR_NODES`"));
        }
        for (place, node) in nodes.iter().enumerate() {
            if nodes[..place].contains(node) {
                return Err(Failure::usage(format!("`--nodes` names `{node}` twice")));
            }
        }
        Ok(nodes)
    }

    /// The agents' addresses, for a command that can do without.
    pub(crate) fn some_nodes(&self) -> &[Address] {
        self.options.nodes.as_deref().unwrap_or_default()
    }

    /// Files or ranges at the same time.
    pub(crate) fn jobs(&self) -> u32 {
        self.options.jobs.unwrap_or(4)
    }

    /// Bytes a second; `None`: no limit.
    pub(crate) fn bandwidth(&self) -> Option<u64> {
        self.options.bandwidth.map(|rate| rate.0)
    }

    /// How many of the newest full backups `prune` keeps.
    pub(crate) fn keep_full(&self) -> Option<u32> {
        self.options.keep_full
    }

    /// How many days `prune` keeps backups.
    pub(crate) fn keep_days(&self) -> Option<u32> {
        self.options.keep_days
    }

    /// zstd level.
    pub(crate) fn level(&self) -> i32 {
        self.options.level.unwrap_or(1)
    }
}

/// Our directory in the user's home.
fn home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("GS_PITR_HOME").filter(|home| !home.is_empty()) {
        return Ok(home.into());
    }
    let user = std::env::home_dir().filter(|home| home.is_absolute());
    user.map(|home| home.join(".gs_pitr")).ok_or_else(|| {
        Failure::usage("there is no home directory").next("set `HOME` or `GS_PITR_HOME`")
    })
}
