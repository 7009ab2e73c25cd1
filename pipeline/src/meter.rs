//! Counters that progress reports read while the pipeline runs.

use std::sync::atomic::{AtomicU64, Ordering};

/// How much one operation has moved so far. Only ever grows; repeated work is not counted twice.
#[derive(Debug, Default)]
pub struct Meter {
    plain_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    files: AtomicU64,
}

impl Meter {
    /// Counts plain bytes that were compressed, or written to files.
    pub fn add_plain(&self, bytes: u64) {
        self.plain_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts stored bytes that the store confirmed, or that arrived from it.
    pub fn add_stored(&self, bytes: u64) {
        self.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts files that are done.
    pub fn add_files(&self, files: u64) {
        self.files.fetch_add(files, Ordering::Relaxed);
    }

    /// Plain bytes so far.
    pub fn plain_bytes(&self) -> u64 {
        self.plain_bytes.load(Ordering::Relaxed)
    }

    /// Stored bytes so far.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes.load(Ordering::Relaxed)
    }

    /// Files so far.
    pub fn files(&self) -> u64 {
        self.files.load(Ordering::Relaxed)
    }
}
