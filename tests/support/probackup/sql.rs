//! The sessions with the server. The programs ask for a password on standard error and read it from standard input.

use std::io::{self, BufRead as _};
use std::sync::Arc;
use std::time::Duration;

use agent_wal::{Lsn, SegmentSize};
use tokio::runtime::Runtime;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

use super::args::Args;
use super::log::Log;
use super::{Failure, Kind};

/// Longest wait for an answer: a checkpoint can take minutes.
const DEADLINE: Duration = Duration::from_mins(5);
/// Advisory lock that stands in for the exclusive backup mode of openGauss: one backup at a time.
const EXCLUSIVE: i64 = 0x6773_5f70_726f;
/// Name of a session's slot, before its process id.
const SLOT: &str = "pg_probackup_stand_in_";

/// How to reach the server, with the password once it is known.
#[derive(Debug, Clone)]
pub(super) struct Server {
    runtime: Arc<Runtime>,
    config: Config,
    database: String,
    /// For backup.control.
    pub(super) conninfo: String,
}

/// One session.
#[derive(Debug)]
pub(super) struct Session {
    runtime: Arc<Runtime>,
    client: Client,
}

/// What the server says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) version: u32,
    pub(super) system_identifier: u64,
    pub(super) segment: SegmentSize,
    pub(super) checksums: bool,
    pub(super) in_recovery: bool,
    pub(super) superuser: bool,
}

/// What the end of backup mode gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stopped {
    pub(super) xid: u64,
    pub(super) time: i64,
    pub(super) lsn: Lsn,
    pub(super) label: Vec<u8>,
    pub(super) tablespaces: Vec<u8>,
}

fn words(error: &tokio_postgres::Error) -> String {
    use std::error::Error as _;
    if let Some(server) = error.as_db_error() {
        return format!("{}:  {}", server.severity(), server.message());
    }
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

impl Server {
    /// Connects for the first time, asking for the password if the server wants one.
    pub(super) fn connect(
        kind: Kind,
        args: &Args,
        runtime: Arc<Runtime>,
        log: Log,
    ) -> Result<(Self, Session), Failure> {
        let environment = |name: &str| std::env::var(name).ok();
        let host = args.host.clone().or_else(|| environment("PGHOST"));
        let host = host.unwrap_or_else(|| "/var/run/postgresql".to_owned());
        let port = environment("PGPORT").and_then(|text| text.parse().ok());
        let port = args.port.or(port).unwrap_or(5432);
        let user = args.user.clone().or_else(|| environment("PGUSER"));
        let user = user.or_else(|| environment("USER")).unwrap_or_default();
        let database = args.database.clone().or_else(|| environment("PGDATABASE"));
        let database = database.unwrap_or_else(|| user.clone());
        let mut config = Config::new();
        config.host(&host).port(port).user(&user).dbname(&database);
        config.application_name(kind.program());
        config.connect_timeout(Duration::from_secs(10));
        // gs_probackup does not look at PGPASSWORD.
        let known = match kind {
            Kind::Gs => args.password.clone(),
            Kind::Pg => environment("PGPASSWORD"),
        };
        if let Some(password) = &known {
            config.password(password);
        }
        let mut server = Self {
            runtime,
            config,
            database,
            conninfo: format!("user={user} host={host} port={port}"),
        };
        match server.session() {
            Err(e) if known.is_none() && e.0.contains("password missing") && !args.never_ask => {
                log.raw(&format!("Password for user {user}: "));
                let mut line = String::new();
                let _ = io::stdin().lock().read_line(&mut line);
                log.raw("\n");
                let password = line.trim_end_matches(['\r', '\n']);
                if password.is_empty() {
                    return Err(Failure::new("no password supplied"));
                }
                server.config.password(password);
            }
            other => return other.map(|session| (server, session)),
        }
        let session = server.session()?;
        Ok((server, session))
    }

    /// One more session.
    pub(super) fn session(&self) -> Result<Session, Failure> {
        let connect = async {
            let connected = self.config.connect(NoTls).await.map_err(|e| words(&e))?;
            let (client, connection) = connected;
            tokio::spawn(connection);
            Ok::<_, String>(client)
        };
        let client = self.runtime.block_on(connect).map_err(|error| {
            Failure::new(format!(
                "could not connect to database {}: {error}",
                self.database
            ))
        })?;
        let session = Session {
            runtime: Arc::clone(&self.runtime),
            client,
        };
        session.rows("SET statement_timeout = 0")?;
        Ok(session)
    }
}

impl Session {
    fn rows(&self, sql: &str) -> Result<Vec<Vec<String>>, Failure> {
        let query = async {
            match tokio::time::timeout(DEADLINE, self.client.simple_query(sql)).await {
                Ok(answer) => answer.map_err(|e| words(&e)),
                Err(_) => Err(format!("no answer for {} s", DEADLINE.as_secs())),
            }
        };
        let answer = self
            .runtime
            .block_on(query)
            .map_err(|e| Failure::new(format!("query failed: {e}\nquery was: {sql}")))?;
        let row = |message: &SimpleQueryMessage| match message {
            SimpleQueryMessage::Row(row) => Some(
                (0..row.len())
                    .map(|at| row.get(at).unwrap_or_default().to_owned())
                    .collect(),
            ),
            _ => None,
        };
        Ok(answer.iter().filter_map(row).collect())
    }

    fn row(&self, sql: &str) -> Result<Vec<String>, Failure> {
        let rows = self.rows(sql)?;
        let none = || Failure::new(format!("no row, query was: {sql}"));
        rows.into_iter().next().ok_or_else(none)
    }

    /// Facts.
    pub(super) fn facts(&self) -> Result<Facts, Failure> {
        let row = self.row(
            "SELECT current_setting('server_version_num'), (SELECT system_identifier FROM pg_control_system()), \
             (SELECT setting::bigint * CASE unit WHEN '8kB' THEN 8192 ELSE 1 END FROM pg_settings WHERE name = 'wal_segment_size'), \
             current_setting('data_checksums'), pg_is_in_recovery(), current_setting('is_superuser')",
        )?;
        let bad = || Failure::new(format!("facts not understood: {row:?}"));
        Ok(Facts {
            version: row[0].parse().map_err(|_| bad())?,
            system_identifier: row[1].parse().map_err(|_| bad())?,
            segment: row[2]
                .parse()
                .ok()
                .and_then(SegmentSize::new)
                .ok_or_else(bad)?,
            checksums: row[3] == "on",
            in_recovery: row[4] == "t",
            superuser: row[5] == "on",
        })
    }

    /// Backup mode on: the position and timeline it starts at. For gs_probackup, only if nobody else has it on.
    pub(super) fn start(
        &self,
        kind: Kind,
        label: &str,
        facts: &Facts,
    ) -> Result<(Lsn, u32), Failure> {
        if kind == Kind::Gs {
            let free = self.row(&format!("SELECT pg_try_advisory_lock({EXCLUSIVE})"))?;
            if free[0] != "t" {
                return Err(Failure::new(
                    "query failed: ERROR:  a backup is already in progress\nHINT:  Run pg_stop_backup() and try again.\n\
                     CONTEXT:  referenced column: pg_start_backup\nquery was: SELECT pg_catalog.pg_start_backup($1, $2)",
                ));
            }
        }
        let call = if facts.version >= 150_000 {
            format!("pg_backup_start('{label}', true)")
        } else {
            format!("pg_start_backup('{label}', true, false)")
        };
        let lsn = self.row(&format!("SELECT {call}"))?;
        let timeline = self.row("SELECT timeline_id FROM pg_control_checkpoint()")?;
        let bad = || Failure::new(format!("not understood: {lsn:?} {timeline:?}"));
        Ok((
            lsn[0].parse().map_err(|_| bad())?,
            timeline[0].parse().map_err(|_| bad())?,
        ))
    }

    /// Backup mode off.
    pub(super) fn stop(&self, facts: &Facts) -> Result<Stopped, Failure> {
        let call = if facts.version >= 150_000 {
            "pg_backup_stop(false)"
        } else {
            "pg_stop_backup(false, false)"
        };
        let row = self.row(&format!(
            "SELECT txid_snapshot_xmax(txid_current_snapshot()), extract(epoch FROM current_timestamp(0))::bigint, \
             lsn, labelfile, coalesce(spcmapfile, '') FROM {call}"
        ))?;
        let bad = || Failure::new(format!("not understood: {row:?}"));
        Ok(Stopped {
            xid: row[0].parse().map_err(|_| bad())?,
            time: row[1].parse().map_err(|_| bad())?,
            lsn: row[2].parse().map_err(|_| bad())?,
            label: row[3].clone().into_bytes(),
            tablespaces: row[4].clone().into_bytes(),
        })
    }

    /// A slot of this session, gone with it, that keeps the WAL from the last checkpoint's redo position on.
    pub(super) fn hold_wal(&self) -> Result<(), Failure> {
        self.row(&format!(
            "SELECT pg_create_physical_replication_slot('{SLOT}' || pg_backend_pid(), true, true)"
        ))
        .map(drop)
    }

    /// The slot of this session keeps only what is behind `lsn`.
    pub(super) fn release_wal(&self, lsn: Lsn) -> Result<(), Failure> {
        self.row(&format!(
            "SELECT pg_replication_slot_advance('{SLOT}' || pg_backend_pid(), '{lsn}')"
        ))
        .map(drop)
    }

    /// Goes on to the next segment.
    pub(super) fn switch_wal(&self) -> Result<(), Failure> {
        self.row("SELECT pg_catalog.pg_switch_wal()").map(drop)
    }

    /// What the server has on its disk.
    pub(super) fn flushed(&self) -> Result<Lsn, Failure> {
        let row = self.row(
            "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END",
        )?;
        row[0]
            .parse()
            .map_err(|_| Failure::new(format!("not understood: {row:?}")))
    }

    /// Databases that are not templates, by number and name.
    pub(super) fn databases(&self) -> Result<Vec<(u32, String)>, Failure> {
        let rows = self.rows(
            "SELECT oid, datname FROM pg_catalog.pg_database WHERE datname NOT IN ('template1', 'template0')",
        )?;
        let pair = |row: &Vec<String>| Some((row[0].parse().ok()?, row[1].clone()));
        Ok(rows.iter().filter_map(pair).collect())
    }
}
