//! What differs between PostgreSQL and openGauss: the statements, and how their answers are read.
//!
//! A statement that both understand stands with its method; each of the others is here, once for each.

mod opengauss;
mod postgresql;

use std::fmt;
use std::pin::Pin;

use crate::connect::NodeConnection;
use crate::error::SqlError;
use crate::facts::ServerFacts;
use crate::preflight::Finding;
use crate::session::Session;

pub(crate) use opengauss::OpenGauss;
pub(crate) use postgresql::PostgreSql;

/// Which kind of server it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flavour {
    /// PostgreSQL, 12 to 18.
    PostgreSql,
    /// openGauss, whatever release: all call themselves 9.2.4.
    OpenGauss,
}

impl Flavour {
    /// As manifests and facts have it: `postgresql` or `opengauss`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PostgreSql => "postgresql",
            Self::OpenGauss => "opengauss",
        }
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PostgreSql => "PostgreSQL",
            Self::OpenGauss => "openGauss",
        })
    }
}

/// An answer to wait for.
pub(crate) type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, SqlError>> + Send + 'a>>;

/// A server's way of saying what every data node says. No statement takes a transaction id.
pub(crate) trait Dialect: fmt::Debug + Send + Sync {
    /// Which one it is.
    fn flavour(&self) -> Flavour;

    /// The server's name and release, such as `PostgreSQL 15.14`.
    fn version(&self) -> String;

    /// `server_version_num`.
    fn version_num(&self) -> u32;

    /// Settings of our sessions: nothing of the server's may end one that waits, nothing is looked up along somebody
    /// else's `search_path`, and literals mean what they say.
    fn set_up(&self) -> String;

    /// One row: `name` (a literal) as a restore point; where its record ends.
    fn create_restore_point(&self, name: &str) -> String;

    /// One row: as [`Self::create_restore_point`], and the record is on disk afterwards.
    fn flushed_restore_point(&self, name: &str) -> String;

    /// One row: goes on in the next segment; where the last record of the old one ends.
    fn switch_wal(&self) -> &'static str;

    /// One row: every whole segment before this position is on disk.
    fn flush_lsn(&self) -> &'static str;

    /// One row: everything that was ever written is before this position.
    fn insert_lsn(&self) -> &'static str;

    /// One row: flush position, insert position, and the timeline in hexadecimal.
    fn wal_position(&self) -> &'static str;

    /// One row: what two looks must have in common if no transaction has ended between them.
    fn snapshot(&self) -> &'static str;

    /// A row for each transaction that holds an id, at most `most`, the oldest first: process, application, state,
    /// database, age in milliseconds, global identifier and owner (if it is prepared), number of all.
    fn xid_holders(&self, most: u32) -> String;

    /// A row for each connected receiver of WAL: application, address, state.
    fn wal_receivers(&self) -> &'static str;

    /// A row for each tablespace: oid, name, location (empty or NULL for the built-in ones).
    fn tablespaces(&self) -> &'static str;

    /// Statement that starts a non-exclusive backup with this label (a literal), or why there is none.
    fn start_backup(&self, label: &str, fast: bool) -> Result<String, SqlError>;

    /// Statement that ends it, one row: position, label and map in hexadecimal; or why there is none.
    fn stop_backup(&self) -> Result<String, SqlError>;

    /// Whether physical slots hold WAL here.
    fn slots_hold_wal(&self) -> bool;

    /// The grant that mends an "insufficient privilege", as far as the server's words tell.
    fn grant_for(&self, message: &str, user: &str) -> String;

    /// Identity, shape and files.
    fn server_facts<'a>(&'a self, sql: &'a NodeConnection) -> Answer<'a, ServerFacts>;

    /// Whatever would stop a backup, or make it worthless, and what is fine.
    fn examine<'a>(&'a self, sql: &'a NodeConnection) -> Answer<'a, Vec<Finding>>;
}

/// First and last major version of PostgreSQL that is known, as `server_version_num`.
const KNOWN_POSTGRESQL: std::ops::Range<u32> = 120_000..190_000;
/// What every openGauss says of itself there (`PG_VERSION_NUM`).
const OPENGAUSS: u32 = 90_204;

/// Asks a new session which server it is of.
pub(crate) async fn detect(
    session: &Session,
    cancel: &tokio_util::sync::CancellationToken,
) -> Result<Box<dyn Dialect>, SqlError> {
    let what = "reading the server's version";
    let ask = async |sql| {
        let rows = session.run(what, sql, session.deadline, cancel).await?;
        crate::session::only(what, rows)
    };
    // D 20.1.3; an integer in every version.
    let version: u32 = ask("SHOW server_version_num").await?.value(0)?;
    if KNOWN_POSTGRESQL.contains(&version) {
        return Ok(Box::new(PostgreSql::new(version)));
    }
    if version == OPENGAUSS {
        // PostgreSQL 9.2.4 says the same number: only the words tell them apart.
        let row = ask("SELECT version()").await?;
        if let Some(opengauss) = OpenGauss::of(row.text(0)?) {
            return Ok(Box::new(opengauss));
        }
    }
    Err(SqlError::Setting {
        name: "server_version_num",
        value: version.to_string(),
        needed: "that of PostgreSQL 12 to 18, or of openGauss".to_owned(),
    })
}
