//! The private directory of a mount, whose name says to whom it belongs.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::MountError;

/// What the names begin with.
const PREFIX: &str = "gs_pitr-";
/// The mount point in it.
const POINT: &str = "catalog";
/// The socket in it.
const SOCKET: &str = "s";
/// Characters of an operation's name that are kept: the path of a socket has room for 107.
const OPERATION: usize = 8;

/// `RUNTIME/gs_pitr-PID-START-NAMESPACE-NUMBER-OPERATION`, mode 0700: the mount point `catalog` and the socket `s`.
#[derive(Debug)]
pub(super) struct Place {
    directory: PathBuf,
    point: PathBuf,
}

/// The directory that the mount covers.
#[derive(Debug)]
pub(super) struct Below(File);

impl Below {
    /// Forbids to write into it. Goes by the descriptor: by its path one would reach the mount.
    pub(super) fn close(self) -> io::Result<()> {
        self.0.set_permissions(Permissions::from_mode(0o500))
    }
}

impl Place {
    /// Makes it.
    pub(super) fn make(runtime: &Path, operation: &str) -> Result<Self, MountError> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let failed = |path: &Path, source| MountError::Place {
            path: path.to_owned(),
            source,
        };
        let owner = Owner::ourselves().map_err(|source| failed(runtime, source))?;
        // Links followed: the mount table has no others.
        let runtime = runtime
            .canonicalize()
            .map_err(|source| failed(runtime, source))?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let operation: String = operation
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .take(OPERATION)
            .collect();
        let directory = runtime.join(format!("{PREFIX}{}-{number}-{operation}", owner.text()));
        let mut private = DirBuilder::new();
        private.mode(0o700);
        private
            .create(&directory)
            .map_err(|source| failed(&directory, source))?;
        let point = directory.join(POINT);
        if let Err(source) = private.create(&point) {
            let _ = fs::remove_dir(&directory);
            return Err(failed(&point, source));
        }
        Ok(Self { directory, point })
    }

    /// A dead agent's, if `directory` has the name of one.
    pub(super) fn of_the_dead(directory: PathBuf) -> Option<Self> {
        let name = directory.file_name()?.to_str()?;
        let owner = Owner::parse(name.strip_prefix(PREFIX)?)?;
        let dead = owner.is_gone();
        let point = directory.join(POINT);
        dead.then_some(Self { directory, point })
    }

    pub(super) fn point(&self) -> &Path {
        &self.point
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.join(SOCKET)
    }

    /// The directory at the mount point; open it before something is mounted there.
    pub(super) fn below(&self) -> io::Result<Below> {
        File::open(&self.point).map(Below)
    }

    /// Removes it; what cannot be removed is logged. A mount in it is not touched: `rmdir` says EBUSY.
    pub(super) fn remove(&self) {
        let gone = |result: io::Result<()>| match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        let removed = gone(fs::remove_file(self.socket()))
            .and_then(|()| gone(fs::remove_dir(&self.point)))
            .and_then(|()| gone(fs::remove_dir(&self.directory)));
        if let Err(error) = removed {
            let directory = self.directory.display();
            if error.kind() == io::ErrorKind::DirectoryNotEmpty {
                tracing::warn!(
                    "`{directory}` stays: something wrote into it when its mount was gone; remove it by hand"
                );
            } else {
                tracing::warn!("cannot remove `{directory}`: {error}");
            }
        }
    }
}

/// A process, so that another one with the same number is not taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    pid: u32,
    /// Clock ticks from boot to its start.
    start: u64,
    /// Its PID namespace: in another one its number means nothing.
    namespace: u64,
}

impl Owner {
    fn ourselves() -> io::Result<Self> {
        let pid = std::process::id();
        let unknown = || io::Error::other("/proc does not say who we are");
        Ok(Self {
            pid,
            start: started(pid)?.ok_or_else(unknown)?,
            namespace: pid_namespace().ok_or_else(unknown)?,
        })
    }

    fn text(self) -> String {
        format!("{}-{}-{}", self.pid, self.start, self.namespace)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        Some(Self {
            pid: parts.next()?.parse().ok()?,
            start: parts.next()?.parse().ok()?,
            namespace: parts.next()?.parse().ok()?,
        })
    }

    /// Whether it has certainly ended.
    fn is_gone(self) -> bool {
        if pid_namespace() != Some(self.namespace) {
            return false;
        }
        match started(self.pid) {
            Ok(start) => start.is_some_and(|start| start != self.start),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }
}

/// When `pid` started; its name stands before it in parentheses and may have anything in it. A zombie has ended:
/// 0 for it.
fn started(pid: u32) -> io::Result<Option<u64>> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let Some((_, behind)) = line.rsplit_once(')') else {
        return Ok(None);
    };
    let mut fields = behind.split_whitespace();
    if matches!(fields.next(), Some("Z" | "X")) {
        return Ok(Some(0));
    }
    Ok(fields.nth(18).and_then(|start| start.parse().ok()))
}

/// Of `pid:[4026531836]`.
fn pid_namespace() -> Option<u64> {
    let link = fs::read_link("/proc/self/ns/pid").ok()?;
    let number = link.to_str()?.strip_prefix("pid:[")?.strip_suffix(']')?;
    number.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_living_are_not_taken_for_dead() {
        let ourselves = Owner::ourselves().unwrap();
        assert_eq!(Owner::parse(&ourselves.text()), Some(ourselves));
        assert!(!ourselves.is_gone());
        let later = Owner {
            start: ourselves.start + 1,
            ..ourselves
        };
        assert!(later.is_gone(), "the number was given to another process");
        let elsewhere = Owner {
            namespace: ourselves.namespace + 1,
            ..later
        };
        assert!(!elsewhere.is_gone(), "we cannot know");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let start = started(child.id()).unwrap().unwrap();
        child.wait().unwrap();
        let ended = Owner {
            pid: child.id(),
            start,
            ..ourselves
        };
        assert!(ended.is_gone());
    }

    #[test]
    fn a_place_is_private_and_goes_without_a_trace() {
        let runtime = tempfile::tempdir().unwrap();
        let place = Place::make(runtime.path(), "0197-a/../b c d e f g h").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&place.directory), 0o700);
        let name = place.directory.file_name().unwrap().to_str().unwrap();
        assert!(name.ends_with("-0197abcd"), "{name}");
        assert!(Place::of_the_dead(place.directory.clone()).is_none());
        place.below().unwrap().close().unwrap();
        assert_eq!(mode(&place.point), 0o500);
        let second = Place::make(runtime.path(), "0197").unwrap();
        place.remove();
        second.remove();
        assert_eq!(fs::read_dir(runtime.path()).unwrap().count(), 0);
        for name in ["gs_pitr-", "gs_pitr-1-2", "gs_pitr-a-b-c", "other"] {
            assert!(Place::of_the_dead(runtime.path().join(name)).is_none());
        }
    }
}
