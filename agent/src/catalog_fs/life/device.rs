//! Mounting and detaching, by the kernel or by `fusermount3`.

use std::ffi::{CString, OsStr};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount as mount_syscall, unmount};
use rustix::process::{getgid, getuid};
use tokio::time::timeout;

use super::SOURCE;
use crate::catalog_fs::private::wire;
use crate::child;

/// The device that FUSE is spoken through.
pub(super) const DEVICE: &str = "/dev/fuse";
/// `fusermount3` needs milliseconds.
const FUSERMOUNT: Duration = Duration::from_secs(10);
/// Where it is if `PATH` does not say: services have a short one.
const USUAL: [&str; 3] = ["/usr/bin", "/bin", "/usr/local/bin"];

/// When to detach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Detach {
    /// Only if nothing is open.
    IfUnused,
    /// At once; who has a file open keeps it.
    Lazily,
}

/// Opens `/dev/fuse`, closed on exec.
pub(super) fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(DEVICE)
}

/// Mounts at `point` as whoever we are in our namespace, and returns the device to serve it from.
///
/// # Errors
/// The step that failed.
pub(in crate::catalog_fs) fn mount(point: &Path) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd as _;

    let step =
        |what: &str, error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
    let device = open().map_err(|error| step(DEVICE, error))?;
    let options = format!(
        "fd={},rootmode=40000,user_id={},group_id={}",
        device.as_raw_fd(),
        getuid().as_raw(),
        getgid().as_raw()
    );
    let options = CString::new(options).map_err(io::Error::other)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let kind = format!("fuse.{SOURCE}");
    mount_syscall(SOURCE, point, kind.as_str(), flags, options.as_c_str())
        .map_err(|error| step("mount", error.into()))?;
    Ok(device.into())
}

/// The program, if there is one.
pub(super) fn find_fusermount() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .filter(|directory| directory.is_absolute())
        .chain(USUAL.map(PathBuf::from))
        .map(|directory| directory.join("fusermount3"))
        .find(|program| program.is_file())
}

/// Has `fusermount3` mount at `point` and returns the device.
pub(super) async fn fusermount(point: &Path) -> Result<OwnedFd, String> {
    let (ours, its) = UnixStream::pair().map_err(|error| error.to_string())?;
    // Its standard input is the socket it answers on: so it needs no descriptor that all our children would inherit.
    let arguments = [
        OsStr::new("-o"),
        OsStr::new("rw,nosuid,nodev,noexec,fsname=gs_pitr,subtype=gs_pitr"),
        OsStr::new("--"),
        point.as_os_str(),
    ];
    run_fusermount(&arguments, Stdio::from(OwnedFd::from(its))).await?;
    ours.set_nonblocking(true)
        .map_err(|error| error.to_string())?;
    match wire::receive(&ours) {
        Ok((_, Some(device))) => Ok(device),
        Ok((_, None)) => Err("fusermount3 handed over no device".to_owned()),
        Err(error) => Err(format!("fusermount3 handed over no device: {error}")),
    }
}

/// Takes the mount at `point` away, without looking at it.
pub(super) async fn detach(point: &Path, how: Detach) -> Result<(), String> {
    let flags = match how {
        Detach::IfUnused => UnmountFlags::NOFOLLOW,
        Detach::Lazily => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    let path = point.to_owned();
    let done = tokio::task::spawn_blocking(move || unmount(path.as_path(), flags)).await;
    match done.map_err(|error| error.to_string())? {
        Ok(()) => Ok(()),
        // Only root may; for a user's mount there is the program that mounted it.
        Err(Errno::PERM) => {
            let (quietly, lazily) = (OsStr::new("-u"), OsStr::new("-z"));
            let mut arguments = vec![quietly];
            arguments.extend((how == Detach::Lazily).then_some(lazily));
            arguments.extend([OsStr::new("--"), point.as_os_str()]);
            run_fusermount(&arguments, Stdio::null()).await
        }
        Err(error) => Err(io::Error::from(error).to_string()),
    }
}

async fn run_fusermount(arguments: &[&OsStr], stdin: Stdio) -> Result<(), String> {
    let program = find_fusermount().ok_or("there is no fusermount3 (package fuse3)")?;
    let mut command = child::command(&program);
    command
        .args(arguments)
        .stdin(stdin)
        .env("_FUSE_COMMFD", "0")
        .stdout(Stdio::null());
    let shown = program.display();
    let late = |_| format!("{shown} does not end within {} s", FUSERMOUNT.as_secs());
    let output = timeout(FUSERMOUNT, command.output()).await.map_err(late)?;
    let output = output.map_err(|error| format!("{shown}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(format!("{} ({})", words.trim(), output.status))
}
