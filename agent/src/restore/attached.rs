//! Configuration that lived outside the source's data directory, and includes that must not lead back there.
//!
//! An include by absolute path would be read from THIS host, where the path may belong to another cluster.
//! One of a file that travelled with the copy is turned to the restored file; any other is switched off.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use agent_api::{ApiError, ErrorKind};
use catalog::model::{AttachmentRole, NodeBackup};

use super::errors::local;
use super::files::sync;

/// Directory of the index that holds configuration from outside the data directory.
pub(super) const ATTACHMENTS: &str = "attachments";

/// The restored configuration files that are not in the data directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Attached {
    pub(super) config: Option<PathBuf>,
    pub(super) hba: Option<PathBuf>,
    pub(super) ident: Option<PathBuf>,
}

/// Where an attachment (its path in the index) goes.
pub(super) fn location(config: &Path, path: &str) -> Result<PathBuf, ApiError> {
    let below = path
        .strip_prefix(ATTACHMENTS)
        .and_then(|rest| rest.strip_prefix('/'))
        .map(Path::new)
        .filter(|rest| {
            rest.components()
                .all(|part| matches!(part, Component::Normal(_)))
        });
    below.map(|below| config.join(below)).ok_or_else(|| {
        let message = format!("the manifest's attachment `{path}` is not below `{ATTACHMENTS}/`");
        ApiError::new(ErrorKind::Damaged, message)
    })
}

/// Finds the files by their roles.
pub(super) fn locate(node: &NodeBackup, config: &Path) -> Result<Attached, ApiError> {
    let mut attached = Attached::default();
    for attachment in &node.attachments {
        let path = location(config, &attachment.path)?;
        match attachment.role {
            AttachmentRole::Config => attached.config = Some(path),
            AttachmentRole::Hba => attached.hba = Some(path),
            AttachmentRole::Ident => attached.ident = Some(path),
            AttachmentRole::Included => {}
        }
    }
    Ok(attached)
}

/// Finds the files by their roles, and settles the includes of all configuration files.
///
/// Returns warnings too.
pub(super) fn settle(
    node: &NodeBackup,
    config: &Path,
    data: &Path,
) -> Result<(Attached, Vec<String>), ApiError> {
    let attached = locate(node, config)?;
    let mut files = vec![data.join("postgresql.conf")];
    for attachment in &node.attachments {
        if matches!(
            attachment.role,
            AttachmentRole::Config | AttachmentRole::Included
        ) {
            files.push(location(config, &attachment.path)?);
        }
    }
    let moved = |path: &Path| {
        let travelled = node
            .attachments
            .iter()
            .any(|a| Path::new(&a.source).starts_with(path));
        travelled.then(|| config.join(path.strip_prefix("/").unwrap_or(path)))
    };
    let mut warnings = Vec::new();
    for file in files {
        settle_file(&file, &moved, &mut warnings).map_err(|error| local(&file, &error))?;
    }
    Ok((attached, warnings))
}

fn settle_file(
    file: &Path,
    moved: &dyn Fn(&Path) -> Option<PathBuf>,
    warnings: &mut Vec<String>,
) -> io::Result<()> {
    let text = match fs::read(file) {
        // Not UTF-8: kept byte by byte unless an include has to change.
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let directory = file.parent().unwrap_or(Path::new("/"));
    let mut changed = false;
    let mut settled = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let Some((keyword, target)) = include(line) else {
            settled += line;
            continue;
        };
        if !target.is_absolute() {
            if keyword == "include_dir" {
                // A directory without files did not travel, and a missing one stops the server.
                fs::create_dir_all(directory.join(&target))?;
            }
            settled += line;
            continue;
        }
        changed = true;
        if let Some(place) = moved(&target) {
            let place = place.to_string_lossy().replace('\'', "''");
            settled.extend([keyword, " '", &place, "'\n"]);
        } else {
            settled.extend(["#gs_pitr restore: not on this host: ", line]);
            warnings.push(format!(
                "{}: `{keyword}` of {} was switched off: it is not in the backup",
                file.display(),
                target.display()
            ));
        }
    }
    if changed {
        let mode = fs::metadata(file)?.permissions().mode();
        let new = file.with_extension("gs_pitr-new");
        fs::write(&new, settled)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
        fs::File::open(&new)?.sync_all()?;
        fs::rename(&new, file)?;
        sync(directory)?;
    }
    Ok(())
}

/// The include directive of a line of postgresql.conf: `name ['='] 'value'`.
fn include(line: &str) -> Option<(&'static str, PathBuf)> {
    let line = line.trim();
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))?;
    let (name, rest) = line.split_at(end);
    let keyword = ["include", "include_if_exists", "include_dir"]
        .into_iter()
        .find(|keyword| keyword.eq_ignore_ascii_case(name))?;
    let rest = rest.trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    let Some(quoted) = rest.strip_prefix('\'') else {
        let end = rest.find(|c: char| c.is_whitespace() || c == '#');
        let bare = &rest[..end.unwrap_or(rest.len())];
        return (!bare.is_empty()).then(|| (keyword, bare.into()));
    };
    let mut value = String::new();
    let mut letters = quoted.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '\'' if letters.peek() == Some(&'\'') => value.extend(letters.next()),
            '\'' => return Some((keyword, value.into())),
            '\\' => value.extend(letters.next()),
            letter => value.push(letter),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn includes_are_read_as_the_server_reads_them() {
        let is = |line, keyword, path: &str| {
            assert_eq!(
                include(line),
                Some((keyword, PathBuf::from(path))),
                "{line}"
            );
        };
        is("include_dir = 'conf.d'\t# all\n", "include_dir", "conf.d");
        is("  INCLUDE '/a/it''s'\n", "include", "/a/it's");
        is("include_if_exists=/x#y", "include_if_exists", "/x");
        for line in [
            "#include 'x'",
            "included = 1",
            "port = 1",
            "",
            "include ''x",
            "include",
        ] {
            assert!(
                include(line).is_none_or(|(_, path)| path.as_os_str().is_empty()),
                "{line}"
            );
        }
    }

    #[test]
    fn absolute_includes_lead_to_what_travelled_or_nowhere() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("postgresql.conf");
        let text = "port = 1\ninclude '/etc/pg/a.conf'\ninclude_dir '/etc/pg/none'\ninclude_dir 'empty.d'\n";
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let moved = |path: &Path| {
            (path == Path::new("/etc/pg/a.conf"))
                .then(|| PathBuf::from("/r/n.config/etc/pg/a.conf"))
        };
        let mut warnings = Vec::new();
        settle_file(&file, &moved, &mut warnings).unwrap();
        let settled = fs::read_to_string(&file).unwrap();
        assert!(settled.contains("\ninclude '/r/n.config/etc/pg/a.conf'\n"));
        assert!(
            settled.contains("\n#gs_pitr restore: not on this host: include_dir '/etc/pg/none'\n")
        );
        assert!(settled.ends_with("include_dir 'empty.d'\n"));
        assert!(root.path().join("empty.d").is_dir());
        assert_eq!(warnings.len(), 1);
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o640
        );
    }

    #[test]
    fn attachments_stay_below_their_directory() {
        let config = Path::new("/r/n.config");
        let place = location(config, "attachments/etc/pg/a.conf").unwrap();
        assert_eq!(place, Path::new("/r/n.config/etc/pg/a.conf"));
        for path in [
            "attachments",
            "attachments//etc",
            "base/1",
            "attachments/../x",
            "attachmentsx/y",
        ] {
            assert!(location(config, path).is_err(), "{path}");
        }
    }
}
