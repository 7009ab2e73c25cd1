//! The program; all of it is in the library, so that tests reach what they need.

use std::process::ExitCode;

fn main() -> ExitCode {
    gs_pitr::main()
}
