//! `/proc/self/mountinfo`: what is mounted, learned without touching it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use super::SOURCE;

/// One of our mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Mount point.
    pub(super) point: PathBuf,
    /// Whose it is, as FUSE says: the only user that may detach it, besides root.
    pub(super) user: Option<u32>,
}

/// Whether one of ours is mounted at `point`. If the table cannot be read: yes.
///
/// Before Linux 5.8 an unmount elsewhere may hide a line from one reading (commit 9f6c61f96f2d, "proc/mounts: add cursor"), so what
/// is missing is looked for again.
pub(super) fn mounted(point: &Path) -> bool {
    (0..3).any(|_| match fs::read("/proc/self/mountinfo") {
        Ok(table) => ours(&table).iter().any(|entry| entry.point == point),
        Err(_) => true,
    })
}

/// All of ours in this mount namespace.
pub(super) fn all() -> Vec<Entry> {
    fs::read("/proc/self/mountinfo")
        .map(|table| ours(&table))
        .unwrap_or_default()
}

fn ours(table: &[u8]) -> Vec<Entry> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(entry)
        .collect()
}

/// `36 35 98:0 /root /point options [optional fields] - type source super-options`
fn entry(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let point = fields.nth(4)?;
    let mut behind = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = behind.next()?;
    if !kind.starts_with(b"fuse") || behind.next()? != SOURCE.as_bytes() {
        return None;
    }
    let options = behind.next().unwrap_or_default();
    let user = options
        .split(|byte| *byte == b',')
        .find_map(|option| option.strip_prefix(b"user_id="))
        .and_then(|id| std::str::from_utf8(id).ok()?.parse().ok());
    Some(Entry {
        point: PathBuf::from(unescape(point)),
        user,
    })
}

/// Blanks, tabs, newlines and backslashes stand there as `\040` and the like.
fn unescape(text: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let octal = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        bytes.push(octal.unwrap_or(*first));
        rest = &rest[if octal.is_some() { 4 } else { 1 }..];
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_mounts_are_seen_with_their_real_paths() {
        let table = b"25 1 0:23 / /proc rw,nosuid - proc proc rw\n\
            90 25 0:44 / /run/a\\040b\\134c/catalog rw,nosuid shared:5 master:1 - fuse.gs_pitr gs_pitr rw,user_id=101,group_id=104\n\
            91 25 0:45 / /mnt rw - fuse.sshfs gs_pitr:/x rw,user_id=0\n\
            92 25 0:46 / /gs_pitr rw - ext4 gs_pitr rw\n\
            broken\n\
            93 25 0:47 / /x rw - fuse gs_pitr\n";
        let found = ours(table);
        let expected = [
            Entry {
                point: PathBuf::from("/run/a b\\c/catalog"),
                user: Some(101),
            },
            Entry {
                point: PathBuf::from("/x"),
                user: None,
            },
        ];
        assert_eq!(found, expected);
        assert!(!mounted(Path::new("/nowhere/catalog")));
    }
}
