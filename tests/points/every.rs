//! Points again and again, as a service makes them.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::scene::{Scene, say};

struct Service {
    process: Child,
    lines: Receiver<Value>,
}

impl Service {
    fn start(scene: &Scene, span: &str) -> Self {
        let args = [
            "point",
            "create",
            "--every",
            span,
            "--nodes",
            &scene.nodes,
            "--output",
            "json",
        ];
        let mut command = scene.fleet.command(&args);
        command.stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut process = command.spawn().unwrap();
        let stdout = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let value = serde_json::from_str(&line).expect("every line is JSON");
                if sender.send(value).is_err() {
                    return;
                }
            }
        });
        Self { process, lines }
    }

    /// The next line of this event; others are told.
    fn next(&self, event: &str, within: Duration) -> Value {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line["event"] == event => return line,
                Ok(line) => say(&format!("meanwhile: {line}")),
                Err(RecvTimeoutError::Timeout) => panic!("no `{event}` within {within:?}"),
                Err(RecvTimeoutError::Disconnected) => panic!("it has ended, without `{event}`"),
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// It survives an agent that is killed and comes back, and ends well when it is told to.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_survives_an_agent_and_ends_when_it_is_told_to() {
    let mut scene = Scene::start("service").await;
    let backup = scene.backup();
    let mut service = Service::start(&scene, "5s");
    let minute = Duration::from_mins(1);
    let mut points = Vec::new();
    for _ in 0..2 {
        let point = service.next("point", minute);
        assert_eq!(point["base"], backup.as_str(), "{point}");
        points.push(point["point_id"].clone());
    }
    scene.fleet.hosts[1].agent.kill();
    let failed = service.next("point-failed", Duration::from_mins(3));
    assert_eq!(failed["last"], *points.last().unwrap(), "{failed}");
    scene.fleet.restart_agent(1);
    let point = service.next("point", Duration::from_mins(3));
    points.push(point["point_id"].clone());
    service.signal(Signal::TERM);
    let result = service.next("result", minute);
    assert_eq!(result["status"], "ok", "{result}");
    assert!(result["made"].as_u64().unwrap() >= 3, "{result}");
    assert_eq!(service.process.wait().unwrap().code(), Some(0));
    let listed = scene.points();
    for point in &points {
        let listed = listed.iter().find(|it| it["point_id"] == *point);
        assert_eq!(listed.expect("it is there")["base"], backup.as_str());
    }
    let number = points.len();
    say(&format!("{number} points, {result}"));
}

/// A client that is killed at any moment leaves no point that is not whole, and is in nobody's way for long.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_killed_leaves_nothing_half_done() {
    let scene = Scene::start("killed").await;
    let backup = scene.backup();
    for wait in [150, 300, 600, 1200] {
        let args = [
            "point",
            "create",
            "--nodes",
            &scene.nodes,
            "--output",
            "json",
        ];
        let mut command = scene.fleet.command(&args);
        let mut process = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(wait)).await;
        process.kill().unwrap();
        process.wait().unwrap();
    }
    // The killed one's part on an agent is waited for.
    let begun = Instant::now();
    let made = scene.point("after the kills");
    say(&format!("the next point took {:?}", begun.elapsed()));
    assert_eq!(made["base"], backup.as_str());
    for point in scene.points() {
        assert!(point["base"].is_string(), "{point}");
    }
    let verified = scene.ask(&["verify", "--all"]);
    assert_eq!(verified.code, 0, "{verified:?}");
}
