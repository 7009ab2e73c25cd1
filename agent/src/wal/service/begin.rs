//! The beginning of a stretch: what holds its WAL, its first segment, and the gap before it.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use agent_api::{ApiError, ErrorKind, WalGap};
use agent_sql::{Flavour, NodeConnection};
use agent_wal::{Lsn, SegmentName, SegmentSize};
use catalog::Catalog;
use catalog::ids::EpochId;
use catalog::model::{Extra, Gap};
use catalog::repo::{BackupState, ListedBackup};
use catalog::wal::list_segments;
use jiff::Timestamp;
use uuid::Uuid;

use super::saved::{Broken, Saved};
use crate::config::Config;
use crate::engine::errors;
use crate::wal::transfer::blocking;
use crate::wal::trouble::Trouble;
use crate::walput;

/// Name of the slot of a node's service.
pub(super) fn slot_name(node: Uuid) -> String {
    crate::engine::slot::wal_name_of(node)
}

/// The database that a session reaches, and where its WAL is.
#[derive(Debug, Clone)]
pub(super) struct Database {
    pub(super) flavour: Flavour,
    pub(super) system_identifier: u64,
    pub(super) data_directory: String,
    /// Its directory of WAL.
    pub(super) wal: PathBuf,
    pub(super) size: SegmentSize,
}

/// The first segment that can be shipped: the oldest that the slot keeps and that was written as a whole on the timeline of
/// now. WAL from before a promotion has other names.
///
/// # Errors
/// Of the statements; if the directory cannot be read.
pub(super) async fn first_segment(
    sql: &NodeConnection,
    database: &Database,
    kept: Option<Lsn>,
) -> Result<SegmentName, Trouble> {
    let position = sql.wal_position().await?;
    let size = database.size;
    let at = SegmentName::of_lsn(position.timeline, position.flush, size);
    let behind = if at.start_lsn(size) == position.flush {
        at
    } else {
        at.next()
    };
    let Some(kept) = kept else {
        return Ok(behind);
    };
    let oldest = SegmentName::of_lsn(position.timeline, kept, size);
    let directory = database.wal.clone();
    let first = blocking(move || {
        let mut segment = oldest;
        while segment < behind {
            if is_whole(&directory, segment, size) {
                break;
            }
            segment = segment.next();
        }
        segment
    });
    Ok(first.await?)
}

/// Whether a segment's first page was written on its own timeline: then all of it was.
fn is_whole(directory: &Path, segment: SegmentName, size: SegmentSize) -> bool {
    // XLogPageHeaderData: magic, info (2 bytes each), timeline (4), address (8).
    let mut header = [0; 16];
    let read = File::open(directory.join(segment.format(size)))
        .and_then(|mut file| file.read_exact(&mut header));
    let timeline = segment.timeline.to_le_bytes();
    let address = segment.start_lsn(size).0.to_le_bytes();
    read.is_ok() && header[4..8] == timeline && header[8..16] == address
}

/// Writes down what is missing between what the bucket has and `first`; `None`: nothing is.
///
/// # Errors
/// Of the store.
pub(super) async fn declare_gap(
    catalog: &Catalog,
    operation: Uuid,
    saved: &Saved,
    (first, size): (SegmentName, SegmentSize),
) -> Result<Joined, ApiError> {
    let listed = list_segments(&**catalog.store(), saved.node, &saved.epoch).await;
    let listed = listed.map_err(errors::catalog)?;
    let numbers = listed.iter().filter_map(|it| it.name.number(size.bytes()));
    let there = numbers.max().map(|last| last + 1);
    let Some((from, broken)) = missing(there, saved.broken.as_ref(), first, size) else {
        return Ok(if there.is_some() {
            Joined::Before
        } else {
            Joined::Nothing
        });
    };
    let gap = gap_of(saved, from, first, size, broken);
    let declared = catalog.declare_gap(&gap, operation).await;
    declared.map_err(errors::catalog)?;
    tracing::error!(
        "WAL from {} to {} is not in the bucket and never will be: {}; a new base backup is wanted",
        gap.from,
        gap.to,
        gap.reason
    );
    Ok(Joined::Gap(WalGap {
        from: gap.from,
        to: Some(gap.to),
        why: gap.reason,
        at: gap.at,
    }))
}

/// What is in the bucket before a stretch.
#[derive(Debug)]
pub(super) enum Joined {
    /// No WAL of the epoch.
    Nothing,
    /// WAL that it goes on from.
    Before,
    /// WAL, and then a gap.
    Gap(WalGap),
}

/// Whether no base backup begins behind the newest gap of the epoch.
///
/// # Errors
/// Of the store.
pub(super) async fn wants_base(catalog: &Catalog, saved: &Saved) -> Result<bool, ApiError> {
    let gaps = catalog.gaps(saved.node, &saved.epoch).await;
    let gaps = gaps.map_err(errors::catalog)?;
    let position = |text: &str| text.parse::<Lsn>().ok();
    let Some(newest) = gaps.iter().filter_map(|gap| position(&gap.to)).max() else {
        return Ok(false);
    };
    let backups = catalog.backups().await.map_err(errors::catalog)?;
    let begins_behind = |listed: &ListedBackup| {
        let BackupState::Complete(manifest) = &listed.state else {
            return false;
        };
        let copies = manifest.nodes.iter();
        let mut ours = copies.filter(|it| it.node_id == saved.node && it.epoch == saved.epoch);
        ours.any(|copy| position(&copy.start_lsn).is_some_and(|start| start >= newest))
    };
    Ok(!backups.iter().any(begins_behind))
}

/// Where the gap before `first` begins, and why there is one. `there` is the number of the segment behind what is in the
/// bucket.
fn missing(
    there: Option<u64>,
    broken: Option<&Broken>,
    first: SegmentName,
    size: SegmentSize,
) -> Option<(Lsn, Option<&Broken>)> {
    let ended = broken.and_then(|broken| broken.from.parse::<Lsn>().ok());
    let from = match there {
        Some(number) => size.start_of(number),
        None => ended?,
    };
    (from < first.start_lsn(size)).then_some((from, broken))
}

fn gap_of(
    saved: &Saved,
    from: Lsn,
    first: SegmentName,
    size: SegmentSize,
    broken: Option<&Broken>,
) -> Gap {
    Gap {
        node_id: saved.node,
        epoch: EpochId::clone(&saved.epoch),
        timeline: first.timeline,
        from: from.to_string(),
        to: first.start_lsn(size).to_string(),
        reason: broken.map_or_else(
            || "WAL was not shipped all the time meanwhile".to_owned(),
            |broken| broken.why.clone(),
        ),
        at: broken.map_or_else(Timestamp::now, |broken| broken.at),
        nonce: Uuid::new_v4(),
        extra: Extra::new(),
    }
}

/// Tells `wal-put` that WAL is kept also while no agent answers.
pub(super) fn hold_archive(config: &Config) -> io::Result<()> {
    let mark = walput::mark_of(&config.archive_socket);
    if let Some(directory) = mark.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(mark, b"")
}

/// Takes that back.
pub(super) fn let_go_of_archive(config: &Config) {
    let mark = walput::mark_of(&config.archive_socket);
    match fs::remove_file(&mark) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::error!("cannot remove {}: {error}", mark.display());
        }
        _ => {}
    }
}

/// Refuses a database that is not to be shipped from.
pub(super) fn refuse_standby() -> ApiError {
    let message = "the database is a standby or still recovering";
    ApiError::new(ErrorKind::Database, message).next("WAL is shipped when it is a primary")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 16 << 20;

    fn size() -> SegmentSize {
        SegmentSize::new(SIZE).unwrap()
    }

    fn segment(number: u64) -> SegmentName {
        SegmentName {
            timeline: 1,
            number,
        }
    }

    #[test]
    fn a_gap_is_what_lies_between_the_bucket_and_the_first_segment() {
        let broken = Broken {
            from: Lsn(5 * SIZE).to_string(),
            why: "too much".to_owned(),
            at: Timestamp::now(),
        };
        let from = |there, broken, first| {
            missing(there, broken, segment(first), size()).map(|(from, _)| from.0 / SIZE)
        };
        // A first stretch; one that joins; one that overlaps.
        assert_eq!(from(None, None, 9), None);
        assert_eq!(from(Some(9), None, 9), None);
        assert_eq!(from(Some(12), None, 9), None);
        assert_eq!(from(Some(7), None, 9), Some(7));
        // What another way has put since is there all the same.
        assert_eq!(from(Some(7), Some(&broken), 9), Some(7));
        assert_eq!(from(None, Some(&broken), 9), Some(5));
        assert_eq!(from(None, Some(&broken), 5), None);
    }

    #[test]
    fn a_segment_that_began_on_another_timeline_is_none_to_begin_with() {
        let dir = tempfile::tempdir().unwrap();
        let mut page = [0; 8192];
        page[4..8].copy_from_slice(&1_u32.to_le_bytes());
        page[8..16].copy_from_slice(&(3 * SIZE).to_le_bytes());
        fs::write(dir.path().join(segment(3).format(size())), page).unwrap();
        assert!(is_whole(dir.path(), segment(3), size()));
        assert!(!is_whole(dir.path(), segment(4), size()));
        let of_two = SegmentName {
            timeline: 2,
            number: 3,
        };
        fs::write(dir.path().join(of_two.format(size())), page).unwrap();
        assert!(!is_whole(dir.path(), of_two, size()));
    }
}
