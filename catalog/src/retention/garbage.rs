//! What nobody needs, and whatever says that somebody may: dead backups, failed attempts, uploads, journals.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use pipeline::store::Key;
use uuid::Uuid;

use super::plan::{Dead, JOURNALS, Plan};
use super::view::View;
use super::{BackupHolding, HeldState, OperationHolding, Stored};
use crate::ids::{BackupId, PointId};
use crate::keys;
use crate::model::Manifest;

impl View<'_> {
    /// What lies below a name and is no part of what stands there.
    pub(super) fn litter(name: &str, held: &BackupHolding) -> Vec<Stored> {
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

    /// Metadata of points that never came to be, or have gone. One that is young may get its point yet.
    pub(super) fn lost_metadata(&self) -> impl Iterator<Item = Stored> {
        let all = self.held.metadata.iter();
        let lost = all.filter(|(name, stored)| {
            let is_id = name.parse::<PointId>().is_ok();
            is_id && !self.held.point_names.contains(*name) && self.is_old(stored.newest)
        });
        lost.map(|(_, stored)| stored.clone())
    }

    /// Operations that make a backup: the operator's own part, which has no node.
    pub(super) fn makers(&self, id: &BackupId) -> impl Iterator<Item = (&Uuid, &OperationHolding)> {
        let all = self.held.operations.iter();
        all.filter(move |(_, it)| it.makes(id) && it.node.is_none())
    }

    pub(super) fn find_dead(&self, plan: &mut Plan) {
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
    pub(super) fn is_dead(
        &self,
        id: &BackupId,
        objects: &[Stored],
    ) -> Result<(Uuid, String), String> {
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

    pub(super) fn is_old(&self, newest: Timestamp) -> bool {
        let silent = self.held.now.duration_since(newest);
        silent
            > jiff::SignedDuration::try_from(self.rules.grace).unwrap_or(jiff::SignedDuration::MAX)
    }

    pub(super) fn uploads_and_journals(&self, plan: &mut Plan) {
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
