//! Which local mirror belongs to which repository, for the day the bucket is away.

use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use agent_api::ErrorKind;
use catalog::Catalog;
use catalog::mirror::Mirror;

use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::Settings;

/// File in a mirror's directory that says whose it is.
const PLACE: &str = "place";
/// The longest that a command waits for the mirror, when its work is done.
const REFRESH_WITHIN: Duration = Duration::from_mins(2);

/// Brings the local mirror up to date. It decides nothing, so a failure is a warning.
pub(crate) async fn refresh(catalog: &Catalog, settings: &Settings, printer: &Printer) {
    let mirror = Mirror::new(&settings.home, catalog.repository().repository_id);
    let synced = tokio::time::timeout(REFRESH_WITHIN, mirror.sync(catalog)).await;
    let failure = match synced {
        Ok(Ok(_)) => match remember(settings, &mirror) {
            Ok(()) => return,
            Err(failure) => failure,
        },
        Ok(Err(error)) => Failure::from(error),
        Err(_) => Failure::new(ErrorKind::Timeout, "it took too long"),
    };
    let message = format!("the local mirror is not up to date: {failure}");
    printer.warning(None, &message);
}

/// A repository's place as one line.
fn place(settings: &Settings) -> Result<String> {
    let endpoint = settings.s3_endpoint().unwrap_or("AWS");
    Ok(format!("{} at {endpoint}\n", settings.repo()?))
}

/// Notes in `mirror` that it is the one of the settings' repository.
///
/// # Errors
/// If the note cannot be written.
fn remember(settings: &Settings, mirror: &Mirror) -> Result<()> {
    let (path, text) = (mirror.directory().join(PLACE), place(settings)?);
    if fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let write = || {
        let new = path.with_extension("new");
        let mut open = fs::OpenOptions::new();
        let mut file = open
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        fs::rename(&new, &path)
    };
    write().map_err(|error| Failure::file(&path, "write", &error))
}

/// The mirror of the settings' repository.
///
/// # Errors
/// If there is none.
pub(crate) fn find(settings: &Settings) -> Result<Mirror> {
    let (wanted, all) = (place(settings)?, settings.home.join("repositories"));
    let entries = match fs::read_dir(&all) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(none(settings, &all));
        }
        Err(error) => return Err(Failure::file(&all, "read", &error)),
    };
    // A prefix may have held another repository before: the note written last is the one.
    let mut found = None;
    for entry in entries.flatten() {
        let id = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let path = entry.path().join(PLACE);
        let its = fs::read_to_string(&path).is_ok_and(|its| its == wanted);
        let written = fs::metadata(&path).and_then(|meta| meta.modified());
        if let (Some(id), true, Ok(written)) = (id, its, written)
            && found.is_none_or(|(_, before)| before < written)
        {
            found = Some((id, written));
        }
    }
    match found {
        Some((id, _)) => Ok(Mirror::new(&settings.home, id)),
        None => Err(none(settings, &all)),
    }
}

fn none(settings: &Settings, all: &Path) -> Failure {
    let place = place(settings).unwrap_or_default();
    let message = format!("`{}` has no mirror of {}", all.display(), place.trim_end());
    Failure::new(ErrorKind::NotFound, message).next("gs_pitr show, when the bucket is there")
}
