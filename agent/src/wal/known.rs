//! Segments that are known to be in the bucket: two ways lead there, and none is to be gone twice.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Names that are remembered; older ones are forgotten. Whoever puts one of those again finds it in the bucket.
const REMEMBERED: usize = 4096;

/// Names of WAL files that are in the bucket, with the SHA-256 of their plain bytes. Memory: about 150 bytes a file, at most
/// about 600 KiB.
#[derive(Debug, Default)]
pub struct KnownSegments {
    put: Mutex<BTreeMap<String, String>>,
}

impl KnownSegments {
    fn put(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.put.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes one that is there.
    pub fn add(&self, name: &str, plain_sha256: String) {
        let mut put = self.put();
        put.insert(name.to_owned(), plain_sha256);
        while put.len() > REMEMBERED {
            put.pop_first();
        }
    }

    /// The SHA-256 (hex) of one that is there.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<String> {
        self.put().get(name).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_remembered() {
        let known = KnownSegments::default();
        for number in 0..REMEMBERED + 2 {
            known.add(&format!("{number:024X}"), "x".to_owned());
        }
        assert_eq!(known.get(&format!("{:024X}", 1)), None);
        assert!(known.get(&format!("{:024X}", 2)).is_some());
        assert!(known.get(&format!("{:024X}", REMEMBERED + 1)).is_some());
    }
}
