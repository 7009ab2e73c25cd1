//! What the agent knows of its host and of the database beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, NodeFacts, ProbackupFacts, ServerFacts, Standby};
use agent_sql::{NodeConnection, WalReceiver};
use catalog::model::{Extra, Tablespace};
use futures_util::future::join_all;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::catalog_fs::life::available;
use crate::child;
use crate::config::Config;
use crate::database;
use crate::engine::probackup::program::{self, Program};
use crate::failure::sql_error;
use crate::managers;

/// The database's time to say who it is, and again to sum its size.
const SERVER: Duration = Duration::from_secs(5);
/// A program's time to say its version.
const VERSION: Duration = Duration::from_secs(5);
/// Where packages put server programs: `/usr/lib/postgresql/15/bin`, `/usr/pgsql-15/bin`.
const PACKAGED: [(&str, &str); 2] = [("/usr/lib/postgresql", ""), ("/usr", "pgsql-")];

/// All facts. What cannot be had is left out, and said where the API has room for it.
pub async fn gather(config: &Config) -> NodeFacts {
    let (server, installed, probackup) =
        tokio::join!(server(config), installed(config), probackup(config));
    let (server, server_error) = match server {
        Ok(server) => (Some(server), None),
        Err(error) => (None, Some(error)),
    };
    let pgdata = config.pgdata.clone();
    let pgdata = pgdata.or_else(|| Some(PathBuf::from(&server.as_ref()?.data_directory)));
    let managers = managers::find(config, pgdata).await;
    let probackup = fits(probackup, server.as_ref());
    NodeFacts {
        host: host_name(),
        machine_id: machine_id(),
        os_user: os_user(),
        allow_roots: config.allow_roots.iter().map(|root| text(root)).collect(),
        pgdata: config.pgdata.as_deref().map(text),
        pg_port: config.pg_port,
        installed: installed
            .into_iter()
            .map(|(major, directory)| (major, text(&directory)))
            .collect(),
        has_credentials: config.credentials.is_some(),
        own_commands: config.start_command.is_some() && config.stop_command.is_some(),
        server,
        server_error,
        managers,
        probackup: Some(probackup),
    }
}

/// The same, if the program can back up this database.
fn fits(mut facts: ProbackupFacts, server: Option<&ServerFacts>) -> ProbackupFacts {
    let server = server.filter(|server| server.flavour == "postgresql");
    let built = facts.version.as_deref().and_then(program::built_for);
    if let (Some(server), Some(built), None) = (server, built, &facts.missing)
        && server.server_version_num / 10_000 != built
    {
        let major = server.server_version_num / 10_000;
        facts.missing = Some(format!(
            "the program was built for PostgreSQL {built}, and the database is PostgreSQL {major}: install \
             pg_probackup for PostgreSQL {major} and start the agent with its --probackup"
        ));
    }
    facts
}

/// What there is for the engine `probackup`. What is missing is told with what helps; of two things, the program.
pub async fn probackup(config: &Config) -> ProbackupFacts {
    let (program, mount) = tokio::join!(Program::find(config), available(&config.mount));
    let missing = match (&program, &mount) {
        (Ok(_), Ok(_)) => None,
        (Err(error), _) => Some(match &error.next {
            Some(next) => format!("{}: {next}", error.message),
            None => error.message.clone(),
        }),
        (Ok(_), Err(unavailable)) => Some(unavailable.to_string()),
    };
    let program = program.ok();
    ProbackupFacts {
        program: program.as_ref().map(|program| text(&program.path)),
        version: program.map(|program| program.version),
        mount: mount.ok().map(|kind| kind.name().to_owned()),
        missing,
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The host's name.
#[must_use]
pub fn host_name() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

/// `/etc/machine-id`, or D-Bus's copy of it. Where there is neither (some containers), `hostname:` and the
/// host's name: it is as stable as that name, and shows by its form that it is a substitute.
#[must_use]
pub fn machine_id() -> String {
    let is_id = |id: &String| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    ["/etc/machine-id", "/var/lib/dbus/machine-id"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .map(|id| id.trim().to_ascii_lowercase())
        .find(is_id)
        .unwrap_or_else(|| format!("hostname:{}", host_name()))
}

/// Name of the user the agent runs as, or its number where it has no name.
#[must_use]
pub fn os_user() -> String {
    let uid = rustix::process::geteuid().as_raw();
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    user_name(&passwd, uid).unwrap_or_else(|| uid.to_string())
}

fn user_name(passwd: &str, uid: u32) -> Option<String> {
    let uid = uid.to_string();
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    })
}

/// Server programs by major version; openGauss counts as 9, which it says it is. Where a major is there twice,
/// `--pg-bindir` comes before `$GAUSSHOME` and `PATH`, and `PATH` before the packages' places.
pub async fn installed(config: &Config) -> BTreeMap<u32, PathBuf> {
    let found = join_all(candidates(config).into_iter().map(|directory| async {
        let major = major_version(&directory).await?;
        Some((major, directory))
    }))
    .await;
    let mut installed = BTreeMap::new();
    for (major, directory) in found.into_iter().flatten() {
        installed.entry(major).or_insert(directory);
    }
    installed
}

/// What every openGauss says is its major version (9.2.4).
const OPENGAUSS_MAJOR: u32 = 9;
/// Programs of servers: `postgres` and openGauss's `gaussdb`.
const SERVERS: [&str; 2] = ["postgres", "gaussdb"];

/// Directories with a server in them, best first, each once.
fn candidates(config: &Config) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = config.pg_bindir.iter().cloned().collect();
    let gauss = std::env::var_os("GAUSSHOME").map(|home| PathBuf::from(home).join("bin"));
    directories.extend(gauss.filter(|directory| directory.is_absolute()));
    directories.extend(std::env::split_paths(&path).filter(|directory| directory.is_absolute()));
    for (parent, prefix) in PACKAGED {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        let mut packaged: Vec<_> = entries
            .filter(|entry| {
                let name = entry.file_name();
                let version = name.to_str().and_then(|name| name.strip_prefix(prefix));
                version.is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit()))
            })
            .map(|entry| entry.path().join("bin"))
            .collect();
        packaged.sort();
        directories.extend(packaged);
    }
    let mut seen = BTreeSet::new();
    directories.retain(|directory| {
        server_in(directory)
            .is_some_and(|program| seen.insert(program.canonicalize().unwrap_or(program)))
    });
    directories
}

fn server_in(directory: &Path) -> Option<PathBuf> {
    let mut programs = SERVERS.iter().map(|server| directory.join(server));
    programs.find(|program| program.is_file())
}

async fn major_version(directory: &Path) -> Option<u32> {
    let program = server_in(directory)?;
    let output = child::command(&program).arg("--version").output();
    match timeout(VERSION, output).await {
        Ok(Ok(output)) => parse_major(&String::from_utf8_lossy(&output.stdout)),
        Ok(Err(error)) => {
            tracing::warn!("cannot run {}: {error}", program.display());
            None
        }
        Err(_) => {
            tracing::warn!("{} --version does not end", program.display());
            None
        }
    }
}

/// Of `postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)`, `... 18beta1`, or `gaussdb (openGauss 5.0.0 build ...)`.
fn parse_major(version: &str) -> Option<u32> {
    if version.contains("(openGauss") {
        return Some(OPENGAUSS_MAJOR);
    }
    let (_, number) = version.split_once("(PostgreSQL) ")?;
    let end = number
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(number.len());
    number.get(..end)?.parse().ok()
}

async fn server(config: &Config) -> Result<ServerFacts, ApiError> {
    let mut options = database::connect_options(config, "pitr-agent facts")?;
    options.connect_timeout = SERVER;
    options.statement_deadline = SERVER;
    // Fires when this future is dropped too: a client that goes away leaves no statement behind.
    let cancel = CancellationToken::new();
    let _guard = cancel.clone().drop_guard();
    let ask = async {
        let connection = NodeConnection::connect(&options, cancel).await?;
        let facts = connection.server_facts().await?;
        Ok((connection, facts))
    };
    let (connection, facts) = timeout(SERVER, ask)
        .await
        .map_err(|_| no_answer())?
        .map_err(|error| sql_error(&error))?;
    // A large cluster's size takes longer than a client waits; it is for display only.
    let size_bytes = match timeout(SERVER, connection.size_bytes()).await {
        Ok(Ok(size)) => size,
        Ok(Err(error)) => {
            tracing::warn!("the databases' size: {error}");
            0
        }
        Err(_) => 0,
    };
    let standbys = match timeout(SERVER, connection.wal_receivers()).await {
        Ok(Ok(receivers)) => receivers.into_iter().map(standby).collect(),
        Ok(Err(error)) => {
            tracing::warn!("the database's standbys: {error}");
            Vec::new()
        }
        Err(_) => Vec::new(),
    };
    let outside = facts
        .tablespaces
        .into_iter()
        .filter(|t| t.location.starts_with('/'));
    Ok(ServerFacts {
        system_identifier: facts.system_identifier,
        server_version_num: facts.server_version_num,
        data_directory: facts.data_directory,
        port: facts.port,
        flavour: facts.flavour.name().into(),
        wal_segment_size: facts.wal_segment_size,
        timeline: facts.timeline,
        in_recovery: facts.in_recovery,
        data_checksums: facts.data_checksums,
        size_bytes,
        tablespaces: outside
            .map(|tablespace| Tablespace {
                oid: tablespace.oid,
                location: tablespace.location,
                extra: Extra::default(),
            })
            .collect(),
        standbys,
    })
}

fn standby(receiver: WalReceiver) -> Standby {
    Standby {
        application: receiver.application,
        address: receiver.address,
        state: receiver.state,
    }
}

fn no_answer() -> ApiError {
    let message = format!("the database did not answer within {} s", SERVER.as_secs());
    ApiError::new(ErrorKind::Database, message).next("look at the database's log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let debian = "postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n";
        assert_eq!(parse_major(debian), Some(15));
        assert_eq!(parse_major("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(
            parse_major("gaussdb (openGauss 5.0.0 build a07d57c3)"),
            Some(9)
        );
        assert_eq!(parse_major("postgres (PostgreSQL) "), None);
    }

    #[test]
    fn users_are_found_by_number() {
        let passwd = "root:x:0:0::/root:/bin/sh\nbroken\npostgres:x:105:113::/:/bin/sh\n";
        assert_eq!(user_name(passwd, 105).as_deref(), Some("postgres"));
        assert_eq!(user_name(passwd, 5), None);
    }

    #[tokio::test]
    async fn facts_come_without_a_server_too() {
        let nowhere = tempfile::tempdir().unwrap();
        let config = Config {
            pg_host: nowhere.path().to_str().unwrap().to_owned(),
            ..Config::default()
        };
        let facts = gather(&config).await;
        assert!(facts.server.is_none());
        let error = facts.server_error.unwrap();
        assert_eq!(error.kind, ErrorKind::Database, "{error}");
        assert!(!facts.machine_id.is_empty() && !facts.host.is_empty());
    }
}
