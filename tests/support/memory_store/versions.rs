//! Versions, marks of deletions and locks, as a bucket with versioning and object lock has them.

use std::time::{Duration, SystemTime};

use pipeline::store::{Detail, Hold, Key, ObjectVersion, StoreError, Undeleted, VersionId};

use super::{MemoryStore, Object, State};

/// What is not the object that readers get: an older version, or the mark of a deletion.
#[derive(Debug, Clone)]
pub(super) struct Past {
    key: Key,
    version: u64,
    /// `None`: a mark.
    object: Option<Object>,
    written: SystemTime,
}

/// How the bucket was set up.
#[derive(Debug, Clone, Default)]
pub(super) struct Versioning {
    enabled: bool,
    /// The retention of every new object.
    pub(super) lock: Option<Duration>,
    last: u64,
    past: Vec<Past>,
}

fn id(version: u64) -> VersionId {
    VersionId(if version == 0 {
        "null".into()
    } else {
        format!("v{version:06}")
    })
}

impl Versioning {
    /// The name of the next version.
    pub(super) fn next(&mut self) -> u64 {
        self.last += u64::from(self.enabled);
        if self.enabled { self.last } else { 0 }
    }
}

impl MemoryStore {
    /// A bucket that keeps versions, each locked for `lock` from its writing.
    #[must_use]
    pub fn versioned(lock: Option<Duration>) -> Self {
        let store = Self::default();
        let versioning = Versioning {
            enabled: true,
            lock,
            ..Versioning::default()
        };
        store.state().versioning = versioning;
        store
    }

    /// Everything that takes up room: versions and marks.
    pub fn all_versions(&self) -> Vec<ObjectVersion> {
        self.state().versions("")
    }
}

impl State {
    pub(super) fn versions(&self, prefix: &str) -> Vec<ObjectVersion> {
        let current = self.objects.iter().map(|(key, object)| ObjectVersion {
            key: key.clone(),
            version: Some(id(object.version)),
            size: object.body.len() as u64,
            last_modified: Some(object.written),
            is_latest: true,
            is_marker: false,
        });
        let past = &self.versioning.past;
        let past = past.iter().enumerate().map(|(place, it)| {
            let newer = past[place + 1..].iter().any(|newer| newer.key == it.key);
            ObjectVersion {
                key: it.key.clone(),
                version: Some(id(it.version)),
                size: it
                    .object
                    .as_ref()
                    .map_or(0, |object| object.body.len() as u64),
                last_modified: Some(it.written),
                is_latest: !newer && !self.objects.contains_key(&it.key),
                is_marker: it.object.is_none(),
            }
        });
        let all = current.chain(past);
        all.filter(|it| it.key.as_str().starts_with(prefix))
            .collect()
    }

    /// A deletion that names no version: it hides the object where versions are kept.
    pub(super) fn hide(&mut self, key: &Key) {
        let Some(object) = self.objects.remove(key) else {
            return;
        };
        if !self.versioning.enabled {
            return;
        }
        let (version, written) = (self.versioning.next(), self.now());
        let past = &mut self.versioning.past;
        past.push(Past {
            key: key.clone(),
            version: object.version,
            written: object.written,
            object: Some(object),
        });
        past.push(Past {
            key: key.clone(),
            version,
            object: None,
            written,
        });
    }

    fn locked_until(&self, key: &Key, version: &VersionId) -> Option<SystemTime> {
        let past = self.versioning.past.iter();
        let past = past
            .filter(|it| it.key == *key)
            .filter_map(|it| it.object.as_ref());
        let mut all = self.objects.get(key).into_iter().chain(past);
        all.find(|object| id(object.version) == *version)?.locked
    }

    pub(super) fn hold(&self, key: &Key, version: &VersionId) -> Option<Hold> {
        self.locked_until(key, version).map(|until| Hold {
            until: Some(until),
            mode: "COMPLIANCE".into(),
            legal: false,
        })
    }

    pub(super) fn delete_version(
        &mut self,
        key: &Key,
        version: &VersionId,
    ) -> Result<(), Undeleted> {
        if self
            .locked_until(key, version)
            .is_some_and(|until| until > self.now())
        {
            let detail = Detail::new(
                "delete",
                key.as_str(),
                "AccessDenied: Object is WORM protected",
            );
            return Err(Undeleted {
                key: key.clone(),
                version: Some(version.clone()),
                error: StoreError::PermissionDenied(detail),
            });
        }
        if self
            .objects
            .get(key)
            .is_some_and(|object| id(object.version) == *version)
        {
            self.objects.remove(key);
        } else {
            let its = |it: &Past| it.key == *key && id(it.version) == *version;
            self.versioning.past.retain(|it| !its(it));
        }
        // What was hidden by what is gone now is what readers get.
        let past = &mut self.versioning.past;
        let newest = past.iter().rposition(|it| it.key == *key);
        if let Some(newest) = newest
            && !self.objects.contains_key(key)
            && past[newest].object.is_some()
            && let Some(object) = past.remove(newest).object
        {
            self.objects.insert(key.clone(), object);
        }
        Ok(())
    }
}
