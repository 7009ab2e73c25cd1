//! What the bodies say, checked against their keys and against each other.

use std::collections::BTreeSet;

use pipeline::store::Key;
use uuid::Uuid;

use super::Context;
use super::finding::Finding;
use super::records::{Records, Small};
use crate::check;
use crate::ids::{BackupId, EpochId, PointId};
use crate::model::{Epoch, Gap, Manifest, ManifestState, Node, NodeBackup, Point, Tombstone};
use crate::repo::gap_key;

/// Which backups there are.
#[derive(Debug, Default)]
pub(super) struct Rests {
    /// Complete and not deleted, damaged or not.
    pub(super) restorable: BTreeSet<BackupId>,
    /// Those of them whose manifest keeps the rules, so that what it names can be looked for.
    pub(super) sound: BTreeSet<BackupId>,
}

/// Checks all of them.
pub(super) fn check(context: &Context<'_>, records: &Records) -> Rests {
    let rules = Rules { context, records };
    if let Some(repository) = &records.repository
        && let Some(body) = &repository.body
        && body.encryption.is_some()
    {
        let what = "its objects are encrypted in a way that this program does not know";
        context.add(Finding::note(&repository.key, what));
    }
    for (id, found) in &records.nodes {
        rules.node(*id, found);
    }
    for ((node, epoch), found) in &records.epochs {
        rules.epoch(*node, epoch, found);
    }
    for found in records.gaps.values() {
        rules.gap(found);
    }
    for (id, found) in &records.points {
        rules.point(id, found);
    }
    for (id, found) in &records.tombstones {
        rules.tombstone(id, found);
    }
    let mut rests = Rests::default();
    for (id, found) in &records.manifests {
        rules.manifest(id, found, &mut rests);
    }
    rests
}

struct Rules<'a> {
    context: &'a Context<'a>,
    records: &'a Records,
}

impl Rules<'_> {
    fn damage(&self, key: &Key, what: impl Into<String>) {
        self.context.add(Finding::damage(key, what));
    }

    fn node(&self, id: Uuid, found: &Small<Node>) {
        if let Some(body) = &found.body
            && body.node_id != id
        {
            let what = format!("it says it is node {}", body.node_id);
            self.damage(&found.key, what);
        }
    }

    fn gap(&self, found: &Small<Gap>) {
        let Some(body) = &found.body else {
            return;
        };
        match gap_key(body) {
            Ok(own) if own == found.key => {}
            Ok(own) => self.damage(&found.key, format!("it says it is `{own}`")),
            Err(why) => self.damage(&found.key, why),
        }
    }

    fn epoch(&self, node: Uuid, id: &EpochId, found: &Small<Epoch>) {
        let Some(body) = &found.body else {
            return;
        };
        if body.node_id != node || body.epoch != *id {
            let what = format!(
                "it says it is epoch {} of node {}",
                body.epoch, body.node_id
            );
            return self.damage(&found.key, what);
        }
        match (&body.parent, &body.fork_lsn) {
            (None, None) => {}
            (Some(parent), Some(fork)) => {
                if !self.records.epochs.contains_key(&(node, parent.clone())) {
                    self.damage(&found.key, format!("its parent {parent} is not there"));
                }
                if let Err(what) = check::lsn(fork) {
                    self.damage(&found.key, what);
                }
            }
            _ => self.damage(
                &found.key,
                "of parent and fork, one is there without the other",
            ),
        }
        self.registered(&found.key, node);
    }

    fn registered(&self, key: &Key, node: Uuid) {
        if !self.records.nodes.contains_key(&node) {
            self.damage(key, format!("its node {node} is not registered"));
        }
    }

    fn place(&self, key: &Key, node: Uuid, epoch: &EpochId) {
        self.registered(key, node);
        if !self.records.epochs.contains_key(&(node, epoch.clone())) {
            self.damage(key, format!("epoch {epoch} of node {node} is not there"));
        }
    }

    fn point(&self, id: &PointId, found: &Small<Point>) {
        let Some(body) = &found.body else {
            return;
        };
        if let Err(what) = check::point(body, id) {
            return self.damage(&found.key, what);
        }
        for node in &body.nodes {
            self.place(&found.key, node.node_id, &node.epoch);
        }
    }

    fn tombstone(&self, id: &BackupId, found: &Small<Tombstone>) {
        let Some(body) = &found.body else {
            return;
        };
        if body.backup_id != *id {
            let what = format!("it says it is of backup {}", body.backup_id);
            return self.damage(&found.key, what);
        }
        if let (Some(named), Some(manifest)) =
            (&body.manifest_sha256, self.records.manifests.get(id))
            && *named != manifest.sha256
        {
            let what = "it names another SHA-256 than the manifest has";
            self.damage(&found.key, what);
        }
    }

    fn manifest(&self, id: &BackupId, found: &Small<Manifest>, rests: &mut Rests) {
        let deleted = self.records.is_deleted(id);
        let Some(body) = &found.body else {
            if !deleted {
                rests.restorable.insert(id.clone());
            }
            return;
        };
        if let Err(what) = check::manifest(body, id) {
            let finding = Finding::damage(&found.key, what).of_backup(id);
            self.context.add(finding.losing([id]));
            rests.restorable.insert(id.clone());
            return;
        }
        if body.state == ManifestState::Abandoned || deleted {
            return;
        }
        rests.restorable.insert(id.clone());
        rests.sound.insert(id.clone());
        for what in self.wrong_with(body) {
            let finding = Finding::damage(&found.key, what).of_backup(id);
            self.context.add(finding.losing([id]));
        }
    }

    /// What a manifest names that is not there or does not fit.
    fn wrong_with(&self, manifest: &Manifest) -> Vec<String> {
        let mut wrong = Vec::new();
        match &manifest.point {
            None => wrong.push("it names no point to recover to".to_owned()),
            Some(id) => match self.records.points.get(id) {
                None => wrong.push(format!("its point {id} is not there")),
                Some(found) => {
                    if let Some(point) = &found.body
                        && let Err(what) = check::belongs(manifest, point)
                    {
                        wrong.push(what);
                    }
                }
            },
        }
        if let Some(parent) = &manifest.parent
            && (!self.records.manifests.contains_key(parent) || self.records.is_deleted(parent))
        {
            wrong.push(format!(
                "the backup {parent} that it builds on is not there"
            ));
        }
        for copy in &manifest.nodes {
            wrong.extend(self.wrong_with_copy(copy));
        }
        wrong
    }

    fn wrong_with_copy(&self, copy: &NodeBackup) -> Option<String> {
        let node = copy.node_id;
        let Some(registered) = self.records.nodes.get(&node) else {
            return Some(format!("its node {node} is not registered"));
        };
        if !self
            .records
            .epochs
            .contains_key(&(node, copy.epoch.clone()))
        {
            return Some(format!("epoch {} of node {node} is not there", copy.epoch));
        }
        let system = registered.body.as_ref()?.system_identifier;
        (system != copy.system_identifier).then(|| {
            let its = copy.system_identifier;
            format!("node {node} has system identifier {system}, its copy {its}")
        })
    }
}

impl Records {
    /// The backups that cannot be restored if the object of this key cannot be used.
    pub(super) fn resting_on(&self, key: &Key) -> BTreeSet<BackupId> {
        use super::inventory::Kind;
        let with = |rests: &dyn Fn(&Manifest) -> bool| {
            let backups = self.complete().filter(|(_, manifest)| rests(manifest));
            backups.map(|(id, _)| id.clone()).collect()
        };
        let on_node =
            |id: Uuid| with(&|manifest| manifest.nodes.iter().any(|copy| copy.node_id == id));
        match Kind::of(key) {
            Kind::Repository => with(&|_| true),
            // A restore reads all epochs of a node to find those that its own one continues.
            Kind::Node(id) | Kind::Epoch(id, _) => on_node(id),
            Kind::Point(id) => with(&|manifest| manifest.point.as_ref() == Some(&id)),
            Kind::Manifest(id) => {
                let fence = self
                    .manifest(&id)
                    .is_some_and(|it| it.state == ManifestState::Abandoned);
                let lost = !fence && !self.is_deleted(&id);
                lost.then_some(id).into_iter().collect()
            }
            _ => BTreeSet::new(),
        }
    }
}
