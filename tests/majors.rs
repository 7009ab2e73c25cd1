//! One cycle on every other major version of PostgreSQL that is here: backup under load, disaster, restore, ledger.
//!
//! `make test-full` fetches the versions; without them this says that it was skipped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::fs;
use std::path::Path;
use std::time::Duration;

use support::bucket::Bucket;
use support::fleet::Fleet;
use support::load::{self, Load};
use support::os;
use support::postgres::{self, ClusterOptions, Installation};

/// Restores on a host whose agent has only `bindir`'s programs beside those every host has.
fn restore(fleet: &mut Fleet, id: &str, node: &str, bindir: Option<&str>) -> support::fleet::Run {
    let number = fleet.hosts.len();
    let target = fleet.path().join(format!("target {number}"));
    fs::create_dir(&target).expect("target");
    os::give(&target);
    let target = target.display().to_string();
    let mut more = vec!["--allow-root", &target];
    more.extend(bindir.iter().flat_map(|bindir| ["--pg-bindir", *bindir]));
    fleet.add_host(&format!("host{number}"), &more);
    let to = fleet.addresses(&[number]);
    let map = format!("{node}={to}");
    fleet.run(&[
        "restore",
        "--id",
        id,
        "--nodes",
        &to,
        "--map",
        &map,
        "--target-dir",
        &target,
        "--output",
        "json",
        "--yes",
    ])
}

async fn cycle(installation: &Installation, elsewhere: bool, bucket: Bucket) {
    let mut fleet = Fleet::new(&format!("pg{}", installation.major), &bucket.config());
    fleet.add_database(
        "node",
        installation,
        ClusterOptions {
            data_checksums: true,
            ..ClusterOptions::default()
        },
    );
    let host = &fleet.hosts[0];
    let space = host.root.join("space");
    fs::create_dir(&space).expect("a tablespace");
    os::give(&space);
    let cluster = host.cluster.as_ref().expect("a database");
    load::prepare(cluster, &space, false).await;
    let ledgers = fleet.path().join("ledgers");
    fs::create_dir(&ledgers).expect("ledgers");
    let load = Load::start(cluster, &ledgers, 2);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let result = fleet
        .run(&[
            "backup",
            "--nodes",
            &fleet.addresses(&[0]),
            "--output",
            "json",
        ])
        .good()
        .result();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let ledger = load.stop().await;
    let id = result["backup_id"].as_str().expect("an id").to_owned();
    let (manifest, point) = bucket.recorded(&id).await;
    let end = &point.nodes[0].end_lsn;
    let node = manifest.nodes[0].node_id.to_string();
    fleet.destroy();

    if elsewhere {
        let run = restore(&mut fleet, &id, &node, None);
        let error = &run.result()["error"];
        assert_eq!(
            (error["kind"].as_str(), run.code),
            (Some("incompatible"), 11),
            "{run:?}"
        );
        let message = error["message"].as_str().expect("a message");
        assert!(
            message.contains(&installation.major.to_string()),
            "{message}"
        );
        assert_eq!(error["changed"], false);
    }
    let bindir = installation.bindir.display().to_string();
    let restored = restore(&mut fleet, &id, &node, Some(&bindir))
        .good()
        .result();
    let data = restored["nodes"][0]["data_directory"]
        .as_str()
        .expect("a directory");
    let (socket, port) = postgres::running(Path::new(data));
    let client = postgres::connect(&socket, port, "shop db").await;
    let stop = load::lsn(&manifest.nodes[0].stop_lsn);
    let verdict = ledger.check(&client, stop, load::lsn(end)).await;
    let verdict = verdict.unwrap_or_else(|e| panic!("PostgreSQL {}: {e}", installation.major));
    assert!(
        verdict.required > 0 && verdict.forbidden > 0,
        "the load proves nothing: {verdict:?}"
    );
    report(installation, &format!("{verdict:?}"));
}

#[expect(clippy::print_stdout, reason = "shown by --nocapture and on failure")]
fn report(installation: &Installation, verdict: &str) {
    println!("PostgreSQL {}: {verdict}", installation.major);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_other_major_comes_back() {
    let newest = Installation::newest();
    let others: Vec<_> = Installation::all()
        .into_iter()
        .filter(|other| other.major != newest.major)
        .collect();
    if others.is_empty() {
        support::skip(
            "every_other_major_comes_back",
            "only one major is here: `make test-full` fetches the others (it needs Maven)",
        );
        return;
    }
    for installation in &others {
        // Refused where its programs are not; agents look in the places of packages too.
        let elsewhere = !installation.bindir.starts_with("/usr");
        cycle(installation, elsewhere, Bucket::double().await).await;
    }
}

/// The same on another real store, which keeps objects as files. `check` finds nothing against it.
#[tokio::test(flavor = "multi_thread")]
async fn a_cycle_on_versitygw() {
    let Some(bucket) = Bucket::versitygw().await else {
        let why = "the environment names no versitygw: `make test-full` fetches one (it needs Go)";
        support::skip("a_cycle_on_versitygw", why);
        return;
    };
    let fleet = Fleet::new("versitygw check", &bucket.config());
    let _ = fleet.run(&["check", "--output", "json"]).good();
    cycle(&Installation::newest(), false, bucket).await;
}
