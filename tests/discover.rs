//! A cluster found through its proxies, the command lines of the Go `gs_pitr`, and a lock that is left. On the stand-in and on real
//! proxies alike.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use agent_api::client::{AgentClient, ClientTls, Transport};
use agent_api::{ArmWatchdog, ProxyAddress, Secret, StartWatchdog, WatchdogTls};
use futures_util::TryStreamExt as _;
use pipeline::store::Key;
use serde_json::Value;
use support::bank::wire::Session;
use support::bucket::Bucket;
use support::fleet::{Run, wait};
use support::postgres::SUPERUSER;
use support::real_proxy::{DATABASE, RealClock, USER, home, redis_server};
use support::running::Running;
use support::sharded::{NODE_PASSWORD, SHARD, ShardedCluster, ShardedOptions};
use support::shown::go_tool_backup;
use support::skip::skip;
use uuid::Uuid;

#[allow(
    dead_code,
    reason = "it is that of `lock_faults.rs`, which uses the rest"
)]
#[path = "lock_faults/hands.rs"]
mod hands;

const PASSWORD: &str = "pr0xy-S3cret #1: x";

/// Two databases with agents, and two proxies before them.
struct Stage(ShardedCluster);

async fn stage(name: &'static str, clock: RealClock) -> Stage {
    let options = ShardedOptions {
        name,
        clock,
        password: PASSWORD,
        ..ShardedOptions::default()
    };
    Stage(ShardedCluster::start(options).await)
}

impl Stage {
    fn node(&self, host: usize) -> String {
        format!("127.0.0.1:{}", self.0.database(host).port())
    }

    fn agent(&self, host: usize) -> String {
        self.0.fleet.hosts[host].agent.address.clone()
    }

    /// `--agents` of all nodes.
    fn agents(&self) -> String {
        let all = (0..2).map(|host| format!("{}={}", self.node(host), self.agent(host)));
        all.collect::<Vec<_>>().join(",")
    }

    fn port(&self, proxy: usize) -> String {
        self.0.proxy_port(proxy).to_string()
    }

    /// `gs_pitr` that knows nothing of proxies but, where they are real, that those they list are on loopback.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.0.fleet.command(args);
        let environment = self.0.environment();
        command.envs(
            environment
                .into_iter()
                .filter(|(name, _)| *name == "GS_PITR_PROXY_MAP"),
        );
        command
    }

    /// The same, to its end, with no password at all.
    fn ask(&self, args: &[&str]) -> Run {
        wait(self.command(args), Duration::from_mins(5))
    }

    /// Runs with the password in the environment and all agents named.
    fn run(&self, command: &str, more: &[&str]) -> Run {
        let (port, agents) = (self.port(0), self.agents());
        let mut args = vec![command, "-H", "127.0.0.1", "-P", &port, "-u", USER];
        args.extend(["--output", "json"]);
        args.extend(more);
        if !more.contains(&"--agents") && command != "unlock" {
            args.extend(["--agents", &agents]);
        }
        self.with_password(&args)
    }

    /// Has the first agent arm a watchdog that will not fire during the test; its id.
    async fn armed(&self) -> Value {
        let read = |name: &str| {
            let certs = self.0.fleet.home().join(".gs_pitr/certs");
            fs::read(certs.join(name)).unwrap()
        };
        let transport = Transport::MutualTls(ClientTls {
            ca_pem: read("ca.crt"),
            cert_pem: read("operator.crt"),
            key_pem: read("operator.key"),
        });
        let client = AgentClient::new(&self.agent(0), &transport).unwrap();
        let proxy = ProxyAddress {
            host: "127.0.0.1".to_owned(),
            port: self.0.proxy_port(0),
        };
        let start = StartWatchdog {
            id: Uuid::new_v4(),
            proxies: vec![proxy],
            user: USER.to_owned(),
            password: Some(Secret(PASSWORD.to_owned())),
            database: "postgres".to_owned(),
            tls: WatchdogTls::Off,
        };
        client.watchdog_start(&start).await.unwrap();
        let deadline = Duration::from_mins(10);
        client
            .watchdog_arm(start.id, &ArmWatchdog::of(1, deadline))
            .await
            .unwrap();
        serde_json::to_value(start.id).unwrap()
    }

    fn with_password(&self, args: &[&str]) -> Run {
        let mut command = self.command(args);
        command.env("GS_PITR_PROXY_PASSWORD", PASSWORD);
        let run = wait(command, Duration::from_mins(5));
        no_secret(&run.stdout);
        no_secret(&run.stderr);
        run
    }
}

fn no_secret(text: &str) {
    for secret in [PASSWORD, NODE_PASSWORD] {
        assert!(!text.contains(secret), "a password stands in: {text}");
    }
}

fn failed(run: &Run, code: i32) -> Value {
    assert_eq!(run.code, code, "{run:?}");
    let result = run.result();
    assert_eq!(result["status"], "error", "{run:?}");
    result["error"].clone()
}

fn says(value: &Value, words: &str) {
    let text = value.as_str().unwrap_or_default();
    assert!(text.contains(words), "{words:?} is not in {text:?}");
}

fn warnings(run: &Run) -> String {
    let lines = run.stdout.lines();
    let events = lines.map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let warnings = events.filter(|event| event["event"] == "warning");
    let all: Vec<_> = warnings
        .map(|event| format!("{} {}", event["node"], event["message"]))
        .collect();
    all.join("\n")
}

/// Every object of the bucket as text, however odd.
async fn everything(bucket: &Bucket) -> Vec<(Key, String)> {
    let store = bucket.store();
    let listed: Vec<_> = store.list("").try_collect().await.unwrap();
    let mut all = Vec::new();
    for object in listed {
        if object.size < 4 << 20 {
            let body = store.get(&object.key, None).await.unwrap();
            let bytes: Vec<_> = body.stream.try_collect().await.unwrap();
            let text = String::from_utf8_lossy(&bytes.concat()).into_owned();
            all.push((object.key, text));
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn the_go_tools_command_lines_work_as_they_are() {
    if home().is_some() && redis_server().is_none() {
        let name = "the_go_tools_command_lines_work_as_they_are";
        skip(name, "there is no redis-server here");
        return;
    }
    let stage = stage("discover-go", RealClock::Redis).await;
    let agents = stage.agents();
    // Several nodes on one host are what the Go tool could not do; the rest is its README's line.
    let words = go_tool_backup(&stage.0);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let mut backup = stage.command(&words);
    backup.env("GS_PITR_AGENTS", &agents);
    let run = wait(backup, Duration::from_mins(5)).good();
    no_secret(&run.stdout);
    no_secret(&run.stderr);
    for words in [
        "`--password` on the command line",
        "GS_PITR_PROXY_PASSWORD",
        "`--dn-backup-path` is no longer needed",
    ] {
        assert!(run.stderr.contains(words), "{words}: {run:?}");
    }

    let shown = stage.ask(&["show", "--output", "json"]).good().result();
    let backups = shown["backups"].as_array().unwrap();
    assert_eq!(backups.len(), 1, "{shown}");
    assert_eq!(backups[0]["nodes"].as_array().unwrap().len(), 2);
    let id = backups[0]["id"].as_str().unwrap().to_owned();

    // The metadata is there, and no password of it anywhere in the bucket, nor in our own directory.
    let objects = everything(&stage.0.bucket).await;
    let metadata: Vec<_> = objects
        .iter()
        .filter(|(key, _)| key.as_str().starts_with("metadata/"))
        .collect();
    assert_eq!(metadata.len(), 1);
    assert!(metadata[0].1.contains("${gs_pitr:"), "{}", metadata[0].1);
    for (key, text) in &objects {
        for secret in [PASSWORD, NODE_PASSWORD] {
            assert!(!text.contains(secret), "a password stands in {key:?}");
        }
    }
    let _ = stage.ask(&["verify", "--all"]).good();

    short_names(&stage, &id);
    let _ = stage.ask(&["verify", "--all"]).good();
}

/// The rest of the Go tool's flags, on the stage with one backup.
fn short_names(stage: &Stage, id: &str) {
    let (port, agents) = (stage.port(0), stage.agents());
    // Short names; an increment of a whole copy's engine is refused, so FULL again, by its long Go name.
    let mut short = stage.command(&[
        "backup",
        "-H",
        "127.0.0.1",
        "-P",
        &port,
        "-u",
        USER,
        "-p",
        PASSWORD,
        "-a",
        "18080",
        "-j",
        "2",
        "-B",
        "/x",
        "--dn-backup-mode",
        "full",
        "--agents",
        &agents,
    ]);
    short.env("GS_PITR_NODES", "127.0.0.1:1");
    let run = wait(short, Duration::from_mins(5)).good();
    assert!(run.stderr.contains("`--nodes` is not looked at"), "{run:?}");

    let shown = stage.ask(&["show", "--id", id]).good();
    assert!(shown.stdout.contains(id), "{shown:?}");
    let none = stage
        .ask(&["show", "--csn", "1", "--output", "json"])
        .good();
    assert!(none.result()["backups"].as_array().unwrap().is_empty());

    let refused = stage.ask(&["delete", "--csn", "1", "--yes", "--output", "json"]);
    says(&failed(&refused, 8)["message"], "CSN 1");
    let gone = stage.command(&[
        "delete",
        "--host",
        "127.0.0.1",
        "--password",
        PASSWORD,
        "--port",
        &port,
        "--username",
        USER,
        "--agent-port",
        "18080",
        "--dn-backup-path",
        "/x",
        "--id",
        id,
        "--yes",
    ]);
    let gone = wait(gone, Duration::from_mins(2)).good();
    assert!(gone.stderr.contains("can be left away"), "{gone:?}");
    no_secret(&gone.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn data_nodes_without_an_agent_of_their_own_are_refused_by_name() {
    let stage = stage("discover-agents", RealClock::Off).await;
    let (one, two) = (stage.node(0), stage.node(1));
    let address = |host: usize| stage.agent(host);

    // Both would have the agent on one port.
    let error = failed(
        &stage.run("backup", &["--agents", &format!("{one}=127.0.0.1:18080")]),
        2,
    );
    says(&error["message"], &two);
    says(&error["next"], "--agents");

    let nobody = format!("{one}={},{two}=127.0.0.1:1", address(0));
    let error = failed(&stage.run("backup", &["--agents", &nobody]), 5);
    says(&error["message"], &format!("data node {two} has no agent"));
    says(&error["next"], &format!("--agents {two}=HOST:PORT"));
    assert_eq!(error["node"], two.as_str());
    assert_eq!(error["changed"], false);

    let swapped = format!("{one}={},{two}={}", address(1), address(0));
    let error = failed(&stage.run("backup", &["--agents", &swapped]), 12);
    says(&error["message"], "it is another database");

    let error = failed(&stage.run("backup", &["--agents", "db9:5432=db9:1"]), 2);
    says(&error["message"], &one);
    a_new_data_node_ends_the_points_of_the_others(&stage).await;
}

/// Points that are made again and again are of all data nodes, or there are none.
async fn a_new_data_node_ends_the_points_of_the_others(stage: &Stage) {
    let _ = stage.run("backup", &["--wal", "continuous"]).good();
    let (port, agents) = (stage.port(0), stage.agents());
    let mut service = stage.command(&[
        "point",
        "create",
        "--every",
        "5s",
        "-H",
        "127.0.0.1",
        "-P",
        &port,
        "-u",
        USER,
        "--agents",
        &agents,
        "--output",
        "json",
    ]);
    service.env("GS_PITR_PROXY_PASSWORD", PASSWORD);
    let mut service = Running::start(service);
    let first = service.until_event(|event| event["event"] == "point").await;
    let is_another =
        |event: &Value| event["event"] == "point" && event["point_id"] != first["point_id"];
    service.until_event(is_another).await;

    // The same database by another name: to the proxies that is another data node.
    let database = stage.0.database(0);
    let unit = format!(
        r#"REGISTER STORAGE UNIT more (HOST="localhost", PORT={}, DB="{SHARD}", USER="{SUPERUSER}", PASSWORD="{NODE_PASSWORD}")"#,
        database.port()
    );
    let mut session = Session::open(&stage.0.access(1, DATABASE)).await.unwrap();
    session.query(&unit).await.unwrap();
    let failed = service
        .until_event(|event| event["event"] == "point-failed")
        .await;
    let words = format!("new: localhost:{}", database.port());
    says(&failed["error"]["message"], &words);
    service.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_that_are_gone_are_named_and_wrong_passwords_end_it() {
    let mut stage = stage("discover-proxies", RealClock::Local).await;
    let second = format!("127.0.0.1:{}", stage.port(1));
    let run = stage.run("backup", &[]).good();
    let told = warnings(&run);
    assert!(told.contains("TSO.local"), "{told}");
    assert!(!told.contains("not reached"), "{told}");
    let point = run.result()["point"].as_str().unwrap().to_owned();
    assert!(!point.is_empty());

    hands::kill(&mut stage.0, 1);
    let told = warnings(&stage.run("backup", &[]).good());
    assert!(
        told.contains(&second) && told.contains("not reached"),
        "{told}"
    );

    // None of those that are named.
    let error = failed(
        &stage.with_password(&[
            "backup",
            "-H",
            "127.0.0.1",
            "-P",
            "1",
            "-u",
            USER,
            "--output",
            "json",
        ]),
        7,
    );
    says(&error["message"], "proxy 127.0.0.1:1");
    says(&error["next"], "--host");

    let port = stage.port(0);
    let mut wrong = stage.command(&[
        "backup",
        "-H",
        "127.0.0.1",
        "-P",
        &port,
        "-u",
        USER,
        "--output",
        "json",
    ]);
    wrong.env("GS_PITR_PROXY_PASSWORD", "wr0ng-one");
    let run = wait(wrong, Duration::from_mins(1));
    let error = failed(&run, 7);
    says(&error["next"], "--username");
    assert!(
        !run.stdout.contains("wr0ng-one") && !run.stderr.contains("wr0ng-one"),
        "{run:?}"
    );

    // A file that others may read is refused; one that is private does.
    let file = stage.0.fleet.path().join("proxy-password");
    fs::write(&file, format!("{PASSWORD}\n")).unwrap();
    let path = file.to_str().unwrap();
    let (port, agents) = (stage.port(0), stage.agents());
    let args = [
        "backup",
        "-H",
        "127.0.0.1",
        "-P",
        &port,
        "-u",
        USER,
        "--password-file",
        path,
        "--agents",
        &agents,
        "--output",
        "json",
    ];
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    says(&failed(&stage.ask(&args), 2)["next"], "chmod 600");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let _ = stage.ask(&args).good();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_is_left_is_cleared_after_somebody_agreed() {
    let mut stage = stage("discover-unlock", RealClock::Off).await;
    let run = stage.run("unlock", &[]).good();
    assert_eq!(run.result()["outcome"], "not-locked");

    // Something for it to tell of.
    let _ = stage.run("backup", &[]).good();
    hands::lock(&stage.0).await;
    let error = failed(&stage.run("unlock", &[]), 2);
    says(&error["next"], "--yes");
    assert_eq!(error["changed"], false);
    assert!(hands::is_locked(&stage.0));

    // Some say SUCCESS and change nothing. Meanwhile a watchdog is armed, as of somebody who locks.
    let watchdog = stage.armed().await;
    let agents = stage.agents();
    let held = hands::hold_mutex(&stage.0);
    tokio::spawn(async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        drop(held);
    });
    let run = stage.run("unlock", &["--yes", "--agents", &agents]).good();
    let told = run
        .stdout
        .lines()
        .find(|line| line.contains(r#""event":"watchdogs""#));
    let told: Value = serde_json::from_str(told.expect("what the agents say")).unwrap();
    let agents = told["agents"].as_array().unwrap();
    assert_eq!(agents.len(), 2, "{told}");
    let mut watchdogs = agents
        .iter()
        .flat_map(|agent| agent["watchdogs"].as_array().unwrap());
    let is_it = |it: &Value| it["id"] == watchdog && it["state"] == "armed";
    assert!(watchdogs.any(is_it), "{told}");
    let result = run.result();
    assert_eq!(result["outcome"], "unlocked");
    assert_eq!(result["proxies"].as_array().unwrap().len(), 2);
    assert!(!hands::is_locked(&stage.0));
    let known = run
        .stdout
        .lines()
        .find(|line| line.contains("known-of-the-lock"));
    let known: Value = serde_json::from_str(known.expect("what is known")).unwrap();
    let operations = known["operations"].as_array().unwrap();
    assert_eq!(operations[0]["kind"], "backup", "{known}");
    assert!(
        operations[0]["by"].as_str().unwrap().contains('@'),
        "{known}"
    );

    // One proxy is gone: it is said, and the rest is unlocked.
    hands::lock(&stage.0).await;
    hands::kill(&mut stage.0, 1);
    let run = stage.run("unlock", &["--yes"]).good();
    let told = warnings(&run);
    assert!(told.contains(&stage.port(1)), "{told}");
    let states = run.result()["proxies"].clone();
    let states: Vec<_> = states
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["state"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(states, ["open", "unreachable"]);

    let text = stage
        .with_password(&[
            "unlock",
            "-H",
            "127.0.0.1",
            "-P",
            &stage.port(0),
            "-u",
            USER,
        ])
        .good();
    assert!(text.stdout.contains("nothing is locked"), "{text:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_examines_proxies_and_finds_the_agents() {
    let stage = stage("discover-check", RealClock::Off).await;
    let checked = |run: &Run| -> Vec<Value> {
        let lines = run.stdout.lines();
        let events = lines.map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        events.filter(|event| event["event"] == "checked").collect()
    };
    let level = |all: &[Value], node: Option<&str>, name: &str| -> String {
        let found: Vec<_> = all
            .iter()
            .filter(|it| it["node"].as_str() == node && it["name"] == name)
            .collect();
        assert_eq!(found.len(), 1, "{name} at {node:?} in {all:#?}");
        found[0]["level"].as_str().unwrap().to_owned()
    };
    let proxy = format!("127.0.0.1:{}", stage.port(0));
    let run = stage.run("check", &[]);
    let all = checked(&run);
    for name in ["log-in", "privileges", "state"] {
        assert_eq!(level(&all, Some(&proxy), name), "ok");
    }
    assert_eq!(level(&all, None, "data nodes"), "ok");
    assert_eq!(level(&all, None, "global clock"), "ok");
    let agent = stage.agent(1);
    assert_eq!(level(&all, Some(&agent), "agent"), "ok");

    hands::lock(&stage.0).await;
    let run = stage.run("check", &[]);
    assert_ne!(run.code, 0);
    let all = checked(&run);
    assert_eq!(level(&all, Some(&proxy), "state"), "failure");
    let locked = all.iter().find(|it| it["name"] == "state").unwrap();
    says(&locked["mend"], "gs_pitr unlock");
    hands::unlock(&stage.0).await;

    let one = format!("{}=127.0.0.1:1,{}={agent}", stage.node(0), stage.node(1));
    let run = stage.run("check", &["--agents", &one]);
    let all = checked(&run);
    assert_eq!(level(&all, Some(&stage.node(0)), "data nodes"), "failure");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_finds_its_agents_through_the_proxies() {
    let mut stage = stage("discover-restore", RealClock::Off).await;
    for cluster in stage.0.databases() {
        cluster.execute("CREATE TABLE kept AS SELECT 1 AS id").await;
    }
    let run = stage.run("backup", &[]).good();
    let id = run.result()["backup_id"].as_str().unwrap().to_owned();
    for cluster in stage.0.databases() {
        cluster.execute("DROP TABLE kept").await;
    }
    let run = stage
        .run("restore", &["--id", &id, "--yes", "-B", "/x"])
        .good();
    assert!(run.stdout.contains("\"unlocked\""), "{run:?}");
    for cluster in stage.0.databases() {
        let kept = cluster
            .query_one("postgres", "SELECT count(*) FROM kept")
            .await;
        assert_eq!(kept, "1");
    }

    // After a disaster no proxy answers.
    hands::kill(&mut stage.0, 0);
    hands::kill(&mut stage.0, 1);
    let error = failed(&stage.run("restore", &["--id", &id, "--yes"]), 7);
    says(&error["next"], "--nodes");
    assert_eq!(error["changed"], false);
}
