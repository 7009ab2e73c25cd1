//! One segment from the server's own files into the bucket, and the watch over what is held back meanwhile.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind};
use agent_sql::{Flavour, NodeConnection};
use agent_wal::segment::{self, Expected};
use agent_wal::{SegmentName, SegmentSize};
use bytes::Bytes;
use catalog::error::CatalogError;
use catalog::ids::EpochId;
use catalog::wal::{WalFile, put_segment};
use pipeline::budget::Budget;
use pipeline::upload::Uploader;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::hold::{HoldLimit, Room};
use super::keeper::{Keeper, gone};
use super::known::KnownSegments;
use super::trouble::Trouble;
use crate::engine::errors;

/// How often the hold is weighed against the room there is. Goes on also while an upload is stuck.
const GUARD_PERIOD: Duration = Duration::from_secs(2);
/// The most a timeline history may have, in bytes.
const HISTORY_LIMIT: u64 = 1 << 20;

/// The way of a node's WAL into one epoch.
#[derive(Debug)]
pub struct Transfer {
    /// What holds the WAL.
    pub keeper: Keeper,
    /// The server's directory of WAL.
    pub directory: PathBuf,
    /// System identifier that every segment must carry.
    pub system_identifier: u64,
    /// Segment size.
    pub segment_size: SegmentSize,
    /// The node.
    pub node: Uuid,
    /// Its epoch.
    pub epoch: EpochId,
    /// The way into the bucket.
    pub uploader: Uploader,
    /// zstd level.
    pub level: i32,
    /// A segment is read into memory taken from here.
    pub budget: Budget,
    /// What was put by this way and others.
    pub known: Arc<KnownSegments>,
}

impl Transfer {
    /// Puts a whole segment into the bucket.
    ///
    /// # Errors
    /// [`Trouble`]. A segment that was put may be put again: then it is known, or found there.
    pub async fn segment(
        &self,
        sql: &NodeConnection,
        name: SegmentName,
        cancel: &CancellationToken,
    ) -> Result<(), Trouble> {
        let size = self.segment_size;
        let file_name = name.format(size);
        if self.known.get(&file_name).is_none() {
            let lease = self.budget.acquire(size.in_memory(), cancel).await;
            let _lease = lease.map_err(errors::pipeline)?;
            let bytes = self.read(sql, name, &file_name).await?;
            self.put(&file_name, bytes).await?;
        }
        Ok(())
    }

    /// Lets go of a segment on the node that is in the bucket, and of all before it.
    ///
    /// # Errors
    /// Of the statement.
    pub async fn let_go(&self, sql: &NodeConnection, name: SegmentName) -> Result<(), Trouble> {
        self.keeper
            .advance(sql, name.end_lsn(self.segment_size))
            .await
    }

    async fn read(
        &self,
        sql: &NodeConnection,
        name: SegmentName,
        file_name: &str,
    ) -> Result<Bytes, Trouble> {
        let size = self.segment_size;
        let path = self.directory.join(file_name);
        let read = {
            let path = path.clone();
            blocking(move || ReadFile::read(&path, size.bytes())).await?
        };
        // What holds it is asked first where the file is gone: why is the better answer.
        self.keeper
            .check(sql, name.end_lsn(size), file_name)
            .await?;
        let missing = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
        let gone_by_itself = || {
            gone(format!(
                "the WAL segment {file_name} was removed before it was shipped"
            ))
        };
        let read = match read {
            Ok(read) => read,
            Err(error) if missing(&error) => return Err(gone_by_itself()),
            Err(error) => return Err(unreadable(&path, &error).into()),
        };
        // Only now: what was read while it was held is what was written.
        let (read, place) = {
            let path = path.clone();
            blocking(move || {
                let place = read.is_still_at(&path);
                (read, place)
            })
            .await?
        };
        match place {
            Ok(true) => {}
            Ok(false) => {
                let message = format!("the WAL segment {file_name} was replaced while it was read");
                return Err(gone(message));
            }
            Err(error) if missing(&error) => return Err(gone_by_itself()),
            Err(error) => return Err(unreadable(&path, &error).into()),
        }
        let expected = Expected {
            system_identifier: self.system_identifier,
            segment_size: size,
            name,
            timelines: vec![name.timeline],
            flavour: None,
        };
        let bytes = read.bytes;
        blocking(move || match segment::verify(&bytes, &expected) {
            Ok(_) => Ok(bytes),
            Err(error) => {
                let message = format!("`{}` is not the WAL it should be: {error}", path.display());
                Err(ApiError::new(ErrorKind::Database, message).into())
            }
        })
        .await?
    }

    /// Timeline histories, all there are: a recovery that crosses timelines asks for each.
    ///
    /// # Errors
    /// [`Trouble`].
    pub async fn histories(&self) -> Result<(), Trouble> {
        let directory = self.directory.clone();
        let histories = blocking(move || histories(&directory)).await?;
        for (name, bytes) in histories.map_err(|e| unreadable(&self.directory, &e))? {
            if self.known.get(&name).is_none() {
                self.put(&name, bytes).await?;
            }
        }
        Ok(())
    }

    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), Trouble> {
        let file = WalFile {
            node: self.node,
            epoch: self.epoch.clone(),
            name: name.parse().map_err(errors::internal)?,
        };
        let put = put_segment(&self.uploader, &file, self.level, &bytes[..]).await;
        let stored = put.map_err(|error| {
            let conflict = matches!(error, CatalogError::Conflict { .. });
            let damaged = matches!(error, CatalogError::Damaged { .. });
            let error = errors::catalog(error);
            if conflict {
                return Trouble::Foreign(error.next(
                    "two databases write WAL under one name: this one is a copy of the node or was restored by \
                     other means; register it anew with --new-node",
                ));
            }
            if damaged {
                return Trouble::Foreign(error.next("gs_pitr verify --all"));
            }
            Trouble::Other(error)
        })?;
        self.known.add(name, stored.plain_sha256);
        Ok(())
    }

    /// Weighs what is held against the room there is, again and again.
    ///
    /// # Errors
    /// [`Trouble::Overrun`] if it must be let go of, [`Trouble::Gone`] if it is held no more, of the statements.
    pub async fn guard(
        &self,
        sql: &NodeConnection,
        limit: HoldLimit,
    ) -> Result<Infallible, Trouble> {
        guard(sql, &self.keeper, &self.directory, limit, |_| {}).await
    }
}

/// [`Transfer::guard`] where there is no way into the bucket yet. `held` is told how many bytes are held.
///
/// # Errors
/// As there.
pub async fn guard(
    sql: &NodeConnection,
    keeper: &Keeper,
    directory: &Path,
    limit: HoldLimit,
    held: impl Fn(u64),
) -> Result<Infallible, Trouble> {
    loop {
        tokio::time::sleep(GUARD_PERIOD).await;
        let position = sql.wal_position().await?;
        let kept = keeper.kept_from(sql).await?;
        let of = directory.to_owned();
        let room = blocking(move || Room::of(&of)).await?;
        let room = room.map_err(|e| unreadable(directory, &e))?;
        let restart = kept.unwrap_or(position.insert);
        held(position.insert.bytes_since(restart));
        limit
            .check(restart, position.insert, room)
            .map_err(Trouble::Overrun)?;
    }
}

/// Where a server has its WAL, in its data directory.
pub(crate) fn wal_directory(flavour: Flavour) -> &'static str {
    match flavour {
        Flavour::PostgreSql => "pg_wal",
        Flavour::OpenGauss => "pg_xlog",
    }
}

struct ReadFile {
    bytes: Bytes,
    inode: u64,
}

impl ReadFile {
    /// Reads a segment whole, and a byte more if it is longer.
    fn read(path: &Path, size: u64) -> io::Result<Self> {
        let file = File::open(path)?;
        Self::through(&file, &file, size)
    }

    /// Reads `file` through a reader of it.
    fn through(file: &File, reader: impl Read, size: u64) -> io::Result<Self> {
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        let inode = file.metadata()?.ino();
        reader.take(size + 1).read_to_end(&mut bytes)?;
        Ok(Self {
            bytes: bytes.into(),
            inode,
        })
    }

    /// Whether the file that was read is still the one of that name. A server renames a segment before it writes another one into
    /// it: so what was read until now is of one segment, if it is.
    fn is_still_at(&self, path: &Path) -> io::Result<bool> {
        Ok(fs::metadata(path)?.ino() == self.inode)
    }
}

fn histories(directory: &Path) -> io::Result<Vec<(String, Bytes)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if SegmentName::parse_history_file(&name).is_none() {
            continue;
        }
        let mut bytes = Vec::new();
        File::open(entry.path())?
            .take(HISTORY_LIMIT)
            .read_to_end(&mut bytes)?;
        found.push((name, bytes.into()));
    }
    found.sort_unstable();
    Ok(found)
}

/// Runs what blocks in the file system away from the tasks.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(errors::internal)
}

fn unreadable(path: &Path, error: &io::Error) -> ApiError {
    let message = format!("cannot read `{}`: {error}", path.display());
    ApiError::new(ErrorKind::Database, message)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt as _;

    use agent_wal::BLOCK_SIZE;

    use super::*;

    /// `wal.15` of the fixtures: what its server said of it.
    const NAME: &str = "00000001000000000000000A";
    const SYSTEM: u64 = 7_710_626_997_054_397_305;
    const SIZE: usize = 1 << 20;
    /// Where its last record ends; zeros follow.
    const USED: usize = 0x1_7AD8;

    fn segment() -> Vec<u8> {
        let stored = include_bytes!("../../wal/tests/fixtures/wal.15.zst");
        zstd::decode_all(&stored[..]).unwrap()
    }

    /// The same as the server would write it some segments later: right but for the addresses of its pages.
    fn later(segment: &[u8]) -> Vec<u8> {
        let mut later = segment.to_vec();
        for (number, page) in later.chunks_mut(BLOCK_SIZE).enumerate() {
            let address = 0x00C0_0000 + (number * BLOCK_SIZE) as u64;
            page[8..16].copy_from_slice(&address.to_le_bytes());
        }
        later
    }

    /// A reader under which the server takes the file away for another segment, once `at` bytes were read.
    struct Recycled<'a> {
        file: &'a File,
        path: &'a Path,
        at: usize,
        read: usize,
        /// What the server writes from the beginning then.
        writes: &'a [u8],
        done: bool,
    }

    impl Read for Recycled<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.read == self.at && !self.done {
                self.done = true;
                let to = self.path.with_file_name("00000001000000000000000C");
                fs::rename(self.path, &to)?;
                let file = OpenOptions::new().write(true).open(to)?;
                file.write_all_at(self.writes, 0)?;
            }
            let most = if self.done {
                buffer.len()
            } else {
                buffer.len().min(self.at - self.read)
            };
            let got = self.file.read(&mut buffer[..most])?;
            self.read += got;
            Ok(got)
        }
    }

    #[test]
    fn a_segment_that_is_recycled_under_its_reader_is_never_taken() {
        let whole = segment();
        let later = later(&whole);
        let noise: Vec<u8> = (1..=251_u8).cycle().step_by(31).take(SIZE).collect();
        let size = SegmentSize::new(SIZE as u64).unwrap();
        let expected = Expected {
            system_identifier: SYSTEM,
            segment_size: size,
            name: SegmentName::parse(NAME, size).unwrap(),
            timelines: vec![1],
            flavour: None,
        };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NAME);
        let (mut mixed, mut tried) = (0, 0);
        for content in [&later, &noise] {
            for at in (0..USED).step_by(BLOCK_SIZE / 2) {
                // The server is behind the reader, within the page that is being read, ahead of it, or through.
                for written in [at / 2, at + 100, at + 2 * BLOCK_SIZE, SIZE] {
                    fs::write(&path, &whole).unwrap();
                    let file = File::open(&path).unwrap();
                    let reader = Recycled {
                        file: &file,
                        path: &path,
                        at,
                        read: 0,
                        writes: &content[..written],
                        done: false,
                    };
                    let read = ReadFile::through(&file, reader, SIZE as u64).unwrap();
                    let gone = read.is_still_at(&path).unwrap_err();
                    assert_eq!(gone.kind(), io::ErrorKind::NotFound);
                    // Another file of that name is not the one that was read.
                    fs::write(&path, &whole).unwrap();
                    assert!(!read.is_still_at(&path).unwrap());
                    // And the bytes alone say it, too.
                    let same = read.bytes == whole;
                    let verified = segment::verify(&read.bytes, &expected);
                    assert_eq!(
                        verified.is_ok(),
                        same,
                        "{at} read, {written} written: {verified:?}"
                    );
                    (mixed, tried) = (mixed + u32::from(!same), tried + 1);
                }
            }
        }
        assert!(mixed > tried / 2 && mixed < tried, "{mixed} of {tried}");
    }
}
