//! What was at a target before a restore: marked when it is moved aside, found again, removed on order.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_api::{ApiError, Discarded, ErrorKind, OldCluster};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::errors::local;
use super::files::{exists, remove_empty, remove_tree, sync_parent, write_json};
use super::journal::{Journal, Places};
use super::live::{Live, read_links};
use super::search;
use crate::config::Config;

/// Says in a directory what it is, and that a restore may remove it.
const MARKER: &str = ".gs_pitr-old.json";

/// Content of the marker.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Marker {
    restore: Uuid,
    operation: Uuid,
    target: PathBuf,
    /// Directories with its tablespaces' files, and nothing else.
    tablespaces: Vec<PathBuf>,
    since: Timestamp,
}

/// Marks `old`, which was moved aside by this restore.
pub(super) fn mark(old: &Path, places: &Places, journal: &Journal) -> io::Result<()> {
    if exists(&old.join(MARKER)) {
        return Ok(());
    }
    let live = journal.live.iter();
    let spaces = live.flat_map(|live| live.tablespaces.iter());
    let mut tablespaces: Vec<PathBuf> = Vec::new();
    for (name, location) in spaces {
        let moved = journal
            .literal
            .iter()
            .find(|literal| literal.link.as_ref() == Some(name));
        let aside = moved.and_then(|literal| literal.aside.clone());
        tablespaces.push(aside.unwrap_or_else(|| location.clone()));
    }
    let marker = Marker {
        restore: journal.restore,
        operation: journal.operation,
        target: places.target.clone(),
        tablespaces,
        since: Timestamp::now(),
    };
    write_json(old, MARKER, &marker)
}

fn read(directory: &Path) -> Option<Marker> {
    serde_json::from_slice(&fs::read(directory.join(MARKER)).ok()?).ok()
}

/// All that there is.
pub(super) fn list(config: &Config) -> Vec<OldCluster> {
    let found = search::find(config).old.into_iter();
    let found = found.filter_map(|directory| {
        let marker = read(&directory)?;
        let all = std::iter::once(&directory).chain(&marker.tablespaces);
        Some(OldCluster {
            restore: marker.restore,
            target: marker.target.to_string_lossy().into_owned(),
            directories: all.map(|it| it.to_string_lossy().into_owned()).collect(),
            since: marker.since,
        })
    });
    found.collect()
}

/// Removes what a restore moved aside.
///
/// # Errors
/// [`ErrorKind::Conflict`] if a server runs in it; [`ErrorKind::Target`] for what cannot be removed.
pub(super) async fn discard(config: &Config, restore: Uuid) -> Result<Discarded, ApiError> {
    let mut discarded = Discarded::default();
    for directory in search::find(config).old {
        let Some(marker) = read(&directory).filter(|marker| marker.restore == restore) else {
            continue;
        };
        if Live::runs(&directory).await? {
            let message = format!("a server runs in {}", directory.display());
            return Err(ApiError::new(ErrorKind::Conflict, message)
                .next("stop it, if it is not needed, and discard again"));
        }
        let running = search::running_data_directories();
        let removed = tokio::task::spawn_blocking(move || remove(&directory, &marker, &running));
        let removed = removed
            .await
            .map_err(|panic| ApiError::new(ErrorKind::Internal, panic.to_string()))?;
        discarded.removed.extend(removed?);
    }
    tracing::info!(%restore, removed = ?discarded.removed, "discarded what was there before a restore");
    Ok(discarded)
}

/// The marker goes last: what is half removed is still found.
fn remove(directory: &Path, marker: &Marker, running: &[PathBuf]) -> Result<Vec<String>, ApiError> {
    let mut removed = Vec::new();
    let links = read_links(directory).unwrap_or_default();
    let versions = fs::read_to_string(directory.join("PG_VERSION")).unwrap_or_default();
    let prefix = format!("PG_{}_", versions.trim());
    for location in &marker.tablespaces {
        // Only where its own link leads, and no other database's.
        let own = links.values().any(|to| to == location);
        let others = running
            .iter()
            .map(PathBuf::as_path)
            .chain(std::iter::once(marker.target.as_path()));
        let shared = others
            .filter_map(|data| read_links(data).ok())
            .any(|links| links.values().any(|to| to == location));
        if !own || shared {
            continue;
        }
        let entries = fs::read_dir(location).into_iter().flatten().flatten();
        for entry in entries {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                remove_tree(&entry.path()).map_err(|error| local(&entry.path(), &error))?;
                removed.push(entry.path().to_string_lossy().into_owned());
            }
        }
        // Ours, or one that somebody else put there something into: that stays.
        let _ = remove_empty(location);
    }
    for name in fs::read_dir(directory).map_err(|e| local(directory, &e))? {
        let path = name.map_err(|e| local(directory, &e))?.path();
        if path.file_name().is_some_and(|name| name == MARKER) {
            continue;
        }
        let is_directory = fs::symlink_metadata(&path).is_ok_and(|it| it.is_dir());
        let gone = if is_directory {
            remove_tree(&path)
        } else {
            fs::remove_file(&path)
        };
        gone.map_err(|error| local(&path, &error))?;
    }
    remove_tree(directory).map_err(|error| local(directory, &error))?;
    sync_parent(directory).map_err(|error| local(directory, &error))?;
    removed.push(directory.to_string_lossy().into_owned());
    Ok(removed)
}
