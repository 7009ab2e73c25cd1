//! Stretches of WAL: which segments a recovery needs, and whether all of one are there.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::WalHolding;
use crate::check;
use crate::ids::EpochId;
use crate::model::{Manifest, Point};
use crate::wal::WalName;

type EpochOf = (Uuid, EpochId);

/// A segment's place in the log, whatever its timeline: names sort by it.
fn place(name: &str) -> &str {
    name.get(8..24).unwrap_or_default()
}

/// First and last place of a stretch, both included.
type Stretch = (String, String);

/// The stretches that somebody needs.
#[derive(Debug, Default)]
pub(super) struct Needs(BTreeMap<EpochOf, Vec<Stretch>>);

impl Needs {
    /// All that a recovery of a backup asks for: to the end of its copies, and to each of `points`.
    pub(super) fn add(&mut self, manifest: &Manifest, points: &[&Point]) {
        for copy in &manifest.nodes {
            let marks = points.iter().flat_map(|point| &point.nodes);
            let marks = marks.filter(|it| it.node_id == copy.node_id && it.epoch == copy.epoch);
            let lasts = marks.map(|it| place(&it.wal_last));
            let last = lasts.fold(place(&copy.wal_last), Ord::max);
            let stretches = self.0.entry((copy.node_id, copy.epoch.clone()));
            let stretch = (place(&copy.wal_first).to_owned(), last.to_owned());
            stretches.or_default().push(stretch);
        }
    }

    /// Whether a segment lies in one of them.
    pub(super) fn has(&self, of: &EpochOf, name: &WalName) -> bool {
        let here = place(name.as_str());
        let stretches = self.0.get(of).map(Vec::as_slice).unwrap_or_default();
        let within = |(first, last): &Stretch| first.as_str() <= here && here <= last.as_str();
        stretches.iter().any(within)
    }
}

/// Which segments are there.
#[derive(Debug)]
pub(super) struct Present<'a>(BTreeMap<&'a EpochOf, BTreeSet<&'a str>>);

impl<'a> Present<'a> {
    /// Of a listing; those that a deletion's mark hides are not there.
    pub(super) fn new(wal: &'a BTreeMap<EpochOf, Vec<WalHolding>>) -> Self {
        let places = |segments: &'a [WalHolding]| {
            let there = segments.iter().filter(|it| it.stored.size.is_some());
            there.map(|it| place(it.name.as_str())).collect()
        };
        Self(wal.iter().map(|(of, it)| (of, places(it))).collect())
    }

    /// Whether all segments from `first` to `last` are there.
    fn all(&self, of: &EpochOf, first: &str, last: &str, segment_size: u64) -> bool {
        let Some(present) = self.0.get(of) else {
            return false;
        };
        let half = |text: Option<&str>| u64::from_str_radix(text.unwrap_or_default(), 16).ok();
        let (first, last) = (place(first), place(last));
        let (Some(mut high), Some(mut low)) = (half(first.get(..8)), half(first.get(8..))) else {
            return false;
        };
        // A log file of 4 GiB has so many segments; their number starts again in the next one.
        let in_file = (1_u64 << 32) / segment_size.max(1);
        loop {
            let here = format!("{high:08X}{low:08X}");
            if here.as_str() > last {
                return true;
            }
            if !present.contains(here.as_str()) {
                return false;
            }
            low += 1;
            if low >= in_file {
                (high, low) = (high + 1, 0);
            }
        }
    }

    /// Whether all WAL of a backup's copies is there.
    pub(super) fn has_copies(&self, manifest: &Manifest) -> bool {
        manifest.nodes.iter().all(|copy| {
            let of = (copy.node_id, copy.epoch.clone());
            let size = copy.wal_segment_size;
            self.all(&of, &copy.wal_first, &copy.wal_last, size)
        })
    }

    /// Whether a backup can be recovered to a point with the WAL that is there.
    pub(super) fn leads_to(&self, manifest: &Manifest, point: &Point) -> bool {
        check::belongs(manifest, point).is_ok()
            && manifest.nodes.iter().all(|copy| {
                let of = (copy.node_id, copy.epoch.clone());
                let mark = point.nodes.iter().find(|it| it.node_id == copy.node_id);
                mark.is_some_and(|mark| {
                    let size = copy.wal_segment_size;
                    self.all(&of, &copy.wal_first, &mark.wal_last, size)
                })
            })
    }
}
