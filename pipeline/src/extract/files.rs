//! Files being filled in any order by several threads.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::plan::Slice;
use super::sync::Syncing;
use crate::error::PipelineError;
use crate::meter::Meter;

/// Files open for writing at once; those that wait to be flushed come on top.
const OPEN_MAX: usize = 128;

/// A file to be made. It has at least one byte.
#[derive(Debug)]
pub(super) struct FilePlan {
    pub(super) path: PathBuf,
    size: u64,
    mode: u32,
    mtime: Option<i64>,
    /// Bytes not yet written.
    missing: AtomicU64,
}

impl FilePlan {
    pub(super) fn new(path: PathBuf, size: u64, mode: u32, mtime: Option<i64>) -> Self {
        Self {
            path,
            size,
            mode,
            mtime,
            missing: AtomicU64::new(size),
        }
    }
}

/// All files of an extraction.
pub(super) struct Files {
    plans: Vec<FilePlan>,
    open: Mutex<OpenFiles>,
    times: bool,
    meter: Arc<Meter>,
    syncing: Syncing,
}

#[derive(Default)]
struct OpenFiles {
    /// The file, and when it was last used, in turns.
    cached: HashMap<u32, (Arc<File>, u64)>,
    turn: u64,
    created: Vec<bool>,
}

impl Files {
    pub(super) fn new(
        plans: Vec<FilePlan>,
        times: bool,
        meter: Arc<Meter>,
        syncing: Syncing,
    ) -> Self {
        let created = vec![false; plans.len()];
        let open = OpenFiles {
            created,
            ..OpenFiles::default()
        };
        Self {
            plans,
            open: Mutex::new(open),
            times,
            meter,
            syncing,
        }
    }

    pub(super) fn path(&self, file: u32) -> &Path {
        self.plans
            .get(file as usize)
            .map_or(Path::new(""), |plan| &plan.path)
    }

    /// Writes bytes to their place; with the last missing ones the file is finished.
    pub(super) fn write(&self, slice: &Slice, bytes: &[u8]) -> Result<(), PipelineError> {
        let Some(plan) = self.plans.get(slice.file as usize) else {
            return Err(PipelineError::Setup(format!("no file {}", slice.file)));
        };
        let file = self.open(slice.file, plan)?;
        if !is_zero(bytes) {
            let written = file.write_all_at(bytes, slice.file_offset);
            written.map_err(|error| PipelineError::sink(&plan.path, "write", error))?;
        }
        let length = bytes.len() as u64;
        self.meter.add_plain(length);
        // Each thread's write is before its subtraction: whoever takes the last bytes sees all of them.
        if plan.missing.fetch_sub(length, Ordering::AcqRel) == length {
            self.finish(slice.file, plan, file)?;
        }
        Ok(())
    }

    fn finish(&self, number: u32, plan: &FilePlan, file: Arc<File>) -> Result<(), PipelineError> {
        {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.cached.remove(&number);
        }
        let sink = |what| move |error| PipelineError::sink(&plan.path, what, error);
        // Holes at the end were skipped.
        file.set_len(plan.size).map_err(sink("set length"))?;
        set_attributes(&file, plan.mode, plan.mtime.filter(|_| self.times))
            .map_err(sink("set mode and time"))?;
        self.meter.add_files(1);
        self.syncing.file(file, plan.path.clone())
    }

    fn open(&self, number: u32, plan: &FilePlan) -> Result<Arc<File>, PipelineError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.turn += 1;
        let turn = open.turn;
        if let Some((file, used)) = open.cached.get_mut(&number) {
            *used = turn;
            return Ok(Arc::clone(file));
        }
        if open.cached.len() >= OPEN_MAX {
            let oldest = open.cached.iter().min_by_key(|(_, (_, used))| *used);
            let oldest = oldest.map(|(number, _)| *number);
            if let Some(oldest) = oldest {
                open.cached.remove(&oldest);
            }
        }
        let created = open
            .created
            .get(number as usize)
            .copied()
            .unwrap_or_default();
        let file = if created {
            open_again(&plan.path)
        } else {
            create(&plan.path)
        };
        let what = if created { "open" } else { "create" };
        let file = file.map_err(|error| PipelineError::sink(&plan.path, what, error))?;
        if let Some(created) = open.created.get_mut(number as usize) {
            *created = true;
        }
        let file = Arc::new(file);
        open.cached.insert(number, (Arc::clone(&file), turn));
        Ok(file)
    }
}

/// Makes a file that must not exist, for nobody else's eyes yet.
pub(super) fn create(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn open_again(path: &Path) -> std::io::Result<File> {
    let no_follow = rustix::fs::OFlags::NOFOLLOW.bits();
    let no_follow = i32::try_from(no_follow).unwrap_or_default();
    OpenOptions::new()
        .write(true)
        .custom_flags(no_follow)
        .open(path)
}

/// Sets permission bits, and the modification time if one is given (seconds since 1970).
pub(super) fn set_attributes(file: &File, mode: u32, mtime: Option<i64>) -> std::io::Result<()> {
    file.set_permissions(Permissions::from_mode(mode))?;
    if let Some(time) = mtime.and_then(time_of) {
        file.set_modified(time)?;
    }
    Ok(())
}

fn time_of(mtime: i64) -> Option<SystemTime> {
    let distance = Duration::from_secs(mtime.unsigned_abs());
    if mtime < 0 {
        UNIX_EPOCH.checked_sub(distance)
    } else {
        UNIX_EPOCH.checked_add(distance)
    }
}

fn is_zero(plain: &[u8]) -> bool {
    let (blocks, rest) = plain.as_chunks::<64>();
    blocks.iter().all(|block| *block == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}
