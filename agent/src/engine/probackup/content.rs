//! `backup_content.control`, the program's own list of a backup's files, against what is stored.
//!
//! A line a file or directory, `{"path":"...", "size":"...", "mode":"...", ...}`, values always quoted and never escaped
//! (`write_backup_filelist` in its catalog.c). `size` is what it wrote: more than 0 and the file has exactly so many bytes;
//! 0 and it has none, and mostly is not there (empty files are not made); -1 and an increment left it out, since
//! it is as it was in the parent (`BYTES_INVALID`).

use std::io::{self, BufRead};

/// Files of a backup that its list does not have.
const UNLISTED: [&str; 3] = [
    "backup.control",
    "backup_content.control",
    "page_header_map",
];
/// Longest line: a path of 1 KiB and some numbers.
const LINE: usize = 64 << 10;

/// How list and store differ.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// The list cannot be read.
    #[error("its list of files cannot be read: {0}")]
    Read(#[from] io::Error),
    /// A line of the list is none.
    #[error("line {number} of its list of files is not understood: {why}")]
    Line {
        /// From 1.
        number: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A listed file is not stored.
    #[error("`{path}` is listed with {listed} bytes and was never stored")]
    Missing {
        /// Its path in the backup.
        path: String,
        /// Bytes in the list.
        listed: i64,
    },
    /// A file has another size.
    #[error("`{path}` is listed with {listed} bytes and stored with {stored}")]
    Size {
        /// Its path in the backup.
        path: String,
        /// Bytes in the list; -1: none, it is as in the parent.
        listed: i64,
        /// Bytes that are stored.
        stored: u64,
    },
    /// A stored file is not listed.
    #[error("`{path}` is stored with {stored} bytes and is not listed")]
    Unlisted {
        /// Its path in the backup.
        path: String,
        /// Bytes that are stored.
        stored: u64,
    },
}

/// What the list says in sum.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// Files that were copied.
    pub files: u64,
    /// Files that an increment left to its parent.
    pub unchanged: u64,
}

/// Compares the list with the stored files `(path in the backup's directory, bytes)`. Memory: a byte for each of those.
///
/// # Errors
/// [`ContentError`] for the first difference.
pub fn compare(list: impl BufRead, mut stored: Vec<(&str, u64)>) -> Result<Tally, ContentError> {
    stored.sort_unstable();
    let mut listed = vec![false; stored.len()];
    let mut tally = Tally::default();
    each_file(list, |path, size| {
        let found = stored.binary_search_by(|(name, _)| (*name).cmp(path));
        if let Ok(at) = found {
            listed[at] = true;
        }
        let bytes = found.map(|at| stored[at].1);
        match (size, bytes) {
            (-1, _) => tally.unchanged += 1,
            _ => tally.files += 1,
        }
        match (u64::try_from(size).unwrap_or(0), bytes) {
            (0, Err(_) | Ok(0)) => Ok(()),
            (size, Ok(bytes)) if size == bytes => Ok(()),
            (_, Ok(stored)) => Err(ContentError::Size {
                path: path.to_owned(),
                listed: size,
                stored,
            }),
            (_, Err(_)) => Err(ContentError::Missing {
                path: path.to_owned(),
                listed: size,
            }),
        }
    })?;
    for ((path, bytes), listed) in stored.iter().zip(listed) {
        // A file that was dropped after it had been opened: the program forgets it and leaves an empty one behind.
        let forgotten = *bytes == 0;
        if !listed && !forgotten && !UNLISTED.contains(path) {
            return Err(ContentError::Unlisted {
                path: (*path).to_owned(),
                stored: *bytes,
            });
        }
    }
    Ok(tally)
}

/// Hands each regular file of the list to `sink`, by its path in the backup's directory.
fn each_file(
    mut list: impl BufRead,
    mut sink: impl FnMut(&str, i64) -> Result<(), ContentError>,
) -> Result<(), ContentError> {
    let mut line = Vec::new();
    let mut path = String::new();
    for number in 1.. {
        line.clear();
        let limit = u64::try_from(LINE).unwrap_or(u64::MAX);
        if io::Read::take(&mut list, limit).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        let wrong = |why| ContentError::Line { number, why };
        let text = std::str::from_utf8(&line).map_err(|_| wrong("it is not UTF-8"))?;
        if text.trim().is_empty() {
            continue;
        }
        if !text.ends_with('\n') {
            return Err(wrong("it does not end"));
        }
        let mode: u32 = number_of(text, "mode").ok_or_else(|| wrong("it has no mode"))?;
        // S_ISREG, as the program asks.
        if mode & 0o170_000 != 0o100_000 {
            continue;
        }
        if number_of(text, "file_type").is_some_and(|kind: u32| kind != 0) {
            return Err(wrong(
                "it is a file in a shared storage (DSS), which is not supported",
            ));
        }
        let name = field(text, "path").ok_or_else(|| wrong("it has no path"))?;
        let size = number_of(text, "size").ok_or_else(|| wrong("it has no size"))?;
        if size < -1 {
            return Err(wrong("its size is negative"));
        }
        path.clear();
        match number_of(text, "external_dir_num").unwrap_or(0_u32) {
            0 => path.push_str("database/"),
            number => {
                path.push_str("external_directories/externaldir");
                path.push_str(&number.to_string());
                path.push('/');
            }
        }
        path.push_str(name);
        sink(&path, size)?;
    }
    Ok(())
}

/// The value of `"name":"value"`.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let mut from = line;
    loop {
        let (_, rest) = from.split_once('"')?;
        let (key, rest) = rest.split_once('"')?;
        let (value, rest) = rest.strip_prefix(":\"")?.split_once('"')?;
        if key == name {
            return Some(value);
        }
        from = rest;
    }
}

fn number_of<T: std::str::FromStr>(line: &str, name: &str) -> Option<T> {
    field(line, name)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = include_str!("samples/D_backup_content_head3.txt");

    fn line(path: &str, size: i64, more: &str) -> String {
        format!(
            "{{\"path\":\"{path}\", \"size\":\"{size}\", \"mode\":\"33152\", \"is_datafile\":\"1\"{more}}}\n"
        )
    }

    fn check(list: &str, stored: &[(&str, u64)]) -> Result<Tally, String> {
        compare(list.as_bytes(), stored.to_vec()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_recorded_list_is_read() {
        let segment = "database/pg_xlog/000000010000000000000063";
        let tally = check(HEAD, &[(segment, 16 << 20), ("backup.control", 700)]).unwrap();
        assert_eq!(
            tally,
            Tally {
                files: 4,
                unchanged: 0
            }
        );
        let error = check(HEAD, &[(segment, 8192)]).unwrap_err();
        assert!(error.contains(segment) && error.contains("8192"), "{error}");
        let error = check(HEAD, &[]).unwrap_err();
        assert!(
            error.contains(segment) && error.contains("never stored"),
            "{error}"
        );
    }

    #[test]
    fn what_an_increment_leaves_out_is_not_stored() {
        let list = line("base/1/1", -1, ", \"external_dir_num\":\"0\"") + &line("base/1/2", 0, "");
        assert_eq!(
            check(&list, &[]),
            Ok(Tally {
                files: 1,
                unchanged: 1
            })
        );
        assert!(
            check(&list, &[("database/base/1/1", 8200)])
                .unwrap_err()
                .contains("with -1 bytes")
        );
        assert!(
            check(&list, &[("database/base/1/2", 8200)])
                .unwrap_err()
                .contains("base/1/2")
        );
    }

    #[test]
    fn both_ways() {
        let list = line("base/1/1", 8200, ", \"external_dir_num\":\"0\"")
            + &line("PG_9/1/1", 5, ", \"external_dir_num\":\"2\"")
            + "{\"path\":\"base\", \"size\":\"4096\", \"mode\":\"16832\"}\n";
        let good = [
            ("database/base/1/1", 8200),
            ("external_directories/externaldir2/PG_9/1/1", 5),
            ("page_header_map", 77),
            ("backup_content.control", 1),
            ("database/base/1/dropped", 0),
        ];
        assert_eq!(
            check(&list, &good),
            Ok(Tally {
                files: 2,
                unchanged: 0
            })
        );
        let more = [&good[..], &[("database/base/1/3", 1)]].concat();
        assert!(
            check(&list, &more)
                .unwrap_err()
                .contains("`database/base/1/3` is stored with 1 bytes and is not listed")
        );
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for (list, why) in [
            ("{\"path\":\"a\"}\n", "no mode"),
            ("nonsense\n", "no mode"),
            (
                "{\"path\":\"a\", \"size\":\"1\", \"mode\":\"33152\"}",
                "does not end",
            ),
            (
                "{\"path\":\"a\", \"size\":\"-2\", \"mode\":\"33152\"}\n",
                "negative",
            ),
            (
                "{\"path\":\"a\", \"size\":\"1\", \"mode\":\"33152\", \"file_type\":\"1\"}\n",
                "DSS",
            ),
        ] {
            let error = check(list, &[]).unwrap_err();
            assert!(error.contains("line 1") && error.contains(why), "{error}");
        }
    }
}
