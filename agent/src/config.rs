//! The agent's settings: flags over environment over file over defaults, checked before anything starts.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, Secret};

use crate::catalog_fs::life::{MountHow, MountSettings};
pub use crate::config::settings::{LogFormat, LogLevel, Settings};

mod settings;
mod words;

/// Port of the agent, as the Go agent's.
pub const DEFAULT_PORT: u16 = 18080;
/// Where Debian's and Red Hat's servers have their sockets.
const DEFAULT_PG_HOST: &str = "/var/run/postgresql";
const DEFAULT_PG_PORT: u16 = 5432;
const DEFAULT_MEMORY_MIB: usize = 128;
/// Below this the static reserve of one upload does not fit.
const LEAST_MEMORY_MIB: usize = 64;
const DEFAULT_ORPHAN_TIMEOUT: Duration = Duration::from_mins(10);
const DEFAULT_CLIENT_TIMEOUT: Duration = Duration::from_mins(1);
const DEFAULT_STALL_TIMEOUT: Duration = Duration::from_mins(5);
/// Below this a server that is busy would be taken for one that hangs.
const LEAST_STALL_TIMEOUT: u64 = 10;
/// Below this a client that only waits would be taken for a dead one.
const LEAST_CLIENT_TIMEOUT: u64 = 2;

/// A setting that cannot be used. The program ends with exit code 2 and has started nothing.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file named by a setting cannot be read.
    #[error("{name}: cannot read {path}: {source}")]
    Unreadable {
        /// The setting.
        name: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The configuration file is not what it should be.
    #[error("configuration file {path}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's words, with line and column.
        message: String,
    },
    /// A value is wrong, missing, or does not go with another.
    #[error("{name}: {problem}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
}

impl ConfigError {
    fn setting(name: &'static str, problem: impl Into<String>) -> Self {
        Self::Setting {
            name,
            problem: problem.into(),
        }
    }
}

/// Certificate, key and authority of the agent (PEM files); read again on SIGHUP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain, the agent's own first.
    pub certificate: PathBuf,
    /// Private key.
    pub key: PathBuf,
    /// Authority that signs the operators' certificates.
    pub authority: PathBuf,
}

/// S3 credentials that the agent has of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnCredentials {
    /// `AWS_ACCESS_KEY_ID` and the like.
    Environment,
    /// A file, read again when they expire.
    File(PathBuf),
    /// A program, run again when they expire.
    Command(Vec<String>),
}

/// The agent's settings, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Data directory of the node beside the agent (absolute).
    pub pgdata: Option<PathBuf>,
    /// Address to listen on.
    pub listen: IpAddr,
    /// Port to listen on; 0: any free one.
    pub port: u16,
    /// Certificates; `None`: plain HTTP on loopback was asked for.
    pub tls: Option<TlsFiles>,
    /// How much is logged.
    pub log_level: LogLevel,
    /// How it is logged.
    pub log_format: LogFormat,
    /// The database's socket directory or host name.
    pub pg_host: String,
    /// The database's port, if it was given.
    pub pg_port: Option<u16>,
    /// The database user; `None`: named as the OS user.
    pub pg_user: Option<String>,
    /// File whose first line is the database user's password.
    pub pg_password_file: Option<PathBuf>,
    /// Directory of PostgreSQL's server programs.
    pub pg_bindir: Option<PathBuf>,
    /// Directories below which it may restore (canonical).
    pub allow_roots: Vec<PathBuf>,
    /// Command that starts a restored database, as argv; `None`: `pg_ctl`.
    pub start_command: Option<Vec<String>>,
    /// Command that stops it, as argv; `None`: `pg_ctl`.
    pub stop_command: Option<Vec<String>>,
    /// The byte budget of all buffers, in bytes.
    pub memory: usize,
    /// How long an operation that waits for its client is kept when nobody asks about it.
    pub orphan_timeout: Duration,
    /// How long a restore goes on without its client before it goes back, or after the decision forward, alone.
    pub client_timeout: Duration,
    /// WAL that may be held back on the node, in bytes, beside the rule of a quarter of the free space.
    pub wal_hold: Option<u64>,
    /// `gs_probackup` or `pg_probackup`; `None`: the first of them on `PATH`.
    pub probackup: Option<PathBuf>,
    /// How long a copy by probackup may stand still.
    pub stall_timeout: Duration,
    /// Socket that the database's archiver asks (absolute, without blanks: it stands in a command).
    pub archive_socket: PathBuf,
    /// Where it remembers what WAL it ships all the time (absolute).
    pub state_dir: PathBuf,
    /// S3 credentials of its own.
    pub credentials: Option<OwnCredentials>,
    /// How backup catalogs are mounted.
    pub mount: MountSettings,
}

impl Default for Config {
    /// The defaults; plain HTTP on loopback, no node.
    fn default() -> Self {
        Self {
            pgdata: None,
            listen: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: DEFAULT_PORT,
            tls: None,
            log_level: LogLevel::Info,
            log_format: LogFormat::Text,
            pg_host: DEFAULT_PG_HOST.to_owned(),
            pg_port: None,
            pg_user: None,
            pg_password_file: None,
            pg_bindir: None,
            allow_roots: Vec::new(),
            start_command: None,
            stop_command: None,
            memory: DEFAULT_MEMORY_MIB << 20,
            orphan_timeout: DEFAULT_ORPHAN_TIMEOUT,
            client_timeout: DEFAULT_CLIENT_TIMEOUT,
            wal_hold: None,
            probackup: None,
            stall_timeout: DEFAULT_STALL_TIMEOUT,
            archive_socket: default_archive_socket(DEFAULT_PG_PORT),
            state_dir: default_state_dir(),
            credentials: None,
            mount: MountSettings::new(MountHow::Auto),
        }
    }
}

impl Config {
    /// Flags and environment (`settings`) over the file that they name over the defaults.
    ///
    /// # Errors
    /// [`ConfigError`] for the first setting that cannot be used.
    pub fn load(settings: Settings) -> Result<Self, ConfigError> {
        let settings = match &settings.config {
            None => settings,
            Some(path) => {
                let file = Settings::read(path)?;
                settings.over(file)
            }
        };
        Self::check(settings)
    }

    fn check(settings: Settings) -> Result<Self, ConfigError> {
        let defaults = Self::default();
        let listen = settings.listen.unwrap_or(defaults.listen);
        let tls = tls_files(&settings, listen)?;
        let credentials = own_credentials(&settings)?;
        let memory_mib = settings.memory.unwrap_or(DEFAULT_MEMORY_MIB);
        if !(LEAST_MEMORY_MIB..=1 << 20).contains(&memory_mib) {
            let problem = format!(
                "{memory_mib} MiB does not fit: at least {LEAST_MEMORY_MIB} (MiB), at most {}",
                1 << 20
            );
            return Err(ConfigError::setting("--memory", problem));
        }
        let orphan_timeout = match settings.orphan_timeout {
            None => DEFAULT_ORPHAN_TIMEOUT,
            Some(0) => {
                return Err(ConfigError::setting(
                    "--orphan-timeout",
                    "at least 1 second",
                ));
            }
            Some(seconds) => Duration::from_secs(seconds),
        };
        let client_timeout = match settings.client_timeout {
            None => DEFAULT_CLIENT_TIMEOUT,
            Some(seconds) if seconds < LEAST_CLIENT_TIMEOUT => {
                let problem = format!("at least {LEAST_CLIENT_TIMEOUT} seconds");
                return Err(ConfigError::setting("--client-timeout", problem));
            }
            Some(seconds) => Duration::from_secs(seconds),
        };
        let stall_timeout = match settings.stall_timeout {
            None => DEFAULT_STALL_TIMEOUT,
            Some(seconds) if seconds < LEAST_STALL_TIMEOUT => {
                let problem = format!("at least {LEAST_STALL_TIMEOUT} seconds");
                return Err(ConfigError::setting("--stall-timeout", problem));
            }
            Some(seconds) => Duration::from_secs(seconds),
        };
        if let Some(probackup) = &settings.probackup {
            absolute("--probackup", probackup)?;
        }
        if let Some(pgdata) = &settings.pgdata {
            absolute("--pgdata", pgdata)?;
        }
        if settings.pg_port == Some(0) {
            return Err(ConfigError::setting("--pg-port", "0 is not a port"));
        }
        if let Some(path) = &settings.pg_password_file {
            private_file("--pg-password-file", path, 0o077)?;
        }
        let archive_socket = archive_socket(&settings)?;
        if let Some(state_dir) = &settings.state_dir {
            absolute("--state-dir", state_dir)?;
        }
        let mut allow_roots = Vec::new();
        for root in settings.allow_root.unwrap_or_default() {
            allow_roots.push(allow_root(&root)?);
        }
        Ok(Self {
            pgdata: settings.pgdata,
            listen,
            port: settings.port.unwrap_or(DEFAULT_PORT),
            tls,
            log_level: settings.log_level.unwrap_or(defaults.log_level),
            log_format: settings.log_format.unwrap_or(defaults.log_format),
            pg_host: settings.pg_host.unwrap_or(defaults.pg_host),
            pg_port: settings.pg_port,
            pg_user: settings.pg_user,
            pg_password_file: settings.pg_password_file,
            pg_bindir: settings.pg_bindir,
            allow_roots,
            start_command: settings.start_command.map(|argv| argv.0),
            stop_command: settings.stop_command.map(|argv| argv.0),
            memory: memory_mib << 20,
            orphan_timeout,
            client_timeout,
            wal_hold: settings.wal_hold.map(|mib| mib.saturating_mul(1 << 20)),
            probackup: settings.probackup,
            stall_timeout,
            archive_socket,
            state_dir: settings.state_dir.unwrap_or(defaults.state_dir),
            credentials,
            mount: MountSettings::new(settings.mount.unwrap_or_default()),
        })
    }

    /// The database's port: the one given, else PostgreSQL's own.
    #[must_use]
    pub fn pg_port(&self) -> u16 {
        self.pg_port.unwrap_or(DEFAULT_PG_PORT)
    }

    /// The database user's password, read now so that a changed file is seen.
    ///
    /// # Errors
    /// [`ErrorKind::Database`] if there is a password file and it cannot be read.
    pub fn pg_password(&self) -> Result<Option<Secret>, ApiError> {
        let Some(path) = &self.pg_password_file else {
            return Ok(None);
        };
        let text = fs::read_to_string(path).map_err(|error| {
            let message = format!("cannot read --pg-password-file {}: {error}", path.display());
            ApiError::new(ErrorKind::Database, message)
        })?;
        let line = text.lines().next().unwrap_or_default();
        Ok(Some(Secret(line.to_owned())))
    }

    /// Checks that `target` may be written by a restore: absolute, without `.` and `..`, its parent
    /// exists and lies, all links followed, in one of the allowed roots. Returns it with its parent's links
    /// followed, so that what was checked is what is written.
    ///
    /// # Errors
    /// [`ErrorKind::Target`] that says which roots there are.
    pub fn allowed_target(&self, target: &Path) -> Result<PathBuf, ApiError> {
        let refuse = |why: String| {
            let message = format!("the target {} {why}", target.display());
            ApiError::new(ErrorKind::Target, message)
        };
        let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
        // Not only `components()`: it drops a `.` silently.
        let dotted = target.to_string_lossy().split('/').any(|part| part == ".");
        if !target.is_absolute() || dotted || !target.components().all(plain) {
            return Err(refuse(
                "is not an absolute path without `.` and `..`".to_owned(),
            ));
        }
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(refuse("is the root directory".to_owned()));
        };
        let parent = parent.canonicalize().map_err(|error| {
            refuse(format!(
                "has a parent directory that cannot be used: {error}"
            ))
        })?;
        if self.allow_roots.iter().any(|root| parent.starts_with(root)) {
            return Ok(parent.join(name));
        }
        let why = if self.allow_roots.is_empty() {
            "is refused: the agent was started without --allow-root, so it restores nowhere"
                .to_owned()
        } else {
            let roots: Vec<_> = self
                .allow_roots
                .iter()
                .map(|root| root.display().to_string())
                .collect();
            format!(
                "lies outside the agent's allowed roots ({})",
                roots.join(", ")
            )
        };
        Err(refuse(why)
            .next("start the agent with --allow-root DIR, or choose another --target-dir"))
    }
}

fn tls_files(settings: &Settings, listen: IpAddr) -> Result<Option<TlsFiles>, ConfigError> {
    let given = [&settings.tls_crt, &settings.tls_key, &settings.tls_ca];
    if settings.insecure_http == Some(true) {
        if given.iter().any(|file| file.is_some()) {
            let problem = "cannot go with --tls-crt, --tls-key or --tls-ca: choose one";
            return Err(ConfigError::setting("--insecure-http", problem));
        }
        if !listen.is_loopback() {
            let problem = format!(
                "refused on {listen}: plain HTTP has no log-in, so it is served on a loopback address only \
                 (such as --listen 127.0.0.1); else give --tls-crt, --tls-key and --tls-ca"
            );
            return Err(ConfigError::setting("--insecure-http", problem));
        }
        return Ok(None);
    }
    let (Some(certificate), Some(key), Some(authority)) =
        (&settings.tls_crt, &settings.tls_key, &settings.tls_ca)
    else {
        let names = ["--tls-crt", "--tls-key", "--tls-ca"];
        let missing: Vec<_> = names
            .iter()
            .zip(given)
            .filter_map(|(name, file)| file.is_none().then_some(*name))
            .collect();
        let problem = format!(
            "missing. `gs_pitr certs init` and `gs_pitr certs issue` make the files; for a trial on \
             loopback without certificates give --insecure-http. Not given: {}",
            missing.join(", ")
        );
        return Err(ConfigError::setting("certificates", problem));
    };
    // The group may read it: Debian keeps keys readable for the group ssl-cert.
    private_file("--tls-key", key, 0o007)?;
    Ok(Some(TlsFiles {
        certificate: certificate.clone(),
        key: key.clone(),
        authority: authority.clone(),
    }))
}

fn own_credentials(settings: &Settings) -> Result<Option<OwnCredentials>, ConfigError> {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    match (
        &settings.s3_credentials_file,
        &settings.s3_credentials_command,
    ) {
        (Some(_), Some(_)) => Err(ConfigError::setting(
            "--s3-credentials-file",
            "cannot go with --s3-credentials-command: choose one",
        )),
        (Some(file), None) => {
            private_file("--s3-credentials-file", file, 0o077)?;
            Ok(Some(OwnCredentials::File(file.clone())))
        }
        (None, Some(argv)) => Ok(Some(OwnCredentials::Command(argv.0.clone()))),
        (None, None) => match (set("AWS_ACCESS_KEY_ID"), set("AWS_SECRET_ACCESS_KEY")) {
            (true, true) => Ok(Some(OwnCredentials::Environment)),
            (false, false) => Ok(None),
            _ => Err(ConfigError::setting(
                "AWS_ACCESS_KEY_ID",
                "goes with AWS_SECRET_ACCESS_KEY, and only one of the two is set",
            )),
        },
    }
}

/// Where the archiver of the database on `port` asks, unless told otherwise. The database's configuration names it, so it
/// must not depend on who starts the agent, when or from where: only on a service's own directory, or the user.
fn default_archive_socket(port: u16) -> PathBuf {
    let directory = std::env::var_os("RUNTIME_DIRECTORY").map(PathBuf::from);
    let directory = directory.filter(|directory| directory.is_absolute());
    let directory = directory.unwrap_or_else(|| {
        let uid = rustix::process::geteuid().as_raw();
        PathBuf::from(format!("/tmp/gs_pitr-{uid}"))
    });
    directory.join(format!("archive-{port}.sock"))
}

/// Where an agent remembers what it ships: what survives a restart of the host, and is its user's alone.
fn default_state_dir() -> PathBuf {
    let absolute = |name: &str| {
        let directory = std::env::var_os(name).map(PathBuf::from);
        directory.filter(|directory| directory.is_absolute())
    };
    let own = absolute("STATE_DIRECTORY");
    own.or_else(|| Some(absolute("HOME")?.join(".gs_pitr")))
        .unwrap_or_else(|| {
            let uid = rustix::process::geteuid().as_raw();
            PathBuf::from(format!("/var/tmp/gs_pitr-{uid}"))
        })
}

fn archive_socket(settings: &Settings) -> Result<PathBuf, ConfigError> {
    const NAME: &str = "--archive-socket";
    let Some(path) = &settings.archive_socket else {
        let port = settings.pg_port.unwrap_or(DEFAULT_PG_PORT);
        return Ok(default_archive_socket(port));
    };
    absolute(NAME, path)?;
    // openGauss splits the command at blanks and knows no quotes; '%' would be taken for one of its own.
    let plain = |c: char| !c.is_whitespace() && !matches!(c, '%' | '\'' | '"' | '\\');
    if path.to_str().is_some_and(|path| path.chars().all(plain)) {
        return Ok(path.clone());
    }
    let problem = format!(
        "{} has blanks, quotes or a percent sign: it stands in archive_command",
        path.display()
    );
    Err(ConfigError::setting(NAME, problem))
}

fn absolute(name: &'static str, path: &Path) -> Result<(), ConfigError> {
    if path.is_absolute() {
        return Ok(());
    }
    let problem = format!("{} is not an absolute path", path.display());
    Err(ConfigError::setting(name, problem))
}

fn allow_root(root: &Path) -> Result<PathBuf, ConfigError> {
    const NAME: &str = "--allow-root";
    absolute(NAME, root)?;
    let canonical = root
        .canonicalize()
        .map_err(|source| ConfigError::Unreadable {
            name: NAME,
            path: root.to_owned(),
            source,
        })?;
    if canonical.is_dir() {
        return Ok(canonical);
    }
    let problem = format!("{} is not a directory", root.display());
    Err(ConfigError::setting(NAME, problem))
}

/// Refuses a secret that others may read, as `ssh` and `libpq` do.
fn private_file(name: &'static str, path: &Path, forbidden: u32) -> Result<(), ConfigError> {
    let metadata = fs::metadata(path).map_err(|source| ConfigError::Unreadable {
        name,
        path: path.to_owned(),
        source,
    })?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & forbidden == 0 {
        return Ok(());
    }
    let problem = format!(
        "{} can be read by others (mode {mode:04o}): chmod 600 it",
        path.display()
    );
    Err(ConfigError::setting(name, problem))
}

#[cfg(test)]
mod tests;
