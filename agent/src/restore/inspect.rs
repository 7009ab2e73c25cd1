//! What is at a place that somebody may want to restore to.

use std::path::Path;

use agent_api::{ApiError, ErrorKind, TargetFacts};
use rustix::fs::statvfs;

use super::errors::local;
use super::files::{is_absent_or_empty, is_mount_point};
use super::live::Live;
use crate::config::Config;

/// Looks at `target`. Changes nothing.
///
/// # Errors
/// [`ErrorKind::Target`] if the agent may not restore there, or what is there cannot be looked at.
pub async fn target(config: &Config, target: &str) -> Result<TargetFacts, ApiError> {
    let path = real_target(config, Path::new(target))?;
    let text = path.to_str().ok_or_else(|| {
        let message = format!("the target {} is not UTF-8", path.display());
        ApiError::new(ErrorKind::Target, message)
    })?;
    let mount_point = is_mount_point(&path).map_err(|error| local(&path, &error))?;
    Ok(TargetFacts {
        target: text.to_owned(),
        empty: is_absent_or_empty(&path).map_err(|error| local(&path, &error))?,
        mount_point,
        free_bytes: free_bytes(room(&path, mount_point))?,
        cluster: Live::look(&path).await?.map(|live| live.facts()),
    })
}

/// The target with its links followed, checked to be one that the agent may restore to.
pub(crate) fn real_target(config: &Config, target: &Path) -> Result<std::path::PathBuf, ApiError> {
    let allowed = config.allowed_target(target)?;
    // A data directory may be reached by a link. What the link leads to is what is replaced.
    match allowed.canonicalize() {
        Ok(real) if real != allowed => config.allowed_target(&real),
        _ => Ok(allowed),
    }
}

/// Where the copy takes its room.
pub(super) fn room(target: &Path, mount_point: bool) -> &Path {
    if mount_point {
        target
    } else {
        target.parent().unwrap_or(target)
    }
}

/// Bytes free there for our user.
pub(super) fn free_bytes(directory: &Path) -> Result<u64, ApiError> {
    let free = statvfs(directory).map_err(|error| local(directory, &error.into()))?;
    Ok(free.f_bavail.saturating_mul(free.f_frsize))
}
