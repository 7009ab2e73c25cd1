//! `gs_pitr` as its users meet it: help, precedence, mistakes, certificates, what `show` says.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "cli/certs.rs"]
mod certs;
#[path = "cli/help.rs"]
mod help;
#[path = "cli/leases.rs"]
mod leases;
#[path = "cli/life.rs"]
mod life;
#[path = "cli/mistakes.rs"]
mod mistakes;
#[path = "cli/precedence.rs"]
mod precedence;
#[path = "cli/show.rs"]
mod show;
#[path = "cli/verify.rs"]
mod verify;

use std::path::Path;

use assert_cmd::Command;
use serde_json::Value;
use support::fleet::built_program;
use tempfile::TempDir;

/// A home of one's own, and nothing in the environment.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(built_program("gs_pitr"));
        command.args(args).env_clear().env("HOME", self.path());
        command.env("PATH", std::env::var_os("PATH").unwrap());
        command.env("COLUMNS", "100").current_dir(self.path());
        command.timeout(std::time::Duration::from_mins(2));
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        ran(&mut self.command(args))
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

/// What a run left.
#[derive(Debug)]
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    /// The last line of `--output json`.
    fn result(&self) -> Value {
        let last = self.stdout.lines().last();
        let last = last.unwrap_or_else(|| panic!("no output: {self:?}"));
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Exit code, kind and message of the error that it ended with.
    fn error(&self) -> (i32, String, String) {
        let result = self.result();
        assert_eq!(result["status"], "error", "{self:?}");
        let error = &result["error"];
        assert!(error["changed"].is_boolean(), "{self:?}");
        assert!(
            error["next"].as_str().is_some_and(|next| !next.is_empty()),
            "{self:?}"
        );
        let text = |key: &str| error[key].as_str().unwrap().to_owned();
        (self.code, text("kind"), text("message"))
    }
}

fn ran(command: &mut Command) -> Ran {
    let output = command.output().unwrap();
    let ran = Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    };
    assert!(!ran.stderr.contains("panicked"), "{ran:?}");
    ran
}
