//! The proxies' metadata, held against those that were kept with a point, and brought back.
//!
//! IMPORT takes no database that is there, replaces all properties of the cluster, is not atomic, loses a race with itself now and then, and keeps nothing of
//! tables beyond a restart: so each database is dropped, forgotten by every proxy, imported with the properties that are there until it takes, read
//! again, and looked at through every proxy. What was there before is kept in memory, with its secrets, for as long as this program
//! lives: that is the way back. Without secrets it stands in the journal.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use agent_api::{ErrorKind, Secret};
use agent_sql::SqlError;
use agent_sql::proxy::{Gate, ImportReply, ProxyConnection, ProxyOptions};
use catalog::Catalog;
use catalog::ids::PointId;
use catalog::journal::OperationJournal;
use catalog::model::OperationEvent;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::cluster::metadata::{
    Change, Database, Difference, Differences, MetadataExport, Properties,
};
use crate::cluster::{Proxy, ProxyAccess, Reached, of_proxy};
use crate::failure::{Failure, Result};
use crate::printer::Printer;

/// For an export.
const EXPORT: Duration = Duration::from_secs(30);
/// For a DROP.
const DROP: Duration = Duration::from_secs(30);
/// For an IMPORT: a large document takes a proxy most of a minute.
const IMPORT: Duration = Duration::from_mins(2);
/// For a REFRESH: it reads the tables of all nodes.
const REFRESH: Duration = Duration::from_mins(2);
/// How long another's lock is waited for: watchdogs of a program that has died rest after a minute and the longest `--lock-timeout`.
const LOCKED: Duration = Duration::from_mins(7);
/// How long IMPORT is tried for. It takes at the first to the eighth try.
const TRIES: Duration = Duration::from_mins(3);
/// Pause before the next, and before what is new is used.
const PAUSE: Duration = Duration::from_millis(400);
/// How long a proxy may take to forget a database that was dropped. One that has missed that is not waited for any longer.
const FORGOTTEN: Duration = Duration::from_secs(10);
/// How long a proxy may take to know a new database.
const KNOWN: Duration = Duration::from_secs(10);
/// How often a database is imported if a proxy does not read it.
const ROUNDS: u32 = 3;
/// For a log-in and a SELECT.
const LOOK: Duration = Duration::from_secs(10);
/// Settings of one database that are told.
const TOLD: usize = 20;

/// Who holds metadata against each other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Importing<'a> {
    /// Where points are.
    pub(crate) catalog: &'a Catalog,
    /// The way to the proxies.
    pub(crate) access: &'a ProxyAccess,
    /// Who is told.
    pub(crate) printer: &'a Printer,
    /// Somebody asks for it to stop.
    pub(crate) cancel: &'a CancellationToken,
}

/// What was found.
#[derive(Debug)]
pub(crate) struct Compared {
    point: PointId,
    /// What differs.
    pub(crate) differences: Differences,
    then: MetadataExport,
    now: MetadataExport,
    reached: Reached,
}

/// The command that compares, or imports.
pub(crate) fn command(point: &PointId, import: bool) -> String {
    let flag = if import { " --import" } else { "" };
    format!("gs_pitr metadata {point}{flag}")
}

impl Importing<'_> {
    /// Compares what the proxies know now with what was kept of a point. `None`: nothing was.
    ///
    /// # Errors
    /// The store's and the proxies'.
    pub(crate) async fn compared(&self, point: &PointId) -> Result<Option<Compared>> {
        let work = async {
            let point = self.catalog.point(point).await?;
            let Some(named) = &point.metadata else {
                return Ok(None);
            };
            let stored = self.catalog.metadata(&point.point_id, named).await?;
            let then = MetadataExport::stored(&stored.document)?;
            let reached = Reached::find(self.access, self.cancel).await?;
            let now = exported(&reached).await?;
            Ok(Some(Compared {
                differences: now.since(&then),
                point: point.point_id,
                then,
                now,
                reached,
            }))
        };
        let compared = self.cancel.run_until_cancelled(work).await;
        compared.unwrap_or_else(|| Err(Failure::cancelled()))
    }

    /// Brings those databases back that differ. If that fails, what was there before is put back.
    ///
    /// # Errors
    /// Secrets that nobody knows, before anything is changed; what failed, and whether what was there is there again.
    pub(crate) async fn import(
        &self,
        compared: &Compared,
        told: BTreeMap<String, Secret>,
        journal: &OperationJournal,
    ) -> Result<Vec<String>> {
        let (wanted, before) = Self::prepared(compared, told)?;
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let Some((proxy, connection)) = compared.reached.connected().next() else {
            return Err(Failure::new(ErrorKind::Database, "no proxy is reached"));
        };
        self.unlocked(proxy, connection).await?;
        // As they are now: much time may have gone by.
        let properties = exported(&compared.reached).await?.properties();
        let properties = properties.map_err(|why| not_importable(&why))?;
        let saved = OperationEvent::MetadataReplaced {
            databases: wanted.iter().map(|it| it.name.clone()).collect(),
            document: compared.now.redacted().document,
        };
        journal.record(saved).await?;
        // What was begun is ended, or taken back.
        let target = Target {
            reached: &compared.reached,
            proxy,
            connection: connection.with_cancel(CancellationToken::new()),
            properties,
        };
        let mut touched = Vec::new();
        for database in &wanted {
            touched.push(database.name.as_str());
            let replaced = async {
                if self.cancel.is_cancelled() {
                    return Err(Failure::cancelled());
                }
                let text = format!("database `{}` is dropped and imported", database.name);
                let fields = json!({"database": database.name, "proxy": proxy.address.to_string()});
                self.printer.event("importing", fields, Some(&text));
                let looks = target.brought(database).await?;
                self.tell_looks(database, looks)
            };
            if let Err(failure) = replaced.await {
                return Err(self
                    .back(compared, &before, &touched, &target, failure)
                    .await);
            }
        }
        Ok(wanted.into_iter().map(|database| database.name).collect())
    }

    /// What a restore does in the end, whoever brings it there: compares, tells, and imports if `told` is given. The databases are there, whatever becomes of this.
    ///
    /// # Errors
    /// Of the import.
    pub(crate) async fn after_restore(
        &self,
        point: &PointId,
        told: Option<&BTreeMap<String, Secret>>,
        journal: &OperationJournal,
    ) -> Result<()> {
        let compared = match self.compared(point).await {
            Ok(Some(compared)) => compared,
            Ok(None) => {
                let message = "no metadata of proxies were kept with the point";
                self.printer.warning(None, message);
                return Ok(());
            }
            Err(failure) if told.is_none() => {
                let message = format!(
                    "whether the proxies' metadata are those of the point is not known: {}; see `{}`",
                    failure.message,
                    command(point, false)
                );
                self.printer.warning(failure.node.as_deref(), &message);
                return Ok(());
            }
            Err(failure) => return Err(restored(failure, point)),
        };
        compared.tell(told.is_some(), self.printer);
        let Some(told) = told else {
            return Ok(());
        };
        let imported = self.import(&compared, told.clone(), journal).await;
        let imported = imported.map_err(|failure| restored(failure, point))?;
        if !imported.is_empty() {
            let text = format!("imported at the proxies: {}", imported.join(", "));
            let fields = json!({"databases": imported});
            self.printer.event("imported", fields, Some(&text));
        }
        Ok(())
    }

    /// The databases to import, and those that are there now.
    fn prepared(
        compared: &Compared,
        told: BTreeMap<String, Secret>,
    ) -> Result<(Vec<Database>, BTreeMap<String, Database>)> {
        let known = compared.now.known(told);
        let (mut wanted, mut missing) = (Vec::new(), BTreeSet::new());
        for name in compared.differences.to_import() {
            match compared.then.database(name, &known) {
                Ok(Some(database)) => wanted.push(database),
                Ok(None) => {}
                Err(names) => missing.extend(names),
            }
        }
        if !missing.is_empty() {
            let names: Vec<_> = missing.into_iter().collect();
            let message = format!(
                "secrets of the proxies' metadata are not stored, and not known from storage units of the same address and user: {}",
                names.join(", ")
            );
            return Err(Failure::usage(message).next(
                "write them into a file (mode 0600), a line NAME=SECRET each, and give `--metadata-secrets FILE`",
            ));
        }
        let before = wanted.iter().filter_map(|it| {
            let there = compared.now.database(&it.name, &known).ok().flatten()?;
            Some((it.name.clone(), there))
        });
        let before = before.collect();
        Ok((wanted, before))
    }

    /// Waits until nobody's lock is in the way: that of a restore whose program died is taken off by its agents.
    async fn unlocked(&self, proxy: &Proxy, connection: &ProxyConnection) -> Result<()> {
        let until = Instant::now() + LOCKED;
        let mut told = false;
        while let Ok(Gate::Locked(said)) = connection.probe(LOOK).await {
            if Instant::now() >= until {
                let message = format!("the cluster is locked ({said}), so nothing was imported");
                return Err(Failure::new(ErrorKind::Conflict, message)
                    .on(proxy.address.to_string())
                    .next(
                        "wait until it is released; if nobody holds it any more: gs_pitr unlock",
                    ));
            }
            if !told {
                let message = "the cluster is locked: the import waits until it is released";
                self.printer
                    .warning(Some(&proxy.address.to_string()), message);
                told = true;
            }
            let pause = self.cancel.run_until_cancelled(sleep(PAUSE));
            pause.await.ok_or_else(Failure::cancelled)?;
        }
        Ok(())
    }

    /// A proxy that does not read what others read has to be started again, which is told.
    fn tell_looks(&self, database: &Database, looks: Looks) -> Result<()> {
        if looks.good == 0
            && let Some((proxy, why)) = looks.bad.first()
        {
            let message = format!("`{}` was imported and cannot be read: {why}", database.name);
            return Err(Failure::new(ErrorKind::Database, message).on(proxy.clone()));
        }
        for (proxy, why) in looks.bad {
            let message = format!(
                "`{}` was imported, and this proxy does not read it: {why}; restart this proxy",
                database.name
            );
            self.printer.warning(Some(&proxy), &message);
        }
        Ok(())
    }

    /// A proxy that does not read what was put back may not have read it before either.
    fn tell_put_back(&self, name: &str, looks: Looks) {
        for (proxy, why) in looks.bad {
            let message = format!(
                "`{name}` was put back, and this proxy does not read all of it: {why}; if it did before, restart this proxy"
            );
            self.printer.warning(Some(&proxy), &message);
        }
    }

    /// Puts back what was there.
    async fn back(
        &self,
        compared: &Compared,
        before: &BTreeMap<String, Database>,
        touched: &[&str],
        target: &Target<'_>,
        failure: Failure,
    ) -> Failure {
        let text = "the import failed; what was there before is put back";
        let fields = json!({"databases": touched, "why": failure.message});
        self.printer.event("putting-back", fields, Some(text));
        let mut wrong = Vec::new();
        for name in touched {
            let put_back = if let Some(database) = before.get(*name) {
                let brought = target.brought(database).await;
                brought.map(|looks| self.tell_put_back(name, looks))
            } else {
                target.dropped(name).await
            };
            if let Err(error) = put_back {
                wrong.push(format!("`{name}`: {}", error.message));
            }
        }
        if wrong.is_empty() {
            // A proxy tries every storage unit before it keeps anything of an import.
            let next = if failure.message.contains("torage unit") {
                format!(
                    "see that the proxies reach the data nodes, and write the right passwords of the storage units into a file (mode 0600), a line NAME=SECRET each; \
                     then {} --metadata-secrets FILE",
                    command(&compared.point, true)
                )
            } else {
                command(&compared.point, true)
            };
            let message = format!("{}; what was there before is there again", failure.message);
            return Failure {
                message,
                next: Some(next),
                ..failure
            };
        }
        let message = format!(
            "{}; and it could not be put back: {}; without its secrets it stands in the operation's journal",
            failure.message,
            wrong.join("; ")
        );
        let next = format!(
            "mend what is in the way; then {}, or register the storage units and rules by hand",
            command(&compared.point, true)
        );
        Failure {
            message,
            next: Some(next),
            ..failure
        }
        .changed_if(true)
    }
}

/// Whom databases are imported through.
struct Target<'a> {
    reached: &'a Reached,
    proxy: &'a Proxy,
    connection: ProxyConnection,
    properties: Properties,
}

impl Target<'_> {
    fn failed(&self, error: &SqlError) -> Failure {
        of_proxy(&self.proxy.address, error)
    }

    /// Brings a database in until every proxy reads it, a few times.
    async fn brought(&self, database: &Database) -> Result<Looks> {
        let mut rounds = 1;
        loop {
            self.replaced(database).await?;
            let looks = self.looks(database).await;
            if rounds == ROUNDS || !looks.may_pass() {
                return Ok(looks);
            }
            tracing::info!(database = database.name, bad = ?looks.bad, "importing once more");
            rounds += 1;
        }
    }

    /// Looks at its tables through every proxy.
    async fn looks(&self, database: &Database) -> Looks {
        let looks = self.reached.connected().map(|(proxy, _)| async move {
            let looked = looked(proxy, database).await;
            (proxy.address.to_string(), looked)
        });
        let mut all = Looks::default();
        for (proxy, looked) in join_all(looks).await {
            match looked {
                Ok(()) => all.good += 1,
                Err(why) => all.bad.push((proxy, why)),
            }
        }
        all
    }

    /// DROP, IMPORT until it takes, REFRESH.
    async fn replaced(&self, database: &Database) -> Result<()> {
        let document = database.document(&self.properties);
        let until = Instant::now() + TRIES;
        loop {
            self.dropped(&database.name).await?;
            let imported = self.connection.import_metadata(&document, IMPORT).await;
            let why = match imported.map_err(|error| self.failed(&error))? {
                ImportReply::Imported => break,
                ImportReply::Again(why) => why,
            };
            if Instant::now() >= until {
                let message = format!(
                    "IMPORT METADATA of `{}` does not take: {why}",
                    database.name
                );
                return Err(
                    Failure::new(ErrorKind::Database, message).on(self.proxy.address.to_string())
                );
            }
            tracing::info!(database = database.name, why, "importing again");
        }
        sleep(PAUSE).await;
        let refreshed = self
            .connection
            .refresh_database(&database.name, REFRESH)
            .await;
        refreshed.map_err(|error| self.failed(&error))
    }

    /// DROP, and a wait until no proxy knows it any more: one that hears of it only while the database is made anew takes the new one away
    /// from itself, or closes its connections.
    async fn dropped(&self, name: &str) -> Result<()> {
        let dropped = self.connection.drop_database(name, DROP).await;
        dropped.map_err(|error| self.failed(&error))?;
        let forgotten = self.reached.connected();
        join_all(forgotten.map(|(proxy, _)| forgotten_by(proxy, name))).await;
        sleep(PAUSE).await;
        Ok(())
    }
}

/// Which proxies read what was imported.
#[derive(Debug, Default)]
struct Looks {
    good: usize,
    /// Those that do not, and why.
    bad: Vec<(String, String)>,
}

impl Looks {
    /// Whether another import may mend it: a proxy has missed something that another one knows, or has closed the connections that it has just
    /// opened. If none reads it for another reason, a table is missing on the nodes.
    fn may_pass(&self) -> bool {
        let closed = |(_, why): &(String, String)| why.contains("has been closed");
        !self.bad.is_empty() && (self.good > 0 || self.bad.iter().any(closed))
    }
}

/// Waits until a proxy lets nobody into a database, though not for ever.
async fn forgotten_by(proxy: &Proxy, name: &str) {
    let options = ProxyOptions {
        database: name.to_owned(),
        ..proxy.options.clone()
    };
    let until = Instant::now() + FORGOTTEN;
    while Instant::now() < until {
        let connected = ProxyConnection::connect(&options, CancellationToken::new()).await;
        if let Err(SqlError::Refused { .. }) = connected {
            return;
        }
        sleep(PAUSE / 4).await;
    }
    tracing::info!(proxy = %proxy.address, database = name, "still knows a database that was dropped");
}

impl Compared {
    /// Tells what differs.
    pub(crate) fn tell(&self, imports: bool, printer: &Printer) {
        printer.event("metadata", self.fields(), Some(&self.text(imports)));
    }

    /// For machines.
    pub(crate) fn fields(&self) -> Value {
        let databases = self.differences.databases.iter();
        let databases: Vec<_> = databases
            .map(|Difference { name, change }| match change {
                Change::Missing => json!({"database": name, "change": "missing"}),
                Change::New => json!({"database": name, "change": "new"}),
                Change::Settings { then, now } => {
                    json!({"database": name, "change": "settings", "then": then, "now": now})
                }
            })
            .collect();
        json!({"point": self.point, "databases": databases, "cluster": self.differences.cluster})
    }

    fn text(&self, imports: bool) -> String {
        if self.differences.is_empty() {
            return "the proxies' metadata are those of the point".to_owned();
        }
        let mut text = format!(
            "the proxies' metadata differ from those of point {} (secrets are not compared):",
            self.point
        );
        for Difference { name, change } in &self.differences.databases {
            let _ = match change {
                Change::Missing => write!(text, "\n  database {name}: it is not there now"),
                Change::New => write!(
                    text,
                    "\n  database {name}: it was not there; it is left as it is"
                ),
                Change::Settings { then, now } => {
                    let _ = write!(text, "\n  database {name}:");
                    let lines = then.iter().map(|it| ("then", it));
                    let lines = lines.chain(now.iter().map(|it| ("now ", it)));
                    let count = then.len() + now.len();
                    for (when, line) in lines.take(TOLD) {
                        let _ = write!(text, "\n    {when} {line}");
                    }
                    match count.saturating_sub(TOLD) {
                        0 => Ok(()),
                        more => write!(text, "\n    and {more} more"),
                    }
                }
            };
        }
        if self.differences.cluster > 0 {
            let _ = write!(
                text,
                "\n  {} settings of the whole cluster (rules, users, properties): they are never imported",
                self.differences.cluster
            );
        }
        if !imports && self.differences.to_import().next().is_some() {
            let next = command(&self.point, true);
            let _ = write!(text, "\n  to bring the databases of the point back: {next}");
        }
        text
    }
}

/// No database can be imported at these proxies, and none has been touched.
fn not_importable(why: &str) -> Failure {
    let message = format!("nothing can be imported at these proxies: {why}");
    Failure::new(ErrorKind::Database, message).next(
        "say `SET DIST VARIABLE proxy_frontend_database_protocol_type = 'PostgreSQL'` (or 'openGauss', whichever they speak) to one of them, then repeat this",
    )
}

/// A failure after which the data nodes are restored all the same.
fn restored(failure: Failure, point: &PointId) -> Failure {
    let message = format!(
        "the databases are restored and open, but the proxies' metadata are not: {}",
        failure.message
    );
    let command = command(point, true);
    let next = match failure.next {
        None => command,
        Some(next) if next.contains(&command) => next,
        Some(next) => format!("{next}; then {command}"),
    };
    let next = Some(next);
    Failure {
        message,
        next,
        ..failure
    }
    .changed_if(true)
}

async fn exported(reached: &Reached) -> Result<MetadataExport> {
    let exported = reached.told(async |proxy| proxy.export_metadata(EXPORT).await);
    MetadataExport::read(&exported.await?)
}

/// Reads a row count of every table that its rules name, through one proxy, as soon as that knows them.
async fn looked(proxy: &Proxy, database: &Database) -> std::result::Result<(), String> {
    let options = ProxyOptions {
        database: database.name.clone(),
        ..proxy.options.clone()
    };
    let until = Instant::now() + KNOWN;
    loop {
        let looks = async {
            let connection = ProxyConnection::connect(&options, CancellationToken::new()).await?;
            if database.tables.is_empty() {
                return connection.look(None, LOOK).await;
            }
            for table in &database.tables {
                connection.look(Some(table), LOOK).await?;
            }
            Ok(())
        };
        match looks.await {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= until => return Err(error.to_string()),
            Err(_) => sleep(PAUSE).await,
        }
    }
}
