//! Into a user and mount namespace of our own.

use std::fs;
use std::io;
use std::path::Path;

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::{getegid, geteuid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Goes there, with user and group mapped to themselves. Mounts made there stay there; those that others
/// take away outside go here too, so that a long copy keeps nobody's disk busy.
///
/// # Errors
/// The step that failed, with what commonly forbids it. Fails in a process of several threads.
pub(super) fn namespace() -> io::Result<()> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let step =
        |what: &str, error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
    unshare().map_err(|error| step("unshare", error))?;
    let write = |file: &str, text: String| {
        let path = Path::new("/proc/self").join(file);
        fs::write(&path, text).map_err(|error| step(&path.display().to_string(), error))
    };
    // The kernel demands it of a group map that no root writes. Kernels before 3.19 have no such file.
    match write("setgroups", "deny".to_owned()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        written => written?,
    }
    write("uid_map", format!("{uid} {uid} 1"))?;
    write("gid_map", format!("{gid} {gid} 1"))?;
    let downstream = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", downstream).map_err(|error| step("mount", error.into()))
}

#[expect(unsafe_code, reason = "rustix has no safe function for it")]
fn unshare() -> io::Result<()> {
    let flags = UnshareFlags::NEWUSER | UnshareFlags::NEWNS;
    // SAFETY: it is unsafe for CLONE_FILES, which would part the descriptors of one thread from those of
    // others. These flags leave descriptors and memory alone.
    unsafe { unshare_unsafe(flags) }.map_err(io::Error::from)
}
