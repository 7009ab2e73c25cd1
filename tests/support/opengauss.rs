//! A real openGauss, where its programs are on `PATH`.

use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::os;

/// Password of [`USER`].
pub const PASSWORD: &str = "Gauss_2345";
/// The user that the agents log in as.
pub const USER: &str = "gs_backup";

/// Directory of the programs.
///
/// # Errors
/// What is missing.
pub fn programs() -> Result<PathBuf, &'static str> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).find(|directory| {
        let has = |name: &str| directory.join(name).is_file();
        has("gaussdb") && has("gs_initdb") && has("gs_probackup") && has("gs_ctl") && has("gsql")
    });
    found.ok_or("gaussdb, gs_initdb and gs_probackup are not on PATH")
}

/// What its programs want in their environment; other programs would take its libraries for the system's.
///
/// # Panics
/// If `programs` is the root directory.
pub fn environment(programs: &Path) -> Vec<(&'static str, String)> {
    let home = programs.parent().expect("bin has a parent");
    let path = std::env::var("PATH").unwrap_or_default();
    vec![
        ("GAUSSHOME", home.display().to_string()),
        ("LD_LIBRARY_PATH", home.join("lib").display().to_string()),
        ("PATH", format!("{}:{path}", programs.display())),
    ]
}

/// A running server. It is stopped, and its directory left, on drop.
#[derive(Debug)]
pub struct OpenGauss {
    programs: PathBuf,
    /// Its data directory.
    pub data: PathBuf,
    sockets: PathBuf,
    /// Its port; the next one is its, too.
    pub port: u16,
}

impl OpenGauss {
    /// Makes and starts one in `data`, and its user [`USER`]. `archive_socket` is where its archiver asks, `agent` the
    /// program it asks by. Its own socket comes into `sockets`, which is the database user's.
    ///
    /// # Panics
    /// If anything fails.
    pub fn create(
        programs: &Path,
        data: &Path,
        sockets: &Path,
        (agent, archive_socket): (&Path, &Path),
    ) -> Self {
        let server = Self {
            programs: programs.to_owned(),
            data: data.to_owned(),
            sockets: sockets.to_owned(),
            port: free_ports(),
        };
        let user = server.database_user();
        let nodename = format!("--nodename=n{}", server.port);
        let data_text = data.display().to_string();
        server.run(
            "gs_initdb",
            &[
                "-D",
                &data_text,
                &nodename,
                "-w",
                PASSWORD,
                "-U",
                &user,
                "--locale=C",
                "-E",
                "UTF8",
            ],
        );
        let conf = fs::OpenOptions::new()
            .append(true)
            .open(data.join("postgresql.conf"));
        write!(
            conf.expect("postgresql.conf"),
            "\nport={}\nlisten_addresses='127.0.0.1'\nunix_socket_directory='{}'\nmax_process_memory=2GB\nshared_buffers=128MB\n\
             cstore_buffers=16MB\nmax_connections=100\nmax_prepared_transactions=20\nwal_level=hot_standby\nmax_wal_senders=4\n\
             enable_cbm_tracking=on\narchive_mode=on\narchive_command='{} wal-put --socket {} %p %f'\n",
            server.port,
            sockets.display(),
            agent.display(),
            archive_socket.display(),
        )
        .expect("its settings");
        server.start();
        server.sql(&format!(
            "create user {USER} sysadmin password '{PASSWORD}'"
        ));
        server
    }

    /// The server that a restore has left running in `data`.
    pub fn there(programs: &Path, data: &Path, sockets: &Path, port: u16) -> Self {
        Self {
            programs: programs.to_owned(),
            data: data.to_owned(),
            sockets: sockets.to_owned(),
            port,
        }
    }

    fn database_user(&self) -> String {
        let text = self.run_quietly(Path::new("id"), &["-un"]);
        text.trim().to_owned()
    }

    /// Starts it.
    ///
    /// # Panics
    /// If that fails.
    pub fn start(&self) {
        let log = self.sockets.join(format!("{}.log", self.port));
        let (data, log) = (self.data.display().to_string(), log.display().to_string());
        self.run(
            "gs_ctl",
            &[
                "start",
                "-D",
                &data,
                "-Z",
                "single_node",
                "-l",
                &log,
                "-t",
                "120",
            ],
        );
    }

    /// Stops it at once, as a power cut does.
    pub fn stop(&self) {
        let data = self.data.display().to_string();
        let mut command = self.command(&self.programs.join("gs_ctl"));
        let _ = command
            .args(["stop", "-D", &data, "-m", "immediate"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }

    /// Rows of a statement, without headings, by its own client.
    ///
    /// # Panics
    /// If it fails.
    pub fn sql(&self, sql: &str) -> String {
        let client = self.begin_sql(sql);
        said_by(client, sql)
    }

    /// Its own client, at a statement.
    ///
    /// # Panics
    /// If it does not start.
    pub fn begin_sql(&self, sql: &str) -> Child {
        let (sockets, port) = (self.sockets.display().to_string(), self.port.to_string());
        let user = self.database_user();
        // Without ON_ERROR_STOP it ends with 0 when the statement failed, unlike psql.
        let mut args = vec!["-h", &sockets, "-p", &port, "-U", &user, "-d", "postgres"];
        args.extend(["-v", "ON_ERROR_STOP=1", "-At", "-c", sql]);
        begin(self.command(&self.programs.join("gsql")).args(args))
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = os::command(program);
        command
            .envs(environment(&self.programs))
            .current_dir(&self.sockets)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, program: &str, args: &[&str]) -> String {
        self.run_quietly(&self.programs.join(program), args)
    }

    fn run_quietly(&self, program: &Path, args: &[&str]) -> String {
        let child = begin(self.command(program).args(args));
        said_by(child, &format!("{} {args:?}", program.display()))
    }
}

fn begin(command: &mut Command) -> Child {
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("it starts")
}

/// What a program says that is wanted to succeed.
fn said_by(child: Child, what: &str) -> String {
    let output = child.wait_with_output().expect("its output");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {text}{error}");
    text
}

impl Drop for OpenGauss {
    fn drop(&mut self) {
        if self.data.join("postmaster.pid").exists() {
            self.stop();
        }
    }
}

/// A port that is free, as is the next one.
///
/// # Panics
/// If there is none.
pub fn free_ports() -> u16 {
    for _ in 0..64 {
        let port = os::free_port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return port;
        }
    }
    panic!("no two free ports in a row");
}
