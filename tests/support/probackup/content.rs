//! `backup_content.control`: one JSON object a line for every file and directory.

use serde::Deserialize;

use super::{Failure, Kind};

/// Size of a file that is in the parent as it is.
pub(super) const UNCHANGED: i64 = -1;
/// `S_IFDIR`.
const DIRECTORY: u32 = 0o040_000;

/// Where the page headers of a data file lie in page_header_map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Headers {
    /// Pages of the file in this backup.
    pub(super) pages: u32,
    /// CRC of the headers before compression.
    pub(super) crc: u32,
    /// Where they begin.
    pub(super) offset: u64,
    /// Bytes they take.
    pub(super) size: u32,
}

/// A file or directory of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Entry {
    /// Below the data directory, or below its external directory.
    pub(super) path: String,
    /// Bytes in the catalog; [`UNCHANGED`].
    pub(super) size: i64,
    /// With the kind of file, as `stat` says it.
    pub(super) mode: u32,
    /// Stored page by page.
    pub(super) is_data: bool,
    pub(super) crc: u32,
    /// How pages are compressed; the stand-in writes `none` only.
    pub(super) compress: String,
    /// 0: of the data directory.
    pub(super) external: u32,
    pub(super) database: u32,
    /// Bytes before compression; 0 if nothing is said.
    pub(super) full_size: u64,
    pub(super) segment: u32,
    pub(super) linked: Option<String>,
    /// Pages the file has, here and in the parents.
    pub(super) blocks: u32,
    pub(super) headers: Option<Headers>,
}

impl Entry {
    pub(super) fn is_directory(&self) -> bool {
        self.mode & 0o170_000 == DIRECTORY
    }

    /// The last part of its path.
    pub(super) fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    fn line(&self, kind: Kind) -> String {
        let mut line = format!(
            "{{\"path\":\"{}\", \"size\":\"{}\", \"mode\":\"{}\", \"is_datafile\":\"{}\", \"is_cfs\":\"0\", \
             \"crc\":\"{}\", \"compress_alg\":\"{}\", \"external_dir_num\":\"{}\", \"dbOid\":\"{}\"",
            self.path,
            self.size,
            self.mode,
            u8::from(self.is_data),
            self.crc,
            self.compress,
            self.external,
            self.database
        );
        if kind == Kind::Gs {
            line += ", \"file_type\":\"0\"";
        }
        if self.full_size != 0 && i64::try_from(self.full_size) != Ok(self.size) {
            line += &format!(",\"full_size\":\"{}\"", self.full_size);
        }
        if self.is_data {
            line += &format!(",\"segno\":\"{}\"", self.segment);
        }
        if let Some(linked) = &self.linked {
            line += &format!(",\"linked\":\"{linked}\"");
        }
        if self.blocks > 0 {
            line += &format!(",\"n_blocks\":\"{}\"", self.blocks);
        }
        if let Some(headers) = self.headers {
            line += &format!(
                ",\"n_headers\":\"{}\",\"hdr_crc\":\"{}\",\"hdr_off\":\"{}\",\"hdr_size\":\"{}\"",
                headers.pages, headers.crc, headers.offset, headers.size
            );
        }
        line + "}\n"
    }
}

/// The file's text.
pub(super) fn text(entries: &[Entry], kind: Kind) -> String {
    entries.iter().map(|entry| entry.line(kind)).collect()
}

/// A line: numbers stand in quotes.
#[derive(Deserialize)]
struct Line {
    path: String,
    size: String,
    mode: String,
    is_datafile: String,
    crc: String,
    compress_alg: String,
    external_dir_num: String,
    #[serde(rename = "dbOid")]
    database: String,
    full_size: Option<String>,
    segno: Option<String>,
    linked: Option<String>,
    n_blocks: Option<String>,
    n_headers: Option<String>,
    hdr_crc: Option<String>,
    hdr_off: Option<String>,
    hdr_size: Option<String>,
}

/// Reads the file's text, the real programs' too.
pub(super) fn parse(text: &str) -> Result<Vec<Entry>, Failure> {
    text.lines()
        .map(|line| {
            entry(line).ok_or_else(|| Failure::new(format!("Invalid line in file list: {line}")))
        })
        .collect()
}

fn entry(line: &str) -> Option<Entry> {
    let line: Line = serde_json::from_str(line).ok()?;
    let small = |text: Option<String>| match text {
        Some(text) => text.parse::<u32>().ok(),
        None => Some(0),
    };
    let headers = match small(line.n_headers)? {
        0 => None,
        pages => Some(Headers {
            pages,
            crc: small(line.hdr_crc)?,
            offset: line.hdr_off?.parse().ok()?,
            size: small(line.hdr_size)?,
        }),
    };
    Some(Entry {
        path: line.path,
        size: line.size.parse().ok()?,
        mode: line.mode.parse().ok()?,
        is_data: line.is_datafile == "1",
        crc: line.crc.parse().ok()?,
        compress: line.compress_alg,
        external: line.external_dir_num.parse().ok()?,
        database: line.database.parse().ok()?,
        full_size: line.full_size.unwrap_or_default().parse().unwrap_or(0),
        segment: small(line.segno)?,
        linked: line.linked,
        blocks: small(line.n_blocks)?,
        headers,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of the real programs come back as they were.
    #[test]
    fn recorded_lines_are_read_and_written() {
        let gs = "{\"path\":\"base/1/14625\", \"size\":\"0\", \"mode\":\"33152\", \"is_datafile\":\"1\", \"is_cfs\":\"0\", \
                  \"crc\":\"0\", \"compress_alg\":\"none\", \"external_dir_num\":\"0\", \"dbOid\":\"1\", \
                  \"file_type\":\"0\",\"segno\":\"0\"}\n";
        let pg = "{\"path\":\"base/4/2833\", \"size\":\"8200\", \"mode\":\"33152\", \"is_datafile\":\"1\", \"is_cfs\":\"0\", \
                  \"crc\":\"1741979789\", \"compress_alg\":\"none\", \"external_dir_num\":\"0\", \
                  \"dbOid\":\"4\",\"full_size\":\"8192\",\"segno\":\"0\",\"n_blocks\":\"1\",\"n_headers\":\"1\",\
                  \"hdr_crc\":\"2852340548\",\"hdr_off\":\"1321\",\"hdr_size\":\"24\"}\n";
        let unchanged = "{\"path\":\"PG_VERSION\", \"size\":\"-1\", \"mode\":\"33152\", \"is_datafile\":\"0\", \"is_cfs\":\"0\", \
                         \"crc\":\"575108234\", \"compress_alg\":\"none\", \"external_dir_num\":\"0\", \
                         \"dbOid\":\"0\",\"full_size\":\"3\"}\n";
        for (kind, line) in [(Kind::Gs, gs), (Kind::Pg, pg), (Kind::Pg, unchanged)] {
            let entries = parse(line).unwrap();
            assert_eq!(text(&entries, kind), line);
        }
        assert!(parse("{\"path\":\"x\"}").is_err());
    }
}
