//! The journal of a restore: what was made, how far it is, what is decided. Every step that has to be done again or
//! undone after a kill stands here before it is taken.

use std::path::{Path, PathBuf};

use agent_api::{RepositoryAccess, RestoreState};
use catalog::model::Verdict;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::live::Live;

/// How far a restore is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Stage {
    /// The copy is not whole, or not proved.
    Making,
    /// Proved to be at the point.
    Proved,
    /// Promoted and shut down, in the workspace.
    Promoted,
    /// What was at the target is being moved aside.
    Out,
    /// The new data directory is being moved to the target.
    In,
    /// It stands at the target.
    InPlace,
}

impl Stage {
    pub(super) fn state(self) -> RestoreState {
        match self {
            Self::Making => RestoreState::Making,
            Self::Proved => RestoreState::Proved,
            Self::Promoted => RestoreState::Promoted,
            Self::Out | Self::In => RestoreState::Switching,
            Self::InPlace => RestoreState::InPlace,
        }
    }
}

/// What a restore has made, and what it is about to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Journal {
    /// The agent's operation.
    pub(super) operation: Uuid,
    /// The client's restore.
    pub(super) restore: Uuid,
    pub(super) target: PathBuf,
    /// The target is a mount point: workspace and old files live inside it.
    pub(super) mount: bool,
    /// The store, in a person's words; a decision is looked for nowhere else.
    pub(super) store: String,
    /// The repository, without credentials.
    pub(super) repository: Option<RepositoryAccess>,
    pub(super) stage: Stage,
    /// Written before it is acted on.
    pub(super) decision: Option<Verdict>,
    /// Short directory for sockets.
    pub(super) run: Option<PathBuf>,
    /// Directories that are ours as a whole.
    pub(super) made: Vec<PathBuf>,
    /// Locations of tablespaces that replay creates by their literal path.
    pub(super) literal: Vec<Literal>,
    /// The database at the target.
    pub(super) live: Option<Live>,
    /// It ran, and was (or is being) stopped for this restore.
    pub(super) stopped: bool,
    /// Renames of what was at the target, out of the way.
    pub(super) out: Vec<Rename>,
    /// Renames that put the new data directory in place.
    pub(super) into: Vec<Rename>,
    /// The old database is being removed, by `out` into the workspace; there is no way back.
    pub(super) clearing: bool,
    /// Directories of its tablespaces that are removed with it.
    pub(super) cleared: Vec<PathBuf>,
    /// Where the old database is kept.
    pub(super) old: Option<PathBuf>,
    /// What promotion made: timeline, and where it begins (`X/X`).
    pub(super) promoted: Option<(u32, String)>,
}

/// One rename within a file system. Whether it is done is seen by `from`: nothing is put there before all renames of
/// its list are journalled as done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rename {
    pub(super) from: PathBuf,
    pub(super) to: PathBuf,
}

/// The location of a tablespace that replay creates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Literal {
    /// The literal path.
    pub(super) path: PathBuf,
    /// Whether we made it (otherwise it was there).
    pub(super) made: bool,
    /// What the server makes in it, such as `PG_15_202209061`.
    pub(super) version_directory: String,
    /// The database at the target keeps a tablespace there: its files are moved in here meanwhile.
    pub(super) aside: Option<PathBuf>,
    /// Name of that database's link to it in `pg_tblspc`.
    pub(super) link: Option<String>,
}

impl Literal {
    /// Where replay makes its files, and where the files of the database at the target were.
    pub(super) fn version(&self) -> PathBuf {
        self.path.join(&self.version_directory)
    }

    /// Where those of the database at the target are kept meanwhile.
    pub(super) fn kept(&self) -> Option<PathBuf> {
        let aside = self.aside.as_ref()?;
        Some(aside.join(&self.version_directory))
    }
}

/// Eight digits by which the directories of one restore are told from those of another. The last ones: the first ones
/// of an id are its time, which two restores may share.
pub(super) fn tag(restore: Uuid) -> String {
    let text = restore.simple().to_string();
    text[text.len() - 8..].to_owned()
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
    /// What an in-place restore removes, on its way out.
    pub(super) removed: PathBuf,
    /// Tablespaces, one directory each, named by OID.
    pub(super) tablespaces: PathBuf,
    /// Attached configuration.
    pub(super) config: PathBuf,
    /// What the standalone server writes before its own logging begins.
    pub(super) server_log: PathBuf,
    /// Where what was at the target is kept.
    pub(super) old: PathBuf,
    /// The target is a mount point.
    pub(super) mount: bool,
}

impl Places {
    /// The places of a restore to `target`. Over a database (`beside_old`) the names of what stays carry the
    /// restore's tag: that database may use the plain ones since an earlier restore.
    pub(super) fn of(target: &Path, mount: bool, restore: Uuid, beside_old: bool) -> Self {
        let place = |name: &str| {
            if mount {
                return target.join(format!(".gs_pitr-{name}"));
            }
            let mut path = target.as_os_str().to_owned();
            path.push(format!(".{name}"));
            PathBuf::from(path)
        };
        let tag = tag(restore);
        let stays = |name: &str| {
            if beside_old {
                place(&format!("{name}-{tag}"))
            } else {
                place(name)
            }
        };
        let (work, old) = if mount {
            (place("restore"), place(&format!("old-{tag}")))
        } else {
            (
                place("gs_pitr-restore"),
                place(&format!("gs_pitr-old-{tag}")),
            )
        };
        Self {
            target: target.to_owned(),
            data: work.join("data"),
            spool: work.join("wal"),
            log: work.join("server.log"),
            hba: work.join("pg_hba.conf"),
            ident: work.join("pg_ident.conf"),
            removed: work.join("removed"),
            tablespaces: stays("tablespaces"),
            config: stays("config"),
            server_log: place("log"),
            old,
            mount,
            work,
        }
    }

    /// The workspace of whatever restore to `target`.
    pub(super) fn workspace(target: &Path, mount: bool) -> PathBuf {
        Self::of(target, mount, Uuid::nil(), false).work
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_of_two_restores_has_different_names() {
        let target = Path::new("/r/node");
        let (one, two) = (Uuid::now_v7(), Uuid::now_v7());
        let fresh = Places::of(target, false, one, false);
        assert_eq!(fresh.work, Path::new("/r/node.gs_pitr-restore"));
        assert_eq!(fresh.tablespaces, Path::new("/r/node.tablespaces"));
        let (over, again) = (
            Places::of(target, false, one, true),
            Places::of(target, false, two, true),
        );
        for (a, b, c) in [
            (&fresh.tablespaces, &over.tablespaces, &again.tablespaces),
            (&fresh.config, &over.config, &again.config),
        ] {
            assert!(a != b && b != c && a != c);
        }
        assert!(over.old != again.old && over.work == again.work);
        let inside = Places::of(target, true, one, true);
        for path in [
            &inside.work,
            &inside.old,
            &inside.tablespaces,
            &inside.config,
            &inside.server_log,
        ] {
            let name = path.strip_prefix(target).unwrap().to_str().unwrap();
            assert!(name.starts_with(".gs_pitr-"), "{name}");
        }
    }
}
