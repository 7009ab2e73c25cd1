//! `proxy-stand-in`: see `support::proxy`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args_os()
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    support::proxy::program::main(&arguments)
}
