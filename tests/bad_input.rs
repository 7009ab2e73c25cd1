//! Bad input, one named error each: what failed, on which node, whether anything was changed, what to do next. Never a panic, never
//! exit 0, never a half restored directory that looks whole.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::{Fleet, Run, wait};
use support::os;
use support::postgres::{ClusterOptions, Installation};

const LIMIT: Duration = Duration::from_mins(3);

/// What an error must be.
struct Expected<'a> {
    kind: &'a str,
    code: i32,
    /// Every one of these stands in the message.
    words: &'a [&'a str],
}

fn expect(case: &str, run: &Run, expected: &Expected<'_>) {
    let result = run.result();
    assert_eq!(result["status"], "error", "{case}: {run:?}");
    let error = &result["error"];
    assert_eq!(
        (error["kind"].as_str(), run.code),
        (Some(expected.kind), expected.code),
        "{case}: {run:?}"
    );
    let message = error["message"].as_str().expect("a message");
    for word in expected.words {
        assert!(
            message.contains(word),
            "{case}: `{word}` is not in: {message}"
        );
    }
    assert_eq!(error["changed"], false, "{case}: {run:?}");
    assert!(
        error["next"].as_str().is_some_and(|next| !next.is_empty()),
        "{case}: no next step: {run:?}"
    );
    assert!(!run.stderr.contains("panicked"), "{case}: {run:?}");
}

/// One database with an agent, one host without, and the stand-in for a bucket.
struct World {
    fleet: Fleet,
    bucket: Bucket,
    target: PathBuf,
    targets: u32,
}

impl World {
    async fn new(name: &str) -> Self {
        let bucket = Bucket::double().await;
        let mut fleet = Fleet::new(name, &bucket.config());
        let options = ClusterOptions {
            password: Some("right one".into()),
            ..ClusterOptions::default()
        };
        fleet.add_database("node", &Installation::newest(), options);
        let target = fleet.path().join("targets");
        fs::create_dir(&target).expect("targets");
        os::give(&target);
        fleet.add_host("other", &["--allow-root", &target.display().to_string()]);
        let database = fleet.hosts[0].cluster.as_ref().expect("a database");
        database
            .execute("CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 50000) g")
            .await;
        Self {
            fleet,
            bucket,
            target,
            targets: 0,
        }
    }

    fn run(&self, command: Command) -> Run {
        let _ = self;
        wait(command, LIMIT)
    }

    fn backup(&self) -> Command {
        self.fleet.command(&[
            "backup",
            "--nodes",
            &self.fleet.addresses(&[0]),
            "--output",
            "json",
        ])
    }

    /// A restore into a new empty directory, and that directory.
    fn restore(&mut self, id: &str) -> (Command, PathBuf) {
        self.targets += 1;
        let target = self.target.join(self.targets.to_string());
        fs::create_dir(&target).expect("a directory");
        os::give(&target);
        let to = self.fleet.addresses(&[1]);
        let map = format!(
            "127.0.0.1:{}={to}",
            self.fleet.hosts[0]
                .cluster
                .as_ref()
                .expect("a database")
                .port()
        );
        let text = target.display().to_string();
        let args = [
            "restore",
            "--id",
            id,
            "--nodes",
            &to,
            "--map",
            &map,
            "--target-dir",
            &text,
            "--yes",
            "--output",
            "json",
        ];
        (self.fleet.command(&args), target)
    }

    /// The one key that contains `part`.
    fn key(&self, part: &str) -> String {
        let keys = self.bucket.server().keys();
        let mut found = keys.into_iter().filter(|key| key.contains(part));
        found.next().unwrap_or_else(|| panic!("no key with {part}"))
    }
}

/// Nothing in the directory looks like a database.
fn assert_no_database(case: &str, target: &Path) {
    for entry in fs::read_dir(target)
        .expect("the target")
        .map(|entry| entry.expect("an entry").path())
    {
        let whole = entry.join("PG_VERSION").exists() && entry.join("global/pg_control").exists();
        assert!(!whole, "{case}: {} looks whole", entry.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_before_a_backup_is_named() {
    let world = World::new("bad").await;
    let nodes = world.fleet.addresses(&[0]);

    let mut command = world.backup();
    command.env("GS_PITR_REPO", "s3://no-such-bucket/x");
    let expected = Expected {
        kind: "store-unavailable",
        code: 3,
        words: &["bucket", "no-such-bucket"],
    };
    expect("missing bucket", &world.run(command), &expected);

    let mut command = world.backup();
    command.env("AWS_SECRET_ACCESS_KEY", "wrong");
    let expected = Expected {
        kind: "store-denied",
        code: 4,
        words: &["SignatureDoesNotMatch"],
    };
    expect("wrong key", &world.run(command), &expected);

    let mut command = world.backup();
    command.env("GS_PITR_S3_REGION", "eu-wrong-7");
    expect(
        "wrong region",
        &world.run(command),
        &Expected {
            kind: "usage",
            code: 2,
            words: &["region"],
        },
    );

    let nobody = format!("127.0.0.1:{}", os::free_port());
    let command = world
        .fleet
        .command(&["backup", "--nodes", &nobody, "--output", "json"]);
    expect(
        "no agent",
        &world.run(command),
        &Expected {
            kind: "agent-unreachable",
            code: 5,
            words: &[&nobody],
        },
    );

    let certs = world.fleet.home().join(".gs_pitr/certs");
    let away = world.fleet.home().join("away");
    fs::rename(&certs, &away).expect("away");
    expect(
        "no certificate",
        &world.run(world.backup()),
        &Expected {
            kind: "certificate",
            code: 6,
            words: &["operator.crt"],
        },
    );
    let made = world.fleet.run(&["certs", "init"]);
    assert_eq!(made.code, 0, "{made:?}");
    expect(
        "certificate of another CA",
        &world.run(world.backup()),
        &Expected {
            kind: "certificate",
            code: 6,
            words: &[&nodes],
        },
    );
    fs::remove_dir_all(&certs).expect("gone");
    fs::rename(&away, &certs).expect("back");

    assert_nothing_listed(&world);
}

/// Neither an upload nor a backup came of it.
fn assert_nothing_listed(world: &World) {
    assert_eq!(world.bucket.server().uploads_under_way(), 0);
    let listed = world.fleet.run(&["show", "--output", "json"]);
    let none = listed.code == 0
        && listed.result()["backups"]
            .as_array()
            .is_some_and(Vec::is_empty);
    assert!(
        none || listed.result()["error"]["kind"] == "not-found",
        "{listed:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_database_password_is_named() {
    let world = World::new("bad").await;
    let cluster = world.fleet.hosts[0].cluster.as_ref().expect("a database");
    let file = world.fleet.hosts[0].root.join("wrong password");
    fs::write(&file, "wrong").expect("a file");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("chmod");
    os::give(&file);
    let root = world.fleet.path().join("tcp");
    fs::create_dir(&root).expect("a directory");
    os::give(&root);
    let file = file.display().to_string();
    let more = [
        "--pg-host",
        "127.0.0.1",
        "--pg-user",
        "postgres",
        "--pg-password-file",
        &file,
    ];
    let agent = world.fleet.start_agent("tcp", &root, Some(cluster), &more);
    let command = world
        .fleet
        .command(&["backup", "--nodes", &agent.address, "--output", "json"]);
    expect(
        "wrong password",
        &world.run(command),
        &Expected {
            kind: "database",
            code: 7,
            words: &["password"],
        },
    );
    assert_nothing_listed(&world);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_before_a_restore_is_named() {
    let mut world = World::new("bad").await;
    let id = world.run(world.backup()).good().result()["backup_id"]
        .as_str()
        .expect("an id")
        .to_owned();

    let (command, target) = world.restore("20200101T000000Z-F-00000000");
    let expected = Expected {
        kind: "not-found",
        code: 8,
        words: &["20200101T000000Z-F-00000000"],
    };
    expect("unknown id", &world.run(command), &expected);
    assert_no_database("unknown id", &target);

    let (mut command, target) = world.restore(&id);
    let node = world
        .fleet
        .run(&["show", &id, "--output", "json"])
        .good()
        .result();
    let node = node["backups"][0]["nodes"][0]["node_id"]
        .as_str()
        .expect("a node id")
        .to_owned();
    fs::create_dir(target.join(&node)).expect("a directory");
    fs::write(target.join(&node).join("precious"), "data").expect("a file");
    os::give(&target.join(&node));
    command.stdin(std::process::Stdio::null());
    expect(
        "non-empty target",
        &world.run(command),
        &Expected {
            kind: "target",
            code: 10,
            words: &["empty", &node],
        },
    );
    assert_eq!(
        fs::read_to_string(target.join(&node).join("precious")).expect("still there"),
        "data"
    );

    let (_, target) = world.restore(&id);
    let text = target.display().to_string();
    let to = world.fleet.addresses(&[1]);
    let args = [
        "restore",
        "--id",
        &id,
        "--nodes",
        &to,
        "--map",
        &format!("{node}={to}"),
        "--target-dir",
        &text,
        "--output",
        "json",
    ];
    expect(
        "no --yes",
        &world.run(world.fleet.command(&args)),
        &Expected {
            kind: "usage",
            code: 2,
            words: &["--yes"],
        },
    );
    assert_no_database("no --yes", &target);
}

/// What was stored is changed behind the product's back.
enum Damage {
    Flip,
    Cut,
    Remove,
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_in_the_bucket_never_becomes_a_database() {
    let mut world = World::new("bad").await;
    let id = world.run(world.backup()).good().result()["backup_id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let pack = "pack-00000";
    for (part, damage, name) in [
        ("manifest.json", Damage::Flip, "manifest, one bit"),
        ("/points/", Damage::Flip, "point, one bit"),
        ("/index", Damage::Flip, "index, one bit"),
        ("/index", Damage::Cut, "index, cut short"),
        ("/index", Damage::Remove, "index, missing"),
        (pack, Damage::Flip, "frame, one bit"),
        (pack, Damage::Cut, "pack, cut short"),
        (pack, Damage::Remove, "pack, missing"),
        (".zst", Damage::Flip, "WAL segment, one bit"),
        (".zst", Damage::Remove, "WAL segment, missing"),
    ] {
        let key = world.key(part);
        let server = world.bucket.server();
        let before = server.take(&key);
        if !matches!(damage, Damage::Remove) {
            server.put_back(&key, &before);
        }
        let size = server.bytes(&key).map_or(0, |bytes| bytes.len());
        match damage {
            Damage::Flip => assert!(server.flip_bit(&key, size as u64 * 4 + 3), "{key}"),
            Damage::Cut => {
                let bytes = server.bytes(&key).expect("the object");
                server.tamper(&key, Some(bytes.slice(..size - 100)));
            }
            Damage::Remove => {}
        }
        let (command, target) = world.restore(&id);
        let run = world.run(command);
        expect(
            name,
            &run,
            &Expected {
                kind: "damaged",
                code: 9,
                words: &[],
            },
        );
        assert_no_database(name, &target);
        world.bucket.server().put_back(&key, &before);
    }
    // Everything put back as it was, it restores: the errors above were of the damage.
    let (command, _) = world.restore(&id);
    let result = world.run(command).good().result();
    assert_eq!(result["status"], "ok");
    stop_restored(&result);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_goes_away_during_recovery_does_not_open_a_database() {
    use std::io::BufRead as _;
    let mut world = World::new("bad").await;
    let id = world.run(world.backup()).good().result()["backup_id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let (mut command, target) = world.restore(&id);
    let mut child = command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("gs_pitr");
    let lines = std::io::BufReader::new(child.stdout.take().expect("its output")).lines();
    let (mut stdout, mut down) = (String::new(), false);
    for line in lines.map_while(Result::ok) {
        let event: Value = serde_json::from_str(&line).expect("JSON");
        if event["phase"] == "recovering" && !down {
            world.bucket.server().set_down(true);
            down = true;
        }
        stdout.push_str(&line);
        stdout.push('\n');
    }
    let output = child.wait_with_output().expect("gs_pitr ends");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let run = Run {
        code: output.status.code().unwrap_or(-1),
        stdout,
        stderr,
    };
    world.bucket.server().set_down(false);
    assert!(down, "never recovering: {run:?}");
    expect(
        "store down",
        &run,
        &Expected {
            kind: "store-unavailable",
            code: 3,
            words: &[],
        },
    );
    assert_no_database("store down", &target);
}

/// Stops the databases that a restore left running.
fn stop_restored(result: &Value) {
    for node in result["nodes"].as_array().expect("nodes") {
        let mut command = os::command(Installation::newest().bindir.join("pg_ctl"));
        command.args([
            "stop",
            "-m",
            "immediate",
            "-D",
            node["data_directory"].as_str().expect("a directory"),
        ]);
        assert!(command.output().expect("pg_ctl").status.success());
    }
}
