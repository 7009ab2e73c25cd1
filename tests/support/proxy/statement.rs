//! What kind of statement a client sent: what the lock, the transaction and the router want to know.

use super::sql::{self, Piece};

/// Kinds that are treated differently.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Class {
    Empty,
    Begin,
    Commit,
    Rollback,
    Savepoint(String),
    RollbackTo(String),
    Release(String),
    Set,
    Select,
    Insert,
    Update,
    Delete,
    Ddl,
    CreateDatabase(String),
    DropDatabase(String),
    /// SHOW: passes both locks.
    Show,
    /// EXPLAIN, VACUUM, ANALYZE, COPY, CALL, DO, LOCK TABLE ...: in none of the lists of what a lock refuses.
    Other,
    /// PREPARE, EXECUTE, DEALLOCATE: DDL to the lock, and not imitated.
    SqlPrepare,
    /// Roles and grants: refused always.
    Dcl,
}

/// A statement.
#[derive(Debug, Clone)]
pub(super) struct Statement {
    pub sql: String,
    pub pieces: Vec<Piece>,
    pub class: Class,
    /// Its class in the real proxy without the dialect's name, for messages: `InsertStatement`.
    pub java: String,
}

impl Statement {
    /// Reads `sql`; the error is what the real one says of a text that it cannot parse.
    pub(super) fn parse(sql: &str) -> Result<Self, String> {
        let syntax = || format!("You have an error in your SQL syntax: {sql}, null");
        let pieces = sql::pieces(sql).ok_or_else(syntax)?;
        if pieces.iter().any(|piece| piece.is_symbol(';')) {
            return Err(syntax());
        }
        let (class, java) = classify(&pieces).ok_or_else(syntax)?;
        Ok(Self {
            sql: sql.to_owned(),
            pieces,
            class,
            java: format!("{java}Statement"),
        })
    }

    /// Whether it changes rows.
    pub(super) fn is_dml_write(&self) -> bool {
        matches!(self.class, Class::Insert | Class::Update | Class::Delete)
    }
}

fn camel(word: &str) -> String {
    let mut characters = word.chars();
    let first = characters
        .next()
        .map(|c| c.to_ascii_uppercase())
        .into_iter();
    first.chain(characters).collect()
}

fn classify(pieces: &[Piece]) -> Option<(Class, String)> {
    let word = |at: usize| pieces.get(at).and_then(Piece::name).unwrap_or("");
    let java = |name: &str| name.to_owned();
    let Some(first) = pieces.first() else {
        return Some((Class::Empty, java("Empty")));
    };
    if first.is_symbol('(') {
        return Some((Class::Select, java("Select")));
    }
    Some(match first.name()? {
        "select" | "with" | "values" | "table" => (Class::Select, java("Select")),
        "insert" => (Class::Insert, java("Insert")),
        "update" => (Class::Update, java("Update")),
        "delete" => (Class::Delete, java("Delete")),
        "begin" => (Class::Begin, java("BeginTransaction")),
        "start" => (Class::Begin, java("StartTransaction")),
        "commit" | "end" if word(1) == "prepared" => (Class::Other, java("CommitPrepared")),
        "commit" | "end" => (Class::Commit, java("Commit")),
        "rollback" | "abort" => return Some(roll_back(pieces)),
        "savepoint" => (Class::Savepoint(java(word(1))), java("Savepoint")),
        "release" => {
            let at = usize::from(word(1) == "savepoint") + 1;
            (Class::Release(java(word(at))), java("ReleaseSavepoint"))
        }
        "set" | "reset" => (Class::Set, java("Set")),
        "show" => (Class::Show, java("Show")),
        "prepare" if word(1) == "transaction" => (Class::Other, java("PrepareTransaction")),
        verb @ ("prepare" | "execute" | "deallocate") => (Class::SqlPrepare, camel(verb)),
        "grant" | "revoke" => (Class::Dcl, camel(word(0))),
        verb @ ("create" | "alter" | "drop") => return define(verb, pieces),
        verb @ ("truncate" | "comment" | "declare" | "fetch" | "move" | "close" | "reindex"
        | "refresh" | "cluster" | "listen" | "unlisten" | "notify" | "discard"
        | "security") => (Class::Ddl, camel(verb)),
        verb @ ("explain" | "vacuum" | "copy" | "call" | "do" | "lock" | "checkpoint" | "load") => {
            (Class::Other, camel(verb))
        }
        "analyze" | "analyse" => (Class::Other, java("AnalyzeTable")),
        _ => return None,
    })
}

fn roll_back(pieces: &[Piece]) -> (Class, String) {
    let name = pieces.last().and_then(Piece::name).unwrap_or("");
    let to = pieces.iter().any(|piece| piece.is("to"));
    let class = if to {
        Class::RollbackTo(name.to_owned())
    } else {
        Class::Rollback
    };
    (class, "Rollback".to_owned())
}

/// CREATE, ALTER and DROP of something.
fn define(verb: &str, pieces: &[Piece]) -> Option<(Class, String)> {
    const BETWEEN: [&str; 12] = [
        "or",
        "replace",
        "temp",
        "temporary",
        "unlogged",
        "unique",
        "global",
        "local",
        "recursive",
        "concurrently",
        "force",
        "trusted",
    ];
    let object = pieces[1..]
        .iter()
        .position(|piece| !piece.name().is_some_and(|name| BETWEEN.contains(&name)))?
        + 1;
    let object_name = pieces[object].name()?;
    let java = format!("{}{}", camel(verb), camel(object_name));
    let name = || {
        let rest = pieces[object + 1..].iter();
        let mut rest = rest.filter(|p| !(p.is("if") || p.is("not") || p.is("exists")));
        rest.next().and_then(Piece::name).map(str::to_owned)
    };
    let class = match (verb, object_name) {
        ("create", "database") => Class::CreateDatabase(name()?),
        ("drop", "database") => Class::DropDatabase(name()?),
        (_, "role" | "user" | "group") => Class::Dcl,
        _ => Class::Ddl,
    };
    Some((class, java))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(sql: &str) -> (Class, String) {
        let statement = Statement::parse(sql).unwrap();
        (statement.class, statement.java)
    }

    #[test]
    fn kinds_and_their_names() {
        for (sql, expected, java) in [
            ("", Class::Empty, "EmptyStatement"),
            (" ; ", Class::Empty, "EmptyStatement"),
            ("/* a */ Select 1", Class::Select, "SelectStatement"),
            (
                "-- b\nINSERT INTO t VALUES (1)",
                Class::Insert,
                "InsertStatement",
            ),
            ("BEGIN;", Class::Begin, "BeginTransactionStatement"),
            (
                "START TRANSACTION",
                Class::Begin,
                "StartTransactionStatement",
            ),
            ("END", Class::Commit, "CommitStatement"),
            ("ABORT", Class::Rollback, "RollbackStatement"),
            (
                "rollback to savepoint a",
                Class::RollbackTo("a".into()),
                "RollbackStatement",
            ),
            (
                "create unique index i on t (a)",
                Class::Ddl,
                "CreateIndexStatement",
            ),
            (
                "CREATE DATABASE IF NOT EXISTS bank",
                Class::CreateDatabase("bank".into()),
                "CreateDatabaseStatement",
            ),
            (
                "drop database \"Bank\"",
                Class::DropDatabase("Bank".into()),
                "DropDatabaseStatement",
            ),
            ("TRUNCATE t", Class::Ddl, "TruncateStatement"),
            (
                "prepare p as select 1",
                Class::SqlPrepare,
                "PrepareStatement",
            ),
            (
                "explain analyze update t set a = 1",
                Class::Other,
                "ExplainStatement",
            ),
            ("create role r", Class::Dcl, "CreateRoleStatement"),
        ] {
            assert_eq!(class(sql), (expected, java.to_owned()), "{sql}");
        }
    }

    #[test]
    fn what_is_no_statement() {
        for sql in ["fly me", "select 'a", "select 1; select 2", "42"] {
            let error = Statement::parse(sql).unwrap_err();
            assert!(error.starts_with("You have an error in your SQL syntax"));
        }
        // Quoted, a semicolon is text.
        assert!(Statement::parse("select ';', $$ ; $$, e'\\';'").is_ok());
    }
}
