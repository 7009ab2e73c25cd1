//! Unbroken runs of WAL segments: asked of many points at a time, each answer is a search and no walk.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use crate::ids::EpochId;
use crate::model::Manifest;
use crate::wal::WalName;

/// A node's epoch.
pub(crate) type EpochOf = (Uuid, EpochId);

/// First and last segment by number, both included.
pub(crate) type Run = (u64, u64);

/// Which segments are there, by epoch and by the size that segments have there, whatever their timelines.
#[derive(Debug, Clone, Default)]
pub(crate) struct Runs(BTreeMap<(EpochOf, u64), Vec<Run>>);

/// The epochs that backups have copies of, with the sizes of their segments.
pub(crate) fn epochs<'a>(
    backups: impl IntoIterator<Item = &'a Manifest>,
) -> BTreeSet<(EpochOf, u64)> {
    let copies = backups.into_iter().flat_map(|manifest| &manifest.nodes);
    copies
        .map(|copy| ((copy.node_id, copy.epoch.clone()), copy.wal_segment_size))
        .collect()
}

impl Runs {
    /// Adds the segments of one epoch, in any order.
    pub(crate) fn add<'a>(
        &mut self,
        of: &EpochOf,
        size: u64,
        names: impl IntoIterator<Item = &'a WalName>,
    ) {
        let numbers = names.into_iter().filter_map(|name| name.number(size));
        let numbers: BTreeSet<u64> = numbers.collect();
        let mut runs: Vec<Run> = Vec::new();
        for number in numbers {
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == number => *last = number,
                _ => runs.push((number, number)),
            }
        }
        self.0.insert((of.clone(), size), runs);
    }

    /// The run that a segment lies in.
    pub(crate) fn around(&self, of: &EpochOf, size: u64, number: u64) -> Option<Run> {
        let runs = self.0.get(&(of.clone(), size))?;
        let after = runs.partition_point(|(first, _)| *first <= number);
        let run = *runs.get(after.checked_sub(1)?)?;
        (number <= run.1).then_some(run)
    }

    /// The first segment from `first` to `last` that is not there.
    pub(crate) fn missing(&self, of: &EpochOf, size: u64, first: u64, last: u64) -> Option<u64> {
        if first > last {
            return None;
        }
        match self.around(of, size, first) {
            None => Some(first),
            Some((_, end)) if end < last => Some(end + 1),
            Some(_) => None,
        }
    }
}

/// The number of a segment by its name.
pub(crate) fn number(name: &str, size: u64) -> Option<u64> {
    name.parse::<WalName>().ok()?.number(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 16 << 20;

    #[test]
    fn runs_end_where_a_segment_is_missing() {
        let of = (Uuid::nil(), EpochId::generate(1));
        let names = [0xFE, 0xFF, 0x100, 0x102, 0x103]
            .map(|number| WalName::segment(1, number, SIZE).unwrap());
        let mut runs = Runs::default();
        runs.add(&of, SIZE, names.iter().rev());
        assert_eq!(runs.around(&of, SIZE, 0xFF), Some((0xFE, 0x100)));
        assert_eq!(runs.around(&of, SIZE, 0x101), None);
        assert_eq!(runs.around(&of, SIZE, 0xFD), None);
        assert_eq!(runs.missing(&of, SIZE, 0xFE, 0x100), None);
        assert_eq!(runs.missing(&of, SIZE, 0xFE, 0x103), Some(0x101));
        assert_eq!(runs.missing(&of, SIZE, 0x101, 0x103), Some(0x101));
        assert_eq!(runs.missing(&of, SIZE, 0x102, 0x104), Some(0x104));
        assert_eq!(runs.missing(&of, SIZE, 0x10, 0x11), Some(0x10));
        let other = (Uuid::max(), of.1.clone());
        assert_eq!(runs.missing(&other, SIZE, 1, 1), Some(1));
    }
}
