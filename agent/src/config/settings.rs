//! What can be set, by flag, environment variable or file; nothing is checked or filled in here.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Deserializer};

use crate::catalog_fs::life::MountHow;
use crate::config::{ConfigError, words};

/// A command as argv. On the command line one string, split into words without a shell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Argv(pub(super) Vec<String>);

fn parse_argv(text: &str) -> Result<Argv, String> {
    words::split(text)
        .map(Argv)
        .map_err(|error| error.to_string())
}

impl<'de> Deserialize<'de> for Argv {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let argv = Vec::<String>::deserialize(deserializer)?;
        if argv.first().is_none_or(String::is_empty) {
            return Err(serde::de::Error::custom("the command is empty"));
        }
        Ok(Self(argv))
    }
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// How it is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Settings as given, each at most once. The file has the same names without the dashes in front.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Read settings from this TOML file (keys are the flags' names without `--`)
    #[arg(long, value_name = "FILE", env = "PITR_AGENT_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Data directory of the node to back up
    #[arg(long, value_name = "DIR", env = "PITR_AGENT_PGDATA")]
    pub pgdata: Option<PathBuf>,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, value_name = "IP", env = "PITR_AGENT_LISTEN")]
    pub listen: Option<IpAddr>,
    /// Port to listen on; 0: any free one, named on stdout [default: 18080]
    #[arg(long, value_name = "PORT", env = "PITR_AGENT_PORT")]
    pub port: Option<u16>,
    /// The agent's certificate (PEM)
    #[arg(long, value_name = "FILE", env = "PITR_AGENT_TLS_CRT")]
    pub tls_crt: Option<PathBuf>,
    /// The certificate's key (PEM)
    #[arg(long, value_name = "FILE", env = "PITR_AGENT_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// Authority that signs the operators' certificates (PEM)
    #[arg(long, value_name = "FILE", env = "PITR_AGENT_TLS_CA")]
    pub tls_ca: Option<PathBuf>,
    /// Serve plain HTTP without certificates; on loopback only
    #[arg(
        long,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_name = "BOOL",
        env = "PITR_AGENT_INSECURE_HTTP"
    )]
    pub insecure_http: Option<bool>,
    /// How much is logged, on stderr [default: info]
    #[arg(long, value_name = "LEVEL", env = "PITR_AGENT_LOG_LEVEL")]
    pub log_level: Option<LogLevel>,
    /// How it is logged [default: text]
    #[arg(long, value_name = "FORMAT", env = "PITR_AGENT_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// The database's socket directory or host name [default: /var/run/postgresql]
    #[arg(long, value_name = "HOST", env = "PITR_AGENT_PG_HOST")]
    pub pg_host: Option<String>,
    /// The database's port [default: 5432]
    #[arg(long, value_name = "PORT", env = "PITR_AGENT_PG_PORT")]
    pub pg_port: Option<u16>,
    /// The database user [default: the OS user's name]
    #[arg(long, value_name = "USER", env = "PITR_AGENT_PG_USER")]
    pub pg_user: Option<String>,
    /// File whose first line is the database user's password; mode 0600
    #[arg(long, value_name = "FILE", env = "PITR_AGENT_PG_PASSWORD_FILE")]
    pub pg_password_file: Option<PathBuf>,
    /// Directory of PostgreSQL's server programs, beside the usual ones
    #[arg(long, value_name = "DIR", env = "PITR_AGENT_PG_BINDIR")]
    pub pg_bindir: Option<PathBuf>,
    /// Directory below which it may restore (absolute, exists; may be repeated)
    #[arg(long, value_name = "DIR", env = "PITR_AGENT_ALLOW_ROOT")]
    pub allow_root: Option<Vec<PathBuf>>,
    /// Command that starts a restored database instead of `pg_ctl`: one string, split at blanks; quotes
    /// and backslashes work, nothing is expanded. In the file: an array
    #[arg(long, value_name = "COMMAND", value_parser = parse_argv, env = "PITR_AGENT_START_COMMAND")]
    pub start_command: Option<Argv>,
    /// Command that stops it, written as --start-command
    #[arg(long, value_name = "COMMAND", value_parser = parse_argv, env = "PITR_AGENT_STOP_COMMAND")]
    pub stop_command: Option<Argv>,
    /// Memory for all buffers, in MiB [default: 128]
    #[arg(long, value_name = "MIB", env = "PITR_AGENT_MEMORY")]
    pub memory: Option<usize>,
    /// Cancel an operation that waits for its client when nobody has asked about it for so many
    /// seconds [default: 600]
    #[arg(long, value_name = "SECONDS", env = "PITR_AGENT_ORPHAN_TIMEOUT")]
    pub orphan_timeout: Option<u64>,
    /// A restore whose client is silent for so many seconds goes back by itself, or forward once that is
    /// decided [default: 60]
    #[arg(long, value_name = "SECONDS", env = "PITR_AGENT_CLIENT_TIMEOUT")]
    pub client_timeout: Option<u64>,
    /// WAL that may be held back on the node, in MiB; never more than a quarter of what is free
    /// on its file system [default: that quarter]
    #[arg(long, value_name = "MIB", env = "PITR_AGENT_WAL_HOLD")]
    pub wal_hold: Option<u64>,
    /// `gs_probackup` or `pg_probackup` for the engine `probackup` [default: the first of them on PATH]
    #[arg(long, value_name = "FILE", env = "PITR_AGENT_PROBACKUP")]
    pub probackup: Option<PathBuf>,
    /// End a copy by probackup when no byte has moved and nothing was said for so many seconds [default: 300]
    #[arg(long, value_name = "SECONDS", env = "PITR_AGENT_STALL_TIMEOUT")]
    pub stall_timeout: Option<u64>,
    /// Socket that `pitr-agent wal-put` asks before the database lets go of WAL (openGauss) [default:
    /// archive-PGPORT.sock in the runtime directory, or in /tmp/gs_pitr-UID]
    #[arg(long, value_name = "PATH", env = "PITR_AGENT_ARCHIVE_SOCKET")]
    pub archive_socket: Option<PathBuf>,
    /// Where it remembers what WAL it ships all the time [default: the service's state directory, or `~/.gs_pitr`, or
    /// `/var/tmp/gs_pitr-UID`]
    #[arg(long, value_name = "DIR", env = "PITR_AGENT_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// How the catalog of a probackup is mounted [default: auto]
    #[arg(long, value_name = "HOW", env = "PITR_AGENT_MOUNT")]
    pub mount: Option<MountHow>,
    /// File with the agent's own S3 credentials; mode 0600
    #[arg(long, value_name = "FILE", env = "PITR_AGENT_S3_CREDENTIALS_FILE")]
    pub s3_credentials_file: Option<PathBuf>,
    /// Program that prints the agent's own S3 credentials, written as --start-command
    #[arg(long, value_name = "COMMAND", value_parser = parse_argv, env = "PITR_AGENT_S3_CREDENTIALS_COMMAND")]
    pub s3_credentials_command: Option<Argv>,
}

impl Settings {
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            name: "--config",
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            message: error.to_string(),
        })
    }

    /// These settings where given, else those of `below`.
    pub(super) fn over(self, below: Self) -> Self {
        Self {
            config: self.config,
            pgdata: self.pgdata.or(below.pgdata),
            listen: self.listen.or(below.listen),
            port: self.port.or(below.port),
            tls_crt: self.tls_crt.or(below.tls_crt),
            tls_key: self.tls_key.or(below.tls_key),
            tls_ca: self.tls_ca.or(below.tls_ca),
            insecure_http: self.insecure_http.or(below.insecure_http),
            log_level: self.log_level.or(below.log_level),
            log_format: self.log_format.or(below.log_format),
            pg_host: self.pg_host.or(below.pg_host),
            pg_port: self.pg_port.or(below.pg_port),
            pg_user: self.pg_user.or(below.pg_user),
            pg_password_file: self.pg_password_file.or(below.pg_password_file),
            pg_bindir: self.pg_bindir.or(below.pg_bindir),
            allow_root: self.allow_root.or(below.allow_root),
            start_command: self.start_command.or(below.start_command),
            stop_command: self.stop_command.or(below.stop_command),
            memory: self.memory.or(below.memory),
            orphan_timeout: self.orphan_timeout.or(below.orphan_timeout),
            client_timeout: self.client_timeout.or(below.client_timeout),
            wal_hold: self.wal_hold.or(below.wal_hold),
            probackup: self.probackup.or(below.probackup),
            stall_timeout: self.stall_timeout.or(below.stall_timeout),
            archive_socket: self.archive_socket.or(below.archive_socket),
            state_dir: self.state_dir.or(below.state_dir),
            mount: self.mount.or(below.mount),
            s3_credentials_file: self.s3_credentials_file.or(below.s3_credentials_file),
            s3_credentials_command: self.s3_credentials_command.or(below.s3_credentials_command),
        }
    }
}
