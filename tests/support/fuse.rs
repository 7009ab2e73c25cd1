//! Whether a test may mount.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use crate::os;

/// Makes the device usable for the user that agents run as, if we may.
///
/// # Errors
/// Why nothing can be mounted here.
pub fn ready() -> Result<(), String> {
    let device = Path::new("/dev/fuse");
    let mode = fs::metadata(device).map_err(|error| format!("/dev/fuse: {error}"))?;
    if mode.permissions().mode() & 0o006 == 0o006 {
        return Ok(());
    }
    // Some machines have it for root only; distributions have it for everybody.
    if os::database_user().is_none() {
        return Err("/dev/fuse is for root only, and we are not root".to_owned());
    }
    fs::set_permissions(device, fs::Permissions::from_mode(0o666))
        .map_err(|error| format!("/dev/fuse cannot be opened for others: {error}"))
}
