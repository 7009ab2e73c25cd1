//! What the service remembers over a restart of the agent: one small file of its own, without a secret.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use agent_api::{ApiError, ErrorKind, RepositoryAccess, WalGap};
use agent_wal::{Lsn, SegmentName, SegmentSize};
use catalog::ids::EpochId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Version of the file; a newer one is not understood.
const VERSION: u32 = 1;
/// No such file is larger.
const LIMIT: u64 = 1 << 20;

/// What is shipped, and how far it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    version: u32,
    /// Where to, without credentials.
    pub(super) repository: RepositoryAccess,
    /// Whether its credentials were lent by a client: then one has to lend them again.
    pub(super) lent: bool,
    pub(super) node: Uuid,
    pub(super) epoch: EpochId,
    pub(super) level: i32,
    pub(super) bandwidth: Option<u64>,
    pub(super) hold: Option<u64>,
    /// When it was switched on.
    pub(super) since: Timestamp,
    /// The slot that it made, if the database's slots hold WAL.
    pub(super) slot: Option<String>,
    /// The stretch that is being shipped; `None`: none has begun, or it has ended in a gap.
    pub(super) stretch: Option<Stretch>,
    /// A stretch that ended, and what is missing behind it is not yet written down in the bucket.
    pub(super) broken: Option<Broken>,
    /// The newest gap since the last base backup.
    pub(super) gap: Option<WalGap>,
    /// Whether no base backup joins the stretch.
    pub(super) wants_base: bool,
    /// Why it writes nothing, until it is switched on anew.
    pub(super) refused: Option<Refused>,
}

/// WAL from `first` to `next` is in the bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stretch {
    pub(super) timeline: u32,
    segment_size: u64,
    /// Numbers of segments.
    first: u64,
    next: u64,
}

/// Why a stretch ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Broken {
    /// End of what is in the bucket.
    pub(super) from: String,
    pub(super) why: String,
    pub(super) at: Timestamp,
}

/// Why nothing is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Refused {
    pub(super) why: String,
    pub(super) next: Option<String>,
}

impl Refused {
    pub(super) fn error(&self) -> ApiError {
        let error = ApiError::new(ErrorKind::Conflict, self.why.clone());
        match &self.next {
            Some(next) => error.next(next.clone()),
            None => error,
        }
    }
}

impl Stretch {
    pub(super) fn new(first: SegmentName, size: SegmentSize) -> Self {
        Self {
            timeline: first.timeline,
            segment_size: size.bytes(),
            first: first.number,
            next: first.number,
        }
    }

    pub(super) fn size(&self) -> Option<SegmentSize> {
        SegmentSize::new(self.segment_size)
    }

    pub(super) fn first(&self) -> SegmentName {
        self.name(self.first)
    }

    pub(super) fn next(&self) -> SegmentName {
        self.name(self.next)
    }

    fn name(&self, number: u64) -> SegmentName {
        SegmentName {
            timeline: self.timeline,
            number,
        }
    }

    /// Notes that everything before `next` is there.
    pub(super) fn advance(&mut self, next: SegmentName) {
        self.next = self.next.max(next.number);
    }

    pub(super) fn shipped(&self) -> Lsn {
        Lsn(self.next.saturating_mul(self.segment_size))
    }
}

impl Saved {
    /// Of an order, nothing shipped.
    pub(super) fn new(order: &agent_api::StartWal, lent: bool) -> Self {
        Self {
            version: VERSION,
            repository: RepositoryAccess {
                credentials: None,
                ..order.repository.clone()
            },
            lent,
            node: order.node_id,
            epoch: order.epoch.clone(),
            level: order.level,
            bandwidth: order.bandwidth,
            hold: order.hold,
            since: Timestamp::now(),
            slot: None,
            stretch: None,
            broken: None,
            gap: None,
            wants_base: true,
            refused: None,
        }
    }

    /// Whether it is for that node, epoch and repository.
    pub(super) fn is_for(&self, order: &agent_api::StartWal) -> bool {
        self.node == order.node_id && self.epoch == order.epoch && self.is_of(&order.repository)
    }

    /// Whether it goes to that repository. The endpoint is only the way there.
    pub(super) fn is_of(&self, repository: &RepositoryAccess) -> bool {
        (&self.repository.bucket, &self.repository.prefix)
            == (&repository.bucket, &repository.prefix)
    }

    /// The repository for people.
    pub(super) fn place(&self) -> String {
        format!("s3://{}/{}", self.repository.bucket, self.repository.prefix)
    }

    /// Ends the stretch, if there is one, in a gap.
    pub(super) fn break_off(&mut self, why: &str) {
        if let Some(stretch) = self.stretch.take() {
            self.broken = Some(Broken {
                from: stretch.shipped().to_string(),
                why: why.to_owned(),
                at: Timestamp::now(),
            });
        }
    }
}

/// Where it is kept.
#[derive(Debug, Clone)]
pub(super) struct Place {
    file: PathBuf,
}

impl Place {
    /// In `directory`, for the database on `port`.
    pub(super) fn new(directory: &Path, port: u16) -> Self {
        Self {
            file: directory.join(format!("wal-{port}.json")),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.file
    }

    /// What was kept; `None`: nothing. Blocks.
    ///
    /// # Errors
    /// If it cannot be read or understood.
    pub(super) fn read(&self) -> io::Result<Option<Saved>> {
        let metadata = match fs::symlink_metadata(&self.file) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let ours = metadata.uid() == rustix::process::geteuid().as_raw();
        if !metadata.is_file() || !ours || metadata.mode() & 0o077 != 0 || metadata.len() > LIMIT {
            return Err(io::Error::other(
                "it is not a small file that only the agent's user can read",
            ));
        }
        let saved: Saved = serde_json::from_slice(&fs::read(&self.file)?)?;
        if saved.version != VERSION {
            return Err(io::Error::other(format!(
                "it has version {}, this agent knows version {VERSION}",
                saved.version
            )));
        }
        Ok(Some(saved))
    }

    /// Keeps it. Killed meanwhile, what was kept before is still there. Blocks.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn write(&self, saved: &Saved) -> io::Result<()> {
        let directory = self.directory();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        let new = self.file.with_extension("new");
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&serde_json::to_vec(saved)?)?;
        file.sync_all()?;
        fs::rename(&new, &self.file)?;
        File::open(directory)?.sync_all()
    }

    /// Forgets it. Blocks.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub(super) fn forget(&self) -> io::Result<()> {
        match fs::remove_file(&self.file) {
            Ok(()) => File::open(self.directory())?.sync_all(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn directory(&self) -> &Path {
        self.file.parent().unwrap_or(Path::new("/"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use agent_api::{Credentials, Secret, StartWal};

    use super::*;

    fn order() -> StartWal {
        StartWal {
            repository: RepositoryAccess {
                bucket: "b".to_owned(),
                prefix: "p".to_owned(),
                endpoint: None,
                region: None,
                ca_pem: None,
                credentials: Some(Credentials {
                    access_key_id: "ID".to_owned(),
                    secret_access_key: Secret("TOP-SECRET".to_owned()),
                    session_token: None,
                }),
            },
            node_id: Uuid::nil(),
            epoch: "00000001-9f3c1a2b".parse().unwrap(),
            level: 1,
            bandwidth: None,
            hold: None,
            replace: false,
        }
    }

    #[test]
    fn what_is_kept_comes_back_without_a_secret() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(&dir.path().join("own"), 5432);
        assert_eq!(place.read().unwrap(), None);
        let mut saved = Saved::new(&order(), true);
        let size = SegmentSize::new(16 << 20).unwrap();
        let first = SegmentName {
            timeline: 1,
            number: 7,
        };
        saved.stretch = Some(Stretch::new(first, size));
        if let Some(stretch) = &mut saved.stretch {
            stretch.advance(first.next());
        }
        place.write(&saved).unwrap();
        place.write(&saved).unwrap();
        assert_eq!(place.read().unwrap(), Some(saved.clone()));
        let text = fs::read_to_string(place.path()).unwrap();
        assert!(!text.contains("SECRET"), "{text}");
        let mode = fs::metadata(place.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        saved.break_off("too much was held");
        let broken = saved.broken.unwrap();
        assert_eq!(broken.from, Lsn(8 * (16 << 20)).to_string());
        assert!(saved.stretch.is_none());

        place.forget().unwrap();
        place.forget().unwrap();
        assert_eq!(place.read().unwrap(), None);
    }

    #[test]
    fn a_file_that_others_may_read_or_that_is_newer_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(dir.path(), 5432);
        let saved = Saved::new(&order(), false);
        place.write(&saved).unwrap();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(place.read().is_err());
        place
            .write(&Saved {
                version: VERSION + 1,
                ..saved
            })
            .unwrap();
        let error = place.read().unwrap_err();
        assert!(error.to_string().contains("version 2"), "{error}");
    }
}
