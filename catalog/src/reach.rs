//! Which points can be recovered to, from which backups, and why not from others.
//!
//! A backup leads to a point if both are of the same nodes, epochs and timelines, the point lies behind the end of each
//! node's copy, and every WAL segment from the copy's first one to the point's last one is in the bucket. Nothing is read of
//! those segments here: whether their bytes are right is for a verification, and for the restore itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::Timestamp;
use uuid::Uuid;

use crate::check;
use crate::error::CatalogError;
use crate::ids::{BackupId, EpochId, PointId};
use crate::keys;
use crate::model::{Gap, Manifest, NodeBackup, NodePoint, Point};
use crate::repo::{BackupState, Catalog, PointState, in_parallel};
use crate::runs::{EpochOf, Runs, epochs, number};
use crate::wal::{WalName, list_segments};

/// Why a backup does not lead to a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unreachable {
    /// It has no copy of a node of the point.
    NoCopy {
        /// The node.
        node: Uuid,
    },
    /// It has a copy of a node that the point lacks.
    NotMarked {
        /// The node.
        node: Uuid,
    },
    /// The node was restored, moved or registered anew between the two.
    OtherEpoch {
        /// The node.
        node: Uuid,
        /// The copy's.
        copy: EpochId,
        /// The point's.
        point: EpochId,
    },
    /// The node changed its timeline between the two.
    OtherTimeline {
        /// The node.
        node: Uuid,
        /// The copy's.
        copy: u32,
        /// The point's.
        point: u32,
    },
    /// The point was made before the copy had ended.
    Earlier {
        /// The node.
        node: Uuid,
    },
    /// WAL between the two is not in the bucket.
    NoWal {
        /// The node.
        node: Uuid,
        /// The first segment that is missing.
        segment: String,
        /// Why, if that was written down.
        why: Option<String>,
    },
    /// A backup that it builds on is not there, or is another one.
    Parent(String),
    /// It names WAL that no cluster has.
    Nonsense(Uuid),
}

impl Unreachable {
    /// Whether the backup is too young: then it says nothing of why older ones do not lead there.
    fn is_earlier(&self) -> bool {
        matches!(self, Self::Earlier { .. })
    }
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCopy { node } => write!(f, "it has no copy of node {node}"),
            Self::NotMarked { node } => write!(f, "the point does not have its node {node}"),
            Self::OtherEpoch { node, copy, point } => write!(
                f,
                "its copy of node {node} is of epoch {copy}, the point is in epoch {point}"
            ),
            Self::OtherTimeline { node, copy, point } => write!(
                f,
                "its copy of node {node} is on timeline {copy}, the point on timeline {point}"
            ),
            Self::Earlier { node } => {
                write!(
                    f,
                    "the point was made before its copy of node {node} had ended"
                )
            }
            Self::NoWal { node, segment, why } => {
                write!(
                    f,
                    "WAL of node {node} is missing in between, from segment {segment} on"
                )?;
                match why {
                    Some(why) => write!(f, " ({})", why.replace(char::is_control, "?")),
                    None => Ok(()),
                }
            }
            Self::Parent(why) => f.write_str(why),
            Self::Nonsense(node) => write!(f, "what it says of the WAL of node {node} cannot be"),
        }
    }
}

/// A point, and the backup to begin at.
#[derive(Debug, Clone)]
pub struct Surveyed<'a> {
    /// The point.
    pub point: &'a Point,
    /// The newest backup that leads to it, or why none does.
    pub base: Result<&'a Manifest, NoBase>,
}

/// Why no backup leads to a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoBase {
    /// There is none that is older than the point.
    NoneBefore,
    /// Nor is there the one that it was made on any more.
    Gone(BackupId),
    /// The newest older one does not.
    Unreachable(BackupId, Unreachable),
}

impl fmt::Display for NoBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoneBefore => f.write_str("no backup is older than it"),
            Self::Gone(id) => write!(
                f,
                "backup {id}, which it was made on, is not there any more"
            ),
            Self::Unreachable(id, why) => write!(f, "backup {id}: {why}"),
        }
    }
}

/// A point that cannot be used.
#[derive(Debug)]
pub struct Unusable {
    /// Its name in the bucket.
    pub name: String,
    /// Why.
    pub error: CatalogError,
}

/// All backups, points and WAL of a repository.
#[derive(Debug, Default)]
pub struct Reach {
    /// Complete ones, by when they were completed.
    backups: Vec<Manifest>,
    /// By when they were made.
    points: Vec<Point>,
    unusable: Vec<Unusable>,
    runs: Runs,
    gaps: BTreeMap<EpochOf, Vec<Gap>>,
}

impl Reach {
    /// Lists and reads. WAL is listed last: what a point that was listed needs is in that listing, unless it is missing.
    ///
    /// # Errors
    /// [`CatalogError::Store`] if the store cannot list or hand out something.
    pub async fn read(catalog: &Catalog) -> Result<Self, CatalogError> {
        let complete = catalog.backups().await?.into_iter();
        let complete = complete.filter_map(|listed| match listed.state {
            BackupState::Complete(manifest) => Some(*manifest),
            _ => None,
        });
        let backups: Vec<_> = complete.collect();
        let (mut points, mut unusable) = (Vec::new(), Vec::new());
        for listed in catalog.points().await? {
            let name = listed.name;
            match listed.state {
                PointState::Usable(point) => points.push(*point),
                PointState::Unusable(error) if error.is_absent() => {}
                PointState::Unusable(error) => unusable.push(Unusable { name, error }),
            }
        }
        let store = catalog.store();
        let listed = in_parallel(epochs(&backups), |(of, size)| async move {
            let listed = list_segments(&**store, of.0, &of.1).await?;
            let declared = match catalog.gaps(of.0, &of.1).await {
                // They only say why: the segments say what is missing.
                Err(error) if error.is_of_object() => Vec::new(),
                declared => declared?,
            };
            Ok((of, size, listed, declared))
        });
        let (mut runs, mut gaps) = (Runs::default(), BTreeMap::new());
        for (of, size, listed, declared) in listed.await? {
            runs.add(&of, size, listed.iter().map(|it| &it.name));
            gaps.insert(of, declared);
        }
        Ok(Self {
            gaps,
            ..Self::of(backups, points, unusable, runs)
        })
    }

    fn of(
        mut backups: Vec<Manifest>,
        mut points: Vec<Point>,
        unusable: Vec<Unusable>,
        runs: Runs,
    ) -> Self {
        backups.sort_by(|a, b| (a.completed, &a.backup_id).cmp(&(b.completed, &b.backup_id)));
        points.sort_by(|a, b| (a.made(), &a.point_id).cmp(&(b.made(), &b.point_id)));
        Self {
            backups,
            points,
            unusable,
            runs,
            gaps: BTreeMap::new(),
        }
    }

    /// Every point, by when it was made.
    #[must_use]
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// Points that cannot be used.
    #[must_use]
    pub fn unusable(&self) -> &[Unusable] {
        &self.unusable
    }

    /// Complete backups, by when they were completed.
    #[must_use]
    pub fn backups(&self) -> &[Manifest] {
        &self.backups
    }

    /// A point.
    #[must_use]
    pub fn point(&self, id: &PointId) -> Option<&Point> {
        self.points.iter().find(|point| point.point_id == *id)
    }

    /// A complete backup.
    #[must_use]
    pub fn backup(&self, id: &BackupId) -> Option<&Manifest> {
        self.backups.iter().find(|it| it.backup_id == *id)
    }

    /// Whether `backup` leads to `point`, for `nodes`; if there are none, for all nodes of both.
    ///
    /// # Errors
    /// Why not.
    pub fn leads(
        &self,
        backup: &Manifest,
        point: &Point,
        nodes: &[Uuid],
    ) -> Result<(), Unreachable> {
        let wanted = |node: Uuid| nodes.is_empty() || nodes.contains(&node);
        let copies = backup.nodes.iter().filter(|copy| wanted(copy.node_id));
        let mut copies: BTreeMap<Uuid, &NodeBackup> =
            copies.map(|copy| (copy.node_id, copy)).collect();
        let mut pairs = Vec::new();
        for mark in point.nodes.iter().filter(|mark| wanted(mark.node_id)) {
            let node = mark.node_id;
            let copy = copies.remove(&node).ok_or(Unreachable::NoCopy { node })?;
            pairs.push((copy, mark));
        }
        if let Some(node) = copies.keys().next() {
            return Err(Unreachable::NotMarked { node: *node });
        }
        if let Some(node) = nodes
            .iter()
            .find(|node| !pairs.iter().any(|(it, _)| it.node_id == **node))
        {
            return Err(Unreachable::NoCopy { node: *node });
        }
        for (copy, mark) in &pairs {
            in_order(copy, mark)?;
        }
        self.chain(backup)?;
        for (copy, mark) in pairs {
            self.joined(copy, mark)?;
        }
        Ok(())
    }

    /// The newest backup that leads to a point, for `nodes`; if there are none, for all of it.
    ///
    /// # Errors
    /// Why there is none.
    pub fn base(&self, point: &Point, nodes: &[Uuid]) -> Result<&Manifest, NoBase> {
        let mut why = NoBase::NoneBefore;
        for backup in self.backups.iter().rev() {
            match self.leads(backup, point, nodes) {
                Ok(()) => return Ok(backup),
                // Of several reasons that of the newest one that is old enough counts.
                Err(reason) if !reason.is_earlier() && why == NoBase::NoneBefore => {
                    why = NoBase::Unreachable(backup.backup_id.clone(), reason);
                }
                Err(_) => {}
            }
        }
        Err(match &point.base {
            Some(base) if why == NoBase::NoneBefore && self.backup(base).is_none() => {
                NoBase::Gone(base.clone())
            }
            _ => why,
        })
    }

    /// Every point with its base, by when it was made.
    #[must_use = "nothing is looked at before it is asked for"]
    pub fn survey(&self) -> impl DoubleEndedIterator<Item = Surveyed<'_>> {
        self.points.iter().map(|point| Surveyed {
            point,
            base: self.base(point, &[]),
        })
    }

    /// The points next to a moment that `backup`, or any, leads to: the last one not after it, and the first one after it.
    #[must_use]
    pub fn nearest(
        &self,
        moment: Timestamp,
        backup: Option<&Manifest>,
        nodes: &[Uuid],
    ) -> (Option<&Point>, Option<&Point>) {
        let reachable = |point: &&Point| match backup {
            Some(backup) => self.leads(backup, point, nodes).is_ok(),
            None => self.base(point, nodes).is_ok(),
        };
        let after = self.points.partition_point(|point| point.made() <= moment);
        let (before, after) = self.points.split_at(after);
        (
            before.iter().rev().find(reachable),
            after.iter().find(reachable),
        )
    }

    /// What a backup builds on is there.
    fn chain(&self, backup: &Manifest) -> Result<(), Unreachable> {
        let (mut child, mut seen) = (backup, BTreeSet::new());
        while let Some(id) = &child.parent {
            let broken = |why: &str| {
                let child = &child.backup_id;
                Unreachable::Parent(format!("{child} builds on backup {id}, {why}"))
            };
            if !seen.insert(id) {
                return Err(broken("which builds on itself"));
            }
            let Some(parent) = self.backup(id) else {
                return Err(broken("which is not there"));
            };
            if let Err(why) = check::builds_on(child, parent) {
                return Err(Unreachable::Parent(why));
            }
            for copy in &parent.nodes {
                self.present(copy, &copy.wal_last)?;
            }
            child = parent;
        }
        Ok(())
    }

    /// All WAL from a copy to a point's record is there.
    fn joined(&self, copy: &NodeBackup, mark: &NodePoint) -> Result<(), Unreachable> {
        self.present(copy, &copy.wal_last)?;
        self.present(copy, &mark.wal_last)
    }

    fn present(&self, copy: &NodeBackup, last: &str) -> Result<(), Unreachable> {
        let (node, size) = (copy.node_id, copy.wal_segment_size);
        let of: EpochOf = (node, copy.epoch.clone());
        let (Some(first), Some(last)) = (number(&copy.wal_first, size), number(last, size)) else {
            return Err(Unreachable::Nonsense(node));
        };
        match self.runs.missing(&of, size, first, last) {
            None => Ok(()),
            Some(missing) => {
                let name = WalName::segment(copy.timeline, missing, size);
                let segment = name.map_or_else(|| copy.wal_first.clone(), |it| it.to_string());
                let why = self.reason(&of, missing.saturating_mul(size));
                Err(Unreachable::NoWal { node, segment, why })
            }
        }
    }

    /// Why the WAL at a position is missing, if an agent has said so.
    fn reason(&self, of: &EpochOf, at: u64) -> Option<String> {
        let covers = |gap: &&Gap| {
            let (from, to) = (check::lsn(&gap.from), check::lsn(&gap.to));
            from.is_ok_and(|from| from <= at) && to.is_ok_and(|to| at < to)
        };
        let gap = self.gaps.get(of)?.iter().find(covers)?;
        Some(gap.reason.clone())
    }
}

/// Copy and point are of one unbroken life of the node, the point behind the copy.
fn in_order(copy: &NodeBackup, mark: &NodePoint) -> Result<(), Unreachable> {
    let node = copy.node_id;
    if copy.epoch != mark.epoch {
        return Err(Unreachable::OtherEpoch {
            node,
            copy: copy.epoch.clone(),
            point: mark.epoch.clone(),
        });
    }
    if copy.timeline != mark.timeline {
        return Err(Unreachable::OtherTimeline {
            node,
            copy: copy.timeline,
            point: mark.timeline,
        });
    }
    match (check::lsn(&mark.record_lsn), check::lsn(&copy.stop_lsn)) {
        (Ok(record), Ok(stop)) if stop <= record => Ok(()),
        (Ok(_), Ok(_)) => Err(Unreachable::Earlier { node }),
        _ => Err(Unreachable::Nonsense(node)),
    }
}

impl Catalog {
    /// The point that `text` names: an id, or the beginning of exactly one.
    ///
    /// # Errors
    /// [`CatalogError::NotFound`] with similar ids; [`CatalogError::Ambiguous`] with all it may mean;
    /// [`CatalogError::Store`].
    pub async fn resolve_point_id(&self, text: &str) -> Result<PointId, CatalogError> {
        if let Ok(id) = text.parse() {
            return Ok(id);
        }
        let all = self.names(keys::POINTS).await?;
        let begins = all
            .iter()
            .filter(|name| !text.is_empty() && name.starts_with(text));
        let mut ids: Vec<PointId> = begins.filter_map(|name| name.parse().ok()).collect();
        match (ids.pop(), ids.is_empty()) {
            (Some(id), true) => Ok(id),
            (None, _) => Err(CatalogError::NotFound {
                what: "point",
                id: text.to_owned(),
                nearest: crate::repo::nearest(text, all),
            }),
            (Some(last), false) => {
                ids.push(last);
                Err(CatalogError::Ambiguous {
                    what: "point",
                    text: text.to_owned(),
                    candidates: ids.iter().map(ToString::to_string).collect(),
                })
            }
        }
    }
}
