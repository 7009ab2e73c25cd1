//! Tablespaces: those of the copy get new places beside the target; those that replay creates
//! keep the literal path that their WAL record has, and that is looked at before any server is started.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use agent_api::{ApiError, ErrorKind};
use catalog::model::NodeBackup;

use super::files::{is_absent_or_empty, remove_file, sync};
use super::live::{Live, read_links};
use super::workspace::MARKER;
use crate::config::Config;

/// Where a tablespace of the copy goes.
pub(super) fn location(tablespaces: &Path, oid: u32) -> PathBuf {
    tablespaces.join(oid.to_string())
}

/// `tablespace_map` with the new places, and its OIDs; `None` if the copy has no tablespaces.
///
/// # Errors
/// If the map and the manifest's list do not name the same tablespaces.
pub(super) fn rewritten_map(
    node: &NodeBackup,
    tablespaces: &Path,
) -> Result<Option<String>, ApiError> {
    let damaged = |what: String| {
        let message = format!("tablespace_map of node {}: {what}", node.node_id);
        ApiError::new(ErrorKind::Damaged, message)
    };
    let mut listed: BTreeMap<u32, &str> = BTreeMap::new();
    for tablespace in &node.tablespaces {
        listed.insert(tablespace.oid, &tablespace.location);
    }
    let text = node.tablespace_map.as_deref().unwrap_or_default();
    let mut map = String::new();
    for line in map_lines(text) {
        let oid = line.split_once(' ').and_then(|(oid, _)| oid.parse().ok());
        let Some(oid) = oid else {
            return Err(damaged(format!(
                "`{}` is not an OID and a path",
                line.escape_debug()
            )));
        };
        if listed.remove(&oid).is_none() {
            return Err(damaged(format!("tablespace {oid} is not in the manifest")));
        }
        let location = location(tablespaces, oid);
        let line = format!("{oid} {}\n", location.display());
        map.push_str(&line);
    }
    if let Some((oid, location)) = listed.pop_first() {
        return Err(damaged(format!("tablespace {oid} ({location}) is missing")));
    }
    Ok((!map.is_empty()).then_some(map))
}

/// Lines end in a newline without a backslash before it: paths may have newlines, which are escaped.
fn map_lines(text: &str) -> Vec<&str> {
    let bytes = text.as_bytes();
    let mut lines = Vec::new();
    let mut begin = 0;
    for (at, byte) in bytes.iter().enumerate() {
        if *byte == b'\n' && (at == 0 || bytes[at - 1] != b'\\') {
            lines.push(&text[begin..at]);
            begin = at + 1;
        }
    }
    lines.push(&text[begin..]);
    lines.retain(|line| !line.trim().is_empty());
    lines
}

/// Turns the links to openGauss's tablespaces within the data directory (`pg_location`), which are absolute, from `data`
/// to where it is moved, `home`. May be done again.
pub(super) fn lead_home(data: &Path, home: &Path) -> io::Result<()> {
    let links = data.join("pg_tblspc");
    for (name, to) in read_links(data)? {
        if let Ok(below) = to.strip_prefix(data) {
            let new = links.join(format!("{name}.gs_pitr-new"));
            remove_file(&new)?;
            symlink(home.join(below), &new)?;
            std::fs::rename(&new, links.join(name))?;
        }
    }
    sync(&links)
}

/// A tablespace that the WAL up to the point creates.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Created {
    /// Its location, as it stands in the record.
    pub(super) location: PathBuf,
    /// Its OID.
    pub(super) oid: u32,
}

/// Who has what is at the literal path of a tablespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owner {
    /// There is nothing, or an empty directory.
    Nobody,
    /// The database that is to be replaced, by this link.
    Replaced(String),
}

/// Checks that replay may use the literal path of a tablespace: nothing is there, or an empty directory, or files of the
/// very database that is to be replaced. Replay itself does not ask: it forcibly removes what is in its way, which
/// once destroyed 50,000 rows of a live database.
pub(super) fn check_literal(
    created: &Created,
    target: &Path,
    live: Option<&Live>,
    config: &Config,
) -> Result<Owner, ApiError> {
    let Created { location, oid } = created;
    let refuse = |why: String, next: &str| {
        let message = format!(
            "between the copy and the point tablespace {oid} was created at {}, and replay creates it at the same \
             path on this host: {why}",
            location.display()
        );
        Err::<Owner, _>(ApiError::new(ErrorKind::Target, message).next(next))
    };
    let host = "restore on a host where that path is free, or move what is there away";
    if !location.is_absolute() || location.starts_with(target) || target.starts_with(location) {
        return refuse(
            "it is not outside the target".to_owned(),
            "choose another --target-dir",
        );
    }
    // Whoever made the backup chose the path; the agent writes only where its operator lets it.
    if let Err(outside) = config.allowed_target(location) {
        let parent = location.parent().unwrap_or(Path::new("/")).display();
        return refuse(
            outside.message,
            &format!(
                "make sure that {parent} exists, and start the agent with --allow-root {parent} too"
            ),
        );
    }
    if location.join(MARKER).exists() {
        return refuse("another restore works there".to_owned(), host);
    }
    match is_absent_or_empty(location) {
        Ok(true) => Ok(Owner::Nobody),
        Ok(false) => {
            if let Some(link) = live.and_then(|live| live.link_to(location)) {
                return Ok(Owner::Replaced(link.clone()));
            }
            let owner = running_cluster(location);
            refuse(format!("something is there already{owner}"), host)
        }
        Err(error) => refuse(format!("it cannot be looked at: {error}"), host),
    }
}

/// Says which running server keeps files there, if that can be seen.
fn running_cluster(location: &Path) -> String {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return String::new();
    };
    for process in processes.filter_map(Result::ok) {
        let Ok(cwd) = std::fs::read_link(process.path().join("cwd")) else {
            continue;
        };
        let Ok(links) = std::fs::read_dir(cwd.join("pg_tblspc")) else {
            continue;
        };
        let mut links = links.filter_map(Result::ok);
        if links.any(|link| std::fs::read_link(link.path()).is_ok_and(|to| to == location)) {
            return format!(", in use by the running database in {}", cwd.display());
        }
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_map_may_hold_escaped_newlines() {
        let text = "16385 /a b\n16386 /odd\\\nname\n16387 /c";
        assert_eq!(
            map_lines(text),
            ["16385 /a b", "16386 /odd\\\nname", "16387 /c"]
        );
        assert!(map_lines("").is_empty());
    }

    #[test]
    fn links_into_the_data_directory_go_with_it() {
        let root = tempfile::tempdir().unwrap();
        let (data, home) = (root.path().join("work/data"), root.path().join("node"));
        let links = data.join("pg_tblspc");
        std::fs::create_dir_all(&links).unwrap();
        symlink(data.join("pg_location/a"), links.join("16385")).unwrap();
        symlink("/elsewhere", links.join("16386")).unwrap();
        for _ in 0..2 {
            lead_home(&data, &home).unwrap();
            let found = read_links(&data).unwrap();
            assert_eq!(found["16385"], home.join("pg_location/a"));
            assert_eq!(found["16386"], Path::new("/elsewhere"));
            assert_eq!(found.len(), 2);
        }
    }

    #[test]
    fn a_literal_path_is_used_only_if_it_is_allowed_and_nothing_is_there() {
        let (root, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let target = root.path().join("node");
        let config = Config {
            allow_roots: vec![root.path().canonicalize().unwrap()],
            ..Config::default()
        };
        let check = |location: PathBuf| {
            check_literal(&Created { location, oid: 1 }, &target, None, &config)
        };
        check(root.path().join("absent")).unwrap();
        let full = root.path().join("full");
        std::fs::create_dir(&full).unwrap();
        check(full.clone()).unwrap();
        std::fs::write(full.join("PG_15_1"), "").unwrap();
        let error = check(full).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Target);
        assert!(error.message.contains("/full") && error.message.contains("already"));
        assert!(check(root.path().join("no/parent")).is_err());
        let error = check(elsewhere.path().join("absent")).unwrap_err();
        assert!(error.next.unwrap().contains("--allow-root"));
        assert!(check(target.join("inside")).is_err());
        assert!(check("relative".into()).is_err());
    }
}
