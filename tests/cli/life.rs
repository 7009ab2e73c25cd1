//! A backup's life with real agents and databases: cancelled, abandoned by an agent, without a terminal,
//! and of databases that moved.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::{Fleet, Run};
use support::os;
use support::postgres::{ClusterOptions, Installation};

/// Slow enough that a copy is still under way when something happens to it.
pub(super) const SLOW: [&str; 2] = ["--bandwidth", "64KiB"];

pub(super) async fn fleet(databases: usize) -> (Bucket, Fleet) {
    let bucket = Bucket::double().await;
    let mut fleet = Fleet::new("cli", &bucket.config());
    for number in 1..=databases {
        let options = ClusterOptions::default();
        fleet.add_database(&format!("node {number}"), &Installation::newest(), options);
    }
    (bucket, fleet)
}

/// A backup whose lines are read as they come.
pub(super) struct Running {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
    stdout: String,
}

impl Running {
    pub(super) fn start(fleet: &Fleet, nodes: &str, more: &[&str]) -> Self {
        let mut command = fleet.command(&["backup", "--output", "json", "--nodes", nodes]);
        let mut child = command
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self {
            child,
            lines,
            stdout: String::new(),
        }
    }

    /// Reads on until every one of `agents` is in `phase`.
    pub(super) fn until(&mut self, phase: &str, agents: &[&str]) {
        let mut waiting = agents.to_vec();
        while !waiting.is_empty() {
            let line = self.lines.next();
            let line = line
                .unwrap_or_else(|| panic!("never {phase}: {}", self.stdout))
                .unwrap();
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["phase"] == phase {
                waiting.retain(|agent| event["node"] != *agent);
            }
            self.stdout.push_str(&line);
            self.stdout.push('\n');
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(super) fn end(mut self) -> Run {
        for line in self.lines {
            self.stdout.push_str(&line.unwrap());
            self.stdout.push('\n');
        }
        let mut stderr = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut stderr)
            .unwrap();
        Run {
            code: self.child.wait().unwrap().code().unwrap_or(-1),
            stdout: self.stdout,
            stderr,
        }
    }
}

/// Nothing of a backup holds WAL back on this host.
pub(super) async fn assert_no_slot(fleet: &Fleet, host: usize) {
    let database = fleet.hosts[host].cluster.as_ref().unwrap();
    let sql = "SELECT count(*)::text FROM pg_replication_slots";
    assert_eq!(
        database.query_one("postgres", sql).await,
        "0",
        "a slot is left"
    );
}

fn assert_no_backup(fleet: &Fleet) {
    let listed = fleet.run(&["show", "--output", "json"]).good().result();
    let mut backups = listed["backups"].as_array().unwrap().iter();
    assert!(
        backups.all(|backup| backup["status"] == "abandoned"),
        "{listed}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_cancels_in_order() {
    let (bucket, fleet) = fleet(2).await;
    let (one, two) = (&fleet.hosts[0].agent.address, &fleet.hosts[1].agent.address);
    let mut running = Running::start(&fleet, &fleet.addresses(&[0, 1]), &SLOW);
    running.until("copying", &[one, two]);
    running.signal(Signal::INT);
    let begun = Instant::now();
    let run = running.end();
    assert!(begun.elapsed() < Duration::from_secs(30), "{run:?}");
    assert_eq!(run.code, 130, "{run:?}");
    let error = &run.result()["error"];
    assert_eq!(error["kind"], "cancelled", "{run:?}");
    assert_eq!(error["changed"], true, "{run:?}");
    let cancelled = run
        .stdout
        .lines()
        .filter(|line| line.contains(r#""phase":"cancelled""#));
    assert!(cancelled.count() <= 2);
    assert_eq!(bucket.uploads_under_way(), Some(0));
    for host in [0, 1] {
        assert_no_slot(&fleet, host).await;
    }
    assert_no_backup(&fleet);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_is_named_and_the_others_stop() {
    let (bucket, mut fleet) = fleet(2).await;
    let (one, two) = (
        fleet.hosts[0].agent.address.clone(),
        fleet.hosts[1].agent.address.clone(),
    );
    let more = [SLOW[0], SLOW[1], "--agent-timeout", "3"];
    let mut running = Running::start(&fleet, &fleet.addresses(&[0, 1]), &more);
    running.until("copying", &[&one, &two]);
    fleet.hosts[0].agent.kill();
    let run = running.end();
    assert_eq!(run.code, 5, "{run:?}");
    let error = &run.result()["error"];
    assert_eq!(error["kind"], "agent-unreachable", "{run:?}");
    assert_eq!(error["node"], one, "{run:?}");
    assert_no_slot(&fleet, 1).await;
    assert_no_backup(&fleet);
    // What the killed agent had begun is left for a sweeper; the other one left nothing.
    assert!(bucket.uploads_under_way() <= Some(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hang_up_does_not_end_a_backup() {
    let (_bucket, fleet) = fleet(1).await;
    let agent = &fleet.hosts[0].agent.address;
    let mut running = Running::start(&fleet, agent, &["--bandwidth", "1MiB"]);
    running.until("copying", &[agent]);
    running.signal(Signal::HUP);
    let run = running.end().good();
    assert_eq!(run.result()["status"], "ok");
    // Its output went to a pipe and not to a terminal, so it stays there.
    assert!(run.stderr.is_empty(), "{run:?}");
    assert!(!fleet.home().join(".gs_pitr/log").exists());
}

/// `script` gives the command a terminal; when it is killed, the terminal is gone.
#[tokio::test(flavor = "multi_thread")]
async fn without_its_terminal_a_backup_goes_on_into_a_log() {
    let (_bucket, fleet) = fleet(1).await;
    let nodes = fleet.addresses(&[0]);
    let program = fleet.programs().join("gs_pitr");
    let line = format!(
        "'{}' backup --nodes {nodes} --bandwidth 512KiB",
        program.display()
    );
    let environment = fleet.command(&[]);
    // Whoever runs the tests may ignore SIGHUP, as `nohup` does, and children inherit that.
    let mut script = std::process::Command::new("env");
    script
        .args([
            "--default-signal=HUP",
            "script",
            "-q",
            "-f",
            "-c",
            &line,
            "/dev/null",
        ])
        .env_clear();
    script.envs(
        environment
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    script.env("TERM", "xterm").env("SHELL", "/bin/sh");
    let mut terminal = script
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut shown = Vec::new();
    let mut output = terminal.stdout.take().unwrap();
    while !String::from_utf8_lossy(&shown).contains("copying") {
        let mut some = [0; 4096];
        let count = output.read(&mut some).unwrap();
        assert_ne!(count, 0, "{}", String::from_utf8_lossy(&shown));
        shown.extend_from_slice(&some[..count]);
    }
    terminal.kill().unwrap();
    terminal.wait().unwrap();
    let logs = fleet.home().join(".gs_pitr/log");
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        let log = std::fs::read_dir(&logs).ok().and_then(|mut all| all.next());
        let text = log.and_then(|log| std::fs::read_to_string(log.unwrap().path()).ok());
        let text = text.unwrap_or_default();
        if text.contains("\n  point ") {
            assert!(text.contains("the terminal has gone away"), "{text}");
            assert!(!text.contains('\x1b'), "{text}");
            break;
        }
        assert!(Instant::now() < deadline, "the log has: {text}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let listed = fleet.run(&["show", "--output", "json"]).good().result();
    assert_eq!(listed["backups"][0]["status"], "complete", "{listed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_moved_is_asked_about() {
    let (_bucket, fleet) = fleet(1).await;
    let host = &fleet.hosts[0];
    let backup = |agent: &str, more: &[&str]| {
        let mut args = vec!["backup", "--output", "json", "--nodes", agent];
        args.extend(more);
        fleet.run(&args)
    };
    let first = backup(&host.agent.address, &[]).good().result();
    let node = first["nodes"][0]["node_id"].as_str().unwrap().to_owned();
    let again = backup(&host.agent.address, &[]).good().result();
    assert_eq!(again["nodes"][0]["node_id"], node);

    let second = fleet.start_agent("second", &host.root, host.cluster.as_ref(), &[]);
    let twice = backup(&format!("{},{}", host.agent.address, second.address), &[]);
    let error = twice.result()["error"].clone();
    assert_eq!(error["kind"], "usage", "{twice:?}");
    assert!(
        error["message"].as_str().unwrap().contains("same database"),
        "{error}"
    );

    let cluster = host.cluster.as_ref().unwrap();
    cluster.stop("fast");
    let moved = cluster.root().join("moved");
    std::fs::rename(cluster.data_directory(), &moved).unwrap();
    let pg_ctl = |verb: &[&str]| {
        let mut command = os::command(Installation::newest().bindir.join("pg_ctl"));
        let log = cluster.root().join("moved.log");
        command
            .arg("-D")
            .arg(&moved)
            .arg("-l")
            .arg(log)
            .arg("-w")
            .args(verb);
        assert!(command.stdout(Stdio::null()).status().unwrap().success());
    };
    pg_ctl(&["start"]);
    let bindir = Installation::newest().bindir.display().to_string();
    let (pgdata, port) = (moved.display().to_string(), cluster.port().to_string());
    let more = [
        "--pgdata",
        &pgdata,
        "--pg-port",
        &port,
        "--pg-bindir",
        &bindir,
    ];
    let agent = fleet.start_agent("moved", cluster.root(), None, &more);

    let asked = backup(&agent.address, &[]);
    assert_eq!(asked.code, 12, "{asked:?}");
    let error = asked.result()["error"].clone();
    assert_eq!(error["changed"], false, "{asked:?}");
    let next = error["next"].as_str().unwrap();
    assert!(
        next.contains(&format!("--node-id {}={node}", agent.address)),
        "{next}"
    );
    assert!(
        next.contains(&format!("--new-node {}", agent.address)),
        "{next}"
    );

    let told = backup(
        &agent.address,
        &["--node-id", &format!("{}={node}", agent.address)],
    );
    assert_eq!(told.good().result()["nodes"][0]["node_id"], node);
    let known = backup(&agent.address, &[]).good().result();
    assert_eq!(known["nodes"][0]["node_id"], node);
    pg_ctl(&["stop", "-m", "immediate"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_is_mapped_planned_and_cancelled() {
    let (_bucket, mut fleet) = fleet(2).await;
    let sources = fleet.addresses(&[0, 1]);
    let made = fleet.run(&["backup", "--output", "json", "--nodes", &sources]);
    let made = made.good().result();
    let id = made["backup_id"].as_str().unwrap().to_owned();
    let nodes: Vec<_> = made["nodes"].as_array().unwrap().iter().collect();
    let names = |place: usize| nodes[place]["node_id"].as_str().unwrap();
    let target = fleet.path().join("restored");
    std::fs::create_dir(&target).unwrap();
    os::give(&target);
    let directory = target.display().to_string();
    let host = fleet.add_host("new", &["--allow-root", &directory]);
    let agent = fleet.hosts[host].agent.address.clone();
    let command = |more: &[&str]| {
        let args = [
            "restore",
            "--id",
            &id,
            "--target-dir",
            &directory,
            "--yes",
            "--output",
            "json",
        ];
        let mut command = fleet.command(&args);
        command.args(more);
        command
    };
    let wait = |more: &[&str]| support::fleet::wait(command(more), Duration::from_mins(2));
    let refused = |more: &[&str], kind: &str, next: &str| {
        let run = wait(more);
        let error = run.result()["error"].clone();
        assert_eq!(error["kind"], kind, "{run:?}");
        assert_eq!(error["changed"], false, "{run:?}");
        assert!(error["next"].as_str().unwrap().contains(next), "{run:?}");
    };
    // Where the nodes came from their databases still run.
    refused(&["--nodes", &sources], "conflict", "--db-port");
    refused(&["--nodes", &agent], "usage", "--map");
    let maps = [0, 1].map(|place| format!("{}={agent}", names(place)));
    let mapped = ["--nodes", &agent, "--map", &maps[0], "--map", &maps[1]];
    let nobody = format!("db9:5432={agent}");
    let unknown = [&mapped[..], &["--map", &nobody]].concat();
    refused(&unknown, "not-found", "gs_pitr show");
    let same = format!("{}=5999", names(0));
    let other = format!("{}=5999", names(1));
    let clash = [&mapped[..], &["--db-port", &same, "--db-port", &other]].concat();
    refused(&clash, "usage", "--db-port");

    let mut child = command(&[&mapped[..], &SLOW].concat());
    let mut child = child
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut said = String::new();
    while !said.contains("fetching") {
        assert_ne!(stdout.read_line(&mut said).unwrap(), 0, "{said}");
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    stdout.read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said}");
    let left: Vec<_> = std::fs::read_dir(&target).unwrap().collect();
    assert!(left.is_empty(), "{left:?}: {said}");

    let restored = wait(&[&mapped[..], &["--no-start"]].concat())
        .good()
        .result();
    for node in restored["nodes"].as_array().unwrap() {
        assert_eq!(node["running"], false, "{restored}");
        let data = std::path::Path::new(node["data_directory"].as_str().unwrap());
        assert_eq!(data, target.join(node["node_id"].as_str().unwrap()));
        assert!(!data.join("postmaster.pid").exists());
    }
}
