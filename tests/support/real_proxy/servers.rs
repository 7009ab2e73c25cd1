//! The programs, as they are started and ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{START, ZOOKEEPER, redis_server};
use crate::os;

/// A child that is killed on drop.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    pub(super) fn spawn(mut command: Command, directory: &Path) -> Self {
        let log = directory.join("log");
        let out = fs::OpenOptions::new().create(true).append(true).open(&log);
        let out = out.expect("a log");
        command
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("a log"))
            .stderr(out);
        let child = command.spawn();
        let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self { child, log }
    }

    pub(super) fn log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    pub(super) fn lives(&mut self) -> bool {
        self.child.try_wait().expect("a child of ours").is_none()
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops it where it stands, and waits until all its threads do.
    #[expect(clippy::disallowed_methods, reason = "a millisecond or two, in a test")]
    pub(super) fn freeze(&self) {
        self.signal(Signal::STOP);
        let until = Instant::now() + START;
        while !is_stopped(self.pid()) {
            assert!(Instant::now() < until, "it does not stop:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until somebody listens on `port`.
    async fn listens(&mut self, port: u16) {
        let until = Instant::now() + START;
        while tokio::net::TcpStream::connect(("127.0.0.1", port))
            .await
            .is_err()
        {
            assert!(self.lives(), "it has ended:\n{}", self.log());
            assert!(
                Instant::now() < until,
                "it does not listen:\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Java, with what all of it wants.
pub(super) fn java() -> Command {
    let java = match std::env::var_os("JAVA_HOME") {
        Some(home) => Path::new(&home).join("bin/java"),
        None => PathBuf::from("java"),
    };
    let mut command = Command::new(java);
    command
        .env_remove("CLASSPATH")
        .env_remove("JAVA_TOOL_OPTIONS");
    command.args([
        "-Xss512k",
        "-XX:+UseSerialGC",
        "-Djava.net.preferIPv4Stack=true",
    ]);
    command
}

/// A directory below `parent`.
pub(super) fn directory(parent: &Path, name: &str) -> PathBuf {
    let path = parent.join(name);
    fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path
}

/// Whether every thread of a process stands: a signal is heard only by a thread that gets its turn.
fn is_stopped(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    threads.flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit(") ").next();
        state.is_none_or(|state| state.is_empty() || state.starts_with('T'))
    })
}

/// Starts ZooKeeper. Returns its port, too.
pub(super) async fn zookeeper(root: &Path) -> (Process, u16) {
    let root = directory(root, "zookeeper");
    let (data, port) = (directory(&root, "data"), os::free_port());
    let text = format!(
        "tickTime=2000\ndataDir={}\nclientPort={port}\nclientPortAddress=127.0.0.1\nmaxClientCnxns=0\n\
         admin.enableServer=false\n",
        data.display()
    );
    fs::write(root.join("zoo.cfg"), text).expect("zoo.cfg");
    let mut command = java();
    command.args(["-Xmx128m", "-cp", ZOOKEEPER]);
    command.arg("org.apache.zookeeper.server.quorum.QuorumPeerMain");
    command.arg(root.join("zoo.cfg"));
    let mut process = Process::spawn(command, &root);
    process.listens(port).await;
    (process, port)
}

/// Starts Redis. Returns its port, too.
pub(super) async fn redis(root: &Path) -> (Process, u16) {
    let program = redis_server().expect("a Redis server: ask redis_server() first");
    let root = directory(root, "redis");
    let (called, port) = (root.join("redis-server"), os::free_port());
    std::os::unix::fs::symlink(program, &called).expect("a link");
    let mut command = Command::new(&called);
    command.args(["--bind", "127.0.0.1", "--port", &port.to_string()]);
    command
        .args(["--save", "", "--appendonly", "no", "--dir"])
        .arg(&root);
    let mut process = Process::spawn(command, &root);
    process.listens(port).await;
    (process, port)
}
