//! Programs that the agent starts.

use std::ffi::OsStr;
use std::process::Stdio;

use tokio::process::Command;

/// A command without our secrets in its environment, without standard input, killed when it is dropped.
///
/// A child's environment can be read in `/proc` by everything of the same user, and a database started by
/// us would hand it on to all of its own children.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    let secret = |name: &OsStr| {
        let name = name.to_string_lossy();
        name.starts_with("AWS_") || name.starts_with("PITR_AGENT_") || name == "PGPASSWORD"
    };
    for (name, _) in std::env::vars_os() {
        if secret(&name) {
            command.env_remove(&name);
        }
    }
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}
