//! A logical database of a proxy: dropped, imported, read again. Nothing on a data node is touched.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::ProxyConnection;
use crate::error::SqlError;

/// What a proxy says to IMPORT METADATA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportReply {
    /// It took.
    Imported,
    /// It failed in a way that is known to pass: drop the database, which may be there now and empty, and import it again. The
    /// proxy's words.
    Again(String),
}

impl ProxyConnection {
    /// `DROP DATABASE`, if there is one of this name. The session must not be of it.
    ///
    /// # Errors
    /// [`SqlError::BadName`]; those of a call: it may be gone all the same.
    pub async fn drop_database(&self, name: &str, deadline: Duration) -> Result<(), SqlError> {
        let sql = format!("DROP DATABASE {}", identifier(name)?);
        match self.ask("DROP DATABASE", &sql, deadline).await {
            // In 5.5.2 that is the bare name of a class.
            Err(SqlError::Server {
                sqlstate, message, ..
            }) if sqlstate == "3D000"
                || message.ends_with("PostgreSQLException")
                || message.contains("doesn't exist")
                || message.contains("does not exist") =>
            {
                Ok(())
            }
            dropped => dropped.map(drop),
        }
    }

    /// `IMPORT METADATA` of a document as EXPORT METADATA gives it. It connects to every storage unit.
    ///
    /// # Errors
    /// Those of a call: some of it may have been imported.
    pub async fn import_metadata(
        &self,
        json: &str,
        deadline: Duration,
    ) -> Result<ImportReply, SqlError> {
        let sql = format!("IMPORT METADATA '{}'", STANDARD.encode(json));
        match self.ask("IMPORT METADATA", &sql, deadline).await {
            Ok(_) => Ok(ImportReply::Imported),
            // 5.5.2 does not find the database that it has just made, or one that it has just dropped is not gone yet.
            Err(SqlError::Server {
                sqlstate, message, ..
            }) if message.contains("NullPointerException") || sqlstate == "42P04" => {
                Ok(ImportReply::Again(message))
            }
            Err(error) => Err(error),
        }
    }

    /// `REFRESH DATABASE METADATA`: without it, what IMPORT did does not outlast a restart of the proxy.
    ///
    /// # Errors
    /// [`SqlError::BadName`]; those of a call.
    pub async fn refresh_database(&self, name: &str, deadline: Duration) -> Result<(), SqlError> {
        let sql = format!("REFRESH DATABASE METADATA {}", identifier(name)?);
        let refreshed = self.ask("REFRESH DATABASE METADATA", &sql, deadline).await;
        refreshed.map(drop)
    }

    /// Reads one row of `table`, or nothing of none, in this session's database.
    ///
    /// # Errors
    /// [`SqlError::BadName`]; those of a call.
    pub async fn look(&self, table: Option<&str>, deadline: Duration) -> Result<(), SqlError> {
        let sql = match table {
            Some(table) => format!("SELECT count(*) FROM {}", identifier(table)?),
            None => "SELECT 1".to_owned(),
        };
        self.ask("SELECT", &sql, deadline).await.map(drop)
    }
}

/// A name in a statement; in quotes only where it needs them.
fn identifier(name: &str) -> Result<String, SqlError> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if !name.is_empty()
        && name.chars().all(plain)
        && !name.starts_with(|c: char| c.is_ascii_digit())
    {
        return Ok(name.to_owned());
    }
    if name.is_empty() || name.contains(['"', '`', '\\', '\0']) {
        return Err(SqlError::BadName {
            what: "the logical database or table",
            value: name.to_owned(),
            reason: "it cannot be put into quotes",
        });
    }
    Ok(format!("\"{name}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_where_they_need_it() {
        assert_eq!(identifier("bank_1").unwrap(), "bank_1");
        assert_eq!(identifier("My Bank").unwrap(), "\"My Bank\"");
        assert_eq!(identifier("1a").unwrap(), "\"1a\"");
        for bad in ["", "a\"b", "a`b"] {
            assert!(identifier(bad).is_err(), "{bad}");
        }
    }
}
