//! What is known, arranged for questions.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use pipeline::store::Key;
use uuid::Uuid;

use super::plan::{Keep, LostPoint, MARGIN, Plan, Removed, Rules, Why};
use super::stretch::{Needs, Present};
use super::{BackupHolding, HeldState, Holdings, PointHolding};
use crate::ids::BackupId;
use crate::journal::WAL_SERVICE;
use crate::keys;
use crate::model::{Manifest, Point};

/// What is known, arranged for questions.
pub(super) struct View<'a> {
    pub(super) held: &'a Holdings,
    pub(super) rules: &'a Rules,
    pub(super) complete: BTreeMap<&'a str, &'a Manifest>,
    pub(super) usable_points: Vec<&'a Point>,
    pub(super) present: Present,
    pub(super) good: BTreeSet<&'a str>,
}

impl<'a> View<'a> {
    pub(super) fn new(held: &'a Holdings, rules: &'a Rules) -> Self {
        let complete = held
            .backups
            .iter()
            .filter_map(|(name, it)| match &it.state {
                HeldState::Complete(manifest) => Some((name.as_str(), &**manifest)),
                _ => None,
            });
        let points = held.points.values().filter(|it| it.stored.size.is_some());
        let manifests = held.backups.values().filter_map(|it| match &it.state {
            HeldState::Complete(manifest) | HeldState::Deleted(Some(manifest)) => Some(&**manifest),
            _ => None,
        });
        let mut view = Self {
            held,
            rules,
            complete: complete.collect(),
            usable_points: points.filter_map(|it| it.point.as_deref().ok()).collect(),
            present: Present::new(&held.wal, manifests),
            good: BTreeSet::new(),
        };
        let whole: BTreeSet<&str> = view
            .complete
            .keys()
            .copied()
            .filter(|id| view.is_whole(id))
            .collect();
        let good = whole
            .iter()
            .copied()
            .filter(|id| view.chain(id).is_some_and(|chain| chain.is_subset(&whole)));
        view.good = good.collect();
        view
    }

    /// Whether everything a recovery of this backup (without its parents) reads is listed in its full size.
    pub(super) fn is_whole(&self, id: &str) -> bool {
        let (manifest, held) = (self.complete[id], &self.held.backups[id]);
        let sizes: BTreeMap<&Key, Option<u64>> =
            held.objects.iter().map(|it| (&it.key, it.size)).collect();
        let has = |key: &Key, size: u64| sizes.get(key) == Some(&Some(size));
        let backup = &manifest.backup_id;
        let objects = manifest.nodes.iter().all(|copy| {
            let (node, attempt) = (copy.node_id, copy.attempt);
            let packs = copy.packs.iter();
            let mut packs = packs.map(|it| (keys::pack(backup, node, attempt, it.number), it.size));
            has(&keys::index(backup, node, attempt), copy.index.size)
                && packs.all(|(key, size)| has(&key, size))
        });
        let own = |point: &&&Point| manifest.point.as_ref() == Some(&point.point_id);
        let point = self.usable_points.iter().find(own);
        objects
            && self.present.has_copies(manifest)
            && point.is_some_and(|point| self.present.leads_to(manifest, point))
    }

    /// A backup with all it builds on; `None` if one of these is missing, or it is a circle.
    pub(super) fn chain(&self, id: &'a str) -> Option<BTreeSet<&'a str>> {
        let (mut chain, mut next) = (BTreeSet::new(), Some(id));
        while let Some(id) = next {
            let (name, manifest) = self.complete.get_key_value(id)?;
            if !chain.insert(*name) {
                return None;
            }
            next = manifest.parent.as_ref().map(BackupId::as_str);
        }
        Some(chain)
    }

    /// The full backup at the beginning of a chain, or where the chain breaks off.
    pub(super) fn root(&self, id: &'a str) -> &'a str {
        let (mut root, mut seen) = (id, BTreeSet::new());
        while seen.insert(root)
            && let Some(parent) = self.complete.get(root).and_then(|it| it.parent.as_ref())
        {
            root = parent.as_str();
        }
        root
    }

    /// How backups are ordered: by when they were completed, as they say.
    pub(super) fn order(&self, id: &'a str) -> (Timestamp, &'a str) {
        let completed = self.complete.get(id).map(|manifest| manifest.completed);
        (completed.unwrap_or(Timestamp::MIN), id)
    }

    pub(super) fn last_good(&self) -> Option<&'a str> {
        self.good.iter().copied().max_by_key(|id| self.order(id))
    }

    pub(super) fn reader(&self, name: &str) -> Option<Uuid> {
        let id: BackupId = name.parse().ok()?;
        self.held.pinned.get(&id).copied()
    }

    pub(super) fn kept(&self) -> BTreeMap<&'a str, Keep> {
        let mut kept = BTreeMap::new();
        let mut keep = |id: &'a str, why| {
            kept.entry(id).or_insert(why);
        };
        let all: Vec<&'a str> = self.complete.keys().copied().collect();
        let no_rule = self.rules.keep_full.is_none() && self.rules.keep_days.is_none();
        for id in &all {
            if self
                .rules
                .keep_full
                .is_some_and(|count| self.is_among_newest(id, count))
            {
                keep(id, Keep::KeepFull);
            }
            if self
                .rules
                .keep_days
                .is_some_and(|days| self.is_younger(id, days))
            {
                keep(id, Keep::KeepDays);
            }
            if no_rule {
                keep(id, Keep::NoRule);
            }
        }
        match self.last_good() {
            Some(id) => keep(id, Keep::LastGood),
            None => all.iter().for_each(|id| keep(id, Keep::NoneGood)),
        }
        for id in &all {
            if self.reader(id).is_some() {
                keep(id, Keep::Read);
            }
        }
        let roots: Vec<&'a str> = kept.keys().copied().collect();
        for id in roots {
            let (mut next, mut seen) = (Some(id), BTreeSet::new());
            while let Some((name, manifest)) = next.and_then(|id| self.complete.get_key_value(id))
                && seen.insert(*name)
            {
                kept.entry(*name).or_insert(Keep::Parent);
                next = manifest.parent.as_ref().map(BackupId::as_str);
            }
        }
        kept
    }

    /// Whether the full backup it builds on is not older than the `count` newest good ones. One that lacks
    /// something counts for nothing, but is not deleted while older ones stay.
    pub(super) fn is_among_newest(&self, id: &'a str, count: u32) -> bool {
        let full = self
            .good
            .iter()
            .copied()
            .filter(|it| self.complete[it].parent.is_none());
        let mut full: Vec<_> = full.map(|it| self.order(it)).collect();
        full.sort_unstable();
        let newest = full.len().checked_sub(count.max(1) as usize);
        newest.is_none_or(|oldest| self.order(self.root(id)) >= full[oldest])
    }

    pub(super) fn is_younger(&self, id: &'a str, days: u32) -> bool {
        let Some(manifest) = self.complete.get(id) else {
            return false;
        };
        let key = keys::manifest(&manifest.backup_id);
        let objects = &self.held.backups[id].objects;
        let stored = objects.iter().find(|it| it.key == key).map(|it| it.newest);
        // Of the two clocks the one that keeps it counts.
        let born = stored.map_or(manifest.completed, |stored| stored.max(manifest.completed));
        let age = self.held.now.duration_since(born);
        age <= jiff::SignedDuration::from_hours(24 * i64::from(days))
    }

    pub(super) fn removal(&self, name: &str, why: Why) -> Option<Removed> {
        Self::removal_of(name, self.held.backups.get(name)?, why)
    }

    pub(super) fn removal_of(name: &str, held: &BackupHolding, why: Why) -> Option<Removed> {
        let id: BackupId = name.parse().ok()?;
        let (manifest, tombstone) = (keys::manifest(&id), keys::tombstone(&id));
        let objects = held.objects.iter();
        let objects = objects.filter(|it| it.key != manifest && it.key != tombstone);
        Some(Removed {
            objects: objects.cloned().collect(),
            manifest: held.objects.iter().find(|it| it.key == manifest).cloned(),
            id,
            why,
        })
    }

    /// Points that a backup can be recovered to: its own, and those that the WAL leads to.
    pub(super) fn points_of(&self, manifest: &Manifest) -> Vec<&'a Point> {
        let points = self.usable_points.iter().copied();
        let own = |point: &Point| manifest.point.as_ref() == Some(&point.point_id);
        points
            .filter(|it| own(it) || self.present.leads_to(manifest, it))
            .collect()
    }

    /// Points that nothing leads to and WAL that nothing needs once the plan's backups are gone; of the
    /// points those that `concerned` names, of the WAL that in `within`, if it is given.
    pub(super) fn points_and_wal(
        &self,
        plan: &mut Plan,
        concerned: impl Fn(&Point) -> bool,
        within: Option<&Needs>,
    ) {
        let gone: BTreeSet<&BackupId> = plan.removed.iter().map(|it| &it.id).collect();
        let unreadable = self.held.backups.iter().find_map(|(name, it)| {
            let goes = name.parse().is_ok_and(|id: BackupId| gone.contains(&id));
            let bad = matches!(it.state, HeldState::Unreadable(_)) && !goes;
            bad.then(|| format!("backup {name}"))
        });
        let bad_point = self
            .held
            .points
            .iter()
            .find(|(_, it)| it.point.is_err() || it.stored.size.is_none());
        let unreadable = unreadable.or_else(|| bad_point.map(|(name, _)| format!("point {name}")));
        if let Some(what) = unreadable {
            plan.notes.push(format!(
                "points and WAL are left alone: what {what} needs cannot be read"
            ));
            return;
        }
        let mut needs = Needs::default();
        let mut led_to = BTreeSet::new();
        for held in self.held.backups.values() {
            let manifest = match &held.state {
                HeldState::Complete(it) if !gone.contains(&it.backup_id) => it,
                // Its reader goes on to the end.
                HeldState::Deleted(Some(it)) if self.held.pinned.contains_key(&it.backup_id) => it,
                _ => continue,
            };
            let points = self.points_of(manifest);
            needs.add(manifest, &points);
            // Points to come are reached by it, too.
            needs.add_what_follows(manifest, &self.present);
            led_to.extend(points.iter().map(|point| point.point_id.clone()));
        }
        let dead: BTreeSet<&BackupId> = plan.dead.iter().map(|it| &it.id).collect();
        for (id, held) in &self.held.points {
            if let Ok(point) = &held.point
                && !led_to.contains(&point.point_id)
                && concerned(point)
                && !self.is_under_way(point.operation, &dead)
                && !self.is_newer_than_wal(point, held)
            {
                plan.points.push(LostPoint {
                    id: id.clone(),
                    stored: held.stored.clone(),
                    metadata: self.held.metadata.get(id).cloned(),
                });
            }
        }
        let under_way = self.held.operations.iter();
        let under_way = under_way.filter(|(id, _)| self.is_under_way(**id, &dead));
        let oldest = under_way.map(|(_, it)| it.started).min();
        let margin = jiff::SignedDuration::try_from(MARGIN).unwrap_or_default();
        let young = oldest.map_or(Timestamp::MAX, |oldest| {
            oldest.checked_sub(margin).unwrap_or(Timestamp::MIN)
        });
        for (of, segments) in &self.held.wal {
            let idle = segments.iter().filter(|it| {
                it.stored.newest < young
                    && !needs.has(of, &it.name)
                    && within.is_none_or(|within| within.has(of, &it.name))
            });
            plan.wal.extend(idle.map(|it| it.stored.clone()));
        }
        if within.is_none() {
            self.gaps(plan);
        }
    }

    /// Gaps with no WAL left before them say nothing any more.
    fn gaps(&self, plan: &mut Plan) {
        let goes: BTreeSet<Key> = plan.wal.iter().map(|it| it.key.clone()).collect();
        for ((node, epoch), gaps) in &self.held.gaps {
            let of = (*node, epoch.clone());
            let segments = self
                .held
                .wal
                .get(&of)
                .map(Vec::as_slice)
                .unwrap_or_default();
            let stays = segments.iter().filter(|it| !goes.contains(&it.stored.key));
            let first = stays.map(|it| it.name.as_str().get(8..24)).min().flatten();
            let idle = gaps.iter().filter(|gap| {
                // A segment's place has the upper half of its position; the lower one depends on the segment size.
                let upper = format!("{:08X}", gap.to >> 32);
                first.is_none_or(|first| first.get(..8).is_some_and(|first| first > &*upper))
            });
            plan.wal.extend(idle.map(|gap| gap.stored.clone()));
        }
    }

    /// Whether a point was made without a backup since the WAL was listed, so that some of what it needs may not stand in the
    /// listing: it is for another time.
    fn is_newer_than_wal(&self, point: &Point, held: &PointHolding) -> bool {
        let age = self.held.now.duration_since(held.stored.newest);
        point.base.is_some() && age < jiff::SignedDuration::try_from(MARGIN).unwrap_or_default()
    }

    /// Whether an operation may still make something of points and WAL.
    pub(super) fn is_under_way(&self, id: Uuid, dead: &BTreeSet<&BackupId>) -> bool {
        let Some(operation) = self.held.operations.get(&id) else {
            return false;
        };
        let over = operation.ended && operation.damaged.is_none();
        match (operation.kind.as_deref(), &operation.backup) {
            (Some("backup"), Some(backup)) if !dead.contains(backup) => {
                match self.held.backups.get(backup.as_str()).map(|it| &it.state) {
                    // Nothing of it is there: its operator knows whether something will be.
                    None if operation.node.is_none() => !over,
                    None => self.makers(backup).any(|(_, maker)| !maker.ended),
                    Some(HeldState::Unfinished | HeldState::Unreadable(_)) => true,
                    Some(_) => false,
                }
            }
            (Some("backup"), Some(_))
            // WAL that is shipped all the time, and points in it, need what follows a backup that stays: no more.
            | (
                Some("restore" | "delete" | "prune" | "verify" | "check" | "point" | WAL_SERVICE),
                _,
            ) => false,
            _ => !over && (self.held.holders.contains(&id) || !self.is_old(operation.newest)),
        }
    }
}
