//! Somebody dies, stands still, or takes the mount away in the middle of a copy; or lies at its end.

use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use support::fleet::Run;

use crate::world::{World, signal, until};

/// Nobody is waited for long.
const AGENT: [&str; 2] = ["--orphan-timeout", "5"];
const CLIENT: [&str; 4] = ["--agent-timeout", "2", "--lease-ttl", "5"];

async fn world(test: &str, more: &[&str]) -> Option<World> {
    let world = World::new(test, &[&AGENT, more].concat()).await?;
    Some(world.always(&CLIENT))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_leaves_nothing_that_blocks_the_next_backup() {
    let test = "a_killed_agent_leaves_nothing_that_blocks_the_next_backup";
    let Some(mut world) = world(test, &[]).await else {
        return;
    };
    let before = world.listed();
    let paused = world.paused_at("half", &[]).await;
    let mounted = world.mounts();
    world.fleet.hosts[0].agent.kill();
    // It feeds nobody any more; and a catalog of its own would be staged locally.
    until("the program is gone", || world.programs().is_empty()).await;
    world.order("");
    paused.go_on();
    world.fleet.restart_agent(0);
    assert_eq!(world.mounts(), Vec::<std::path::PathBuf>::new());
    if !mounted.is_empty() {
        let log = world.agent().log();
        assert!(log.contains("of an agent that was killed"), "{log}");
    }
    let run = paused.running.end().await;
    if run.code != 0 {
        assert_eq!(world.listed(), before, "{run:?}");
    }
    // What it was sending it could not end any more.
    world.prune().await;
    world.nothing_is_left().await;
    world.next_one_works().await;
}

/// Either the copy was made again by itself, or all ended in order; it is said what happened.
async fn made_again_or_refused(world: &World, run: Run, words: &[&str]) {
    let said = format!("{}\n{}\n{}", run.stdout, run.stderr, world.agent().log());
    for word in words {
        assert!(said.contains(word), "`{word}` is not said: {said}");
    }
    if run.code == 0 {
        let result = world.is_good(run).await;
        println!("made again: {result}");
    } else {
        world.nothing_is_left().await;
        world.next_one_works().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_program_is_named_and_cleaned_up_after() {
    let test = "a_killed_program_is_named_and_cleaned_up_after";
    let Some(world) = world(test, &[]).await else {
        return;
    };
    for (kind, word) in [(Signal::KILL, "signal 9"), (Signal::TERM, "pg_probackup")] {
        let paused = world.paused_at("half", &[]).await;
        let child = world.child();
        world.order("");
        signal(child, kind);
        let run = paused.running.end().await;
        made_again_or_refused(&world, run, &["pg_probackup", word]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_lazy_unmount_is_named_and_nothing_is_listed() {
    let test = "an_operators_lazy_unmount_is_named_and_nothing_is_listed";
    let Some(world) = world(test, &[]).await else {
        return;
    };
    let before = world.listed();
    let paused = world.paused_at("half", &[]).await;
    let mounts = world.mounts();
    let Some(point) = mounts.first() else {
        support::skip(test, "the mount is in a namespace of the program");
        return;
    };
    let lazily = Command::new("umount").arg("-l").arg(point).status();
    if !lazily.is_ok_and(|status| status.success()) {
        let user = Command::new("fusermount3").arg("-uz").arg(point).status();
        assert!(user.unwrap().success());
    }
    // What the program still has open goes on; what it makes from now on would land in the directory below.
    paused.go_on();
    let run = paused.running.end().await;
    world
        .is_refused(&run, &before, &["taken away by somebody else"])
        .await;
    world.next_one_works().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_stands_still_is_ended_and_it_is_said() {
    let test = "a_program_that_stands_still_is_ended_and_it_is_said";
    let Some(world) = world(test, &["--stall-timeout", "10"]).await else {
        return;
    };
    let paused = world.paused_at("half", &[]).await;
    let child = world.child();
    world.order("");
    signal(child, Signal::STOP);
    paused.go_on();
    let begun = Instant::now();
    let gone = || !world.programs().contains(&child);
    until("the program that stands still is gone", gone).await;
    let took = begun.elapsed();
    // It was silent some moments longer than it was stopped.
    assert!(
        took >= Duration::from_secs(5),
        "it was ended after {took:?}"
    );
    let run = paused.running.end().await;
    made_again_or_refused(&world, run, &["--stall-timeout"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_client_leaves_nothing() {
    let test = "a_killed_client_leaves_nothing";
    let Some(world) = world(test, &[]).await else {
        return;
    };
    let before = world.listed();
    let paused = world.paused_at("half", &[]).await;
    // The copy goes on to its end: the client may only be away for a moment. Then nobody comes for it.
    world.order("");
    paused.kill_client();
    world.nothing_is_left().await;
    assert_eq!(world.listed(), before);
    world.next_one_works().await;
}

/// A program that says that all is well, and has left a file out.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_lacks_a_file_is_refused_and_the_file_is_named() {
    let test = "a_copy_that_lacks_a_file_is_refused_and_the_file_is_named";
    let Some(world) = world(test, &[]).await else {
        return;
    };
    let before = world.listed();
    world.order("forget=global/1262");
    let run = world.backup().await;
    world.is_refused(&run, &before, &["global/1262"]).await;
    let error: Value = run.result()["error"].clone();
    println!("{error}");
    world.next_one_works().await;
}
