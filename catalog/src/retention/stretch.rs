//! Stretches of WAL: which segments a recovery needs, and whether all of one are there.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::WalHolding;
use crate::check;
use crate::ids::EpochId;
use crate::model::{Manifest, Point};
use crate::runs::{EpochOf, Runs, epochs, number};
use crate::wal::WalName;

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

    /// All that follows a backup's first segment without a gap: the next point will be made behind it.
    pub(super) fn add_what_follows(&mut self, manifest: &Manifest, present: &Present) {
        for copy in &manifest.nodes {
            let of = (copy.node_id, copy.epoch.clone());
            if let Some(last) = present.end_of_run(&of, &copy.wal_first, copy.wal_segment_size) {
                let stretch = (
                    place(&copy.wal_first).to_owned(),
                    place(last.as_str()).to_owned(),
                );
                self.0.entry(of).or_default().push(stretch);
            }
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
pub(super) struct Present(Runs);

impl Present {
    /// Of a listing; those that a deletion's mark hides are not there. `backups` say how large segments are.
    pub(super) fn new<'a>(
        wal: &BTreeMap<(Uuid, EpochId), Vec<WalHolding>>,
        backups: impl IntoIterator<Item = &'a Manifest>,
    ) -> Self {
        let mut runs = Runs::default();
        for (of, size) in epochs(backups) {
            let segments = wal.get(&of).map(Vec::as_slice).unwrap_or_default();
            let there = segments.iter().filter(|it| it.stored.size.is_some());
            runs.add(&of, size, there.map(|it| &it.name));
        }
        Self(runs)
    }

    /// Whether all segments from `first` to `last` are there.
    fn all(&self, of: &EpochOf, first: &str, last: &str, size: u64) -> bool {
        let (Some(first), Some(last)) = (number(first, size), number(last, size)) else {
            return false;
        };
        self.0.missing(of, size, first, last).is_none()
    }

    /// The last segment that is there without a gap from this one on; `None` if that is missing itself.
    fn end_of_run(&self, of: &EpochOf, from: &str, size: u64) -> Option<WalName> {
        let name: WalName = from.parse().ok()?;
        let (_, last) = self.0.around(of, size, name.number(size)?)?;
        WalName::segment(name.timeline(), last, size)
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
