//! openGauss: it cannot be told to shut down at its target. It pauses there, is asked whether it does, and is stopped.

use std::convert::Infallible;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_api::{ApiError, ErrorKind};
use agent_sql::{ConnectOptions, NodeConnection};
use agent_wal::control::DbState;
use tokio_util::sync::CancellationToken;

use super::{LOOK, Recovery, Watched};
use crate::facts;
use crate::restore::errors::local;
use crate::restore::files::sync;
use crate::restore::process::Server;
use crate::restore::prove;
use crate::restore::recoverer::Recoverer;
use crate::restore::settings::RecoveryTarget;
use crate::restore::settings::opengauss::{Private, recovery_conf};
use crate::restore::walserve::WalSource;
use crate::walget::{self, WalFile};

/// `RECOVERY_COMMAND_FILE`
const RECOVERY_CONF: &str = "recovery.conf";
/// How long a server that is starting may take to answer one question.
const ANSWER: Duration = Duration::from_secs(10);
/// How often a pair of free ports is looked for.
const PORT_TRIES: u32 = 64;

/// A private server and where it listens.
pub(super) struct Started {
    pub(super) server: Server,
    port: u16,
}

impl<S: WalSource> Recovery<'_, S> {
    /// Starts it on its way to the point.
    pub(super) async fn start_opengauss(
        &self,
        target: &RecoveryTarget,
    ) -> Result<Started, ApiError> {
        let data = &self.workspace.places.data;
        self.first_segment(data).await?;
        let conf = recovery_conf(self.program, self.socket, target)?;
        // The server renames it as it ends recovery.
        write(data, &conf).map_err(|error| local(&data.join(RECOVERY_CONF), &error))?;
        let port = free_ports().map_err(|error| {
            let message = format!("no two free ports in a row on 127.0.0.1: {error}");
            ApiError::new(ErrorKind::Target, message)
        })?;
        let private = Private {
            places: &self.places,
            socket_directory: self.workspace.run(),
            port,
            source: self.source,
        };
        let server = self.launch(&private.argv())?;
        Ok(Started { server, port })
    }

    /// Puts the first segment in its place: without one the server does not start (`GetOldestXLOGSegNo`), before it asks
    /// for any. What it asks for later takes the place of this one.
    async fn first_segment(&self, data: &Path) -> Result<(), ApiError> {
        let directory = data.join(Recoverer::OpenGauss.wal_directory());
        let there = has_segment(&directory).map_err(|error| local(&directory, &error))?;
        if there {
            return Ok(());
        }
        let spooled = self.wal.first().await?;
        let path = directory.join(self.wal.first_name());
        walget::put(&spooled.path, spooled.size, &path).map_err(|error| local(&path, &error))
    }

    /// Replays to the point, where it pauses, and stops it there.
    pub(super) async fn pause_and_stop(
        &self,
        target: &RecoveryTarget,
        on_segment: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), ApiError> {
        let Started { mut server, port } = self.start_opengauss(target).await?;
        let data = &self.workspace.places.data;
        let paused = AtomicBool::new(false);
        // The copy of a running server says that it is in production, until its recovery begins.
        let began = AtomicBool::new(false);
        let opened = || {
            let state = prove::read_control(data).map(|control| control.state);
            let open = matches!(state, Ok(DbState::InProduction));
            if state.is_ok() && !open {
                began.store(true, Ordering::Relaxed);
            }
            open && began.load(Ordering::Relaxed)
        };
        let seen = || paused.load(Ordering::Relaxed) || opened();
        let watched = tokio::select! {
            watched = self.watch(&mut server, on_segment, &seen) => watched?,
            never = ask(self.workspace.run(), port, self.cancel, &paused) => match never {},
        };
        match watched {
            Watched::Seen if paused.load(Ordering::Relaxed) => self.shut_down(&mut server).await,
            // `pg_is_xlog_replay_paused` may just not have been asked in time: nothing can be said for it.
            Watched::Seen => {
                let error = ApiError::new(
                    ErrorKind::Recovery,
                    format!(
                        "the recovering server opened, and did not stop at point `{}`: {}",
                        target.name,
                        server.last_words()
                    ),
                )
                .next("run `gs_pitr show ID`, and restore another backup");
                Err(self.give_up(&mut server, error).await)
            }
            Watched::Ended(status) => Err(self.failed(&server, status)),
        }
    }
}

/// Asks the server until it says that it pauses. Never returns: the server's end is for others to see.
async fn ask(
    directory: &Path,
    port: u16,
    cancel: &CancellationToken,
    paused: &AtomicBool,
) -> Infallible {
    let options = ConnectOptions {
        host: directory.to_string_lossy().into_owned(),
        port,
        user: facts::os_user(),
        application_name: "gs_pitr restore".to_owned(),
        connect_timeout: ANSWER,
        statement_deadline: ANSWER,
        ..ConnectOptions::default()
    };
    let mut session = None;
    loop {
        // Refused until it is consistent; and it may end a session at any time.
        if session.is_none() {
            match NodeConnection::connect(&options, cancel.clone()).await {
                Ok(connection) => session = Some(connection),
                Err(error) => {
                    tracing::debug!(%error, "the recovering server is not to be asked yet");
                }
            }
        }
        if let Some(connection) = &session {
            match connection.replay_is_paused().await {
                Ok(true) => {
                    paused.store(true, Ordering::Relaxed);
                    drop(session);
                    return std::future::pending().await;
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::debug!(%error, "the recovering server does not say whether it pauses");
                    session = None;
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether a directory has a file with the name of a segment.
fn has_segment(directory: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let is_segment = |name: &str| matches!(WalFile::parse(name), Some(WalFile::Segment(_)));
        if name.to_str().is_some_and(is_segment) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn write(data: &Path, text: &str) -> io::Result<()> {
    let path = data.join(RECOVERY_CONF);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // The server has to be able to write it: it opens it so before it renames it.
    let mut options = OpenOptions::new();
    let mut file = options
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    sync(data)
}

/// A port of 127.0.0.1 that is free, as is the next one. Somebody may take it before the server does: then that says so.
fn free_ports() -> io::Result<u16> {
    let mut last = io::Error::other("none was found");
    for _ in 0..PORT_TRIES {
        let first = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = first.local_addr()?.port();
        let Some(next) = port.checked_add(1) else {
            continue;
        };
        match TcpListener::bind((Ipv4Addr::LOCALHOST, next)) {
            Ok(_) => return Ok(port),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod real;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ports_in_a_row_are_free() {
        let port = free_ports().unwrap();
        let _both =
            [port, port + 1].map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap());
    }

    #[test]
    fn only_a_segment_is_one() {
        let directory = tempfile::tempdir().unwrap();
        let add = |name: &str| fs::write(directory.path().join(name), "").unwrap();
        add("00000002.history");
        add("00000001000000000000000A.00000028.backup");
        assert!(!has_segment(directory.path()).unwrap());
        add("00000001000000000000000A");
        assert!(has_segment(directory.path()).unwrap());
    }

    #[test]
    fn recovery_conf_is_written_anew_each_time() {
        let data = tempfile::tempdir().unwrap();
        write(data.path(), "one").unwrap();
        write(data.path(), "two").unwrap();
        let path = data.path().join(RECOVERY_CONF);
        assert_eq!(fs::read_to_string(path).unwrap(), "two");
    }
}
