//! Where a restore works, and what it has to take away again.
//!
//! Nothing stands at the target before it is whole. The data directory is made, recovered and promoted in
//! `<target>.gs_pitr-restore/data` and then renamed, one atomic step; a process that is killed
//! leaves no directory that could be taken for a database. Tablespaces and attached configuration are made
//! where they stay, because links and includes name them, each with a [`MARKER`] inside until the end.
//!
//! Whatever was made is named in the workspace's journal before it is made. A workspace is locked while its
//! agent lives: one that can be locked belongs to a dead restore, and the next one to the same target takes
//! it away.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::process;

/// What the name of a workspace ends in.
const SUFFIX: &str = ".gs_pitr-restore";
/// File that marks a directory outside the workspace as a running restore's.
const MARKER: &str = ".gs_pitr-restore";
const LOCK: &str = "lock";
const JOURNAL: &str = "restore.json";

/// What a restore makes outside its workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Journal {
    operation: Uuid,
    target: PathBuf,
    /// Short directory for sockets.
    run: Option<PathBuf>,
    /// Directories that are ours as a whole.
    made: Vec<PathBuf>,
    /// Locations of tablespaces that replay creates by their literal path.
    literal: Vec<Literal>,
    /// The data directory is whole and is being renamed to the target.
    whole: bool,
}

/// The location of a tablespace that replay creates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Literal {
    /// The literal path.
    pub(super) path: PathBuf,
    /// Whether we made it (otherwise it was there, empty).
    pub(super) made: bool,
    /// What the server makes in it, such as `PG_15_202209061`.
    pub(super) version_directory: String,
}

/// The places of one restore. All absolute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Places {
    /// The data directory to be.
    pub(super) target: PathBuf,
    /// The workspace.
    pub(super) work: PathBuf,
    /// The data directory until it is whole.
    pub(super) data: PathBuf,
    /// WAL on its way to the server.
    pub(super) spool: PathBuf,
    /// What the server writes while it is private.
    pub(super) log: PathBuf,
    /// `pg_hba.conf` while it is private.
    pub(super) hba: PathBuf,
    /// `pg_ident.conf` while it is private.
    pub(super) ident: PathBuf,
    /// Tablespaces, one directory each, named by OID.
    pub(super) tablespaces: PathBuf,
    /// Attached configuration.
    pub(super) config: PathBuf,
    /// What the standalone server writes before its own logging begins.
    pub(super) server_log: PathBuf,
}

impl Places {
    /// The places of a restore to `target`.
    pub(super) fn of(target: &Path) -> Self {
        let beside = |suffix: &str| {
            let mut name = target.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let work = beside(SUFFIX);
        Self {
            target: target.to_owned(),
            data: work.join("data"),
            spool: work.join("wal"),
            log: work.join("server.log"),
            hba: work.join("pg_hba.conf"),
            ident: work.join("pg_ident.conf"),
            tablespaces: beside(".tablespaces"),
            config: beside(".config"),
            server_log: beside(".log"),
            work,
        }
    }
}

/// A locked workspace.
#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) places: Places,
    journal: Journal,
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

fn at(path: &Path) -> impl FnOnce(io::Error) -> WorkspaceError {
    let path = path.to_owned();
    move |source| WorkspaceError::Io { path, source }
}

impl Workspace {
    /// Takes away what a dead restore to `target` left, and makes the workspace.
    pub(super) async fn create(operation: Uuid, target: &Path) -> Result<Self, WorkspaceError> {
        let places = Places::of(target);
        sweep(&places).await?;
        directory(&places.work).map_err(at(&places.work))?;
        let lock = take_lock(&places.work)?.ok_or_else(|| busy(&places))?;
        let mut workspace = Self {
            journal: Journal {
                operation,
                target: target.to_owned(),
                run: None,
                made: Vec::new(),
                literal: Vec::new(),
                whole: false,
            },
            run: PathBuf::new(),
            places,
            _lock: lock,
        };
        if let Err(error) = workspace.furnish() {
            workspace.discard().await?;
            return Err(error);
        }
        Ok(workspace)
    }

    fn furnish(&mut self) -> Result<(), WorkspaceError> {
        self.write_journal()?;
        let places = self.places.clone();
        for path in [&places.data, &places.spool] {
            directory(path).map_err(at(path))?;
        }
        // Nobody comes in, whoever can open the socket.
        private_file(&places.hba, "local all all reject\n").map_err(at(&places.hba))?;
        private_file(&places.ident, "").map_err(at(&places.ident))?;
        // A socket's path has at most 107 bytes, too few for most workspaces.
        let run = std::env::temp_dir().join(format!("gs_pitr-{:016x}", rand::random::<u64>()));
        self.journal.run = Some(run.clone());
        self.write_journal()?;
        directory(&run).map_err(at(&run))?;
        self.run = run;
        Ok(())
    }

    /// A short directory for sockets.
    pub(super) fn run(&self) -> &Path {
        &self.run
    }

    /// Makes a directory beside the target that stays if the restore succeeds, and marks it until then.
    pub(super) fn make(&mut self, path: &Path) -> Result<(), WorkspaceError> {
        if is_absent_or_empty(path).map_err(at(path))? {
            self.journal.made.push(path.to_owned());
            self.write_journal()?;
            make_marked(path, self.journal.operation).map_err(at(path))?;
            return Ok(());
        }
        Err(WorkspaceError::Foreign(path.to_owned()))
    }

    /// Makes the (absent or empty) location of a tablespace that replay will create.
    pub(super) fn make_literal(
        &mut self,
        path: &Path,
        version_directory: &str,
    ) -> Result<(), WorkspaceError> {
        if !is_absent_or_empty(path).map_err(at(path))? {
            return Err(WorkspaceError::Foreign(path.to_owned()));
        }
        self.journal.literal.push(Literal {
            path: path.to_owned(),
            made: !path.exists(),
            version_directory: version_directory.to_owned(),
        });
        self.write_journal()?;
        make_marked(path, self.journal.operation).map_err(at(path))
    }

    /// Locations that replay created.
    pub(super) fn literal(&self) -> &[Literal] {
        &self.journal.literal
    }

    fn write_journal(&self) -> Result<(), WorkspaceError> {
        let path = self.places.work.join(JOURNAL);
        let write = || {
            let new = self.places.work.join("restore.json.new");
            let mut text = serde_json::to_vec_pretty(&self.journal)?;
            text.push(b'\n');
            let mut file = private(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            sync(&self.places.work)
        };
        write().map_err(at(&path))
    }

    /// Puts the data directory, which is whole, at the target. From then on there is no way back.
    /// If it fails, nothing stands at the target, and the workspace can still be discarded.
    pub(super) fn commit(&mut self) -> Result<(), WorkspaceError> {
        let Places { target, data, .. } = self.places.clone();
        self.journal.whole = true;
        self.write_journal()?;
        let parent = target.parent().unwrap_or(Path::new("/"));
        // Onto an empty directory too; fails if it is not empty any more.
        fs::rename(&data, &target).map_err(at(&target))?;
        sync(parent).map_err(at(parent))
    }

    /// After [`Self::commit`]: takes away everything but the result.
    pub(super) fn finish(self) -> Result<(), WorkspaceError> {
        finish(&self.places, &self.journal)
    }

    /// Takes away everything that was made. No server of ours may be running.
    pub(super) async fn discard(self) -> Result<(), WorkspaceError> {
        let Self {
            places,
            journal,
            _lock,
            ..
        } = self;
        in_background(move || undo(&places, &journal)).await
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

/// Takes away what a dead restore to the same target left.
async fn sweep(places: &Places) -> Result<(), WorkspaceError> {
    if fs::symlink_metadata(&places.work).is_err() {
        return Ok(());
    }
    let path = places.work.join(JOURNAL);
    let journal: Journal = match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text)
            .map_err(|_| WorkspaceError::Foreign(places.work.clone()))?,
        // Killed before there was one: then there is nothing but an empty directory and a lock.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let lock = take_lock(&places.work)?.ok_or_else(|| busy(places))?;
            remove_file(&places.work.join(LOCK)).map_err(at(&places.work))?;
            drop(lock);
            let foreign = |_| WorkspaceError::Foreign(places.work.clone());
            return fs::remove_dir(&places.work).map_err(foreign);
        }
        Err(source) => return Err(WorkspaceError::Io { path, source }),
    };
    if journal.target != places.target {
        return Err(WorkspaceError::Foreign(places.work.clone()));
    }
    let Some(_lock) = take_lock(&places.work)? else {
        return Err(busy(places));
    };
    tracing::info!(work = %places.work.display(), operation = %journal.operation,
        "taking away what a dead restore left");
    process::end_orphan(&places.data)
        .await
        .map_err(at(&places.data))?;
    let places = places.clone();
    in_background(move || {
        // Renamed already: what is at the target is whole, only the rest is to be tidied.
        if journal.whole && !places.data.exists() {
            return finish(&places, &journal);
        }
        undo(&places, &journal)
    })
    .await
}

/// Removing a large directory takes long, and must not hold up the threads that serve others.
async fn in_background(
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

/// Takes the markers off what stays and removes the workspace.
fn finish(places: &Places, journal: &Journal) -> Result<(), WorkspaceError> {
    let literal = journal.literal.iter().map(|literal| &literal.path);
    for path in journal.made.iter().chain(literal) {
        remove_file(&path.join(MARKER)).map_err(at(path))?;
    }
    remove_workspace(places, journal)
}

fn undo(places: &Places, journal: &Journal) -> Result<(), WorkspaceError> {
    for path in &journal.made {
        if is_marked(path, journal.operation) {
            remove_tree(path).map_err(at(path))?;
        }
    }
    for literal in &journal.literal {
        undo_literal(literal, journal.operation).map_err(at(&literal.path))?;
    }
    remove_workspace(places, journal)
}

/// Leaves the location as it was. Only what this version of the server makes in it is removed: nobody else can
/// have made that while ours was there.
fn undo_literal(literal: &Literal, operation: Uuid) -> io::Result<()> {
    if !is_marked(&literal.path, operation) {
        return Ok(());
    }
    remove_tree(&literal.path.join(&literal.version_directory))?;
    remove_file(&literal.path.join(MARKER))?;
    if literal.made {
        fs::remove_dir(&literal.path)?;
    }
    Ok(())
}

fn remove_workspace(places: &Places, journal: &Journal) -> Result<(), WorkspaceError> {
    if let Some(run) = &journal.run {
        remove_tree(run).map_err(at(run))?;
    }
    // The journal goes last: as long as anything is left, it says what.
    for path in [&places.data, &places.spool] {
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

/// Whether there is nothing at `path`, or an empty directory (no link to one).
pub(super) fn is_absent_or_empty(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(fs::read_dir(path)?.next().is_none()),
        Ok(_) => Ok(false),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(e),
    }
}

/// Makes a directory that only we can open.
pub(super) fn directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

fn private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(true).write(true).mode(0o600);
    options.open(path)
}

fn private_file(path: &Path, text: &str) -> io::Result<()> {
    let mut file = private(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Makes the names in a directory durable.
pub(super) fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removes a file, if it is there.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    absent_is_fine(fs::remove_file(path))
}

/// Removes a directory with all that is in it (links are removed, not followed), if it is there.
///
/// More than once if something is made in it meanwhile: a write that was begun before its future was dropped,
/// or a process of a server that was stopped at once.
fn remove_tree(path: &Path) -> io::Result<()> {
    for _ in 0..20 {
        match fs::remove_dir_all(path) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
                std::thread::park_timeout(Duration::from_millis(100));
            }
            removed => return absent_is_fine(removed),
        }
    }
    absent_is_fine(fs::remove_dir_all(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_discarded_restore_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("node");
        let (there, absent) = (root.path().join("there"), root.path().join("absent"));
        fs::create_dir(&there).unwrap();
        let mut workspace = Workspace::create(Uuid::new_v4(), &target).await.unwrap();
        let (run, config) = (workspace.run().to_owned(), workspace.places.config.clone());
        workspace.make(&config).unwrap();
        for path in [&there, &absent] {
            workspace.make_literal(path, "PG_15_1").unwrap();
            fs::create_dir_all(path.join("PG_15_1/5")).unwrap();
        }
        fs::write(workspace.places.data.join("PG_VERSION"), "15").unwrap();
        assert!(run.exists() && !target.exists());
        workspace.discard().await.unwrap();
        assert_eq!(names(root.path()), ["there"]);
        assert!(names(&there).is_empty() && !run.exists());
    }

    #[tokio::test]
    async fn a_committed_restore_leaves_only_the_result() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("node");
        fs::create_dir(&target).unwrap();
        let mut workspace = Workspace::create(Uuid::new_v4(), &target).await.unwrap();
        let tablespaces = workspace.places.tablespaces.clone();
        workspace.make(&tablespaces).unwrap();
        fs::write(workspace.places.data.join("PG_VERSION"), "15").unwrap();
        workspace.commit().unwrap();
        workspace.finish().unwrap();
        assert_eq!(names(root.path()), ["node", "node.tablespaces"]);
        assert_eq!(names(&target), ["PG_VERSION"]);
        assert!(names(&tablespaces).is_empty());
    }

    #[tokio::test]
    async fn a_living_restore_is_not_disturbed_and_a_dead_one_is_taken_away() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("node");
        let mut first = Workspace::create(Uuid::new_v4(), &target).await.unwrap();
        let config = first.places.config.clone();
        first.make(&config).unwrap();
        let second = Workspace::create(Uuid::new_v4(), &target).await;
        assert!(matches!(second, Err(WorkspaceError::Busy(_))));
        // Dropped without a word, as by SIGKILL: the lock is gone, the rest stays.
        drop(first);
        assert_eq!(names(root.path()), ["node.config", "node.gs_pitr-restore"]);
        // One beside it neither disturbs nor is disturbed.
        let beside = root.path().join("other");
        let other = Workspace::create(Uuid::new_v4(), &beside).await.unwrap();
        let third = Workspace::create(Uuid::new_v4(), &target).await.unwrap();
        let both = ["node.gs_pitr-restore", "other.gs_pitr-restore"];
        assert_eq!(names(root.path()), both);
        other.discard().await.unwrap();
        third.discard().await.unwrap();
        assert!(names(root.path()).is_empty());
    }

    #[tokio::test]
    async fn a_restore_killed_after_its_rename_keeps_the_result() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("node");
        let mut workspace = Workspace::create(Uuid::new_v4(), &target).await.unwrap();
        let config = workspace.places.config.clone();
        workspace.make(&config).unwrap();
        workspace.journal.whole = true;
        workspace.write_journal().unwrap();
        fs::rename(&workspace.places.data, &target).unwrap();
        drop(workspace);
        let again = Workspace::create(Uuid::new_v4(), &target).await.unwrap();
        assert!(config.exists() && names(&config).is_empty() && target.exists());
        again.discard().await.unwrap();
    }

    #[tokio::test]
    async fn what_is_not_ours_stays() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("node");
        let work = Places::of(&target).work;
        fs::create_dir(&work).unwrap();
        fs::write(work.join("mine"), "x").unwrap();
        let refused = Workspace::create(Uuid::new_v4(), &target).await;
        assert!(matches!(refused, Err(WorkspaceError::Foreign(_))));
        fs::remove_file(work.join("mine")).unwrap();
        fs::remove_dir(&work).unwrap();
        let mut workspace = Workspace::create(Uuid::new_v4(), &target).await.unwrap();
        let full = root.path().join("full");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("x"), "x").unwrap();
        assert!(workspace.make(&full).is_err());
        assert!(workspace.make_literal(&full, "PG_15_1").is_err());
        workspace.discard().await.unwrap();
        assert_eq!(names(&full), ["x"]);
    }
}
