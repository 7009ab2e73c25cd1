//! `page_header_map`: for each data file of a backup an array of page headers, compressed with zlib.
//!
//! A header is 24 bytes (`BackupPageHeader2`): LSN u64, block u32, position in the data file u32, checksum u16, six
//! bytes of nothing; one more ends the array with the length of the file.

use std::path::{Path, PathBuf};

use miniz_oxide::deflate::compress_to_vec_zlib;
use miniz_oxide::inflate::decompress_to_vec_zlib_with_limit;
use rustix::fs::OFlags;

use super::calls::{In, Out, sync_again};
use super::content::Headers;
use super::log::Log;
use super::{Failure, Kind};

/// Bytes of a header.
const HEADER: usize = 24;
/// Buffer of the file.
const ROOM: usize = 4 << 20;

/// The header of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct PageHeader {
    pub(super) lsn: u64,
    pub(super) block: u32,
    /// Where its record begins in the file in the catalog.
    pub(super) position: u32,
    pub(super) checksum: u16,
}

fn encode(headers: &[PageHeader]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(headers.len() * HEADER);
    for header in headers {
        bytes.extend_from_slice(&header.lsn.to_le_bytes());
        bytes.extend_from_slice(&header.block.to_le_bytes());
        bytes.extend_from_slice(&header.position.to_le_bytes());
        bytes.extend_from_slice(&header.checksum.to_le_bytes());
        bytes.extend_from_slice(&[0; 6]);
    }
    bytes
}

fn decode(bytes: &[u8]) -> Vec<PageHeader> {
    let header = |at: &[u8]| PageHeader {
        lsn: u64::from_le_bytes(at[..8].try_into().expect("8 bytes")),
        block: u32::from_le_bytes(at[8..12].try_into().expect("4 bytes")),
        position: u32::from_le_bytes(at[12..16].try_into().expect("4 bytes")),
        checksum: u16::from_le_bytes(at[16..18].try_into().expect("2 bytes")),
    };
    bytes.chunks_exact(HEADER).map(header).collect()
}

/// The map of a backup that is being made. It is created with the first headers.
#[derive(Debug)]
pub(super) struct HeaderMap {
    path: PathBuf,
    kind: Kind,
    out: Option<Out>,
    offset: u64,
}

impl HeaderMap {
    pub(super) fn new(kind: Kind, path: PathBuf) -> Self {
        Self {
            path,
            kind,
            out: None,
            offset: 0,
        }
    }

    fn create(&self) -> Result<Out, Failure> {
        if self.kind == Kind::Gs {
            let out = Out::create(&self.path, ROOM)?;
            out.mode(0o600)?;
            return Ok(out);
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND;
        let mut out = Out::open(&self.path, flags, 0o666, ROOM)?;
        // fopen(path, "a") looks for the end.
        out.seek_end()?;
        out.mode(0o600)?;
        Ok(out)
    }

    /// Adds the headers of a data file, `length` bytes long in the catalog.
    pub(super) fn add(
        &mut self,
        headers: &[PageHeader],
        length: u64,
        log: Log,
    ) -> Result<Headers, Failure> {
        let end = PageHeader {
            position: u32::try_from(length)
                .map_err(|_| Failure::new("a data file of more than 4 GiB"))?,
            ..PageHeader::default()
        };
        let bytes = [encode(headers), encode(&[end])].concat();
        let compressed = compress_to_vec_zlib(&bytes, 1);
        if self.out.is_none() {
            log.log(&format!(
                "Creating page header map \"{}\"",
                self.path.display()
            ));
            self.out = Some(self.create()?);
        }
        let out = self
            .out
            .as_mut()
            .ok_or_else(|| Failure::new("no header map"))?;
        out.write(&compressed)?;
        let entry = Headers {
            pages: u32::try_from(headers.len()).unwrap_or(u32::MAX),
            crc: crc32c::crc32c(&bytes),
            offset: self.offset,
            size: u32::try_from(compressed.len()).unwrap_or(u32::MAX),
        };
        self.offset += compressed.len() as u64;
        Ok(entry)
    }

    /// Writes and syncs what there is, with `--no-sync` too, as both programs do.
    pub(super) fn close(self) -> Result<(), Failure> {
        let Some(out) = self.out else {
            return Ok(());
        };
        out.close()?;
        sync_again(&self.path)
    }
}

/// Reads the headers of one data file: an open, a seek, a read and a close each time.
pub(super) fn read(map: &Path, wanted: Headers) -> Result<Vec<PageHeader>, Failure> {
    let bad = |what: &str| {
        Failure::new(format!(
            "Header map \"{}\" at offset {}: {what}",
            map.display(),
            wanted.offset
        ))
    };
    let mut compressed = vec![0; usize::try_from(wanted.size).unwrap_or(0)];
    let mut file = In::existing(map, compressed.len())?;
    file.seek(wanted.offset)?;
    if file.read(&mut compressed)? != compressed.len() {
        return Err(bad("cut short"));
    }
    let length = (usize::try_from(wanted.pages).unwrap_or(0) + 1) * HEADER;
    let bytes = decompress_to_vec_zlib_with_limit(&compressed, length)
        .map_err(|_| bad("cannot be decompressed"))?;
    if bytes.len() != length || crc32c::crc32c(&bytes) != wanted.crc {
        return Err(bad("crc mismatch"));
    }
    Ok(decode(&bytes))
}
