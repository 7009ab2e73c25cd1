//! What of a data directory is not copied, after `excludeDirContents`, `excludeFiles` and `sendDir` of
//! PostgreSQL's basebackup.c.

/// Directories whose content is skipped; they themselves are kept, because the server does not create them.
const EMPTIED: [&str; 8] = [
    "pg_wal",
    "pg_replslot",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_subtrans",
    "pg_stat_tmp",
];

/// Files that are skipped wherever they are.
const SKIPPED: [&str; 7] = [
    "postgresql.auto.conf.tmp",
    "current_logfiles.tmp",
    "backup_manifest",
    "postmaster.pid",
    "postmaster.opts",
    "recovery.signal",
    "standby.signal",
];

/// Files that are skipped together with everything whose name begins so. `backup_label.old` and its like
/// belong here; a server that is not in recovery has no use for any of them.
const SKIPPED_PREFIXES: [&str; 5] = [
    "pg_internal.init",
    "backup_label",
    "tablespace_map",
    "pgsql_tmp",
    ".gs_pitr-",
];

/// Whether the content of the directory `name`, right below the data directory, is skipped.
#[must_use]
pub fn is_emptied(name: &str) -> bool {
    EMPTIED.contains(&name)
}

/// Whether a file or directory is skipped because of its name.
#[must_use]
pub fn is_skipped(name: &str) -> bool {
    SKIPPED.contains(&name)
        || SKIPPED_PREFIXES
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

/// Which fork of a relation a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// The data itself.
    Main,
    /// Free space map.
    FreeSpace,
    /// Visibility map.
    Visibility,
    /// What an unlogged relation is reset to after a crash.
    Init,
}

/// A file of a relation, by its name: `<relation>[_fork][.segment]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelationFile<'a> {
    /// The relation's number, as text.
    pub relation: &'a str,
    /// The fork.
    pub fork: Fork,
    /// The segment (1 GiB each by default), from 0.
    pub segment: u32,
}

impl<'a> RelationFile<'a> {
    /// Reads a file name; `None` if it is not one of a (permanent or unlogged) relation.
    #[must_use]
    pub fn parse(name: &'a str) -> Option<Self> {
        let (stem, segment) = match name.split_once('.') {
            Some((stem, digits)) => (stem, parse_number(digits)?),
            None => (name, 0),
        };
        let (relation, fork) = match stem.split_once('_') {
            None => (stem, Fork::Main),
            Some((relation, "fsm")) => (relation, Fork::FreeSpace),
            Some((relation, "vm")) => (relation, Fork::Visibility),
            Some((relation, "init")) => (relation, Fork::Init),
            Some(_) => return None,
        };
        parse_number(relation)?;
        Some(Self {
            relation,
            fork,
            segment,
        })
    }
}

fn parse_number(digits: &str) -> Option<u32> {
    if digits.starts_with('0') || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// Whether a file in a directory of relations is one of a temporary relation: `t<backend>_<relation>...`.
#[must_use]
pub fn is_temporary_relation(name: &str) -> bool {
    let Some((backend, rest)) = name.strip_prefix('t').and_then(|rest| rest.split_once('_')) else {
        return false;
    };
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    is_number(backend) && rest.starts_with(|c: char| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_basebackup_skips_are_skipped() {
        for name in [
            "postgresql.auto.conf.tmp",
            "current_logfiles.tmp",
            "pg_internal.init",
            "pg_internal.init.4711",
            "backup_label",
            "backup_label.old",
            "tablespace_map",
            "tablespace_map.old",
            "backup_manifest",
            "postmaster.pid",
            "postmaster.opts",
            "pgsql_tmp",
            "pgsql_tmp123.0",
            "recovery.signal",
            "standby.signal",
            ".gs_pitr-restore",
        ] {
            assert!(is_skipped(name), "{name}");
        }
        for name in [
            "postgresql.auto.conf",
            "current_logfiles",
            "PG_VERSION",
            "pg_control",
            "16384",
            "my recovery.signal",
        ] {
            assert!(!is_skipped(name), "{name}");
        }
        assert!(is_emptied("pg_wal") && !is_emptied("pg_xact"));
    }

    #[test]
    fn relation_files_are_told_by_their_names() {
        let file =
            |name| RelationFile::parse(name).map(|file| (file.relation, file.fork, file.segment));
        assert_eq!(file("16384"), Some(("16384", Fork::Main, 0)));
        assert_eq!(file("16384.12"), Some(("16384", Fork::Main, 12)));
        assert_eq!(file("16384_fsm"), Some(("16384", Fork::FreeSpace, 0)));
        assert_eq!(file("16384_vm.1"), Some(("16384", Fork::Visibility, 1)));
        assert_eq!(file("16384_init"), Some(("16384", Fork::Init, 0)));
        for name in [
            "pg_filenode.map",
            "PG_VERSION",
            "16384_foo",
            "16384.",
            "16384.x",
            "t3_16384",
            "016384",
            "99999999999",
            "_init",
            "16384.0",
            "",
        ] {
            assert_eq!(file(name), None, "{name}");
        }
    }

    #[test]
    fn temporary_relations_are_told_by_their_names() {
        for name in ["t3_16384", "t12_16384.1", "t3_16384_fsm"] {
            assert!(is_temporary_relation(name), "{name}");
        }
        for name in ["t_16384", "t3_x", "t3", "3_16384", "toast"] {
            assert!(!is_temporary_relation(name), "{name}");
        }
    }
}
