//! Which file of a backup catalog is kept how; facts of the programs' ways, see the table in the parent module.

/// How a file is kept while a backup writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Written once, in order, never read: streams away.
    Stream,
    /// A WAL segment: written in any order, read back, goes to the bucket by itself when complete.
    Segment,
    /// Small, mutable, read back.
    Memory,
    /// The list of files: mutable, read back, and large: in memory compressed.
    List,
    /// Of this process only: never stored.
    Temporary,
}

/// Digits of a WAL segment's name.
const SEGMENT_DIGITS: usize = 24;
/// What the WAL receiver of `gs_probackup` calls a segment that is not complete.
const PARTIAL: &str = ".partial";
/// Depth of a backup's directory: `backups/<instance>/<id>`.
pub(super) const BACKUP_DEPTH: usize = 3;

impl Class {
    /// The class of a file by its path in the catalog.
    pub(super) fn of(path: &str) -> Self {
        let parts: Vec<&str> = path.split('/').collect();
        let name = parts.last().copied().unwrap_or_default();
        match parts.get(BACKUP_DEPTH..) {
            Some([_, ..]) if parts.first() == Some(&"backups") => {}
            _ => return Self::beside(name),
        }
        match parts.get(BACKUP_DEPTH..).unwrap_or_default() {
            ["database", "pg_wal" | "pg_xlog", name] if segment_name(name).is_some() => {
                Self::Segment
            }
            ["database", "pg_wal" | "pg_xlog", _]
            | [
                "database",
                "backup_label" | "tablespace_map" | "database_map",
            ] => Self::Memory,
            ["database" | "external_directories", _, ..] => Self::Stream,
            [name] if name.starts_with("page_header_map") => Self::Stream,
            [name] if name.starts_with("backup_content.control") => Self::List,
            _ => Self::beside(name),
        }
    }

    /// The class of a file that is not part of the database.
    fn beside(name: &str) -> Self {
        if is_pid(name) {
            Self::Temporary
        } else {
            Self::Memory
        }
    }
}

/// `backup.pid`, `backup_ro.pid`, `backup_ro.pidtmp`.
fn is_pid(name: &str) -> bool {
    name.contains(".pid")
}

/// Whether the programs write a file of this name into a backup that is finished: locks and its status.
pub(super) fn written_to_parents(name: &str) -> bool {
    is_pid(name) || name.starts_with("backup.control")
}

/// The name of the WAL segment that a file is, or will be: `000000010000000000000003[.partial]`.
pub(super) fn segment_name(name: &str) -> Option<&str> {
    let segment = name.strip_suffix(PARTIAL).unwrap_or(name);
    let hex = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
    (segment.len() == SEGMENT_DIGITS && segment.bytes().all(hex)).then_some(segment)
}

/// Whether the name is that of a complete segment.
pub(super) fn is_final(name: &str) -> bool {
    segment_name(name) == Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_both_programs_are_told_apart() {
        for (path, class) in [
            ("backups/node/T1/database/base/1/1259", Class::Stream),
            ("backups/node/T1/database/PG_VERSION", Class::Stream),
            ("backups/node/T1/database/global/pg_control", Class::Stream),
            ("backups/node/T1/database/x.pid", Class::Stream),
            (
                "backups/node/T1/external_directories/externaldir1/PG_9.2_1/2/3",
                Class::Stream,
            ),
            (
                "backups/node/T1/external_directories/externaldir1/pg_wal/000000010000000000000001",
                Class::Stream,
            ),
            ("backups/node/T1/page_header_map", Class::Stream),
            (
                "backups/node/T1/database/pg_wal/000000010000000000000001",
                Class::Segment,
            ),
            (
                "backups/node/T1/database/pg_xlog/00000001000000000000001C.partial",
                Class::Segment,
            ),
            (
                "backups/node/T1/database/pg_xlog/00000001000000000000001c",
                Class::Memory,
            ),
            (
                "backups/node/T1/database/pg_wal/00000002.history",
                Class::Memory,
            ),
            ("backups/node/T1/database/backup_label", Class::Memory),
            ("backups/node/T1/database/base/backup_label", Class::Stream),
            ("backups/node/T1/database/tablespace_map", Class::Memory),
            ("backups/node/T1/database/database_map", Class::Memory),
            ("backups/node/T1/backup.control", Class::Memory),
            ("backups/node/T1/backup.control-123.tmp", Class::Memory),
            ("backups/node/T1/backup_content.control.tmp", Class::List),
            ("backups/node/T1/backup.pid", Class::Temporary),
            ("backups/node/T1/backup_ro.pidtmp", Class::Temporary),
            ("backups/node/pg_probackup.conf.tmp", Class::Memory),
            ("backups/node/pg_probackup.conf", Class::Memory),
            ("file", Class::Memory),
        ] {
            assert_eq!(Class::of(path), class, "{path}");
        }
    }
}
