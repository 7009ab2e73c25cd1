//! Whether a catalog can be mounted on this host, and what would help.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::geteuid;
use tokio::time::timeout;

use super::device::{self, DEVICE};
use super::{MountHow, MountKind, MountSettings};
use crate::catalog_fs::private;
use crate::child;

/// A try in a namespace takes milliseconds.
const TRY: Duration = Duration::from_secs(5);
/// The bit of `CAP_SYS_ADMIN` in `/proc/self/status`.
const SYS_ADMIN: u32 = 21;

/// No catalog can be mounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}; {help}, or use `--engine direct`, which needs no mount")]
pub struct Unavailable {
    /// What is not there.
    pub why: String,
    /// What would help.
    pub help: String,
}

impl Unavailable {
    fn new(why: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            help: help.into(),
        }
    }

    /// What would help, the other engine included.
    #[must_use]
    pub fn mend(&self) -> String {
        format!(
            "{}, or use `--engine direct`, which needs no mount",
            self.help
        )
    }
}

/// Which way of mounting works here, without leaving a mount behind.
///
/// # Errors
/// [`Unavailable`] if none does, or the one that is demanded does not.
pub async fn available(settings: &MountSettings) -> Result<MountKind, Unavailable> {
    // All ways go through the device, which the kernel opens to whoever may.
    device()?;
    match settings.how {
        MountHow::Root => root().map(|()| MountKind::Root),
        MountHow::Fusermount => fusermount().map(|()| MountKind::Fusermount),
        MountHow::Namespace => namespace(settings).await.map(|()| MountKind::Namespace),
        MountHow::Auto => {
            if root().is_ok() {
                return Ok(MountKind::Root);
            }
            let Err(without) = fusermount() else {
                return Ok(MountKind::Fusermount);
            };
            match namespace(settings).await {
                Ok(()) => Ok(MountKind::Namespace),
                Err(inside) => {
                    let why = format!("{}, and {}", without.why, inside.why);
                    Err(Unavailable::new(why, without.help))
                }
            }
        }
    }
}

fn device() -> Result<(), Unavailable> {
    let Err(error) = device::open() else {
        return Ok(());
    };
    Err(match error.kind() {
        io::ErrorKind::NotFound => Unavailable::new(
            format!("FUSE is missing: there is no {DEVICE}"),
            "load the kernel module (`modprobe fuse`); start a container with `--device /dev/fuse`",
        ),
        io::ErrorKind::PermissionDenied => {
            let mode = fs::metadata(DEVICE).map_or(0, |found| found.permissions().mode() & 0o777);
            Unavailable::new(
                format!("the agent's user may not open {DEVICE} (mode {mode:04o})"),
                format!("`chmod 666 {DEVICE}` as root, which is its usual mode"),
            )
        }
        _ => Unavailable::new(
            format!("{DEVICE} cannot be opened: {error}"),
            "load the kernel module (`modprobe fuse`); start a container with `--device /dev/fuse`",
        ),
    })
}

fn root() -> Result<(), Unavailable> {
    if !geteuid().is_root() {
        return Err(Unavailable::new(
            "the agent is not root",
            "choose another --mount",
        ));
    }
    if may_mount() {
        return Ok(());
    }
    Err(Unavailable::new(
        "the agent is root without the capability CAP_SYS_ADMIN",
        "start its container with `--cap-add SYS_ADMIN --device /dev/fuse`",
    ))
}

fn may_mount() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    effective.is_some_and(|bits| bits & (1 << SYS_ADMIN) != 0)
}

fn fusermount() -> Result<(), Unavailable> {
    let install = "install the package `fuse3`";
    let Some(program) = device::find_fusermount() else {
        return Err(Unavailable::new("there is no fusermount3", install));
    };
    let mode = fs::metadata(&program).map_or(0, |found| found.permissions().mode());
    if mode & 0o4000 == 0 && !geteuid().is_root() {
        let why = format!("`{}` is not setuid root", program.display());
        return Err(Unavailable::new(why, install));
    }
    // A service that may gain no privileges gains none by setuid either.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if status.lines().any(|line| line == "NoNewPrivs:\t1") && !geteuid().is_root() {
        return Err(Unavailable::new(
            "the agent was started with NoNewPrivileges, so that fusermount3 has no effect",
            "leave NoNewPrivileges= out of its systemd unit",
        ));
    }
    Ok(())
}

/// Tries it: kernels and distributions forbid user namespaces by several settings of their own.
async fn namespace(settings: &MountSettings) -> Result<(), Unavailable> {
    let mut command = child::command(&settings.runner);
    command
        .arg0("pitr-agent")
        .args([private::SUBCOMMAND, private::PROBE])
        .stdout(Stdio::null());
    let why = match timeout(TRY, command.output()).await {
        Ok(Ok(output)) if output.status.success() => return Ok(()),
        Ok(Ok(output)) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("a try did not end within {} s", TRY.as_secs()),
    };
    let why = why.replace("pitr-agent catalog-run: ", "");
    Err(Unavailable::new(
        format!("no mount in a user namespace: {why}"),
        "allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1, \
         kernel.apparmor_restrict_unprivileged_userns=0; in a container `--security-opt seccomp=unconfined`) or install `fuse3`",
    ))
}
