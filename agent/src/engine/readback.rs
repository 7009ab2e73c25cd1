//! The restore point's record, found in what the bucket has.

use agent_api::{ApiError, ErrorKind};
use agent_wal::kind::restore_point;
use agent_wal::record::{ReaderOptions, RecordReader, Step};
use agent_wal::{Lsn, SegmentName, SegmentSize};
use bytes::Bytes;
use catalog::ids::EpochId;
use catalog::wal::{WalFile, read_segment};
use uuid::Uuid;

use crate::engine::errors;
use crate::operation::OperationContext;

/// Which record, and where.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) node: Uuid,
    pub(super) epoch: EpochId,
    pub(super) system_identifier: u64,
    pub(super) size: SegmentSize,
    /// First segment there is.
    pub(super) first: SegmentName,
    /// Segment that the record ends in.
    pub(super) last: SegmentName,
    /// Name of the restore point.
    pub(super) name: String,
    /// End of its record.
    pub(super) end: Lsn,
}

/// Where the record begins.
///
/// # Errors
/// [`ErrorKind::Damaged`] if it is not there.
pub(super) async fn find(cx: &OperationContext, wanted: &Wanted) -> Result<Lsn, ApiError> {
    if let Some(start) = read_from(cx, wanted, wanted.last).await? {
        return Ok(start);
    }
    // It began in the segment before: what is left of it in the last one is no record.
    if wanted.first < wanted.last {
        let before = SegmentName {
            number: wanted.last.number - 1,
            ..wanted.last
        };
        if let Some(start) = read_from(cx, wanted, before).await? {
            return Ok(start);
        }
    }
    Err(missing(wanted, "it is not there"))
}

async fn read_from(
    cx: &OperationContext,
    wanted: &Wanted,
    from: SegmentName,
) -> Result<Option<Lsn>, ApiError> {
    let options = ReaderOptions {
        system_identifier: Some(wanted.system_identifier),
        timelines: vec![wanted.last.timeline],
        ..ReaderOptions::new(wanted.size)
    };
    let limit = wanted.size.in_memory();
    let lease = cx.budget.acquire(limit, &cx.cancel).await;
    let _lease = lease.map_err(errors::pipeline)?;
    let mut reader = RecordReader::near(from.start_lsn(wanted.size), options);
    loop {
        // Some milliseconds of CRC: not on a thread that serves sockets.
        let step = tokio::task::spawn_blocking({
            let (end, name) = (wanted.end, wanted.name.clone());
            move || (search(&mut reader, end, &name), reader)
        });
        let (found, back) = step.await.map_err(errors::internal)?;
        reader = back;
        match found {
            Search::Found(start) => return Ok(Some(start)),
            Search::Ended(why) => return Err(missing(wanted, &why)),
            Search::Need(number) if number <= wanted.last.number => {
                let bytes = segment(cx, wanted, number, limit).await?;
                reader.feed(number, bytes).map_err(errors::internal)?;
            }
            Search::Passed | Search::Need(_) => return Ok(None),
        }
    }
}

enum Search {
    Found(Lsn),
    Passed,
    Need(u64),
    Ended(String),
}

fn search(reader: &mut RecordReader<Bytes>, end: Lsn, name: &str) -> Search {
    loop {
        match reader.step() {
            Step::Record(record) => {
                let point = restore_point(&record).filter(|_| record.end == end);
                if point.is_some_and(|point| point.name == name) {
                    return Search::Found(record.start);
                }
                if record.start >= end {
                    return Search::Passed;
                }
            }
            Step::NeedSegment(number) => return Search::Need(number),
            Step::End(why) => return Search::Ended(why.to_string()),
        }
    }
}

async fn segment(
    cx: &OperationContext,
    wanted: &Wanted,
    number: u64,
    limit: usize,
) -> Result<Bytes, ApiError> {
    let name = SegmentName {
        number,
        ..wanted.last
    };
    let file = WalFile {
        node: wanted.node,
        epoch: wanted.epoch.clone(),
        name: name.format(wanted.size).parse().map_err(errors::internal)?,
    };
    read_segment(&*cx.store, &file, limit)
        .await
        .map_err(errors::catalog)
}

fn missing(wanted: &Wanted, why: &str) -> ApiError {
    let message = format!(
        "the WAL in the bucket does not hold the restore point `{}` that ends at {} (segment {}): {why}",
        wanted.name,
        wanted.end,
        wanted.last.format(wanted.size)
    );
    ApiError::new(ErrorKind::Damaged, message).next("make another restore point")
}
