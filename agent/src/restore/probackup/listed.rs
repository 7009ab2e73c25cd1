//! What the copies' own lists of files say, `backup_content.control`: a line a file, values always quoted, never escaped.

use agent_api::{ApiError, ChainLink, ErrorKind};
use bytes::Bytes;
use catalog::model::{NodeBackup, Probackup};

use crate::catalog_fs::stored::Stored;

/// Read at a time: lists have some 250 bytes a file.
const CHUNK: usize = 256 << 10;

/// A file as it was on the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Original {
    /// There was none.
    Absent,
    /// Its bytes.
    Bytes(Bytes),
}

fn damaged(what: String) -> ApiError {
    ApiError::new(ErrorKind::Damaged, what).next("run `gs_pitr show`, and restore another backup")
}

fn directory(probackup: &Probackup) -> String {
    format!("backups/{}/{}", probackup.instance, probackup.id)
}

/// Compares the copy's label and map of tablespaces with those of the manifest. The program follows its own map: a
/// tablespace that the manifest does not know would be made where it was on the source.
///
/// # Errors
/// [`ErrorKind::Damaged`] if they differ.
pub(super) async fn check_label(
    stored: &Stored,
    node: &NodeBackup,
    probackup: &Probackup,
) -> Result<(), ApiError> {
    let database = format!("{}/database", directory(probackup));
    let files = [
        ("backup_label", Some(node.backup_label.as_str())),
        ("tablespace_map", node.tablespace_map.as_deref()),
    ];
    for (name, ours) in files {
        let theirs = stored.file(&format!("{database}/{name}")).await?;
        let theirs = theirs.as_deref().unwrap_or_default().trim_ascii();
        let ours = ours.unwrap_or_default().trim();
        // openGauss keeps neither in the catalog where there are none on the source.
        if !theirs.is_empty() && theirs != ours.as_bytes() {
            return Err(damaged(format!(
                "{name} in the copy of node {} is not the one in the manifest",
                node.node_id
            )));
        }
    }
    Ok(())
}

/// A small file of the newest copy as it was on the source: increments leave out what is as it was in their parent.
///
/// # Errors
/// [`ErrorKind::Damaged`] if a list names what is not there; errors of reading.
pub(super) async fn original(
    stored: &Stored,
    chain: &[ChainLink],
    name: &str,
) -> Result<Original, ApiError> {
    for link in chain.iter().rev() {
        let Some(probackup) = &link.node.probackup else {
            continue;
        };
        let directory = directory(probackup);
        match listed_size(stored, &directory, name).await? {
            None => return Ok(Original::Absent),
            Some(0) => return Ok(Original::Bytes(Bytes::new())),
            // As it was in the parent.
            Some(-1) => {}
            Some(size) => {
                let path = format!("{directory}/database/{name}");
                let bytes = stored.file(&path).await?;
                let whole = bytes.filter(|bytes| i64::try_from(bytes.len()) == Ok(size));
                return whole.map(Original::Bytes).ok_or_else(|| {
                    damaged(format!(
                        "`{path}` has not the {size} bytes that its list says"
                    ))
                });
            }
        }
    }
    Err(damaged(format!(
        "no copy of the chain has `{name}`, and the newest one needs it"
    )))
}

/// The size that a list has for a file of the data directory; `None`: it is not listed.
async fn listed_size(
    stored: &Stored,
    directory: &str,
    name: &str,
) -> Result<Option<i64>, ApiError> {
    let list = format!("{directory}/backup_content.control");
    let begin = format!("{{\"path\":\"{name}\",");
    let (mut offset, mut rest) = (0, Vec::new());
    loop {
        let chunk = stored.read(&list, offset, CHUNK).await?;
        let chunk = chunk.ok_or_else(|| damaged(format!("`{list}` is missing")))?;
        offset += chunk.len() as u64;
        let ended = chunk.is_empty();
        rest.extend_from_slice(&chunk);
        let whole = if ended {
            rest.len()
        } else {
            rest.iter()
                .rposition(|byte| *byte == b'\n')
                .map_or(0, |at| at + 1)
        };
        let lines = rest.get(..whole).unwrap_or_default();
        let found = lines
            .split(|byte| *byte == b'\n')
            .find(|line| line.starts_with(begin.as_bytes()));
        if let Some(line) = found {
            let size =
                size_of(line).ok_or_else(|| damaged(format!("`{list}`: no size of `{name}`")))?;
            return Ok(Some(size));
        }
        rest.drain(..whole);
        if ended {
            return Ok(None);
        }
    }
}

fn size_of(line: &[u8]) -> Option<i64> {
    let line = std::str::from_utf8(line).ok()?;
    let (_, value) = line.split_once("\"size\":\"")?;
    value.split('"').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_a_size() {
        let line = br#"{"path":"a", "size":"-1", "mode":"33152", "is_datafile":"0"}"#;
        assert_eq!(size_of(line), Some(-1));
        assert_eq!(size_of(br#"{"path":"a", "mode":"1"}"#), None);
    }
}
