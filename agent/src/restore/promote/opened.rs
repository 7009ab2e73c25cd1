//! Where an openGauss opened. Its timeline does not change, so that its log itself has to say it: the first record it
//! writes is the checkpoint that ends recovery, and takes the place of the point's record.

use std::fs;
use std::path::Path;

use agent_wal::kind::shutdown_checkpoint;
use agent_wal::record::{ReaderOptions, RecordReader, Step};
use agent_wal::{Flavour, Lsn, SegmentName, SegmentSize};

/// Checks that the log in `directory` goes on at `fork` with the checkpoint of a server that opened there.
///
/// # Errors
/// What is there instead, in words.
pub(super) fn opened_at(
    directory: &Path,
    timeline: u32,
    fork: Lsn,
    size: SegmentSize,
) -> Result<(), String> {
    let mut options = ReaderOptions::new(size);
    options.flavour = Some(Flavour::OpenGauss);
    let mut reader = RecordReader::new(fork, options);
    let step = reader.step_with(|number| {
        let path = directory.join(SegmentName { timeline, number }.format(size));
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    })?;
    match step {
        Step::Record(record) if shutdown_checkpoint(&record) == Some(fork) => Ok(()),
        Step::Record(record) => Err(format!(
            "at {fork} its log has a record of resource manager {}, info {:02X}",
            record.rmid, record.info
        )),
        Step::End(end) => Err(end.to_string()),
        Step::NeedSegment(number) => Err(format!("its log has no segment {number}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The segments that a real openGauss had before and after it opened at its point.
    #[test]
    fn a_log_that_goes_on_at_the_point_is_told_from_one_that_passed_it() {
        let before = include_bytes!("../../../wal/tests/fixtures/wal.opengauss.point.zst");
        let after = include_bytes!("../../../wal/tests/fixtures/wal.opengauss.opened.zst");
        let point: Lsn = "0/7009FB0".parse().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let look = |fork| opened_at(directory.path(), 1, fork, SegmentSize::DEFAULT);
        assert!(
            look(point)
                .unwrap_err()
                .contains("000000010000000000000007")
        );
        let file = directory.path().join("000000010000000000000007");
        fs::write(&file, zstd::decode_all(&after[..]).unwrap()).unwrap();
        look(point).unwrap();
        // A shutdown checkpoint of later.
        assert!(look(Lsn(point.0 + 8)).is_err());
        fs::write(&file, zstd::decode_all(&before[..]).unwrap()).unwrap();
        assert!(look(point).unwrap_err().contains("info 70"));
    }
}
