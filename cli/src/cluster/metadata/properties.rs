//! The properties of the whole cluster. IMPORT METADATA replaces all of them by those of its document, and there is no form without:
//! so it is given those that are there.

use std::fmt::Write as _;

use super::fill::quoted;
use super::outline::split;

/// Without it 5.5.2 takes a new logical database for one of `MySQL`, and does not find its schemas: no storage unit can be registered.
const PROTOCOL: &str = "proxy-frontend-database-protocol-type";

/// The properties as an export has them, each written so that IMPORT reads what EXPORT meant.
///
/// # Errors
/// Why no database can be imported with them.
pub(super) fn importable(props: &str) -> Result<String, String> {
    let mut text = String::with_capacity(props.len());
    let mut protocol = false;
    for line in props.lines().filter(|line| !line.trim().is_empty()) {
        match split(line.trim()) {
            Some(("props", "")) => text.push_str("props:"),
            Some((key, value)) if line.starts_with(' ') && !value.is_empty() => {
                protocol |= key == PROTOCOL;
                let value = if is_plain(value) {
                    value.to_owned()
                } else {
                    quoted(value)
                };
                let _ = write!(text, "  {key}: {value}");
            }
            _ => return Err("their properties cannot be read".to_owned()),
        }
        text.push('\n');
    }
    if protocol {
        Ok(text)
    } else {
        Err(format!("their properties have no {PROTOCOL}"))
    }
}

/// Whether YAML reads it as what it looks like.
fn is_plain(value: &str) -> bool {
    let number = value.bytes().all(|b| b.is_ascii_digit());
    matches!(value, "true" | "false") || (number && (value == "0" || !value.starts_with('0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_those_of_the_export_and_mean_the_same() {
        let props = "props:\n  proxy-default-port: 23307\n  proxy-frontend-database-protocol-type: PostgreSQL\n  sql-show: true\n  x: 0123\n  y: it's: a #b\n";
        let expected = "props:\n  proxy-default-port: 23307\n  proxy-frontend-database-protocol-type: 'PostgreSQL'\n  sql-show: true\n  x: '0123'\n  y: 'it''s: a #b'\n";
        assert_eq!(importable(props).unwrap(), expected);
    }

    #[test]
    fn without_the_protocol_nothing_can_be_imported() {
        for props in ["", "props:\n  sql-show: true\n"] {
            let why = importable(props).unwrap_err();
            assert!(why.contains(PROTOCOL), "{why}");
        }
        let why = importable("props:\n  proxy-frontend-database-protocol-type: a\nb\n");
        assert!(why.unwrap_err().contains("cannot be read"));
    }
}
