//! What is refused before anything starts: both programs notice most of it late, after the server has begun a backup,
//! and one of them never.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, BackupSpec, ChainLink, ErrorKind};
use agent_sql::{ConnectOptions, Flavour, Severity};
use catalog::ids::BackupId;
use catalog::keys;
use catalog::model::{BackupMode, ParentCopy, Probackup, Tablespace};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use pipeline::store::{Key, ObjectStore, StoreError};
use tokio::time::timeout;

use super::archive;
use super::program::{Kind, Program};
use crate::catalog_fs::life::available;
use crate::engine::attempt::cancelled;
use crate::engine::direct::walk::TablespaceList;
use crate::engine::errors;
use crate::engine::node::Node;
use crate::failure;
use crate::operation::OperationContext;

/// For all questions to the store together.
const STORE: Duration = Duration::from_mins(2);
/// Questions to the store at the same time.
const QUESTIONS: usize = 8;
/// A parent's start this far ahead of the clock is waited for: ids are seconds, and none may be used twice.
const WAIT: Duration = Duration::from_secs(5);
/// What helps an increment that has nothing to build on.
const FULL: &str = "make a FULL: gs_pitr backup -b FULL --engine probackup";

/// What a copy begins with.
#[derive(Debug)]
pub struct Prepared {
    /// The program.
    pub program: Program,
    /// What the copy builds on.
    pub parent: Option<ParentCopy>,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<Tablespace>,
}

/// Looks for whatever would end the copy later, or make it worthless. Changes nothing.
///
/// # Errors
/// The first thing that was found, and the command that helps.
pub async fn prepare(
    cx: &OperationContext,
    spec: &BackupSpec,
    node: &Node,
) -> Result<Prepared, ApiError> {
    let program = Program::find(&cx.config).await?;
    if let Err(missing) = available(&cx.config.mount).await {
        let refused = ApiError::new(
            ErrorKind::Usage,
            format!("no catalog can be mounted: {}", missing.why),
        );
        return Err(refused.next(missing.mend()));
    }
    fits(&program, spec, node)?;
    can_be_noted(program.kind, &node.options)?;
    let tablespaces = tablespaces(&program, node).await?;
    let mut parent = None;
    if spec.mode.is_increment() {
        let link = spec.chain.last();
        let link =
            link.ok_or_else(|| refuse(format!("a {} needs a backup to build on", spec.mode)))?;
        let copy = builds_on(&program, spec, node, link)?;
        after(&copy.id).await?;
        parent = Some(ParentCopy {
            backup_id: link.backup_id.clone(),
            attempt: link.node.attempt,
            id: copy.id.clone(),
        });
        match spec.mode {
            BackupMode::Ptrack => ptrack(&program, node).await?,
            BackupMode::Page => archive::reaches(cx, spec, node, link).await?,
            _ => {}
        }
        chain_is_there(cx, &spec.chain).await?;
    } else if !spec.chain.is_empty() {
        let message = "a FULL backup builds on nothing, and the order names parents";
        return Err(ApiError::new(ErrorKind::Usage, message));
    }
    Ok(Prepared {
        program,
        parent,
        tablespaces,
    })
}

fn refuse(message: String) -> ApiError {
    ApiError::new(ErrorKind::Conflict, message).next(FULL)
}

/// Whether this program can do this with this server.
fn fits(program: &Program, spec: &BackupSpec, node: &Node) -> Result<(), ApiError> {
    if !program.kind.modes().contains(&spec.mode) {
        let modes: Vec<_> = program
            .kind
            .modes()
            .iter()
            .map(|mode| mode.name())
            .collect();
        let message = format!(
            "{} makes no {}, only {}",
            program.kind,
            spec.mode,
            modes.join(" and ")
        );
        let next = format!("-b {}", modes.last().copied().unwrap_or_default());
        return Err(ApiError::new(ErrorKind::Usage, message).next(next));
    }
    if node.sql.flavour() == Flavour::PostgreSql
        && let Some(misfit) = program.misfit(node.sql.major())
    {
        return Err(misfit);
    }
    Ok(())
}

/// Whether the program can read again how it was connected. `pg_probackup` writes the connection into `backup.control` between quotes, with
/// quotes of its own around a space, and takes the first of those for the end: it finds that only after the whole copy.
fn can_be_noted(kind: Kind, options: &ConnectOptions) -> Result<(), ApiError> {
    let breaks =
        |text: &str| text.contains(|c: char| c == '\'' || c.is_ascii_whitespace() || c == '\x0b');
    let (what, value, next) = if kind != Kind::Pg {
        return Ok(());
    } else if breaks(&options.host) {
        let next = "add a directory without them to `unix_socket_directories`, restart the database, and start the agent with --pg-host \
                    of that; or with --pg-host 127.0.0.1 and --pg-password-file; or use --engine direct";
        ("--pg-host", &options.host, next)
    } else if breaks(&options.user) {
        let next = "start the agent with another --pg-user, or use --engine direct";
        ("--pg-user", &options.user, next)
    } else {
        return Ok(());
    };
    let message = format!(
        "the agent's {what} `{value}` has a space or a quote in it, which {kind} writes into its backup and cannot read again"
    );
    Err(ApiError::new(ErrorKind::Usage, message).next(next))
}

/// Tablespaces outside the data directory.
async fn tablespaces(program: &Program, node: &Node) -> Result<Vec<Tablespace>, ApiError> {
    let found = linked(node).await?;
    if program.kind == Kind::Gs {
        brought_back(&found)?;
    }
    Ok(found.outside)
}

/// Whether `gs_probackup` brings them back.
fn brought_back(found: &Linked) -> Result<(), ApiError> {
    // It would make such a one where it was on the source, outside of what is restored; and without an entry of -E it
    // maps none (2.4.2).
    if let Some(space) = found.inside.first() {
        let message = format!(
            "the tablespace {} is within the data directory (`{}`, created with RELATIVE), and gs_probackup does not restore \
             such a one to another directory",
            space.oid, space.location
        );
        let next = format!(
            "move what is in it to a tablespace with an absolute LOCATION outside of the data directory, and drop it \
             (SELECT spcname FROM pg_tablespace WHERE oid = {})",
            space.oid
        );
        return Err(ApiError::new(ErrorKind::Database, message).next(next));
    }
    // The list of -E has no way to say a colon.
    let colon = found.outside.iter().find(|it| it.location.contains(':'));
    match colon {
        Some(space) => {
            let message = format!(
                "the tablespace `{}` has a colon in its path, which -E of gs_probackup cannot say",
                space.location
            );
            Err(ApiError::new(ErrorKind::Database, message))
        }
        None => Ok(()),
    }
}

/// The tablespaces of a node.
#[derive(Debug)]
pub(super) struct Linked {
    /// Elsewhere.
    pub(super) outside: Vec<Tablespace>,
    /// Within the data directory: openGauss's relative ones.
    pub(super) inside: Vec<Tablespace>,
}

/// The tablespaces that there are now.
pub(super) async fn linked(node: &Node) -> Result<Linked, ApiError> {
    let pgdata = node.pgdata.clone();
    let found = tokio::task::spawn_blocking(move || {
        let list = TablespaceList::read(&pgdata)?;
        let within = |space: &Tablespace| pgdata.join(&space.location).starts_with(&pgdata);
        let (inside, outside) = list.linked.into_iter().partition(within);
        Ok(Linked { outside, inside })
    });
    found.await.map_err(errors::internal)?.map_err(errors::copy)
}

/// Whether this copy can build on that one.
fn builds_on<'a>(
    program: &Program,
    spec: &BackupSpec,
    node: &Node,
    link: &'a ChainLink,
) -> Result<&'a Probackup, ApiError> {
    let (id, copy) = (&link.backup_id, &link.node);
    let Some(probackup) = &copy.probackup else {
        return Err(refuse(format!(
            "backup {id} was made by the engine `direct`: no {} can build on it",
            spec.mode
        )));
    };
    let mine = program.kind.name();
    if probackup.program != mine {
        return Err(refuse(format!(
            "backup {id} was made by {}, and the agent has {mine}",
            probackup.program
        )));
    }
    if copy.node_id != spec.node_id {
        return Err(refuse(format!(
            "backup {id} names node {} as the parent of node {}",
            copy.node_id, spec.node_id
        )));
    }
    if copy.epoch != spec.epoch {
        return Err(refuse(format!(
            "backup {id} is of epoch {} of the node, which was restored since and is in epoch {}",
            copy.epoch, spec.epoch
        )));
    }
    let timeline = node.facts.timeline;
    if copy.timeline != timeline {
        return Err(refuse(format!(
            "backup {id} is of timeline {}, and the database is on timeline {timeline} now",
            copy.timeline
        )));
    }
    if copy.data_directory != node.facts.data_directory {
        return Err(refuse(format!(
            "backup {id} is of the data directory `{}`, and the database's is `{}` now",
            copy.data_directory, node.facts.data_directory
        )));
    }
    Ok(probackup)
}

/// Waits until the clock is past the second that is the id of a parent: both programs call a backup by the second of its
/// start, and one of them fails when that is taken.
async fn after(id: &str) -> Result<(), ApiError> {
    let Ok(taken) = i64::from_str_radix(id, 36) else {
        return Err(refuse(format!(
            "the parent's id `{id}` is none of a probackup"
        )));
    };
    let ahead = taken.saturating_sub(Timestamp::now().as_second());
    if ahead < 0 {
        return Ok(());
    }
    let wait = Duration::from_secs(ahead.unsigned_abs() + 1);
    if wait > WAIT {
        let message =
            format!("this host's clock is {ahead} s behind the start of the parent `{id}`");
        return Err(ApiError::new(ErrorKind::Conflict, message).next("set the host's clock (NTP)"));
    }
    tokio::time::sleep(wait).await;
    Ok(())
}

/// Whether the server notes which pages change. Without, `gs_probackup` waits for ever.
async fn ptrack(program: &Program, node: &Node) -> Result<(), ApiError> {
    match (node.sql.flavour(), program.kind) {
        (Flavour::OpenGauss, _) => {
            let findings = node.sql.examine().await.map_err(errors::sql)?;
            let off = findings.into_iter().find(|found| {
                found.name == "enable_cbm_tracking" && found.severity != Severity::Fine
            });
            let Some(found) = off else {
                return Ok(());
            };
            let message = "enable_cbm_tracking is off: the database does not note which pages change, and a PTRACK would \
                           wait for ever";
            let refused = ApiError::new(ErrorKind::Database, message);
            Err(refused.next(found.mend.unwrap_or_else(|| FULL.to_owned())))
        }
        (Flavour::PostgreSql, Kind::Pg) => {
            let version = node.sql.ptrack_version().await.map_err(errors::sql)?;
            if version.is_some() {
                return Ok(());
            }
            let message = format!(
                "the extension `ptrack` is not installed in the database `{}`: the server does not note which pages change",
                node.options.database
            );
            Err(ApiError::new(ErrorKind::Database, message).next(
                "use -b DELTA; or set up ptrack (shared_preload_libraries, ptrack.map_size, CREATE EXTENSION ptrack), \
                 and make a FULL",
            ))
        }
        // It says itself what it misses there.
        (Flavour::PostgreSql, Kind::Gs) => Ok(()),
    }
}

pub(super) fn late(after: Duration) -> ApiError {
    let message = format!("the store did not answer within {} s", after.as_secs());
    ApiError::new(ErrorKind::StoreUnavailable, message)
}

/// An object of the chain.
struct Wanted {
    store: Arc<dyn ObjectStore>,
    backup: BackupId,
    key: Key,
    size: u64,
}

impl Wanted {
    async fn look(self) -> Result<(), ApiError> {
        let gone = |what: String| {
            let message = format!(
                "backup {}, which this one would build on, is damaged: {what}",
                self.backup
            );
            ApiError::new(ErrorKind::Damaged, message).next(FULL)
        };
        match self.store.head(&self.key).await {
            Ok(found) if found.size == self.size => Ok(()),
            Ok(found) => Err(gone(format!(
                "{} has {} bytes instead of {}",
                self.key, found.size, self.size
            ))),
            Err(StoreError::NotFound(_)) => Err(gone(format!("{} is missing", self.key))),
            Err(error) => Err(failure::store_error(&error)),
        }
    }
}

/// Whether every object of the chain is there, with its size. Their content is verified when it is read.
async fn chain_is_there(cx: &OperationContext, chain: &[ChainLink]) -> Result<(), ApiError> {
    let mut wanted = Vec::new();
    for link in chain {
        let (id, copy) = (&link.backup_id, &link.node);
        let mut want = |key, size| {
            let look = Wanted {
                store: Arc::clone(&cx.store),
                backup: id.clone(),
                key,
                size,
            };
            wanted.push(look.look());
        };
        want(keys::index(id, copy.node_id, copy.attempt), copy.index.size);
        for (number, pack) in (0..).zip(&copy.packs) {
            want(
                keys::pack(id, copy.node_id, copy.attempt, number),
                pack.size,
            );
        }
    }
    let looking = stream::iter(wanted)
        .buffer_unordered(QUESTIONS)
        .try_collect::<()>();
    tokio::select! {
        biased;
        () = cx.cancel.cancelled() => Err(cancelled()),
        looked = timeout(STORE, looking) => looked.map_err(|_| late(STORE))?,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_pg_probackup_cannot_read_again_is_refused() {
        let options = |host: &str, user: &str| ConnectOptions {
            host: host.to_owned(),
            user: user.to_owned(),
            ..ConnectOptions::default()
        };
        for (host, user, what) in [
            ("/tmp/a b", "postgres", "--pg-host `/tmp/a b`"),
            ("/tmp/it's", "postgres", "--pg-host `/tmp/it's`"),
            ("/tmp/a\tb", "postgres", "--pg-host"),
            ("/tmp/a\x0bb", "postgres", "--pg-host"),
            ("/tmp", "John Doe", "--pg-user `John Doe`"),
        ] {
            let options = options(host, user);
            let refused = can_be_noted(Kind::Pg, &options).unwrap_err();
            assert_eq!(refused.kind, ErrorKind::Usage);
            assert!(refused.message.contains(what), "{}", refused.message);
            assert!(refused.next.unwrap().contains("--engine direct"));
            assert!(!refused.changed);
            can_be_noted(Kind::Gs, &options).unwrap();
        }
        // What needs no quotes, or is doubled and read as two: nobody reads it but the program.
        for host in [
            "/var/run/postgresql",
            "/tmp/ä=b#c",
            "/tmp/a\\b",
            "::1",
            "db.example",
        ] {
            can_be_noted(Kind::Pg, &options(host, "me")).unwrap();
        }
    }
}
