//! SQL text: quoting on the way out, columns on the way in.

use std::str::FromStr;

use tokio_postgres::SimpleQueryRow;

use crate::error::SqlError;

/// A string literal. The session has `standard_conforming_strings` on, so only quotes need care; the
/// protocol ends a statement at a NUL, so that is refused.
pub(crate) fn literal(what: &'static str, value: &str) -> Result<String, SqlError> {
    if value.chars().any(char::is_control) {
        return Err(SqlError::BadName {
            what,
            value: value.to_owned(),
            reason: "it has control characters",
        });
    }
    Ok(format!("'{}'", value.replace('\'', "''")))
}

/// A quoted identifier, for statements that are shown to the operator.
pub(crate) fn identifier(name: &str) -> String {
    let plain = name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        && name.bytes().next().is_some_and(|b| !b.is_ascii_digit());
    if plain {
        name.to_owned()
    } else {
        format!("\"{}\"", name.replace('"', "\"\""))
    }
}

/// A row of an answer. Columns are found by position, as the statements here name them all.
pub(crate) struct Row {
    pub(crate) what: &'static str,
    pub(crate) row: SimpleQueryRow,
}

impl Row {
    /// Column `at`; `None` is SQL's NULL.
    pub(crate) fn optional(&self, at: usize) -> Result<Option<&str>, SqlError> {
        self.row.try_get(at).map_err(|e| self.bad(&e.to_string()))
    }

    /// Column `at`, which must not be NULL.
    pub(crate) fn text(&self, at: usize) -> Result<&str, SqlError> {
        self.optional(at)?
            .ok_or_else(|| self.bad(&format!("column {at} is NULL")))
    }

    /// Column `at`, parsed.
    pub(crate) fn value<T: FromStr>(&self, at: usize) -> Result<T, SqlError> {
        let text = self.text(at)?;
        text.parse()
            .map_err(|_| self.bad(&format!("column {at} is {text:?}")))
    }

    /// Column `at`, parsed unless NULL.
    pub(crate) fn optional_value<T: FromStr>(&self, at: usize) -> Result<Option<T>, SqlError> {
        self.optional(at)?.map(|_| self.value(at)).transpose()
    }

    /// Column `at`, a boolean.
    pub(crate) fn flag(&self, at: usize) -> Result<bool, SqlError> {
        Ok(self.text(at)? == "t")
    }

    /// Column `at`, bytes in hexadecimal.
    pub(crate) fn bytes(&self, at: usize) -> Result<Vec<u8>, SqlError> {
        let text = self.text(at)?.as_bytes();
        let (pairs, rest) = text.as_chunks::<2>();
        let digit = |b: u8| {
            char::from(b)
                .to_digit(16)
                .and_then(|d| u8::try_from(d).ok())
        };
        pairs
            .iter()
            .map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?))
            .collect::<Option<Vec<u8>>>()
            .filter(|_| rest.is_empty())
            .ok_or_else(|| self.bad(&format!("column {at} is no hexadecimal text")))
    }

    fn bad(&self, answer: &str) -> SqlError {
        SqlError::Answer {
            what: self.what,
            answer: answer.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_cannot_be_left() {
        assert_eq!(literal("label", "a'b").unwrap(), "'a''b'");
        assert_eq!(literal("label", r"a\'b").unwrap(), r"'a\''b'");
        assert_eq!(literal("label", "").unwrap(), "''");
        for bad in ["\0", "a\nb", "\x7f", "\u{85}"] {
            assert!(literal("label", bad).is_err());
        }
    }

    #[test]
    fn identifiers_are_quoted_where_needed() {
        assert_eq!(identifier("backup_1"), "backup_1");
        assert_eq!(identifier("1st"), "\"1st\"");
        assert_eq!(identifier("My \"User\""), "\"My \"\"User\"\"\"");
        assert_eq!(identifier(""), "\"\"");
    }
}
