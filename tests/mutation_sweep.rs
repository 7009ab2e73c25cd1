//! Every stored object is changed in every way that comes to mind, one change at a time: `verify` has to find each, and
//! no restore may bring other bytes.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "test code: a panic is a failed test, with its reason, and what was tried is told"
)]

#[path = "mutation_sweep/building.rs"]
mod building;
#[path = "mutation_sweep/fixture.rs"]
mod fixture;
#[path = "mutation_sweep/mutations.rs"]
mod mutations;
#[path = "mutation_sweep/others.rs"]
mod others;
#[path = "mutation_sweep/repair.rs"]
mod repair;
#[path = "mutation_sweep/restoring.rs"]
mod restoring;

use std::collections::{BTreeMap, BTreeSet};

use catalog::verify::{Depth, Scope};
use fixture::World;
use mutations::{Mutation, is_json, kind, of_bytes, of_fields, of_pairs, removal, typical};

/// What by design cannot be found (docs/FORMAT.md, section 11): fields of objects of which nothing else has a digest,
/// changed by somebody who seals them again. None of them leads a restore to other bytes.
const FREE_IF_SEALED_AGAIN: &[(&str, &[&str])] = &[
    ("decision", &["at", "by", "nonce", "reason"]),
    (
        "lease",
        &[
            "at",
            "backup_id",
            "holder.command",
            "holder.host",
            "holder.pid",
            "holder.user",
            "log_head",
            "nonce",
            "operation",
            "taken",
            "ttl_ms",
        ],
    ),
    ("pin", &["at", "backups.*", "nonce"]),
    (
        "record",
        &[
            "at",
            "backup_id",
            "by",
            "by.command",
            "by.host",
            "by.pid",
            "by.user",
            "data_directory",
            "error",
            "event",
            "fork_lsn",
            "host",
            "kind",
            "log_head",
            "machine_id",
            "node_id",
            "nonce",
            "port",
            "timeline",
        ],
    ),
];

/// Removals that cannot be found: old leases may be removed at any time, from the first on.
const FREE_TO_GO: &[&str] = &[
    "lease/backup/0000000001.json",
    "lease/maintain/0000000001.json",
    "lease/restore/0000000001.json",
];

/// Applies a change, and takes it back when dropped.
struct Applied<'a> {
    world: &'a World,
    before: Vec<(pipeline::store::Key, Option<bytes::Bytes>)>,
}

impl<'a> Applied<'a> {
    fn new(world: &'a World, mutation: &Mutation) -> Self {
        let changes = mutation.changes.iter();
        let before = changes.map(|(key, after)| {
            let before = world.store.bytes(key.as_str());
            world.store.tamper(key, after.clone());
            (key.clone(), before)
        });
        Self {
            world,
            before: before.collect(),
        }
    }
}

impl Drop for Applied<'_> {
    fn drop(&mut self) {
        for (key, bytes) in self.before.drain(..) {
            self.world.store.tamper(&key, bytes);
        }
    }
}

/// Whether `verify` says anything of it. What the fast one finds the full one finds too, which does all of that and more.
async fn is_found(world: &World, mutation: &Mutation) -> bool {
    let _applied = Applied::new(world, mutation);
    for depth in [Depth::Fast, Depth::Full] {
        // An error says it even more plainly: a repository of a newer format cannot be verified at all.
        match world.try_verify(Scope::All, depth).await {
            Ok(report) if report.findings.is_empty() => {}
            _ => return true,
        }
    }
    false
}

/// Tries all of them, says how many there were of each kind, and returns those that were not found.
async fn sweep(world: &World, all: Vec<Mutation>) -> Vec<Mutation> {
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    let mut missed = Vec::new();
    for mutation in all {
        *counts.entry(mutation.kind).or_default() += 1;
        if !is_found(world, &mutation).await {
            missed.push(mutation);
        }
    }
    println!("mutations tried: {counts:?}, not found: {}", missed.len());
    assert!(world.verify(Depth::Full).await.findings.is_empty());
    missed
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_nobody_touched_has_no_finding() {
    let world = World::build().await;
    for depth in [Depth::Full, Depth::Fast] {
        let report = world.verify(depth).await;
        assert!(report.findings.is_empty(), "{:#?}", report.findings);
        assert!(report.repairs.is_empty() && report.unrestorable.is_empty());
        assert_eq!(
            report.backups.iter().collect::<Vec<_>>(),
            world.backups.iter().collect::<Vec<_>>()
        );
    }
    let kinds: BTreeSet<_> = world.objects().keys().map(kind).collect();
    assert_eq!(kinds.len(), 17, "every kind of object is there: {kinds:?}");
    for backup in &world.backups {
        let report = world
            .verify_as(Scope::Backup(backup.clone()), Depth::Full)
            .await;
        assert!(report.findings.is_empty(), "{:#?}", report.findings);
    }
    restoring::assert_original(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_of_bytes_is_found() {
    let world = World::build().await;
    let objects = world.objects();
    let changes = typical(&objects).into_iter();
    let mut all: Vec<_> = changes
        .flat_map(|(key, bytes)| of_bytes(key, bytes))
        .collect();
    all.retain(|mutation| mutation.kind != "delete");
    all.extend(objects.keys().map(removal));
    let missed = sweep(&world, all).await;
    let mut keys = missed
        .iter()
        .map(|it| it.changes[0].0.as_str())
        .collect::<Vec<_>>();
    keys.sort_unstable();
    assert!(
        missed.iter().all(|it| it.kind == "delete"),
        "not found: {missed:#?}"
    );
    assert_eq!(keys, FREE_TO_GO);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_object_in_the_place_of_another_is_found() {
    let world = World::build().await;
    let missed = sweep(&world, of_pairs(&world.objects())).await;
    assert!(missed.is_empty(), "not found: {missed:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_of_a_field_is_found() {
    let world = World::build().await;
    let objects = world.objects();
    let json = typical(&objects);
    let all = json
        .into_iter()
        .filter(|(key, _)| is_json(key))
        .flat_map(|(key, bytes)| of_fields(key, bytes, false));
    let missed = sweep(&world, all.map(|change| change.mutation).collect()).await;
    assert!(missed.is_empty(), "not found: {missed:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_that_were_sealed_again_are_found_but_those_on_the_list() {
    let world = World::build().await;
    let objects = world.objects();
    let (mut tried, mut missed) = (0, BTreeSet::new());
    for (key, bytes) in typical(&objects)
        .into_iter()
        .filter(|(key, _)| is_json(key))
    {
        for change in of_fields(key, bytes, true) {
            tried += 1;
            if !is_found(&world, &change.mutation).await {
                missed.insert((kind(key), change.field));
            }
        }
    }
    println!(
        "fields changed and sealed again: {tried}, kinds of fields not found: {}",
        missed.len()
    );
    let listed = |kind: &str, field: &str| {
        let of_kind = FREE_IF_SEALED_AGAIN.iter().find(|(its, _)| *its == kind);
        of_kind.is_some_and(|(_, fields)| fields.contains(&field))
    };
    let unlisted: Vec<_> = missed
        .iter()
        .filter(|(kind, field)| !listed(kind, field))
        .collect();
    assert!(unlisted.is_empty(), "not found: {unlisted:?}");
    for (kind, fields) in FREE_IF_SEALED_AGAIN {
        for field in *fields {
            let is_missed = missed.contains(&(*kind, (*field).to_owned()));
            assert!(
                is_missed,
                "{kind} {field} is found and need not be on the list"
            );
        }
    }
}

/// The test would see a `verify` that looks at less: without the packs' and segments' bytes much is not found.
#[tokio::test(flavor = "multi_thread")]
async fn a_verification_that_reads_less_finds_less() {
    let world = World::build().await;
    let objects = world.objects();
    let mut missed = 0;
    for (key, bytes) in objects
        .iter()
        .filter(|(key, _)| matches!(kind(key), "pack" | "wal"))
    {
        for mutation in of_bytes(key, bytes)
            .into_iter()
            .filter(|it| it.kind == "flip")
        {
            let _applied = Applied::new(&world, &mutation);
            missed += usize::from(world.verify(Depth::Fast).await.findings.is_empty());
        }
    }
    assert!(missed > 50, "{missed}");
}

/// Whatever was changed: a restore says no, or brings what was backed up.
#[tokio::test(flavor = "multi_thread")]
async fn no_restore_brings_other_bytes() {
    let world = World::build().await;
    let objects = world.objects();
    let mut originals = Vec::new();
    for id in &world.backups {
        originals.push((id, restoring::restore(&world, id).await.unwrap()));
    }
    let touching = [
        "manifest",
        "point",
        "index",
        "pack",
        "wal",
        "history",
        "epoch",
        "node",
        "repository",
    ];
    let of_data = |key: &pipeline::store::Key| touching.contains(&kind(key));
    let mut all = Vec::new();
    for (key, bytes) in objects.iter().filter(|(key, _)| of_data(key)) {
        // A bit of each quarter, every cut, the removal, and every field sealed again.
        let bytes_changed = of_bytes(key, bytes).into_iter();
        all.extend(
            bytes_changed
                .enumerate()
                .filter(|(at, it)| it.kind != "flip" || at % 4 == 0)
                .map(|(_, it)| it),
        );
        if is_json(key) {
            all.extend(
                of_fields(key, bytes, true)
                    .into_iter()
                    .map(|change| change.mutation),
            );
        }
    }
    let pairs = of_pairs(&objects).into_iter();
    all.extend(pairs.filter(|mutation| of_data(&mutation.changes[0].0)));
    let (mut refused, mut equal) = (0, 0);
    for mutation in &all {
        let _applied = Applied::new(&world, mutation);
        for (id, original) in &originals {
            match restoring::restore(&world, id).await {
                Err(_) => refused += 1,
                Ok(restored) => {
                    assert!(
                        restored == *original,
                        "{mutation:?}: backup {id} comes back with other bytes"
                    );
                    equal += 1;
                }
            }
        }
    }
    println!(
        "{} mutations: {refused} restores refused, {equal} brought the original bytes",
        all.len()
    );
    assert!(refused > all.len() / 2 && equal > 0);
}
