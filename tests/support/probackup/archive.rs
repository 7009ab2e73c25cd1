//! The archive that a PAGE reads: `wal/INSTANCE` of the catalog.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent_wal::segment::{self, Expected};
use agent_wal::{Lsn, SegmentName, SegmentSize};

use super::log::Log;
use super::{Failure, calls, faults};

/// The real program's `--archive-timeout` where none is given.
const PATIENCE: Duration = Duration::from_mins(5);
/// It looks once a second.
const LOOK: Duration = Duration::from_secs(1);
const XLOG_PAGE: usize = 8192;

/// What of it is read.
pub(super) struct Archive {
    pub(super) directory: PathBuf,
    pub(super) system_identifier: u64,
    pub(super) size: SegmentSize,
    pub(super) timeline: u32,
}

impl Archive {
    /// Waits until the segment that holds `start` is there.
    pub(super) fn wait_for(&self, start: Lsn, log: Log) -> Result<(), Failure> {
        let name = SegmentName::of_lsn(self.timeline, start, self.size).format(self.size);
        let path = self.directory.join(&name);
        let begun = Instant::now();
        while !calls::exists(&path) {
            faults::wait(LOOK)?;
            if begun.elapsed() < LOOK * 2 {
                let path = path.display();
                log.info(&format!("Wait for WAL segment {path} to be archived"));
            }
            if begun.elapsed() > PATIENCE {
                return Err(Failure::new(format!(
                    "WAL segment {name} could not be archived in {} seconds",
                    PATIENCE.as_secs()
                )));
            }
        }
        Ok(())
    }

    /// Reads all from the parent's start to this one's. The stand-in looks whether it is that WAL, whole, and not what it changes: it
    /// copies the pages whose LSN is newer than the parent's start, of which what the WAL names is a part.
    pub(super) fn read(&self, from: Lsn, to: Lsn, log: Log) -> Result<(), Failure> {
        log.info("Extracting pagemap of changed blocks");
        let last = SegmentName::of_lsn(self.timeline, to, self.size);
        let mut name = SegmentName::of_lsn(self.timeline, from, self.size);
        while name <= last {
            let path = self.directory.join(name.format(self.size));
            let bytes = calls::read_whole(&path, XLOG_PAGE)?.ok_or_else(|| {
                Failure::new(format!("Could not read WAL segment {}", path.display()))
            })?;
            let expected = Expected {
                system_identifier: self.system_identifier,
                segment_size: self.size,
                name,
                timelines: Vec::new(),
                flavour: None,
            };
            segment::verify(&bytes, &expected)
                .map_err(|why| Failure::new(format!("{}: {why}", path.display())))?;
            name = name.next();
        }
        log.info("Pagemap successfully extracted, time elapsed: 0 sec");
        Ok(())
    }
}
