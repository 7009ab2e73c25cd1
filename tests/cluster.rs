//! `make cluster` and `make cluster-down`: a sharded cluster on loopback with clients at work, for a person to try.
//!
//! `up` starts this program again as `serve`, which holds everything and ends it at SIGTERM; `down` sends that, and
//! ends by its pid whatever is left. What they know of each other lies in one directory of the user.
#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "it talks to a person and waits for other programs, outside any runtime; a step that fails ends it with its reason"
)]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process, setsid};
use support::bank::Bank;
use support::bucket::Bucket;
use support::real_proxy as real;
use support::sharded::ShardedCluster;
use support::shown;
use tokio::signal::unix::{SignalKind, signal};

/// How long everything may take to start; real proxies take their time.
const START: Duration = Duration::from_mins(5);
/// How long it may take to end.
const END: Duration = Duration::from_mins(1);
/// Clients note each transfer: now and then they begin a new page.
const PAGE: Duration = Duration::from_mins(10);

/// What is known of a cluster that runs.
struct State {
    directory: PathBuf,
}

impl State {
    fn of_user() -> Self {
        let below =
            std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        Self {
            directory: below.join(format!("gs_pitr-cluster-{}", geteuid().as_raw())),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.file(name)).ok()
    }

    /// Readable for the user only: there are keys in it.
    fn write(&self, name: &str, text: &str) {
        let mut options = fs::OpenOptions::new();
        let file = options
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(self.file(name));
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .expect("a file of the state");
    }

    /// The process that holds the cluster, if it lives and is ours.
    fn server(&self) -> Option<Pid> {
        let pid = self.read("pid")?.trim().parse().ok()?;
        let words = [self.directory.display().to_string(), "serve".to_owned()];
        is(pid, &words).then(|| Pid::from_raw(pid)).flatten()
    }

    /// Makes the directory, unless it is there and the user's own.
    fn make(&self) {
        let made = fs::DirBuilder::new().mode(0o700).create(&self.directory);
        if made.is_err() {
            let found = fs::symlink_metadata(&self.directory).expect("the directory of the state");
            let own = found.is_dir()
                && found.uid() == geteuid().as_raw()
                && found.mode().trailing_zeros() >= 6;
            assert!(
                own,
                "{} is not a directory of yours alone",
                self.directory.display()
            );
        }
    }
}

/// Whether a process has all of `words` in its command line: pids are given out again.
fn is(pid: i32, words: &[String]) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).into_owned();
    !line.is_empty() && words.iter().all(|word| line.contains(word))
}

#[expect(clippy::zombie_processes, reason = "the server outlives us")]
fn up(state: &State) -> ExitCode {
    if state.server().is_some() {
        println!(
            "It runs already.\n{}",
            state.read("hello").unwrap_or_default()
        );
        return ExitCode::SUCCESS;
    }
    state.make();
    for name in ["pid", "hello", "env", "pids"] {
        let _ = fs::remove_file(state.file(name));
    }
    let log = fs::File::create(state.file("log")).expect("a log");
    let program = std::env::current_exe().expect("our own path");
    let mut command = Command::new(program);
    command
        .arg("serve")
        .arg(&state.directory)
        .stdin(Stdio::null());
    command.stdout(log.try_clone().expect("a log")).stderr(log);
    let mut server = command.spawn().expect("the server starts");
    state.write("pid", &server.id().to_string());
    println!("Starting databases, agents, proxies and a bucket ...");
    let until = Instant::now() + START;
    while !state.file("hello").exists() {
        let ended = server.try_wait().expect("a child of ours").is_some();
        if ended || Instant::now() > until {
            down(state, false);
            println!(
                "It did not start:\n{}",
                state.read("log").unwrap_or_default()
            );
            return ExitCode::FAILURE;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("{}", state.read("hello").unwrap_or_default());
    ExitCode::SUCCESS
}

/// Ends what runs, and what a server that was killed has left.
fn down(state: &State, remove: bool) {
    if let Some(server) = state.server() {
        let _ = kill_process(server, Signal::TERM);
        let until = Instant::now() + END;
        while state.server().is_some() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(100));
        }
        if state.server().is_some() {
            let _ = kill_process(server, Signal::KILL);
        }
    } else {
        println!("No cluster runs.");
    }
    let mut abandoned = BTreeSet::new();
    // Each line: a process id, and the directory it works in, which must be in its command line.
    for line in state.read("pids").unwrap_or_default().lines() {
        let Some((pid, word)) = line.split_once(' ') else {
            continue;
        };
        let Ok(pid) = pid.parse() else { continue };
        if let Some(left) = Pid::from_raw(pid).filter(|_| is(pid, &[word.to_owned()])) {
            println!("ending {line}");
            // A postmaster ends at once at this one, and takes its children with it; so does everybody else.
            let _ = kill_process(left, Signal::QUIT);
            std::thread::sleep(Duration::from_secs(1));
            let _ = kill_process(left, Signal::KILL);
        }
        if Path::new(word).is_dir() && remove {
            abandoned.insert(word.to_owned());
        }
    }
    for directory in abandoned {
        fs::remove_dir_all(&directory).unwrap_or_else(|error| println!("{directory}: {error}"));
    }
    if remove && state.directory.exists() {
        fs::remove_dir_all(&state.directory).expect("the state goes");
        println!("The cluster is gone.");
    }
}

/// What would be left if this process were killed.
fn pids(cluster: &ShardedCluster) -> String {
    let mut lines = Vec::new();
    let root = cluster.fleet.path().display().to_string();
    for host in &cluster.fleet.hosts {
        let postmaster = host
            .cluster
            .as_ref()
            .and_then(support::postgres::Cluster::pid);
        for pid in postmaster.into_iter().chain([host.agent.pid()]) {
            lines.push(format!("{pid} {root}"));
        }
    }
    if let support::sharded::Proxies::Real(proxies) = &cluster.proxies {
        lines.extend(proxies.pids().iter().map(|pid| format!("{pid} {root}")));
    }
    if let Bucket::Minio(minio) = &cluster.bucket {
        lines.push(format!("{} {}", minio.pid(), minio.directory().display()));
    }
    lines.join("\n") + "\n"
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// For a shell: `gs_pitr` and `psql` with all that they need, and nothing left in the shell's own environment.
fn functions(cluster: &ShardedCluster) -> String {
    let program = cluster
        .fleet
        .programs()
        .join("gs_pitr")
        .display()
        .to_string();
    let own = cluster.fleet.environment().iter().cloned();
    let pairs = own
        .chain(cluster.environment())
        .map(|(name, value)| format!("{name}={}", quoted(&value)));
    let pairs: Vec<_> = pairs.collect();
    let access = cluster.access(0, real::DATABASE);
    format!(
        "gs_pitr() {{ env {} {} \"$@\"; }}\n\
         bank_psql() {{ PGPASSWORD={} psql -X -h 127.0.0.1 -p {} -U {} -d {} \"$@\"; }}\n",
        pairs.join(" "),
        quoted(&program),
        quoted(&access.password),
        access.port,
        access.user,
        access.database,
    )
}

fn hello(state: &State, cluster: &ShardedCluster) -> String {
    let env = state.file("env").display().to_string();
    let agents = cluster.fleet.addresses(&[0, 1]);
    let [nodes, proxies, bucket] = shown::describe(cluster);
    format!(
        "A cluster runs on loopback, and clients move money between its shards.\n\
         \x20 {nodes}\n\
         \x20 {proxies}\n\
         \x20 {bucket}\n\n\
         Type:\n\
         \x20 . {env}     # makes `gs_pitr` and `bank_psql` work in this shell\n\
         \x20 gs_pitr check\n\
         \x20 gs_pitr {}     # as the Go tool was called\n\
         \x20 gs_pitr point create --label before-lunch     # copies nothing\n\
         \x20 gs_pitr point list\n\
         \x20 gs_pitr wal status --nodes {agents}\n\
         \x20 gs_pitr show\n\
         \x20 bank_psql -c 'SELECT count(*), sum(balance) FROM account'     # through the first proxy\n\
         \x20 bank_psql -c 'DELETE FROM account'     # a disaster\n\
         \x20 gs_pitr restore --point \"$(gs_pitr point list | awk '/before-lunch/ {{print $1}}')\"     # shows its plan, and asks\n\
         \x20 bank_psql -c 'SELECT count(*), sum(balance) FROM account'\n\n\
         `make cluster-down` ends it. Logs: {} and below {}.\n",
        shown::go_tool_backup(cluster).join(" "),
        state.file("log").display(),
        cluster.fleet.path().display(),
    )
}

/// Holds the cluster until it is told to end.
async fn serve(state: &State) {
    let mut end = signal(SignalKind::terminate()).expect("SIGTERM");
    let mut interrupt = signal(SignalKind::interrupt()).expect("SIGINT");
    let cluster = shown::cluster("cluster").await;
    state.write("pids", &pids(&cluster));
    let mut options = shown::clients();
    let mut bank = Bank::open(&cluster.ways(), &options);
    state.write("env", &functions(&cluster));
    state.write("hello", &hello(state, &cluster));
    loop {
        tokio::select! {
            _ = end.recv() => break,
            _ = interrupt.recv() => break,
            () = tokio::time::sleep(PAGE) => {}
        }
        println!("{}", bank.close().await.describe());
        options.shift += 1;
        bank = Bank::open(&cluster.ways(), &options);
    }
    // A client that waits for a database that is gone is not waited for.
    if let Ok(diary) = tokio::time::timeout(Duration::from_secs(5), bank.close()).await {
        println!("{}", diary.describe());
    }
}

fn main() -> ExitCode {
    let state = State::of_user();
    let args: Vec<_> = std::env::args().skip(1).collect();
    match args
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .as_slice()
    {
        ["up"] => return up(&state),
        ["down"] => down(&state, true),
        ["serve", directory] => {
            // No terminal's end ends it.
            let _ = setsid();
            let state = State {
                directory: Path::new(directory).to_owned(),
            };
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            runtime.block_on(serve(&state));
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        _ => {
            println!("usage: cluster up|down (`make cluster`, `make cluster-down`)");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}
