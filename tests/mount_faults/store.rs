//! The store is away, busy, slow, or refuses a part.

use std::time::Duration;

use support::s3::{Fault, Operation, When};

use crate::world::{World, until};

/// All that a backup asks of a store.
const OPERATIONS: [Operation; 11] = [
    Operation::Put,
    Operation::Get,
    Operation::Head,
    Operation::List,
    Operation::Delete,
    Operation::CreateUpload,
    Operation::UploadPart,
    Operation::Complete,
    Operation::Abort,
    Operation::ListUploads,
    Operation::ListParts,
];

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_says_503_for_30_seconds_is_waited_for() {
    let test = "a_store_that_says_503_for_30_seconds_is_waited_for";
    let Some(world) = World::new(test, &[]).await else {
        return;
    };
    let paused = world.paused_at("half", &["--jobs", "1"]).await;
    for operation in OPERATIONS {
        world
            .server()
            .inject_at(operation, 0, u64::MAX, Fault::SLOW_DOWN);
    }
    paused.go_on();
    tokio::time::sleep(Duration::from_secs(30)).await;
    world.server().clear_faults();
    let result = world.is_good(paused.running.end().await).await;
    println!("after 30 s of 503: {result}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_drops_connections_or_is_slow_is_waited_for() {
    let test = "a_store_that_drops_connections_or_is_slow_is_waited_for";
    let Some(world) = World::new(test, &[]).await else {
        return;
    };
    let paused = world.paused_at("half", &["--jobs", "1"]).await;
    world.server().set_down(true);
    paused.go_on();
    tokio::time::sleep(Duration::from_secs(2)).await;
    world.server().set_down(false);
    world.is_good(paused.running.end().await).await;

    // Every second part is cut after it has arrived, and all are slow.
    let paused = world.paused_at("copying", &["--jobs", "1"]).await;
    let parts = world.server().calls(Operation::UploadPart);
    for skip in [0, 1] {
        world
            .server()
            .inject_at(Operation::UploadPart, skip, 1, Fault::CutAfter);
    }
    let slow = Fault::Stall(Duration::from_millis(700));
    world.server().inject_at(Operation::UploadPart, 0, 8, slow);
    paused.go_on();
    world.is_good(paused.running.end().await).await;
    let parts = world.server().calls(Operation::UploadPart) - parts;
    assert!(parts >= 4, "{parts} parts: none was sent twice");
}

/// The program has ended, and believes that all is well.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_fails_for_good_after_the_program_has_ended_ends_the_backup() {
    let test = "a_part_that_fails_for_good_after_the_program_has_ended_ends_the_backup";
    let Some(world) = World::new(test, &[]).await else {
        return;
    };
    let before = world.listed();
    let parts = world
        .server()
        .hold(Operation::UploadPart, When::Before, |key| {
            key.contains("/pack-")
        });
    let paused = world.paused_at("copied", &["--jobs", "1"]).await;
    parts.reached().await;
    paused.go_on();
    until("the program has ended", || world.programs().is_empty()).await;
    world.server().inject_at(
        Operation::UploadPart,
        0,
        u64::MAX,
        Fault::Refuse(403, "AccessDenied"),
    );
    parts.release();
    let run = paused.running.end().await;
    world.is_refused(&run, &before, &["AccessDenied"]).await;
    world.next_one_works().await;
}

/// The program is in the middle of it, and is told at its next write.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_fails_for_good_ends_the_program() {
    let test = "a_part_that_fails_for_good_ends_the_program";
    let Some(world) = World::new(test, &[]).await else {
        return;
    };
    let before = world.listed();
    world.server().inject_at(
        Operation::UploadPart,
        0,
        u64::MAX,
        Fault::Refuse(403, "AccessDenied"),
    );
    // One lane: what several share may be too little for parts.
    let run = world.start(&["--jobs", "1"]).end().await;
    world.is_refused(&run, &before, &["AccessDenied"]).await;
    world.next_one_works().await;
}
