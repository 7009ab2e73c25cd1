//! Where a restore works, and what it has to take away again.
//!
//! Nothing stands at the target before it is whole. The data directory is made, recovered and promoted in
//! a workspace beside the target (inside it, where that is a mount point) and then moved; a process that is killed
//! leaves no directory that could be taken for a database. Tablespaces and attached configuration are made
//! where they stay, because links and includes name them, each with a [`MARKER`] inside until the end.
//!
//! Whatever was made is named in the workspace's [`Journal`] before it is made. A workspace is locked while its
//! agent lives: one that can be locked belongs to a dead restore. The same operation takes it up again; what no
//! decision can bring back any more is taken away.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_api::RestoreSpec;
use catalog::model::Verdict;
use rustix::fs::{FlockOperation, flock};
use uuid::Uuid;

use super::files::{
    directory, exists, is_absent_or_empty, private_file, remove_empty, remove_file, remove_tree,
    sync, write_json,
};
use super::journal::{Journal, Literal, Places, Stage};
use super::process;
use super::recoverer::Recoverer;
use crate::facts;

/// File that marks a directory outside the workspace as a running restore's.
pub(super) const MARKER: &str = ".gs_pitr-restore";
const LOCK: &str = "lock";
/// A program that a dead agent was just starting has the lock too, until its `exec` has closed it.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(100);
const JOURNAL: &str = "restore.json";
const SPEC: &str = "spec.json";

/// A locked workspace.
#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) places: Places,
    pub(super) journal: Journal,
    run: PathBuf,
    /// Holds the lock.
    _lock: File,
}

/// Why there is no workspace.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkspaceError {
    /// Another restore works there.
    #[error("another restore works in {0}")]
    Busy(PathBuf),
    /// Something of that name is not ours.
    #[error("{0} is in the way and was not made by a restore")]
    Foreign(PathBuf),
    /// The file system says no.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> WorkspaceError {
    let path = path.to_owned();
    move |source| WorkspaceError::Io { path, source }
}

/// What is known of a workspace without its lock.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) journal: Journal,
    pub(super) spec: RestoreSpec,
    pub(super) places: Places,
}

impl Found {
    /// Reads the journal in `work`; `None` if there is none, or none that this version understands.
    pub(super) fn read(work: &Path) -> Option<Self> {
        let journal: Journal = serde_json::from_slice(&fs::read(work.join(JOURNAL)).ok()?).ok()?;
        let spec: RestoreSpec = serde_json::from_slice(&fs::read(work.join(SPEC)).ok()?).ok()?;
        let places = places_of(&journal, &spec);
        (places.work == work).then_some(Self {
            journal,
            spec,
            places,
        })
    }

    /// Takes it over from a dead agent.
    ///
    /// # Errors
    /// [`WorkspaceError::Busy`] if its agent lives.
    pub(super) async fn take(self) -> Result<Workspace, WorkspaceError> {
        let mut tries = 0;
        let lock = loop {
            if let Some(lock) = take_lock(&self.places.work)? {
                break lock;
            }
            tries += 1;
            if tries > LOCK_TRIES {
                return Err(busy(&self.places));
            }
            tokio::time::sleep(LOCK_PAUSE).await;
        };
        // Read again under the lock: its agent may just have ended.
        let Some(Found {
            journal, places, ..
        }) = Self::read(&self.places.work)
        else {
            return Err(busy(&self.places));
        };
        process::end_orphan(&places.data)
            .await
            .map_err(at(&places.data))?;
        if let Some(run) = &journal.run {
            remove_tree(run).map_err(at(run))?;
        }
        Ok(Workspace {
            places,
            journal,
            run: PathBuf::new(),
            _lock: lock,
        })
    }
}

fn places_of(journal: &Journal, spec: &RestoreSpec) -> Places {
    let over = !matches!(spec.place, agent_api::Place::Fresh);
    Places::of(&journal.target, journal.mount, journal.restore, over)
}

impl Workspace {
    /// Takes away what a dead restore to the same target left before it had a journal, and makes the workspace.
    pub(super) fn create(journal: Journal, spec: &RestoreSpec) -> Result<Self, WorkspaceError> {
        let places = places_of(&journal, spec);
        sweep_begun(&places)?;
        directory(&places.work).map_err(at(&places.work))?;
        let lock = take_lock(&places.work)?.ok_or_else(|| busy(&places))?;
        let mut workspace = Self {
            journal,
            run: PathBuf::new(),
            places,
            _lock: lock,
        };
        if let Err(error) = workspace.furnish(spec) {
            undo(&workspace.places, &workspace.journal)?;
            remove_workspace(&workspace.places, &workspace.journal)?;
            return Err(error);
        }
        Ok(workspace)
    }

    fn furnish(&mut self, spec: &RestoreSpec) -> Result<(), WorkspaceError> {
        let places = self.places.clone();
        write_json(&places.work, SPEC, spec).map_err(at(&places.work))?;
        self.write()?;
        for path in [&places.data, &places.spool] {
            directory(path).map_err(at(path))?;
        }
        // A copy of a server that is not known is not started.
        let hba = Recoverer::of(&spec.node).map_or_else(
            |_| "local all all reject\n".to_owned(),
            |recoverer| recoverer.private_hba(&facts::os_user()),
        );
        private_file(&places.hba, &hba).map_err(at(&places.hba))?;
        private_file(&places.ident, "").map_err(at(&places.ident))?;
        self.make_run()
    }

    /// Makes the directory for sockets. A socket's path has at most 107 bytes, too few for most workspaces.
    pub(super) fn make_run(&mut self) -> Result<(), WorkspaceError> {
        let run = std::env::temp_dir().join(format!("gs_pitr-{:016x}", rand::random::<u64>()));
        self.journal.run = Some(run.clone());
        self.write()?;
        directory(&run).map_err(at(&run))?;
        self.run = run;
        Ok(())
    }

    /// A short directory for sockets.
    pub(super) fn run(&self) -> &Path {
        &self.run
    }

    /// Changes the journal, durably.
    pub(super) fn note(&mut self, change: impl FnOnce(&mut Journal)) -> Result<(), WorkspaceError> {
        change(&mut self.journal);
        self.write()
    }

    fn write(&self) -> Result<(), WorkspaceError> {
        write_json(&self.places.work, JOURNAL, &self.journal).map_err(at(&self.places.work))
    }

    /// Makes a directory that stays if the restore succeeds, and marks it until then.
    pub(super) fn make(&mut self, path: &Path) -> Result<(), WorkspaceError> {
        if is_absent_or_empty(path).map_err(at(path))? {
            self.note(|journal| journal.made.push(path.to_owned()))?;
            make_marked(path, self.journal.operation).map_err(at(path))?;
            return Ok(());
        }
        Err(WorkspaceError::Foreign(path.to_owned()))
    }

    /// Makes the location of a tablespace that replay will create. What is in it must be nothing, or belong to the
    /// database at the target, which does not run: then it is moved into `aside`.
    pub(super) fn make_literal(&mut self, literal: &Literal) -> Result<(), WorkspaceError> {
        let path = literal.path.clone();
        if literal.aside.is_none() && !is_absent_or_empty(&path).map_err(at(&path))? {
            return Err(WorkspaceError::Foreign(path));
        }
        self.note(|journal| journal.literal.push(literal.clone()))?;
        let operation = self.journal.operation;
        let make = || {
            let (Some(aside), Some(kept)) = (&literal.aside, literal.kept()) else {
                return make_marked(&path, operation);
            };
            // The mode of a directory that a living database uses is not ours to change.
            private_file(&path.join(MARKER), &format!("{operation}\n"))?;
            directory(aside)?;
            fs::rename(literal.version(), kept)?;
            sync(aside)?;
            sync(&path)
        };
        make().map_err(at(&path))
    }

    /// Takes away everything but the result: the restore is over.
    pub(super) async fn finish(self) -> Result<(), WorkspaceError> {
        in_background(move || {
            let literal = self.journal.literal.iter().map(|literal| &literal.path);
            for path in self.journal.made.iter().chain(literal) {
                remove_file(&path.join(MARKER)).map_err(at(path))?;
            }
            remove_workspace(&self.places, &self.journal)
        })
        .await
    }

    /// Takes away everything that was made, but the workspace itself. No server of ours may be running.
    pub(super) async fn undo(&self) -> Result<(), WorkspaceError> {
        let (places, journal) = (self.places.clone(), self.journal.clone());
        in_background(move || undo(&places, &journal)).await
    }

    /// After [`Self::undo`]: takes the workspace away.
    pub(super) async fn remove(self) -> Result<(), WorkspaceError> {
        in_background(move || remove_workspace(&self.places, &self.journal)).await
    }

    /// Whether every node goes forward.
    pub(super) fn is_committed(&self) -> bool {
        self.journal.decision == Some(Verdict::Commit)
    }
}

fn busy(places: &Places) -> WorkspaceError {
    WorkspaceError::Busy(places.work.clone())
}

/// Locks a workspace; `None` if another process has it.
fn take_lock(work: &Path) -> Result<Option<File>, WorkspaceError> {
    let path = work.join(LOCK);
    let open = || {
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let file = options.open(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // Whoever had it may have taken the whole workspace away.
        let named = fs::metadata(&path)
            .is_ok_and(|named| file.metadata().is_ok_and(|ours| named.ino() == ours.ino()));
        Ok(named.then_some(file))
    };
    open().map_err(at(&path))
}

/// Takes away a workspace whose agent was killed before there was a journal: then there is nothing in it but a lock
/// and half-written files of ours.
pub(super) fn sweep_begun(places: &Places) -> Result<(), WorkspaceError> {
    let work = &places.work;
    if !exists(work) {
        return Ok(());
    }
    let names = fs::read_dir(work).map_err(at(work))?;
    for name in names {
        let name = name.map_err(at(work))?.file_name();
        let name = name.to_string_lossy();
        let early = [LOCK, SPEC].contains(&name.as_ref()) || name.ends_with(".json.new");
        if !early {
            return Err(WorkspaceError::Foreign(work.clone()));
        }
    }
    let lock = take_lock(work)?.ok_or_else(|| busy(places))?;
    remove_tree(work).map_err(at(work))?;
    drop(lock);
    Ok(())
}

/// Removing a large directory takes long, and must not hold up the threads that serve others.
pub(super) async fn in_background(
    work: impl FnOnce() -> Result<(), WorkspaceError> + Send + 'static,
) -> Result<(), WorkspaceError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| {
        let source = io::Error::other(panic);
        Err(WorkspaceError::Io {
            path: PathBuf::new(),
            source,
        })
    })
}

fn undo(places: &Places, journal: &Journal) -> Result<(), WorkspaceError> {
    debug_assert!(journal.stage < Stage::Out, "there is no way back");
    for path in &journal.made {
        if is_marked(path, journal.operation) {
            remove_tree(path).map_err(at(path))?;
        }
    }
    for literal in &journal.literal {
        undo_literal(literal, journal.operation).map_err(at(&literal.path))?;
    }
    if journal.clearing {
        clear(places, journal)?;
    }
    Ok(())
}

/// Leaves the location as it was. Only what this version of the server makes in it is removed: nobody else can
/// have made that while ours was there.
fn undo_literal(literal: &Literal, operation: Uuid) -> io::Result<()> {
    if !is_marked(&literal.path, operation) {
        return Ok(());
    }
    match (&literal.aside, literal.kept()) {
        (Some(aside), Some(kept)) => {
            // Not there: it was not moved yet, or is back already. Then what lies in its place is not ours.
            if exists(&kept) {
                remove_tree(&literal.version())?;
                fs::rename(&kept, literal.version())?;
                sync(&literal.path)?;
            }
            remove_empty(aside)?;
        }
        _ => remove_tree(&literal.version())?,
    }
    remove_file(&literal.path.join(MARKER))?;
    if literal.made {
        fs::remove_dir(&literal.path)?;
    }
    sync(&literal.path).or(Ok(()))
}

/// Removes the old database, as journalled. May be done again after a kill, as long as nothing new is at the target.
pub(super) fn clear(places: &Places, journal: &Journal) -> Result<(), WorkspaceError> {
    if !exists(&places.removed) {
        directory(&places.removed).map_err(at(&places.removed))?;
    }
    super::switch::rename_all(&journal.out)?;
    for path in &journal.cleared {
        remove_tree(path).map_err(at(path))?;
    }
    remove_tree(&places.removed).map_err(at(&places.removed))
}

/// Makes the workspace as empty as it was in the beginning.
pub(super) fn empty(places: &Places) -> Result<(), WorkspaceError> {
    for path in [&places.data, &places.spool] {
        remove_tree(path).map_err(at(path))?;
        directory(path).map_err(at(path))?;
    }
    Ok(())
}

fn remove_workspace(places: &Places, journal: &Journal) -> Result<(), WorkspaceError> {
    if let Some(run) = &journal.run {
        remove_tree(run).map_err(at(run))?;
    }
    // The journal goes last: as long as anything is left, it says what.
    for path in [&places.data, &places.spool, &places.removed] {
        remove_tree(path).map_err(at(path))?;
    }
    remove_tree(&places.work).map_err(at(&places.work))
}

fn make_marked(path: &Path, operation: Uuid) -> io::Result<()> {
    match directory(path) {
        // Empty, as was checked. Takes the mode that a server wants.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            fs::set_permissions(path, Permissions::from_mode(0o700))?;
        }
        made => made?,
    }
    private_file(&path.join(MARKER), &format!("{operation}\n"))?;
    sync(path)
}

fn is_marked(path: &Path, operation: Uuid) -> bool {
    fs::read_to_string(path.join(MARKER)).is_ok_and(|text| text.trim() == operation.to_string())
}

#[cfg(test)]
pub(super) mod tests;
