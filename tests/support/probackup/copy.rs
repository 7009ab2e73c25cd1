//! Copies one file of the data directory into the catalog: pages with their headers, or bytes as they are.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use agent_wal::BLOCK_SIZE;
use agent_wal::Lsn;
use agent_wal::page::{self, Page, PageCheck};
use rustix::fs::OFlags;

use super::calls::{Out, STDIO};
use super::content::{Entry, UNCHANGED};
use super::faults;
use super::header_map::PageHeader;
use super::walk::Source;
use super::{Failure, Kind};

/// What is read of a file that is not stored by pages, at a time.
const CHUNK: usize = 128 << 10;
/// Pages in a file of a relation.
const SEGMENT_BLOCKS: u32 = 131_072;
/// How often a page is read that does not look right.
const ATTEMPTS: u32 = 300;

/// How pages are judged and chosen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) kind: Kind,
    pub(super) checksums: bool,
    /// Of the parent; pages older than it are in it. `None` in a FULL.
    pub(super) parent_start: Option<Lsn>,
    /// When the parent began, in seconds since 1970.
    pub(super) parent_time: i64,
    /// The file is listed, but not written.
    pub(super) forget: bool,
}

/// Where a copy goes: a file that is made with its first byte, or nowhere at all.
struct Target<'a> {
    path: &'a Path,
    mode: u32,
    out: Option<Out>,
    forget: bool,
}

impl Target<'_> {
    fn out(&mut self) -> Result<Option<&mut Out>, Failure> {
        if self.forget {
            return Ok(None);
        }
        if self.out.is_none() {
            let out = Out::create(self.path, STDIO)?;
            out.mode(self.mode)?;
            self.out = Some(out);
        }
        Ok(self.out.as_mut())
    }

    fn close(self) -> Result<(), Failure> {
        self.out.map_or(Ok(()), Out::close)
    }
}

fn open(path: &Path) -> Result<Option<File>, Failure> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        // Dropped meanwhile: the log knows.
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::call("open file", path, e)),
    }
}

/// Fills `page`; fewer bytes than a page is the end, as the file was truncated.
fn read_page(file: &File, page: &mut Page, block: u32, path: &Path) -> Result<bool, Failure> {
    let at = u64::from(block) * BLOCK_SIZE as u64;
    match file.read_exact_at(page, at) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(Failure::call("read file", path, e)),
    }
}

/// Reads a page until it is whole: the server writes while we read. `None` at the end of the file.
fn whole_page(
    file: &File,
    page: &mut Page,
    source: &Source,
    block: u32,
    checksums: bool,
) -> Result<Option<()>, Failure> {
    for _ in 0..ATTEMPTS {
        if !read_page(file, page, block, &source.path)? {
            return Ok(None);
        }
        let number = source.entry.segment * SEGMENT_BLOCKS + block;
        if !checksums || !matches!(page::check(page, number), PageCheck::Bad { .. }) {
            return Ok(Some(()));
        }
        faults::wait(Duration::from_millis(1))?;
    }
    Err(Failure::new(format!(
        "Corruption detected in file \"{}\", block {block}: page verification failed",
        source.path.display()
    )))
}

/// Copies a data file. `None`: it has gone. The headers are to be written to page_header_map.
pub(super) fn data_file(
    source: &Source,
    parent: Option<&Entry>,
    to: &Path,
    rules: Rules,
) -> Result<Option<(Entry, Vec<PageHeader>)>, Failure> {
    let Some(file) = open(&source.path)? else {
        return Ok(None);
    };
    let since = rules.parent_start.filter(|_| parent.is_some());
    let listed = u32::try_from(source.bytes / BLOCK_SIZE as u64).unwrap_or(u32::MAX);
    let mut entry = source.entry.clone();
    let mut target = Target {
        path: to,
        mode: 0o600,
        out: None,
        forget: rules.forget,
    };
    let mut headers = Vec::new();
    let (mut blocks, mut length) = (0, 0_u64);
    let mut page: Page = [0; BLOCK_SIZE];
    while blocks < listed {
        if whole_page(&file, &mut page, source, blocks, rules.checksums)?.is_none() {
            break;
        }
        let lsn = page::lsn(&page);
        // A page of zeros has no LSN: it is taken, to be safe.
        if since.is_none_or(|since| lsn == Lsn::INVALID || lsn >= since) {
            let mut record = [0; 8 + BLOCK_SIZE];
            record[..4].copy_from_slice(&blocks.to_le_bytes());
            record[4..8].copy_from_slice(&8192_u32.to_le_bytes());
            record[8..].copy_from_slice(&page);
            if let Some(out) = target.out()? {
                out.write(&record)?;
            }
            entry.crc = crc32c::crc32c_append(entry.crc, &record);
            headers.push(PageHeader {
                lsn: lsn.0,
                block: blocks,
                position: u32::try_from(length).unwrap_or(u32::MAX),
                checksum: u16::from_le_bytes([page[8], page[9]]),
            });
            length += record.len() as u64;
        }
        blocks += 1;
    }
    target.close()?;
    // PTRACK believes the size at the listing, the others what they read.
    let by_listing = rules.kind == Kind::Gs && rules.parent_start.is_some();
    entry.blocks = if by_listing { listed } else { blocks };
    entry.full_size = headers.len() as u64 * BLOCK_SIZE as u64;
    entry.size = i64::try_from(length).unwrap_or(i64::MAX);
    if since.is_some() && headers.is_empty() && entry.blocks > 0 {
        entry.size = UNCHANGED;
    }
    Ok(Some((entry, headers)))
}

/// CRC of a file, as it is now.
fn crc_of(file: &mut File, path: &Path) -> Result<u32, Failure> {
    let mut buffer = vec![0; CHUNK];
    let mut crc = 0;
    loop {
        let got = file
            .read(&mut buffer)
            .map_err(|e| Failure::call("read file", path, e))?;
        if got == 0 {
            return Ok(crc);
        }
        crc = crc32c::crc32c_append(crc, &buffer[..got]);
    }
}

/// Copies any other file. `None`: it has gone.
pub(super) fn other_file(
    source: &Source,
    parent: Option<&Entry>,
    to: &Path,
    rules: Rules,
) -> Result<Option<Entry>, Failure> {
    let mut entry = source.entry.clone();
    let Some(mut file) = open(&source.path)? else {
        return Ok(None);
    };
    if let Some(parent) = parent.filter(|_| rules.parent_start.is_some()) {
        let before = if parent.size == UNCHANGED {
            parent.full_size
        } else {
            u64::try_from(parent.size).unwrap_or(0)
        };
        let may_be_same = entry.name() != "pg_filenode.map"
            && before == source.bytes
            && source.changed <= rules.parent_time;
        if may_be_same && crc_of(&mut file, &source.path)? == parent.crc {
            entry.crc = parent.crc;
            entry.size = UNCHANGED;
            entry.full_size = before;
            return Ok(Some(entry));
        }
        let Some(again) = open(&source.path)? else {
            return Ok(None);
        };
        file = again;
    }
    if source.bytes == 0 {
        // An empty file is in the list only.
        return Ok(Some(entry));
    }
    let mut target = Target {
        path: to,
        mode: source.entry.mode,
        out: None,
        forget: rules.forget,
    };
    let mut chunk = vec![0; CHUNK];
    let (mut written, mut read) = (0_u64, 0_u64);
    loop {
        let got = fill(&mut file, &mut chunk, &source.path)?;
        if got == 0 {
            break;
        }
        entry.crc = crc32c::crc32c_append(entry.crc, &chunk[..got]);
        // pg_probackup leaves out what is zero at the end of each chunk, gs_probackup writes all.
        let useful = match rules.kind {
            Kind::Gs => got,
            // Of the beginning of a file at least 64 bytes are written, zeros too.
            Kind::Pg if read == 0 => without_zero_tail(&chunk[..got]).max(got.min(64)),
            Kind::Pg => without_zero_tail(&chunk[..got]),
        };
        if useful > 0
            && let Some(out) = target.out()?
        {
            if read > written {
                out.seek(read)?;
            }
            out.write(&chunk[..useful])?;
            written = read + useful as u64;
        }
        read += got as u64;
    }
    if read > written
        && let Some(out) = target.out()?
    {
        // The length of what was left out: one zero at its end.
        out.seek(read - 1)?;
        out.write(&[0])?;
    }
    target.close()?;
    entry.size = i64::try_from(read).unwrap_or(i64::MAX);
    Ok(Some(entry))
}

fn fill(file: &mut File, chunk: &mut [u8], path: &Path) -> Result<usize, Failure> {
    let mut done = 0;
    while done < chunk.len() {
        match file.read(&mut chunk[done..]) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(Failure::call("read file", path, e)),
        }
    }
    Ok(done)
}

/// Bytes before a tail of zeros, in steps of 64.
fn without_zero_tail(bytes: &[u8]) -> usize {
    let used = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |at| at + 1);
    used.next_multiple_of(64).min(bytes.len())
}

/// Copies `global/pg_control`: its own flags, and synced whatever `--no-sync` says.
pub(super) fn pg_control(source: &Source, to: &Path, forget: bool) -> Result<Entry, Failure> {
    let bytes =
        std::fs::read(&source.path).map_err(|e| Failure::call("read file", &source.path, e))?;
    if !forget {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC;
        let mut out = Out::open(to, flags, 0o600, 0)?;
        out.write(&bytes)?;
        out.sync()?;
        out.close()?;
    }
    Ok(Entry {
        size: i64::try_from(bytes.len()).unwrap_or(i64::MAX),
        crc: control_crc(&bytes).unwrap_or_default(),
        ..source.entry.clone()
    })
}

/// The CRC that pg_control carries: a CRC over it all would always be the same.
pub(super) fn control_crc(bytes: &[u8]) -> Option<u32> {
    let version = u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?);
    let at = if version >= 1800 { 292 } else { 288 };
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_tails_are_cut_in_steps_of_64() {
        let mut bytes = vec![0; 8192];
        assert_eq!(without_zero_tail(&bytes), 0);
        bytes[23] = 1;
        assert_eq!(without_zero_tail(&bytes), 64);
        bytes[64] = 1;
        assert_eq!(without_zero_tail(&bytes), 128);
        bytes[8191] = 1;
        assert_eq!(without_zero_tail(&bytes), 8192);
        assert_eq!(without_zero_tail(&[1, 0, 0]), 3);
    }
}
