//! The switch: what is at the target goes aside, the new data directory takes its place.
//!
//! Two lists of renames stand in the journal before the first of them. Each stage is journalled when all its renames
//! are durable, so that a rename that is done is known by its missing origin: while things go out nothing comes in.
//! [`step`] does the least that can be done at once; killed between any two, the next one goes on.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use super::files::{directory, entries, exists, is_absent_or_empty, remove_file, sync};
use super::journal::{Journal, Places, Rename, Stage};
use super::old;
use super::workspace::{Workspace, WorkspaceError, at, clear};

/// Renames all, where it is not done yet, and makes it durable.
pub(super) fn rename_all(renames: &[Rename]) -> Result<(), WorkspaceError> {
    while !rename_next(renames)? {}
    let parents = renames.iter().flat_map(|rename| [&rename.from, &rename.to]);
    let parents: BTreeSet<&Path> = parents.filter_map(|path| path.parent()).collect();
    for parent in parents {
        sync(parent).map_err(at(parent))?;
    }
    Ok(())
}

/// Does the next rename; whether there was none.
fn rename_next(renames: &[Rename]) -> Result<bool, WorkspaceError> {
    let Some(next) = renames.iter().find(|rename| exists(&rename.from)) else {
        return Ok(true);
    };
    // Onto an empty directory too; fails if it is not empty.
    fs::rename(&next.from, &next.to).map_err(at(&next.to))?;
    Ok(false)
}

/// Renames of everything in `from` (or of itself) to `to`.
fn of_content(from: &Path, to: &Path, inside: bool) -> Result<Vec<Rename>, WorkspaceError> {
    if !inside {
        return Ok(vec![Rename {
            from: from.to_owned(),
            to: to.to_owned(),
        }]);
    }
    let names = entries(from).map_err(at(from))?;
    let rename = |name: std::ffi::OsString| Rename {
        from: from.join(&name),
        to: to.join(&name),
    };
    Ok(names.into_iter().map(rename).collect())
}

/// Removes the database at the target, to make room. There is no way back from here.
pub(super) fn clear_target(
    workspace: &mut Workspace,
    version_directory: &str,
) -> Result<(), WorkspaceError> {
    let places = workspace.places.clone();
    directory(&places.removed).map_err(at(&places.removed))?;
    let to = if places.mount {
        places.removed.clone()
    } else {
        places.removed.join("data")
    };
    let out = of_content(&places.target, &to, places.mount)?;
    let spaces = workspace.journal.live.iter();
    let spaces = spaces.flat_map(|live| live.tablespaces.values());
    let cleared = spaces.map(|path| path.join(version_directory)).collect();
    workspace.note(|journal| {
        journal.out = out;
        journal.cleared = cleared;
        journal.clearing = true;
    })?;
    clear(&places, &workspace.journal)
}

/// From a promoted copy beside the target to one that stands there.
pub(super) fn run(workspace: &mut Workspace) -> Result<(), WorkspaceError> {
    while !step(workspace)? {}
    Ok(())
}

/// Does the next thing; whether there was none.
pub(super) fn step(workspace: &mut Workspace) -> Result<bool, WorkspaceError> {
    let places = workspace.places.clone();
    match workspace.journal.stage {
        Stage::Making | Stage::Proved | Stage::InPlace => return Ok(true),
        Stage::Promoted => plan(workspace, &places)?,
        Stage::Out => {
            if rename_next(&workspace.journal.out)? {
                rename_all(&workspace.journal.out)?;
                settle_old(&places, &workspace.journal)?;
                workspace.note(|journal| journal.stage = Stage::In)?;
            }
        }
        Stage::In => {
            if rename_next(&workspace.journal.into)? {
                rename_all(&workspace.journal.into)?;
                workspace.note(|journal| journal.stage = Stage::InPlace)?;
            }
        }
    }
    Ok(false)
}

fn plan(workspace: &mut Workspace, places: &Places) -> Result<(), WorkspaceError> {
    let replaces = workspace.journal.live.is_some() && !workspace.journal.clearing;
    let out = if replaces {
        of_content(&places.target, &places.old, places.mount)?
    } else if is_absent_or_empty(&places.target).map_err(at(&places.target))? {
        Vec::new()
    } else {
        return Err(WorkspaceError::Foreign(places.target.clone()));
    };
    if places.mount {
        if replaces && !exists(&places.old) {
            directory(&places.old).map_err(at(&places.old))?;
        }
        // A mount point keeps its own mode, and a server wants to be alone.
        let mode = fs::metadata(&places.data).map_err(at(&places.data))?;
        let mode = Permissions::from_mode(mode.permissions().mode() & 0o7777);
        fs::set_permissions(&places.target, mode).map_err(at(&places.target))?;
    }
    let into = of_content(&places.data, &places.target, places.mount)?;
    workspace.note(|journal| {
        journal.out = out;
        journal.into = into;
        journal.old = replaces.then(|| places.old.clone());
        journal.stage = Stage::Out;
    })
}

/// Marks what was moved aside as ours to discard, and leads its links to where its tablespaces' files are now: by the
/// old ones it would write into the new database's.
fn settle_old(places: &Places, journal: &Journal) -> Result<(), WorkspaceError> {
    let Some(old) = &journal.old else {
        return Ok(());
    };
    let settle = || -> io::Result<()> {
        let links = old.join("pg_tblspc");
        for literal in &journal.literal {
            let (Some(aside), Some(name)) = (&literal.aside, &literal.link) else {
                continue;
            };
            let new = links.join(format!("{name}.gs_pitr-new"));
            remove_file(&new)?;
            symlink(aside, &new)?;
            fs::rename(&new, links.join(name))?;
            sync(&links)?;
        }
        old::mark(old, places, journal)
    };
    settle().map_err(at(old))
}

#[cfg(test)]
mod tests;
