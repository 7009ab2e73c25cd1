//! A model of leases and fences: the catalog's own code, driven by operators whose every call to the store
//! waits until a schedule lets it through. Operators stand still for any time between two calls, past their
//! lease too; replies are lost; operators are killed; the store's clock is put forward.
//!
//! What must always hold is in `world`: nobody shares a lease with anybody at the same store time; who was
//! taken over commits nothing; a listed backup lacks no object; fences, tombstones and decisions stay what they
//! were; what a restore reads is not deleted under it. That the model can find a violation is shown by programs that
//! are broken on purpose.
//!
//! The real prune is stood in for by the same calls of the catalog that it makes (`operators`).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a panic is a failed test, with its reason; what was searched is worth a line"
)]

#[path = "leases/explore.rs"]
mod explore;
#[path = "leases/operators.rs"]
mod operators;
#[path = "catalog/samples.rs"]
#[expect(dead_code, reason = "shared with the catalog's tests")]
mod samples;
#[path = "leases/world.rs"]
mod world;

use explore::{Beginning, Search, every_schedule, is_listed, random_schedules, undisturbed};
use operators::Job::{self, Backup, Prune, Restore};
use world::Broken;

/// The random schedules that are tried; `GS_PITR_LEASE_SEED` tries that one alone.
fn seeds(count: u64) -> std::ops::Range<u64> {
    let named = std::env::var("GS_PITR_LEASE_SEED").ok();
    match named.and_then(|seed| seed.parse::<u64>().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..count,
    }
}

fn nothing_found(what: &str, search: &Search) {
    println!("{what}: {} schedules", search.runs);
    assert!(
        search.found.is_none(),
        "{what}: {}",
        search.found.as_ref().unwrap()
    );
}

fn found(what: &str, search: &Search) {
    let violation = search.found.as_ref();
    let violation = violation.unwrap_or_else(|| panic!("{what}: not found in {}", search.runs));
    println!(
        "{what}: {} (after {} schedules)",
        violation.lines().next().unwrap(),
        search.runs
    );
}

async fn systematic(jobs: &[Job], most: usize) {
    let beginning = Beginning::new().await;
    let search = every_schedule(&beginning, jobs, Broken::Nothing, most).await;
    nothing_found(&format!("{jobs:?}, {most} departures"), &search);
}

#[tokio::test]
async fn undisturbed_each_does_its_work() {
    let beginning = Beginning::new().await;
    let world = undisturbed(&beginning, &[Backup, Restore, Prune]).await;
    let trace = world.trace();
    assert_eq!(trace.matches("ends with Ok(())").count(), 3, "{trace}");
    assert!(is_listed(&world, &operators::names(0).0), "{trace}");
    assert!(!is_listed(&world, &samples::backup_id('b')), "{trace}");
}

#[tokio::test]
async fn two_backups_in_every_interleaving() {
    systematic(&[Backup, Backup], 2).await;
}

#[tokio::test]
async fn a_backup_and_a_pruner_in_every_interleaving() {
    systematic(&[Backup, Prune], 2).await;
}

#[tokio::test]
async fn a_restore_and_a_pruner_in_every_interleaving() {
    systematic(&[Restore, Prune], 2).await;
    systematic(&[Prune, Restore], 2).await;
}

#[tokio::test]
async fn everybody_at_random() {
    let beginning = Beginning::new().await;
    for jobs in [
        &[Backup, Backup, Prune][..],
        &[Restore, Restore, Prune, Prune],
        &[Backup, Backup, Restore, Prune, Prune],
    ] {
        let search = random_schedules(&beginning, jobs, Broken::Nothing, seeds(1500)).await;
        nothing_found(&format!("{jobs:?}, at random"), &search);
    }
}

#[tokio::test]
async fn without_fences_an_operator_that_was_taken_over_commits() {
    let beginning = Beginning::new().await;
    for jobs in [[Backup, Backup], [Restore, Restore], [Backup, Prune]] {
        let search = every_schedule(&beginning, &jobs, Broken::Fence, 2).await;
        found(&format!("{jobs:?} without fences"), &search);
    }
    let jobs = [Backup, Backup, Prune];
    let search = random_schedules(&beginning, &jobs, Broken::Fence, 0..5000).await;
    found("without fences, at random", &search);
}

#[tokio::test]
async fn without_the_second_look_a_restore_loses_what_it_reads() {
    let beginning = Beginning::new().await;
    // The pruner first: the restore begins between its first look and its tombstone.
    let jobs = [Prune, Restore];
    let search = every_schedule(&beginning, &jobs, Broken::SecondLook, 2).await;
    found("without the second look for pins", &search);
}

#[tokio::test]
async fn without_the_look_after_the_create_two_hold_a_lease() {
    let beginning = Beginning::new().await;
    let jobs = [Backup, Backup, Prune];
    let search = random_schedules(&beginning, &jobs, Broken::ListAfterCreate, 0..20_000).await;
    found("without the look after the create", &search);
}
