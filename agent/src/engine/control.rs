//! `global/pg_control` of a running server.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use agent_wal::control::{ControlError, ControlFile};

use super::copy_error::CopyError;
use super::pace::pause;

/// The control file in a data directory.
pub const CONTROL: &str = "global/pg_control";
/// `PG_CONTROL_FILE_SIZE`
const SIZE: usize = 8192;
/// The server writes the file in place; a torn reading is read again.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// A control file that was read whole.
#[derive(Debug)]
pub struct Control {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What they say.
    pub parsed: ControlFile,
}

/// Reads the control file of the data directory `pgdata` until its CRC is right. Blocks for a second at most.
///
/// # Errors
/// [`CopyError::Control`] if it never is, or is of a version we do not know; [`CopyError::Read`].
pub fn read(pgdata: &Path) -> Result<Control, CopyError> {
    let path = pgdata.join(CONTROL);
    let mut torn = None;
    for _ in 0..TRIES {
        // One system call: pieces would come from different moments.
        let mut bytes = vec![0; SIZE];
        let length = File::open(&path)
            .and_then(|file| retry_interrupted(|| file.read_at(&mut bytes, 0)))
            .map_err(|e| CopyError::read(&path, e))?;
        bytes.truncate(length);
        match ControlFile::parse(&bytes) {
            Ok(parsed) => return Ok(Control { bytes, parsed }),
            Err(error @ (ControlError::Crc { .. } | ControlError::Short(_))) => torn = Some(error),
            Err(error) => return Err(CopyError::Control(error.to_string())),
        }
        pause(PAUSE);
    }
    Err(CopyError::Control(torn.map_or_else(
        || "not read".to_owned(),
        |error| format!("{error}, {TRIES} times"),
    )))
}

fn retry_interrupted(mut read: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match read() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
