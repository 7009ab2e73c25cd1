//! What may go, decided from what the bucket holds: no request is made here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use pipeline::store::{Key, UploadId};
use serde::Serialize;
use uuid::Uuid;

use super::stretch::{Needs, Present};
use super::{BackupHolding, HeldState, Holdings, OperationHolding, Stored};
use crate::ids::BackupId;
use crate::keys;
use crate::model::{Manifest, Point};

/// How much earlier than an unfinished operation's start WAL is kept: stores with several hosts have several
/// clocks.
pub const MARGIN: Duration = Duration::from_mins(5);
/// Journals of operations that are over go when they are as old as this.
pub const JOURNALS: Duration = Duration::from_hours(30 * 24);
/// Grace of what an operation left that did not say how it ended.
pub const GRACE: Duration = Duration::from_hours(24);
/// Lease objects that stay in each scope. Only the newest means anything ([`Catalog::old_leases`]); some more
/// tell people what happened.
///
/// [`Catalog::old_leases`]: crate::Catalog::old_leases
pub const LEASES: usize = 8;

/// What is kept.
#[derive(Debug, Clone)]
pub struct Rules {
    /// So many of the newest full backups, and the increments on them.
    pub keep_full: Option<u32>,
    /// What is younger than so many days.
    pub keep_days: Option<u32>,
    /// How long what an operation left is kept that did not journal its end, by the store's clock.
    pub grace: Duration,
}

/// Why a backup stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// There is no rule.
    NoRule,
    /// It is among the newest full ones, or builds on one of them.
    KeepFull,
    /// It is young enough.
    KeepDays,
    /// It is the newest one of which everything is there.
    LastGood,
    /// No backup here has everything: none is deleted.
    NoneGood,
    /// One that stays builds on it.
    Parent,
    /// Somebody reads it.
    Read,
}

impl Keep {
    /// In a person's words.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::NoRule => "no rule says that it goes",
            Self::KeepFull => "keep-full",
            Self::KeepDays => "keep-days",
            Self::LastGood => "the last good one",
            Self::NoneGood => "no backup here has all of its objects",
            Self::Parent => "another one builds on it",
            Self::Read => "it is being read",
        }
    }
}

/// Why a backup goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// Somebody asked for it.
    Asked,
    /// No rule keeps it.
    Retention,
    /// It was deleted before, and something of it is left.
    Leftover,
}

/// A backup that stays.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Which.
    pub id: BackupId,
    /// Why.
    pub why: Keep,
}

/// A backup that goes.
#[derive(Debug, Clone)]
pub struct Removed {
    /// Which.
    pub id: BackupId,
    /// Why.
    pub why: Why,
    /// Everything below its name but tombstone and manifest.
    pub objects: Vec<Stored>,
    /// Its manifest, which goes last.
    pub manifest: Option<Stored>,
}

/// A backup that was never finished, and will not be.
#[derive(Debug, Clone)]
pub struct Dead {
    /// Which.
    pub id: BackupId,
    /// The operation that was making it; nil if that is not known.
    pub operation: Uuid,
    /// Why it counts as dead.
    pub why: String,
    /// Everything below its name.
    pub objects: Vec<Stored>,
}

/// A point that goes.
#[derive(Debug, Clone)]
pub struct LostPoint {
    /// Its id.
    pub id: String,
    /// Its object.
    pub stored: Stored,
}

/// What goes and what stays. Deleting it in the order of the fields is safe at every step.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Backups that stay, the oldest first.
    pub kept: Vec<Kept>,
    /// Backups to be fenced; then they go.
    pub dead: Vec<Dead>,
    /// Backups that go.
    pub removed: Vec<Removed>,
    /// Points that no backup leads to.
    pub points: Vec<LostPoint>,
    /// WAL that nobody needs.
    pub wal: Vec<Stored>,
    /// What failed attempts and fenced backups left.
    pub litter: Vec<Stored>,
    /// Uploads that nobody will complete.
    pub uploads: Vec<(Key, UploadId)>,
    /// Journals of operations that are long over.
    pub journals: Vec<Stored>,
    /// Leases that say nothing any more.
    pub leases: Vec<Stored>,
    /// What was left alone, and why.
    pub notes: Vec<String>,
}

impl Plan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.dead.is_empty()
            && self.uploads.is_empty()
            && self.removed.is_empty()
            && self.stored().next().is_none()
    }

    /// Everything that goes.
    pub fn stored(&self) -> impl Iterator<Item = &Stored> {
        let dead = self.dead.iter().flat_map(|dead| &dead.objects);
        let removed = self
            .removed
            .iter()
            .flat_map(|it| it.objects.iter().chain(&it.manifest));
        let points = self.points.iter().map(|point| &point.stored);
        let rest = [&self.wal, &self.litter, &self.journals, &self.leases];
        let rest = rest.into_iter().flatten();
        dead.chain(removed).chain(points).chain(rest)
    }

    /// Bytes of everything that goes, all versions.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.stored().map(Stored::bytes).sum()
    }

    /// How many versions go.
    #[must_use]
    pub fn versions(&self) -> usize {
        self.stored().map(|stored| stored.versions.len()).sum()
    }
}

/// Why one backup is not deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// There is none of that name.
    NotFound,
    /// More than one begins like that.
    Ambiguous(Vec<String>),
    /// These build on it.
    Increments(BackupId, Vec<BackupId>),
    /// This operation reads it.
    Read(BackupId, Uuid),
    /// It is the last good one.
    LastGood(BackupId),
    /// It is being made, or died.
    Unfinished(BackupId),
    /// Its name is none of ours.
    Foreign(String),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound => write!(f, "there is no such backup"),
            Self::Ambiguous(names) => write!(f, "it is ambiguous: {}", names.join(", ")),
            Self::Increments(id, children) => {
                let names: Vec<_> = children.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "backup {id} cannot go: {} builds on it",
                    names.join(", ")
                )
            }
            Self::Read(id, operation) => {
                write!(f, "backup {id} is being read by operation {operation}")
            }
            Self::LastGood(id) => write!(f, "backup {id} is the last good one"),
            Self::Unfinished(id) => {
                write!(f, "backup {id} is being made, or died: it is no backup")
            }
            Self::Foreign(name) => write!(f, "`{name}` is no backup's id"),
        }
    }
}

/// Retention by `rules`, and all garbage.
#[must_use]
pub fn prune(holdings: &Holdings, rules: &Rules) -> Plan {
    let view = View::new(holdings, rules);
    let kept = view.kept();
    let mut plan = Plan::default();
    let mut complete: Vec<&str> = view.complete.keys().copied().collect();
    complete.sort_by_key(|id| view.order(id));
    for id in complete {
        match kept.get(id) {
            Some(why) => plan.kept.push(Kept {
                id: view.complete[id].backup_id.clone(),
                why: *why,
            }),
            None => plan.removed.extend(view.removal(id, Why::Retention)),
        }
    }
    // An increment before what it builds on: no listed backup ever lacks its parent.
    let depth = |removed: &Removed| {
        view.chain(removed.id.as_str())
            .map_or(0, |chain| chain.len())
    };
    plan.removed
        .sort_by_key(|removed| std::cmp::Reverse(depth(removed)));
    for (name, held) in &holdings.backups {
        if matches!(held.state, HeldState::Deleted(_)) {
            match (
                view.removal_of(name, held, Why::Leftover),
                view.reader(name),
            ) {
                (Some(it), None) if !it.is_empty() => plan.removed.push(it),
                (Some(it), Some(reader)) if !it.is_empty() => plan.notes.push(format!(
                    "what is left of the deleted backup {name} stays: operation {reader} reads it"
                )),
                _ => {}
            }
        }
        if let HeldState::Unreadable(why) = &held.state {
            plan.notes
                .push(format!("backup {name} is left alone: {why}"));
        }
    }
    view.find_dead(&mut plan);
    let everything = |_: &Point| true;
    view.points_and_wal(&mut plan, everything, None);
    for (name, held) in &holdings.backups {
        plan.litter.extend(view.litter(name, held));
    }
    view.uploads_and_journals(&mut plan);
    for leases in &holdings.leases {
        let old = leases.len().saturating_sub(LEASES);
        plan.leases.extend(leases[..old].iter().cloned());
    }
    plan
}

/// The deletion of one backup, named by the beginning of its id. `even_last_good` lets go of the last good one.
///
/// # Errors
/// Why it stays.
pub fn delete(holdings: &Holdings, text: &str, even_last_good: bool) -> Result<Plan, Refused> {
    let rules = Rules {
        keep_full: None,
        keep_days: None,
        grace: GRACE,
    };
    let view = View::new(holdings, &rules);
    let names = holdings
        .backups
        .keys()
        .filter(|name| name.starts_with(text));
    let names: Vec<&String> = names.collect();
    let name = match names.as_slice() {
        _ if text.is_empty() => return Err(Refused::NotFound),
        [] => return Err(Refused::NotFound),
        [name] => name.as_str(),
        several => {
            return Err(Refused::Ambiguous(
                several.iter().map(ToString::to_string).collect(),
            ));
        }
    };
    let id: BackupId = name
        .parse()
        .map_err(|_| Refused::Foreign(name.to_owned()))?;
    let held = &holdings.backups[name];
    if matches!(held.state, HeldState::Unfinished) {
        return Err(Refused::Unfinished(id));
    }
    if let Some(reader) = view.reader(name) {
        return Err(Refused::Read(id, reader));
    }
    let children = view.complete.values();
    let children = children.filter(|manifest| manifest.parent.as_ref() == Some(&id));
    let children: Vec<_> = children
        .map(|manifest| manifest.backup_id.clone())
        .collect();
    if !children.is_empty() {
        return Err(Refused::Increments(id, children));
    }
    let last_good = view.last_good() == Some(name);
    if last_good && !even_last_good {
        return Err(Refused::LastGood(id));
    }
    let mut plan = Plan::default();
    if matches!(held.state, HeldState::Abandoned) {
        plan.litter = view.litter(name, held);
        return Ok(plan);
    }
    let why = match held.state {
        HeldState::Deleted(_) => Why::Leftover,
        _ => Why::Asked,
    };
    let removal = view.removal_of(name, held, why);
    plan.removed
        .extend(removal.filter(|it| why == Why::Asked || !it.is_empty()));
    for (other, manifest) in &view.complete {
        if *other != name {
            plan.kept.push(Kept {
                id: manifest.backup_id.clone(),
                why: Keep::NoRule,
            });
        }
    }
    if let HeldState::Complete(manifest) | HeldState::Deleted(Some(manifest)) = &held.state {
        let its = |point: &Point| {
            manifest.point.as_ref() == Some(&point.point_id)
                || view.present.leads_to(manifest, point)
        };
        let mut stretch = Needs::default();
        stretch.add(manifest, &view.points_of(manifest));
        view.points_and_wal(&mut plan, its, Some(&stretch));
    }
    Ok(plan)
}

impl Removed {
    fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.manifest.is_none()
    }
}

/// What is known, arranged for questions.
struct View<'a> {
    held: &'a Holdings,
    rules: &'a Rules,
    complete: BTreeMap<&'a str, &'a Manifest>,
    usable_points: Vec<&'a Point>,
    present: Present<'a>,
    good: BTreeSet<&'a str>,
}

impl<'a> View<'a> {
    fn new(held: &'a Holdings, rules: &'a Rules) -> Self {
        let complete = held
            .backups
            .iter()
            .filter_map(|(name, it)| match &it.state {
                HeldState::Complete(manifest) => Some((name.as_str(), &**manifest)),
                _ => None,
            });
        let points = held.points.values().filter(|it| it.stored.size.is_some());
        let mut view = Self {
            held,
            rules,
            complete: complete.collect(),
            usable_points: points.filter_map(|it| it.point.as_deref().ok()).collect(),
            present: Present::new(&held.wal),
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
    fn is_whole(&self, id: &str) -> bool {
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
    fn chain(&self, id: &'a str) -> Option<BTreeSet<&'a str>> {
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
    fn root(&self, id: &'a str) -> &'a str {
        let (mut root, mut seen) = (id, BTreeSet::new());
        while seen.insert(root)
            && let Some(parent) = self.complete.get(root).and_then(|it| it.parent.as_ref())
        {
            root = parent.as_str();
        }
        root
    }

    /// How backups are ordered: by when they were completed, as they say.
    fn order(&self, id: &'a str) -> (Timestamp, &'a str) {
        let completed = self.complete.get(id).map(|manifest| manifest.completed);
        (completed.unwrap_or(Timestamp::MIN), id)
    }

    fn last_good(&self) -> Option<&'a str> {
        self.good.iter().copied().max_by_key(|id| self.order(id))
    }

    fn reader(&self, name: &str) -> Option<Uuid> {
        let id: BackupId = name.parse().ok()?;
        self.held.pinned.get(&id).copied()
    }

    fn kept(&self) -> BTreeMap<&'a str, Keep> {
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
    fn is_among_newest(&self, id: &'a str, count: u32) -> bool {
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

    fn is_younger(&self, id: &'a str, days: u32) -> bool {
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

    fn removal(&self, name: &str, why: Why) -> Option<Removed> {
        self.removal_of(name, self.held.backups.get(name)?, why)
    }

    fn removal_of(&self, name: &str, held: &BackupHolding, why: Why) -> Option<Removed> {
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

    /// What lies below a name and is no part of what stands there.
    fn litter(&self, name: &str, held: &BackupHolding) -> Vec<Stored> {
        let Ok(id) = name.parse::<BackupId>() else {
            return Vec::new();
        };
        let fixed = [keys::manifest(&id), keys::tombstone(&id)];
        let objects = held.objects.iter().filter(|it| !fixed.contains(&it.key));
        match &held.state {
            HeldState::Abandoned => objects.cloned().collect(),
            HeldState::Complete(manifest) => {
                let named: BTreeSet<Key> = named(manifest).collect();
                let extra = objects.filter(|it| is_of_attempt(&it.key) && !named.contains(&it.key));
                extra.cloned().collect()
            }
            _ => Vec::new(),
        }
    }

    /// Operations that make a backup: the operator's own part, which has no node.
    fn makers(&self, id: &BackupId) -> impl Iterator<Item = (&Uuid, &OperationHolding)> {
        let all = self.held.operations.iter();
        all.filter(move |(_, it)| it.makes(id) && it.node.is_none())
    }

    fn find_dead(&self, plan: &mut Plan) {
        let mut names: BTreeMap<BackupId, &[Stored]> = BTreeMap::new();
        for operation in self.held.operations.values() {
            let settled = operation.node.is_some() || operation.ended;
            let backup = operation.backup.as_ref().filter(|_| !settled);
            if let Some(id) = backup.filter(|_| operation.kind.as_deref() == Some("backup"))
                && !self.held.backups.contains_key(id.as_str())
            {
                names.insert(id.clone(), &[]);
            }
        }
        for (name, held) in &self.held.backups {
            if let (HeldState::Unfinished, Ok(id)) = (&held.state, name.parse()) {
                names.insert(id, &held.objects);
            }
        }
        for (id, objects) in names {
            match self.is_dead(&id, objects) {
                Ok((operation, why)) => plan.dead.push(Dead {
                    id,
                    operation,
                    why,
                    objects: objects.to_vec(),
                }),
                Err(why) => plan.notes.push(format!("backup {id} is left alone: {why}")),
            }
        }
    }

    /// Why nobody will finish a backup, or why that cannot be said.
    fn is_dead(&self, id: &BackupId, objects: &[Stored]) -> Result<(Uuid, String), String> {
        match &self.held.in_making {
            Some(Some(making)) if making == id => return Err("it is being made".to_owned()),
            Some(None) => {
                return Err("a backup is being made, and its lease does not say which".to_owned());
            }
            _ => {}
        }
        let makers: Vec<_> = self.makers(id).collect();
        let operation = makers
            .last()
            .map_or(Uuid::nil(), |(operation, _)| **operation);
        let ended = |it: &OperationHolding| it.ended && it.damaged.is_none();
        if !makers.is_empty() && makers.iter().all(|(_, it)| ended(it)) {
            return Ok((operation, "its operation ended without it".to_owned()));
        }
        let all = self.held.operations.values();
        let records = all.filter(|it| it.makes(id)).map(|it| it.newest);
        let newest = objects.iter().map(|it| it.newest).chain(records).max();
        let newest = newest.unwrap_or(self.held.now);
        let since = newest.strftime("%F %TZ");
        if self.is_old(newest) {
            Ok((operation, format!("nothing was heard of it since {since}")))
        } else {
            Err(format!("it may be under way: it was heard of at {since}"))
        }
    }

    fn is_old(&self, newest: Timestamp) -> bool {
        let silent = self.held.now.duration_since(newest);
        silent
            > jiff::SignedDuration::try_from(self.rules.grace).unwrap_or(jiff::SignedDuration::MAX)
    }

    /// Points that a backup can be recovered to: its own, and those that the WAL leads to.
    fn points_of(&self, manifest: &Manifest) -> Vec<&'a Point> {
        let points = self.usable_points.iter().copied();
        let own = |point: &Point| manifest.point.as_ref() == Some(&point.point_id);
        points
            .filter(|it| own(it) || self.present.leads_to(manifest, it))
            .collect()
    }

    /// Points that nothing leads to and WAL that nothing needs once the plan's backups are gone; of the
    /// points those that `concerned` names, of the WAL that in `within`, if it is given.
    fn points_and_wal(
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
            led_to.extend(points.iter().map(|point| point.point_id.clone()));
        }
        let dead: BTreeSet<&BackupId> = plan.dead.iter().map(|it| &it.id).collect();
        for (id, held) in &self.held.points {
            if let Ok(point) = &held.point
                && !led_to.contains(&point.point_id)
                && concerned(point)
                && !self.is_under_way(point.operation, &dead)
            {
                plan.points.push(LostPoint {
                    id: id.clone(),
                    stored: held.stored.clone(),
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
    }

    /// Whether an operation may still make something of points and WAL.
    fn is_under_way(&self, id: Uuid, dead: &BTreeSet<&BackupId>) -> bool {
        let Some(operation) = self.held.operations.get(&id) else {
            return false;
        };
        let over = operation.ended && operation.damaged.is_none();
        match (operation.kind.as_deref(), &operation.backup) {
            (Some("restore" | "delete" | "prune" | "verify" | "check"), _) => false,
            (Some("backup"), Some(backup)) if !dead.contains(backup) => {
                match self.held.backups.get(backup.as_str()).map(|it| &it.state) {
                    // Nothing of it is there: its operator knows whether something will be.
                    None if operation.node.is_none() => !over,
                    None => self.makers(backup).any(|(_, maker)| !maker.ended),
                    Some(HeldState::Unfinished | HeldState::Unreadable(_)) => true,
                    Some(_) => false,
                }
            }
            (Some("backup"), Some(_)) => false,
            _ => !over && (self.held.holders.contains(&id) || !self.is_old(operation.newest)),
        }
    }

    fn uploads_and_journals(&self, plan: &mut Plan) {
        let dead: BTreeSet<&BackupId> = plan.dead.iter().map(|it| &it.id).collect();
        for (id, operation) in &self.held.operations {
            if self.held.holders.contains(id) {
                continue;
            }
            let old = self.is_old(operation.newest);
            let fate = operation.backup.as_ref().map(|backup| {
                let state = self.held.backups.get(backup.as_str()).map(|it| &it.state);
                let lost = matches!(state, Some(HeldState::Abandoned | HeldState::Deleted(_)));
                let stands = matches!(state, Some(HeldState::Complete(_)));
                (lost || dead.contains(backup), stands)
            });
            let over = match (operation.kind.as_deref(), fate) {
                (Some("backup"), Some((lost, stands))) => lost || (stands && old),
                _ => old && operation.kind.as_deref() != Some("restore"),
            };
            if over {
                plan.uploads.extend(operation.uploads.iter().cloned());
            }
            let age = self.held.now.duration_since(operation.newest);
            let ancient = age > jiff::SignedDuration::try_from(JOURNALS).unwrap_or_default();
            let known = operation.damaged.is_none() && operation.kind.is_some();
            // Its uploads have been asked for just now, and are aborted before. A restore without an end may
            // have nodes that look for its decision when they wake up.
            if ancient && known && (operation.ended || over) {
                plan.journals.extend(operation.objects.iter().cloned());
            }
        }
    }
}

/// The objects that a manifest names.
fn named(manifest: &Manifest) -> impl Iterator<Item = Key> {
    let backup = &manifest.backup_id;
    manifest.nodes.iter().flat_map(move |copy| {
        let (node, attempt) = (copy.node_id, copy.attempt);
        let packs = copy.packs.iter();
        let packs = packs.map(move |it| keys::pack(backup, node, attempt, it.number));
        packs.chain([keys::index(backup, node, attempt)])
    })
}

/// Whether a key is `backups/<id>/<node>/<attempt>/index` or a pack beside it. What is none of these may be
/// something that a newer version keeps there.
fn is_of_attempt(key: &Key) -> bool {
    let parts: Vec<&str> = key.as_str().split('/').collect();
    let [_, _, node, attempt, file] = parts.as_slice() else {
        return false;
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    node.parse::<Uuid>().is_ok()
        && digits(attempt)
        && (*file == "index" || file.strip_prefix("pack-").is_some_and(digits))
}
