//! `probackup-stand-in`: see `support::probackup`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args_os()
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    support::probackup::program::main(&arguments)
}
