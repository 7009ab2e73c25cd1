//! What a session's statements do: whether they are let in, and where they run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::answer;
use super::distsql::{DistSql, Group};
use super::instance::Instance;
use super::login::Client;
use super::node::{Answer, Values};
use super::registry::Database;
use super::route::{self, Part, Route};
use super::session::Prepared;
use super::sql::Token;
use super::statement::{Class, Statement};
use super::tables;
use super::transaction::Transaction;
use super::wire::{Bind, Refusal};
use super::{ClusterState, DataNode, Frontend, Transaction as Kind, Version};

/// A statement of either language.
#[derive(Debug, Clone)]
pub(super) enum Command {
    Sql(Statement),
    DistSql(DistSql),
}

impl Command {
    pub(super) fn parse(sql: &str, version: Version) -> Result<Self, Refusal> {
        if let Some(distsql) = DistSql::parse(sql, version) {
            return distsql.map(Self::DistSql);
        }
        let statement = Statement::parse(sql);
        let statement = statement.map_err(|message| Refusal::new("99999", message))?;
        Ok(Self::Sql(statement))
    }

    /// What a batch says of each of its executions.
    pub(super) fn batch_tag(&self, rows: u64) -> String {
        match self {
            Self::Sql(statement) if statement.class == Class::Update => format!("UPDATE {rows}"),
            Self::Sql(statement) if statement.class == Class::Delete => format!("DELETE {rows}"),
            _ => format!("INSERT 0 {rows}"),
        }
    }
}

/// What a statement is answered with.
#[derive(Debug, Clone, Default)]
pub(super) struct Reply {
    pub columns: Option<Bytes>,
    pub rows: Vec<Bytes>,
    pub tag: String,
    /// What SET has set.
    pub settings: Vec<(String, String)>,
    /// There was no statement.
    pub empty: bool,
    /// A fault on demand: the client hears nothing but the end of its connection.
    pub hang_up: bool,
}

impl Reply {
    pub(super) fn tag(tag: impl Into<String>) -> Self {
        Self {
            tag: tag.into(),
            ..Self::default()
        }
    }

    /// How DistSQL says that it is done, whatever was done.
    pub(super) fn success() -> Self {
        Self::tag("SUCCESS")
    }
}

impl From<Answer> for Reply {
    fn from(answer: Answer) -> Self {
        Self {
            columns: answer.columns,
            rows: answer.rows,
            tag: answer.tag,
            ..Self::default()
        }
    }
}

/// What a session's statements share.
pub(super) struct Context {
    pub proxy: Arc<Instance>,
    pub client: Client,
    pub transaction: Option<Transaction>,
}

impl Context {
    pub(super) fn new(proxy: Arc<Instance>, client: Client) -> Self {
        Self {
            proxy,
            client,
            transaction: None,
        }
    }

    /// Whether its table is known. The real one asks this first, while it parses.
    pub(super) async fn known(&self, command: &Command) -> Result<(), Refusal> {
        let name = self.client.database.as_deref().unwrap_or("postgres");
        let Command::Sql(statement) = command else {
            return Ok(());
        };
        tables::check(&self.proxy, statement, name).await
    }

    /// Whether the statement is let in: in the order of the real one's `ProxyBackendHandlerFactory`.
    pub(super) fn admit(&self, command: &Command) -> Result<(), Refusal> {
        let ends = matches!(
            command,
            Command::Sql(Statement {
                class: Class::Commit | Class::Rollback | Class::RollbackTo(_),
                ..
            })
        );
        if self.transaction.as_ref().is_some_and(|tx| tx.failed) && !ends {
            return Err(Refusal::system(
                "Current transaction is aborted, commands ignored until end of transaction block.",
            ));
        }
        let java = self.java(command);
        if let Command::Sql(statement) = command
            && statement.class == Class::Dcl
        {
            let message = format!("Unsupported SQL operation: unsupported SQL statement `{java}`.");
            return Err(Refusal::new("0A000", message));
        }
        let state = self.proxy.seen();
        if !passes(state, command) {
            let state = state.name();
            return Err(Refusal::system(format!(
                "The cluster state is {state}, can not support SQL statement '{java}'."
            )));
        }
        match command {
            Command::DistSql(distsql)
                if self.transaction.is_some() && distsql.group() != Group::Query =>
            {
                Err(Refusal::new(
                    "0A000",
                    "Unsupported SQL operation: Non-query DistSQL is not supported within a transaction.",
                ))
            }
            _ => Ok(()),
        }
    }

    fn java(&self, command: &Command) -> String {
        match command {
            Command::DistSql(distsql) => distsql.java().to_owned(),
            Command::Sql(statement) => {
                let dialect = match self.proxy.frontend {
                    Frontend::OpenGaussSha256 => "OpenGauss",
                    Frontend::PostgresMd5 | Frontend::PostgresCleartext => "PostgreSQL",
                };
                format!("{dialect}{}", statement.java)
            }
        }
    }

    /// After an error in a transaction it can only be rolled back.
    pub(super) fn mark_failed(&mut self, refusal: &Refusal) {
        // BEGIN in a transaction is forgiven.
        if let Some(transaction) = &mut self.transaction
            && refusal.state != "25001"
        {
            transaction.failed = true;
        }
    }

    /// Runs a statement that was let in.
    pub(super) async fn run(
        &mut self,
        command: &Command,
        values: Option<&Values>,
    ) -> Result<Reply, Refusal> {
        match command {
            Command::DistSql(distsql) => answer::run(self, distsql).await,
            Command::Sql(statement) => self.sql(statement, values).await,
        }
    }

    async fn sql(
        &mut self,
        statement: &Statement,
        values: Option<&Values>,
    ) -> Result<Reply, Refusal> {
        match &statement.class {
            Class::Empty => Ok(Reply {
                empty: true,
                ..Reply::default()
            }),
            Class::Begin => self.begin(statement),
            Class::Commit => self.commit().await,
            Class::Rollback => {
                if let Some(transaction) = self.transaction.take() {
                    transaction.roll_back().await?;
                }
                Ok(Reply::tag("ROLLBACK"))
            }
            Class::Savepoint(name) => {
                self.in_transaction("SAVEPOINT")?.savepoint(name).await?;
                Ok(Reply::tag("SAVEPOINT"))
            }
            Class::RollbackTo(name) => {
                let transaction = self.in_transaction("ROLLBACK TO SAVEPOINT")?;
                transaction.roll_back_to(name).await?;
                Ok(Reply::tag("ROLLBACK"))
            }
            Class::Release(name) => {
                let transaction = self.in_transaction("RELEASE SAVEPOINT")?;
                transaction.release(name).await?;
                Ok(Reply::tag("RELEASE"))
            }
            Class::Set => Ok(set(statement)),
            Class::CreateDatabase(name) => self.create_database(name),
            Class::DropDatabase(name) => self.drop_database(name),
            Class::SqlPrepare => {
                let message = "The stand-in does not execute PREPARE, EXECUTE and DEALLOCATE.";
                Err(Refusal::new("0A000", message))
            }
            Class::Show
                if statement
                    .pieces
                    .get(1)
                    .is_some_and(|p| p.is("server_version")) =>
            {
                let version = self.proxy.version.release();
                Ok(answer::rows(
                    &["server_version"],
                    &[vec![version.to_owned()]],
                ))
            }
            _ => self.routed(statement, values).await,
        }
    }

    fn begin(&mut self, statement: &Statement) -> Result<Reply, Refusal> {
        if self.transaction.is_some() {
            let message = "There is already a transaction in progress";
            return Err(Refusal::new("25001", message));
        }
        let kind = self.proxy.registry.shared().transaction;
        self.transaction = Some(Transaction::begin(kind));
        let begins = statement.pieces[0].is("begin");
        Ok(Reply::tag(if begins {
            "BEGIN"
        } else {
            "START TRANSACTION"
        }))
    }

    async fn commit(&mut self) -> Result<Reply, Refusal> {
        let committed = match self.transaction.take() {
            Some(transaction) => transaction.commit(&self.proxy).await?,
            None => true,
        };
        Ok(Reply::tag(if committed { "COMMIT" } else { "ROLLBACK" }))
    }

    fn in_transaction(&mut self, what: &str) -> Result<&mut Transaction, Refusal> {
        let message = format!("{what} can only be used in transaction blocks");
        self.transaction
            .as_mut()
            .ok_or_else(|| Refusal::system(message))
    }

    fn create_database(&self, name: &str) -> Result<Reply, Refusal> {
        self.proxy.connected()?;
        let registry = &self.proxy.registry;
        let mut shared = registry.shared();
        if shared.databases.contains_key(name) || name == "postgres" {
            let message = format!("Database '{name}' already exists");
            return Err(Refusal::fatal("42P04", message));
        }
        let late = Duration::from_millis(if self.proxy.delayer.is_real() { 400 } else { 0 });
        let database = Database::new(Instant::now() + late);
        shared.databases.insert(name.to_owned(), database);
        Ok(Reply::tag("CREATE DATABASE"))
    }

    fn drop_database(&self, name: &str) -> Result<Reply, Refusal> {
        self.proxy.connected()?;
        if self.client.database.as_deref() == Some(name) || name == "postgres" {
            let cause =
                "java.lang.UnsupportedOperationException: cannot drop the currently open database";
            return Err(Refusal::unknown(cause));
        }
        if !self.proxy.registry.drop_database(name) {
            let message = "org.apache.shardingsphere.infra.exception.postgresql.exception.PostgreSQLException";
            return Err(Refusal::new("99999", message));
        }
        for instance in self.proxy.registry.instances() {
            instance
                .unknown_tables
                .lock()
                .expect("no panic")
                .remove(name);
            instance.closed_pools.lock().expect("no panic").remove(name);
        }
        Ok(Reply::tag("DROP DATABASE"))
    }

    /// Where a statement of the session's database goes.
    fn route(
        &self,
        statement: &Statement,
        values: Option<&Values>,
    ) -> Result<(Vec<DataNode>, Route), Refusal> {
        let name = self.client.database.as_deref().unwrap_or("postgres");
        let database = self.proxy.registry.database(name);
        let units: BTreeMap<_, _> = database
            .as_ref()
            .map(|d| d.units.clone())
            .unwrap_or_default();
        let (Some(database), false) = (database, units.is_empty()) else {
            let message = format!("There is no storage unit in database '{name}'.");
            return Err(Refusal::new("42S02", message));
        };
        let table = route::table(statement);
        if self
            .proxy
            .closed_pools
            .lock()
            .expect("no panic")
            .contains(name)
        {
            let message = "HikariDataSource HikariDataSource (HikariPool-1) has been closed.";
            return Err(Refusal::system(message));
        }
        let column = database.column(table.as_deref().unwrap_or(""));
        let nodes: Vec<DataNode> = units.into_values().collect();
        let route = route::route(statement, values, table.as_deref(), column, nodes.len())?;
        Ok((nodes, route))
    }

    async fn routed(
        &mut self,
        statement: &Statement,
        values: Option<&Values>,
    ) -> Result<Reply, Refusal> {
        let (nodes, mut route) = self.route(statement, values)?;
        let formats = values.map_or(Vec::new(), |values| values.bind.result_formats.clone());
        if route.merge.wants_text() {
            for part in &mut route.parts {
                part.values
                    .iter_mut()
                    .for_each(|values| values.bind.result_formats.clear());
            }
        }
        let kind = self.proxy.registry.shared().transaction;
        // A distributed one is begun where a change goes to several nodes.
        let implicit = self.transaction.is_none()
            && kind == Kind::Xa
            && route.parts.len() > 1
            && statement.is_dml_write();
        if implicit {
            self.transaction = Some(Transaction::begin(kind));
        }
        let result = self.parts(&nodes, &route.parts).await;
        if result.is_ok() && statement.java == "CreateTableStatement" {
            let mut made = self.proxy.made_tables.lock().expect("no panic");
            made.extend(route::table(statement));
        }
        if implicit && let Some(mut transaction) = self.transaction.take() {
            transaction.failed = result.is_err();
            transaction.commit(&self.proxy).await?;
        }
        route.merge.apply(result?, &formats).map(Reply::from)
    }

    /// One node after the other.
    async fn parts(&mut self, nodes: &[DataNode], parts: &[Part]) -> Result<Vec<Answer>, Refusal> {
        let mut answers = Vec::new();
        for part in parts {
            self.proxy.thawed().await;
            let node = &nodes[part.node];
            if let Some(transaction) = &mut self.transaction {
                let lease = transaction.on(&self.proxy, node).await?;
                answers.push(match &part.values {
                    Some(values) => lease.bound(&part.sql, values).await?,
                    None => lease.simple(&part.sql).await?,
                });
                continue;
            }
            let mut lease = self.proxy.pool_of(node).take().await?;
            let answer = match &part.values {
                Some(values) => lease.bound(&part.sql, values).await,
                None => lease.simple(&part.sql).await,
            };
            lease.give_back();
            answers.push(answer?);
        }
        Ok(answers)
    }

    /// What a statement takes and gives, as a node says it. DistSQL gets there too, and is not understood.
    pub(super) async fn describe(&mut self, prepared: &Prepared) -> Result<Answer, Refusal> {
        if let Command::Sql(Statement { class, .. }) = &prepared.command
            && !matches!(
                class,
                Class::Select
                    | Class::Insert
                    | Class::Update
                    | Class::Delete
                    | Class::Show
                    | Class::Other
            )
        {
            return Ok(Answer::default());
        }
        let name = self.client.database.as_deref().unwrap_or("postgres");
        let database = self.proxy.registry.database(name);
        let Some(node) = database.and_then(|database| database.units.into_values().next()) else {
            let cause =
                "java.lang.UnsupportedOperationException: Can not find aggregated data source";
            return Err(Refusal::unknown(cause));
        };
        let mut lease = self.proxy.pool_of(&node).take().await?;
        let answer = lease.described(&prepared.sql, &prepared.types()).await;
        lease.give_back();
        answer
    }

    /// A batch whose sharding column gets a parameter of unknown type fails in the real one, locked or not.
    fn check_types(
        &self,
        statement: &Statement,
        values: &Values,
        route: &Route,
    ) -> Result<(), Refusal> {
        let mut typed = values.clone();
        for (index, value) in typed.bind.values.iter_mut().enumerate() {
            if values.types.get(index).is_none_or(|kind| *kind == 0) {
                *value = None;
            }
        }
        let same = self
            .route(statement, Some(&typed))
            .map(|(_, other)| other.parts.len());
        if same == Ok(route.parts.len()) {
            return Ok(());
        }
        let message = "Sharding value of an unspecified type must implements Comparable.";
        Err(Refusal::new("44000", message))
    }

    /// Executes a batch, node after node, and returns how many rows it changed.
    pub(super) async fn batch(
        &mut self,
        prepared: &Prepared,
        binds: &[&Bind],
    ) -> Result<u64, Refusal> {
        let Command::Sql(statement) = &prepared.command else {
            return Err(Refusal::unknown(
                "java.lang.ClassCastException: DistSQL in a batch",
            ));
        };
        let mut by_node: BTreeMap<usize, Vec<Part>> = BTreeMap::new();
        let mut nodes = Vec::new();
        for bind in binds {
            let values = Values {
                types: prepared.types(),
                bind: (*bind).clone(),
            };
            let (all, route) = self.route(statement, Some(&values))?;
            self.check_types(statement, &values, &route)?;
            nodes = all;
            for part in route.parts {
                by_node.entry(part.node).or_default().push(part);
            }
        }
        let alone = self.transaction.is_none();
        let mut rows = 0;
        for parts in by_node.values() {
            // Without a transaction each node's share is one of its own.
            if alone {
                self.transaction = Some(Transaction::begin(Kind::Local));
            }
            let answers = self.parts(&nodes, parts).await;
            if alone && let Some(mut transaction) = self.transaction.take() {
                transaction.failed = answers.is_err();
                transaction.commit_share().await?;
            }
            rows += answers?.iter().filter_map(changed).sum::<u64>();
        }
        Ok(rows)
    }
}

fn changed(answer: &Answer) -> Option<u64> {
    answer.tag.rsplit(' ').next()?.parse().ok()
}

/// What a state lets through.
fn passes(state: ClusterState, command: &Command) -> bool {
    let group = match command {
        Command::DistSql(distsql) => Some(distsql.group()),
        Command::Sql(_) => None,
    };
    match (state, command) {
        (ClusterState::Ok, _)
        | (
            _,
            Command::Sql(Statement {
                class: Class::Empty,
                ..
            }),
        ) => true,
        (ClusterState::ReadOnly, Command::DistSql(_)) => {
            matches!(group, Some(Group::Query | Group::Unlock))
        }
        (ClusterState::ReadOnly, Command::Sql(statement)) => !matches!(
            statement.class,
            Class::Insert
                | Class::Update
                | Class::Delete
                | Class::Ddl
                | Class::SqlPrepare
                | Class::CreateDatabase(_)
                | Class::DropDatabase(_)
        ),
        (ClusterState::Unavailable, Command::DistSql(_)) => {
            matches!(group, Some(Group::Query | Group::Unlock | Group::Import))
        }
        (ClusterState::Unavailable, Command::Sql(statement)) => statement.class == Class::Show,
    }
}

/// SET is answered here, and no node hears of it.
fn set(statement: &Statement) -> Reply {
    let pieces = &statement.pieces;
    if pieces[0].is("reset") {
        return Reply::tag("RESET");
    }
    let scoped = pieces
        .get(1)
        .is_some_and(|p| p.is("session") || p.is("local"));
    let at = 1 + usize::from(scoped);
    let assigned = pieces
        .get(at + 1)
        .is_some_and(|p| p.is("to") || p.is_symbol('='));
    let name = pieces.get(at).and_then(|piece| piece.name());
    let (Some(name), true, Some(value)) = (name, assigned, pieces.get(at + 2)) else {
        return Reply::tag("SET");
    };
    let value = match &value.token {
        Token::Text(text) | Token::Quoted(text) => text.clone(),
        _ => statement.sql[value.at.clone()].to_owned(),
    };
    Reply {
        settings: vec![(name.to_owned(), value)],
        ..Reply::tag("SET")
    }
}
