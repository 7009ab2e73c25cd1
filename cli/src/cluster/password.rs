//! Where the proxies' password comes from. It is held in memory only: it stands in no log, error, result or journal, and
//! no program that we start inherits it.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use agent_api::{ErrorKind, Secret};
use clap::builder::{StringValueParser, TypedValueParser};

use crate::failure::{Failure, Result};
use crate::printer::Printer;

/// Holds the password.
pub(crate) const VARIABLE: &str = "GS_PITR_PROXY_PASSWORD";
/// A password file is no larger.
const LONGEST: u64 = 4096;

/// Reads `--password`.
pub(super) fn argument() -> impl TypedValueParser<Value = Secret> {
    StringValueParser::new().map(Secret)
}

/// Says that a password on the command line is no secret.
pub(super) fn seen(printer: &Printer) {
    let message = format!(
        "`--password` on the command line can be seen by every user of this host (ps, /proc) and stays in the shell's history; safer: the environment variable `{VARIABLE}`, `--password-file FILE` (mode 0600), or no password at all on a terminal, to be asked for it"
    );
    printer.warning(None, &message);
}

/// The password: of the flag, the environment, the file, or of whoever is at the terminal. `None`: of nobody.
///
/// # Errors
/// A file that others may read, or nobody can; a terminal that cannot be read.
pub(super) fn find(
    flag: Option<&Secret>,
    file: Option<&Path>,
    user: &str,
) -> Result<Option<Secret>> {
    if let Some(secret) = flag {
        return Ok(Some(secret.clone()));
    }
    if let Some(value) = std::env::var_os(VARIABLE) {
        let text = value
            .into_string()
            .map_err(|_| Failure::usage(format!("`{VARIABLE}` is not UTF-8")))?;
        return Ok(Some(Secret(text)));
    }
    if let Some(path) = file {
        return of_file(path).map(Some);
    }
    if Printer::can_ask() {
        return asked(user).map(Some);
    }
    Ok(None)
}

/// The text of a file that nobody else may read, of at most `longest` bytes; `flag` names it.
///
/// # Errors
/// A file that others may read, that is too long, or that nobody can read.
pub(crate) fn private(path: &Path, flag: &str, longest: u64) -> Result<String> {
    let failed = |error: std::io::Error| Failure::file(path, "read", &error);
    let mut file = File::open(path).map_err(failed)?;
    // Of the file that is open, so that no other one takes its place in between.
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.mode() & 0o7777;
    if metadata.is_file() && mode & 0o077 != 0 {
        let path = path.display();
        let message = format!("`{flag} {path}` can be read by others (mode {mode:04o})");
        return Err(Failure::usage(message).next(format!("chmod 600 {path}")));
    }
    let mut text = String::new();
    let mut limited = (&mut file).take(longest + 1);
    limited.read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > longest {
        let message = format!("`{flag} {}` is too long", path.display());
        return Err(Failure::usage(message));
    }
    Ok(text)
}

/// The first line of a password file.
fn of_file(path: &Path) -> Result<Secret> {
    let text = private(path, "--password-file", LONGEST)?;
    let line = text.split('\n').next().unwrap_or_default();
    let line = line.strip_suffix('\r').unwrap_or(line);
    if line.is_empty() {
        let message = format!("the first line of `{}` is empty", path.display());
        return Err(Failure::usage(message).next("write the password into it"));
    }
    Ok(Secret(line.to_owned()))
}

/// Asks at the terminal, without showing what is typed.
fn asked(user: &str) -> Result<Secret> {
    let prompt = format!("Password of `{user}` for the proxies: ");
    rpassword::prompt_password(prompt)
        .map(Secret)
        .map_err(|error| {
            let message = format!("no password could be read at the terminal: {error}");
            Failure::new(ErrorKind::Usage, message)
                .next(format!("set `{VARIABLE}`, or give `--password-file`"))
        })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_password_file_is_private_and_its_first_line_counts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        let put = |text: &str, mode: u32| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            of_file(&path)
        };
        assert_eq!(put("s3 cret\nmore\n", 0o600).unwrap().0, "s3 cret");
        assert_eq!(put(" spaced \r\n", 0o400).unwrap().0, " spaced ");
        let open = put("s3cret", 0o640).unwrap_err();
        assert!(open.message.contains("mode 0640"), "{open:?}");
        assert!(!format!("{open:?}").contains("s3cret"));
        assert!(put("\n", 0o600).is_err());
        assert!(put(&"x".repeat(5000), 0o600).is_err());
        assert!(of_file(&directory.path().join("none")).is_err());
    }
}
