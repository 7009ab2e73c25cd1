//! Options as the command line has them.

use std::path::PathBuf;

use clap::Args;
use clap::builder::BoolishValueParser;

use super::proxy::ProxySettings;
use super::values::{Address, Argv, ByteRate, RepoUrl};
use super::{Format, MIN_LEASE_TTL, Options};

/// Options that every command knows.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct GlobalArgs {
    /// The repository
    #[arg(
        long,
        global = true,
        env = "GS_PITR_REPO",
        hide_env_values = true,
        value_name = "s3://BUCKET/PREFIX"
    )]
    repo: Option<RepoUrl>,
    /// Endpoint of the store; without it, AWS's own
    #[arg(
        long,
        global = true,
        env = "GS_PITR_S3_ENDPOINT",
        hide_env_values = true,
        value_name = "URL"
    )]
    s3_endpoint: Option<String>,
    /// Region of the bucket
    #[arg(
        long,
        global = true,
        env = "GS_PITR_S3_REGION",
        hide_env_values = true,
        value_name = "REGION"
    )]
    s3_region: Option<String>,
    /// Certificates (PEM) that the store's certificate is signed by
    #[arg(
        long,
        global = true,
        env = "GS_PITR_S3_CA_FILE",
        hide_env_values = true,
        value_name = "FILE"
    )]
    s3_ca_file: Option<PathBuf>,
    /// S3 credentials: a file in the format of `~/.aws/credentials`, read again when they expire
    #[arg(
        long,
        global = true,
        env = "GS_PITR_S3_CREDENTIALS_FILE",
        hide_env_values = true,
        value_name = "FILE",
        conflicts_with = "s3_credentials_command"
    )]
    s3_credentials_file: Option<PathBuf>,
    /// S3 credentials: a command (no shell) that prints them as AWS's `credential_process` does
    #[arg(
        long,
        global = true,
        env = "GS_PITR_S3_CREDENTIALS_COMMAND",
        hide_env_values = true,
        value_name = "ARGV"
    )]
    s3_credentials_command: Option<Argv>,
    /// Our certificate for the agents [default: `~/.gs_pitr/certs/operator.crt`]
    #[arg(
        long,
        global = true,
        env = "GS_PITR_TLS_CRT",
        hide_env_values = true,
        value_name = "FILE"
    )]
    tls_crt: Option<PathBuf>,
    /// Its key [default: `~/.gs_pitr/certs/operator.key`]
    #[arg(
        long,
        global = true,
        env = "GS_PITR_TLS_KEY",
        hide_env_values = true,
        value_name = "FILE"
    )]
    tls_key: Option<PathBuf>,
    /// CA that signs the agents' certificates [default: `~/.gs_pitr/certs/ca.crt`]
    #[arg(
        long,
        global = true,
        env = "GS_PITR_TLS_CA",
        hide_env_values = true,
        value_name = "FILE"
    )]
    tls_ca: Option<PathBuf>,
    /// Talk plain HTTP to the agents; only for agents on loopback
    #[arg(long, global = true, env = "GS_PITR_INSECURE_HTTP", hide_env_values = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
        value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    insecure_http: Option<bool>,
    /// Seconds without an answer after which an agent counts as lost [default: 60]
    #[arg(long, global = true, env = "GS_PITR_AGENT_TIMEOUT", hide_env_values = true, value_name = "SECONDS",
        value_parser = clap::value_parser!(u32).range(1..=86_400))]
    agent_timeout: Option<u32>,
    /// Seconds until another may take over from this command if it dies [default: 60]
    #[arg(long, global = true, env = "GS_PITR_LEASE_TTL", hide_env_values = true, value_name = "SECONDS",
        value_parser = clap::value_parser!(u32).range(MIN_LEASE_TTL..=3600))]
    lease_ttl: Option<u32>,
    /// Profile of the configuration file to use
    #[arg(
        long,
        global = true,
        env = "GS_PITR_PROFILE",
        hide_env_values = true,
        value_name = "NAME"
    )]
    pub(super) profile: Option<String>,
    /// Configuration file [default: `~/.gs_pitr/config.toml`, if there is one]
    #[arg(
        long,
        global = true,
        env = "GS_PITR_CONFIG",
        hide_env_values = true,
        value_name = "FILE"
    )]
    pub(super) config: Option<PathBuf>,
    /// How results are written [default: text]
    #[arg(
        long,
        global = true,
        env = "GS_PITR_OUTPUT",
        hide_env_values = true,
        value_name = "FORMAT"
    )]
    output: Option<Format>,
    /// Answer yes to every question
    #[arg(long, short = 'y', global = true)]
    pub(crate) yes: bool,
    /// Say more on stderr; twice: much more
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// No progress bars
    #[arg(long, global = true, env = "GS_PITR_NO_PROGRESS", hide_env_values = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
        value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    no_progress: Option<bool>,
}

/// Options of the commands that move data.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct TransferArgs {
    /// The agents, one a data node, by their own addresses
    #[arg(
        long,
        env = "GS_PITR_NODES",
        hide_env_values = true,
        value_name = "HOST:PORT,...",
        value_delimiter = ','
    )]
    nodes: Option<Vec<Address>>,
    /// Files or ranges that each agent works on at the same time [default: 4]
    #[arg(long, short, alias = "dn-threads-num", env = "GS_PITR_JOBS", hide_env_values = true, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=64))]
    jobs: Option<u32>,
    /// Most bytes a second that each agent sends to or fetches from the bucket, such as 50MiB
    #[arg(
        long,
        env = "GS_PITR_BANDWIDTH",
        hide_env_values = true,
        value_name = "RATE"
    )]
    bandwidth: Option<ByteRate>,
}

/// What `prune` keeps.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct RetentionArgs {
    /// Keep the newest N full backups, and the increments on them
    #[arg(long, env = "GS_PITR_KEEP_FULL", hide_env_values = true, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..))]
    keep_full: Option<u32>,
    /// Keep backups that are not older than N days
    #[arg(long, env = "GS_PITR_KEEP_DAYS", hide_env_values = true, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=36_500))]
    keep_days: Option<u32>,
}

/// The agents, for commands that move no data.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct NodesArgs {
    /// The agents, one a data node, by their own addresses
    #[arg(
        long,
        env = "GS_PITR_NODES",
        hide_env_values = true,
        value_name = "HOST:PORT,...",
        value_delimiter = ','
    )]
    nodes: Option<Vec<Address>>,
}

/// Options of commands that read the bucket themselves.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ReadArgs {
    /// Packs and WAL segments read at the same time [default: 4]
    #[arg(long, short, env = "GS_PITR_JOBS", hide_env_values = true, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=64))]
    jobs: Option<u32>,
    /// Most bytes a second that are fetched from the bucket, such as 50MiB
    #[arg(
        long,
        env = "GS_PITR_BANDWIDTH",
        hide_env_values = true,
        value_name = "RATE"
    )]
    bandwidth: Option<ByteRate>,
}

/// Compression, for the commands that write.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct LevelArgs {
    /// zstd level, 1 (fast) to 19 (small) [default: 1]
    #[arg(long, env = "GS_PITR_LEVEL", hide_env_values = true, value_name = "N",
        value_parser = clap::value_parser!(i32).range(1..=19), allow_negative_numbers = true)]
    level: Option<i32>,
}

impl From<&GlobalArgs> for Options {
    fn from(args: &GlobalArgs) -> Self {
        let args = args.clone();
        Self {
            repo: args.repo,
            s3_endpoint: args.s3_endpoint,
            s3_region: args.s3_region,
            s3_ca_file: args.s3_ca_file,
            s3_credentials_file: args.s3_credentials_file,
            s3_credentials_command: args.s3_credentials_command,
            tls_crt: args.tls_crt,
            tls_key: args.tls_key,
            tls_ca: args.tls_ca,
            insecure_http: args.insecure_http,
            agent_timeout: args.agent_timeout,
            lease_ttl: args.lease_ttl,
            output: args.output,
            no_progress: args.no_progress,
            ..Self::default()
        }
    }
}

impl From<ProxySettings> for Options {
    fn from(proxy: ProxySettings) -> Self {
        Self {
            proxy,
            ..Self::default()
        }
    }
}

impl From<&TransferArgs> for Options {
    fn from(args: &TransferArgs) -> Self {
        Self {
            nodes: args.nodes.clone(),
            jobs: args.jobs,
            bandwidth: args.bandwidth,
            ..Self::default()
        }
    }
}

impl From<&RetentionArgs> for Options {
    fn from(args: &RetentionArgs) -> Self {
        Self {
            keep_full: args.keep_full,
            keep_days: args.keep_days,
            ..Self::default()
        }
    }
}

impl From<&NodesArgs> for Options {
    fn from(args: &NodesArgs) -> Self {
        Self {
            nodes: args.nodes.clone(),
            ..Self::default()
        }
    }
}

impl From<&ReadArgs> for Options {
    fn from(args: &ReadArgs) -> Self {
        Self {
            jobs: args.jobs,
            bandwidth: args.bandwidth,
            ..Self::default()
        }
    }
}

impl From<&LevelArgs> for Options {
    fn from(args: &LevelArgs) -> Self {
        Self {
            level: args.level,
            ..Self::default()
        }
    }
}
