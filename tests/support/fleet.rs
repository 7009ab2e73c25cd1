//! The whole thing as its users run it: the two real programs, certificates made by `gs_pitr certs`, one agent beside each real
//! database, and a bucket.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pipeline::store::s3::{CredentialSource, S3Config};
use serde_json::Value;

use crate::os::{self, Scratch};
use crate::postgres::{Cluster, ClusterOptions, Installation};

/// An agent that runs. It is killed on drop.
#[derive(Debug)]
pub struct Agent {
    process: Child,
    /// `HOST:PORT` it listens on.
    pub address: String,
    log: PathBuf,
}

impl Agent {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Peak resident memory so far, in MiB.
    pub fn peak_rss_mib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
        kib.unwrap_or(0) / 1024
    }

    /// SIGKILL, and wait.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A database with its agent, or a host with an agent only.
#[derive(Debug)]
pub struct Host {
    /// Its name, also its directory's.
    pub name: String,
    /// Directory that the agent may restore below.
    pub root: PathBuf,
    /// The database.
    pub cluster: Option<Cluster>,
    /// The agent.
    pub agent: Agent,
    /// Flags that the agent was started with beyond the usual ones.
    pub flags: Vec<String>,
}

/// All of it.
#[derive(Debug)]
pub struct Fleet {
    /// The hosts, in the order they were added. Dropped before the directories they live in.
    pub hosts: Vec<Host>,
    scratch: Scratch,
    home: PathBuf,
    temporary: PathBuf,
    programs: PathBuf,
    environment: Vec<(&'static str, String)>,
    /// What agents that are started from now on have in their environment beyond ours.
    pub agents: Vec<(&'static str, String)>,
}

/// What a run of `gs_pitr` left.
#[derive(Debug)]
pub struct Run {
    /// Its exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Run {
    /// The last line of `--output json`.
    ///
    /// # Panics
    /// If there is none.
    pub fn result(&self) -> Value {
        let line = self
            .stdout
            .lines()
            .last()
            .unwrap_or_else(|| panic!("no output: {self:?}"));
        serde_json::from_str(line).unwrap_or_else(|e| panic!("{e} in {line}: {self:?}"))
    }

    /// The same run, if its exit code was 0.
    ///
    /// # Panics
    /// With all that it said, if not.
    #[must_use]
    pub fn good(self) -> Self {
        assert_eq!(
            self.code, 0,
            "stdout:\n{}\nstderr:\n{}",
            self.stdout, self.stderr
        );
        self
    }

    fn of(output: &Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// A program of this workspace: beside the running test, or in `GS_PITR_BIN_DIR`.
///
/// # Panics
/// If it has not been built.
pub fn built_program(name: &str) -> PathBuf {
    let mut directory = std::env::var_os("GS_PITR_BIN_DIR").map_or_else(
        || {
            std::env::current_exe()
                .expect("our own path")
                .parent()
                .expect("its directory")
                .to_owned()
        },
        PathBuf::from,
    );
    if directory.ends_with("deps") {
        directory.pop();
    }
    let program = directory.join(name);
    assert!(
        program.exists(),
        "{} is missing: `cargo build --workspace --bins`",
        program.display()
    );
    program
}

impl Fleet {
    /// Nothing but certificates and access to `store`; hosts are added.
    ///
    /// # Panics
    /// If that fails.
    pub fn new(name: &str, store: &S3Config) -> Self {
        let scratch = Scratch::new(name);
        // The user of the databases may not be able to reach the build directory.
        let programs = scratch.path().join("bin");
        fs::create_dir(&programs).expect("bin");
        for program in ["gs_pitr", "pitr-agent"] {
            let (from, to) = (built_program(program), programs.join(program));
            fs::hard_link(&from, &to)
                .or_else(|_| fs::copy(&from, &to).map(|_| ()))
                .expect("a program");
        }
        let home = scratch.path().join("home");
        fs::create_dir(&home).expect("home");
        // Short: sockets are made in it.
        let temporary = scratch.directory("tmp");
        let mut environment = vec![
            ("HOME", home.display().to_string()),
            // Whatever is on PATH: tests of the other engine ask for it.
            ("GS_PITR_ENGINE", "direct".to_owned()),
            // Tests of WAL that is shipped all the time ask for it.
            ("GS_PITR_WAL", "backup".to_owned()),
            (
                "GS_PITR_REPO",
                format!("s3://{}/{}", store.bucket, store.prefix),
            ),
        ];
        let CredentialSource::Static {
            access_key_id,
            secret_access_key,
            ..
        } = &store.credentials
        else {
            panic!("a fleet wants static credentials");
        };
        environment.push(("AWS_ACCESS_KEY_ID", access_key_id.clone()));
        environment.push(("AWS_SECRET_ACCESS_KEY", secret_access_key.clone()));
        environment.extend(
            store
                .endpoint
                .clone()
                .map(|endpoint| ("GS_PITR_S3_ENDPOINT", endpoint)),
        );
        environment.extend(
            store
                .region
                .clone()
                .map(|region| ("GS_PITR_S3_REGION", region)),
        );
        if let Some(pem) = &store.ca_pem {
            let file = scratch.path().join("s3-ca.crt");
            fs::write(&file, pem).expect("the CA file");
            environment.push(("GS_PITR_S3_CA_FILE", file.display().to_string()));
        }
        let fleet = Self {
            hosts: Vec::new(),
            scratch,
            home,
            temporary,
            programs,
            environment,
            agents: Vec::new(),
        };
        let _ = fleet.run(&["certs", "init"]).good();
        fleet
    }

    /// The scratch directory.
    pub fn path(&self) -> &Path {
        self.scratch.path()
    }

    /// `~` of the CLI.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The temporary directory of the agents.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Where the two programs are.
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// Adds a host with a new running database.
    ///
    /// # Panics
    /// If something does not start.
    pub fn add_database(
        &mut self,
        name: &str,
        installation: &Installation,
        options: ClusterOptions,
    ) -> usize {
        self.add_database_with(name, installation, options, &[])
    }

    /// The same, and `flags` for its agent.
    ///
    /// # Panics
    /// If something does not start.
    pub fn add_database_with(
        &mut self,
        name: &str,
        installation: &Installation,
        options: ClusterOptions,
        flags: &[&str],
    ) -> usize {
        let root = self.scratch.directory(name);
        let cluster = Cluster::create(installation, &root, options);
        cluster.start();
        let agent = self.start_agent(name, &root, Some(&cluster), flags);
        self.hosts.push(Host {
            name: name.to_owned(),
            root,
            cluster: Some(cluster),
            agent,
            flags: flags.iter().map(ToString::to_string).collect(),
        });
        self.hosts.len() - 1
    }

    /// Kills the agent of a host, if it lives, and starts it again on the same port.
    ///
    /// # Panics
    /// If it does not start.
    pub fn restart_agent(&mut self, host: usize) {
        self.hosts[host].agent.kill();
        let of = &self.hosts[host];
        let (_, port) = of.agent.address.rsplit_once(':').expect("a port");
        let flags: Vec<_> = of.flags.iter().map(String::as_str).collect();
        let agent = self.agent_on(port, &of.name, &of.root, of.cluster.as_ref(), &flags);
        self.hosts[host].agent = agent;
    }

    /// Adds an agent with these flags only, for a database of another kind.
    ///
    /// # Panics
    /// If it does not start.
    pub fn add_agent(&mut self, name: &str, flags: &[&str]) -> usize {
        let root = self.scratch.directory(name);
        let agent = self.start_agent(name, &root, None, flags);
        self.hosts.push(Host {
            name: name.to_owned(),
            root,
            cluster: None,
            agent,
            flags: flags.iter().map(ToString::to_string).collect(),
        });
        self.hosts.len() - 1
    }

    /// Adds a host without a database, to restore on.
    ///
    /// # Panics
    /// If its agent does not start.
    pub fn add_host(&mut self, name: &str, more: &[&str]) -> usize {
        let root = self.scratch.directory(name);
        let port = os::free_port().to_string();
        let args: Vec<_> = ["--pg-port", &port].iter().chain(more).copied().collect();
        let agent = self.start_agent(name, &root, None, &args);
        self.hosts.push(Host {
            name: name.to_owned(),
            root,
            cluster: None,
            agent,
            flags: args.iter().map(ToString::to_string).collect(),
        });
        self.hosts.len() - 1
    }

    /// Starts an agent with a certificate of its own.
    ///
    /// # Panics
    /// If it does not say that it listens within 20 s.
    pub fn start_agent(
        &self,
        name: &str,
        root: &Path,
        cluster: Option<&Cluster>,
        more: &[&str],
    ) -> Agent {
        // One that may be bound again after a kill.
        let port = os::free_port().to_string();
        self.agent_on(&port, name, root, cluster, more)
    }

    fn agent_on(
        &self,
        port: &str,
        name: &str,
        root: &Path,
        cluster: Option<&Cluster>,
        more: &[&str],
    ) -> Agent {
        let certs = self.home.join(".gs_pitr/certs");
        let own = root.join("certs");
        if !own.exists() {
            let out = self.scratch.path().join(format!("certs of {name}"));
            let out_text = out.display().to_string();
            let issue = [
                "certs",
                "issue",
                "--name",
                "agent",
                "--san",
                "127.0.0.1",
                "--out",
                &out_text,
            ];
            let _ = self.run(&issue).good();
            fs::create_dir(&own).expect("certs");
            os::give(&own);
            for (from, to) in [
                (out.join("agent.crt"), "agent.crt"),
                (out.join("agent.key"), "agent.key"),
                (certs.join("ca.crt"), "ca.crt"),
            ] {
                fs::copy(&from, own.join(to)).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
                os::give(&own.join(to));
            }
            fs::set_permissions(own.join("agent.key"), fs::Permissions::from_mode(0o600))
                .expect("chmod");
        }
        let log = root.join("agent.log");
        let mut command = os::command(self.programs.join("pitr-agent"));
        command
            .current_dir(root)
            .args(["--port", port, "--listen", "127.0.0.1"]);
        command.arg("--tls-crt").arg(own.join("agent.crt"));
        command.arg("--tls-key").arg(own.join("agent.key"));
        command.arg("--tls-ca").arg(own.join("ca.crt"));
        command.arg("--allow-root").arg(root);
        command.arg("--state-dir").arg(root.join("state"));
        if !more.contains(&"--pg-host") {
            command.arg("--pg-host").arg(root);
        }
        if let Some(cluster) = cluster {
            command.arg("--pgdata").arg(cluster.data_directory());
            command
                .arg("--pg-bindir")
                .arg(&cluster.installation().bindir);
            command.args(["--pg-port", &cluster.port().to_string()]);
        }
        command
            .args(more)
            .envs(self.agents.iter().map(|(name, value)| (name, value)))
            .env("TMPDIR", &self.temporary)
            .env_remove("AWS_ACCESS_KEY_ID")
            .env_remove("AWS_SECRET_ACCESS_KEY");
        let errors = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .expect("the agent's log");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors);
        let mut process = command.spawn().expect("the agent starts");
        let stdout = process.stdout.take().expect("its standard output");
        let mut line = String::new();
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("a line of the agent");
        let address = line
            .trim()
            .rsplit("://")
            .next()
            .unwrap_or_default()
            .to_owned();
        let agent = Agent {
            process,
            address,
            log,
        };
        assert!(
            line.contains("listening on "),
            "the agent said `{line}`, and logged: {}",
            agent.log()
        );
        agent
    }

    /// What `gs_pitr` has in its environment.
    pub fn environment(&self) -> &[(&'static str, String)] {
        &self.environment
    }

    /// `gs_pitr` with this fleet's environment, not yet started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.programs.join("gs_pitr"));
        command.args(args).current_dir(self.scratch.path());
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default());
        // A few cores do all of it here, and no database waits for them that anybody needs.
        command.env("GS_PITR_PACE", "full");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null());
        command
    }

    /// Runs `gs_pitr` to its end. A run above 300 s is killed, and fails.
    ///
    /// # Panics
    /// If it cannot be run.
    pub fn run(&self, args: &[&str]) -> Run {
        wait(self.command(args), Duration::from_mins(5))
    }

    /// The disaster: databases, agents and every one of their directories are gone, and so is the CLI's own
    /// mirror. Returns the directories.
    ///
    /// # Panics
    /// If something refuses to go.
    pub fn destroy(&mut self) -> Vec<PathBuf> {
        let hosts = std::mem::take(&mut self.hosts).into_iter();
        let gone = hosts.map(|mut host| {
            host.agent.kill();
            if let Some(cluster) = &host.cluster {
                cluster.stop("immediate");
            }
            fs::remove_dir_all(&host.root).expect("the directory goes");
            host.root.clone()
        });
        let gone = gone.collect();
        fs::remove_dir_all(self.home.join(".gs_pitr/repositories"))
            .expect("the mirror was there and goes");
        gone
    }

    /// The agents' addresses of some hosts, as `--nodes` wants them.
    pub fn addresses(&self, hosts: &[usize]) -> String {
        let addresses: Vec<_> = hosts
            .iter()
            .map(|host| self.hosts[*host].agent.address.clone())
            .collect();
        addresses.join(",")
    }
}

/// Runs a command to its end, or kills it after `limit`.
///
/// # Panics
/// If it cannot be run.
pub fn wait(mut command: Command, limit: Duration) -> Run {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a child");
    let pid = rustix::process::Pid::from_child(&child);
    let (done, ended) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if ended.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    });
    let begun = Instant::now();
    let output = child.wait_with_output().expect("the child's output");
    drop(done);
    watchdog.join().expect("the watchdog");
    let run = Run::of(&output);
    assert!(
        begun.elapsed() < limit,
        "still running after {limit:?}: {run:?}"
    );
    run
}
