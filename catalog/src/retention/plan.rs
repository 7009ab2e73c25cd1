//! What may go, decided from what the bucket holds: no request is made here.

use std::fmt;
use std::time::Duration;

use pipeline::store::{Key, UploadId};
use serde::Serialize;
use uuid::Uuid;

use super::stretch::Needs;
use super::view::View;
use super::{HeldState, Holdings, Stored};
use crate::ids::BackupId;
use crate::model::Point;

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
    /// Its metadata, which goes just before it, when the log says already that both go.
    pub metadata: Option<Stored>,
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
        let points = self.points.iter();
        let points = points.flat_map(|point| std::iter::once(&point.stored).chain(&point.metadata));
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
                View::removal_of(name, held, Why::Leftover),
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
        plan.litter.extend(View::litter(name, held));
    }
    plan.litter.extend(view.lost_metadata());
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
        plan.litter = View::litter(name, held);
        return Ok(plan);
    }
    let why = match held.state {
        HeldState::Deleted(_) => Why::Leftover,
        _ => Why::Asked,
    };
    let removal = View::removal_of(name, held, why);
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
                || point.base.as_ref() == Some(&manifest.backup_id)
                || view.present.leads_to(manifest, point)
        };
        let mut stretch = Needs::default();
        stretch.add(manifest, &view.points_of(manifest));
        stretch.add_what_follows(manifest, &view.present);
        view.points_and_wal(&mut plan, its, Some(&stretch));
    }
    Ok(plan)
}

impl Removed {
    fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.manifest.is_none()
    }
}
