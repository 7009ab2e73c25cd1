//! The OS user that databases and agents run as, and scratch directories it can use.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Another user than us: databases refuse to run as root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OsUser {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Whom databases and agents run as: `None` is ourselves, which is right unless we are root.
///
/// Root becomes `postgres`, which Debian's packages create, else `nobody`.
///
/// # Panics
/// If we are root and there is neither user.
pub fn database_user() -> Option<OsUser> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").expect("/etc/passwd can be read");
    let find = |name: &str| {
        let line = passwd
            .lines()
            .find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some(OsUser {
            uid: fields.next()?.parse().ok()?,
            gid: fields.next()?.parse().ok()?,
        })
    };
    Some(
        find("postgres")
            .or_else(|| find("nobody"))
            .expect("a user `postgres` or `nobody`"),
    )
}

/// A command that runs as the database user.
pub fn command(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    if let Some(user) = database_user() {
        command
            .uid(user.uid)
            .gid(user.gid)
            .env("HOME", "/nonexistent");
    }
    command
}

/// Gives `path` to the database user.
///
/// # Panics
/// If that fails.
pub fn give(path: &Path) {
    if let Some(user) = database_user() {
        chown(path, Some(user.uid), Some(user.gid)).expect("chown to the database user");
    }
}

/// A scratch directory with a short path (unix sockets), owned by the database user, removed on drop
/// unless `GS_PITR_KEEP` is set.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes one; `name` is a hint in its path.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(name: &str) -> Self {
        let base = std::env::var_os("GS_PITR_SCRATCH").map_or_else(std::env::temp_dir, Into::into);
        let path = base.join(format!("gsp-{name}-{:08x}", rand::random::<u32>()));
        fs::create_dir(&path).unwrap_or_else(|e| panic!("cannot make {}: {e}", path.display()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
        give(&path);
        Self { path }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory in it, owned by the database user, mode 0700.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir(&path).unwrap_or_else(|e| panic!("cannot make {}: {e}", path.display()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("chmod");
        give(&path);
        path
    }
}

/// Ends servers whose data directory lies at most three levels below `directory`: what a test that failed
/// half way has left running.
fn end_servers(directory: &Path, levels: u32) {
    let pid = fs::read_to_string(directory.join("postmaster.pid")).ok();
    let pid = pid.and_then(|text| text.lines().next()?.trim().parse().ok());
    if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
        return;
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if levels > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            end_servers(&entry.path(), levels - 1);
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        end_servers(&self.path, 3);
        if std::env::var_os("GS_PITR_KEEP").is_none() {
            // Best effort: what remains lies in the temporary directory.
            let _: io::Result<()> = fs::remove_dir_all(&self.path);
        }
    }
}

/// What says that a port is this process's, though nobody may listen on it yet: until the process ends.
static OUR_PORTS: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A port on loopback that was free a moment ago, and that is given to nobody else while this process lives.
///
/// # Panics
/// If there is none.
pub fn free_port() -> u16 {
    // Below the ports that connections are given: none of those may take it before it is used.
    for _ in 0..1000 {
        let port = rand::random_range(12_000..32_000);
        let name = SocketAddr::from_abstract_name(format!("gs_pitr-test-port-{port}"));
        let ours = UnixListener::bind_addr(&name.expect("it is short"));
        if let (Ok(ours), Ok(_)) = (ours, TcpListener::bind(("127.0.0.1", port))) {
            OUR_PORTS.lock().expect("no panic").push(ours);
            return port;
        }
    }
    panic!("no free port on loopback");
}
