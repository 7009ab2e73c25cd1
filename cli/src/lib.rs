//! `gs_pitr`: one cluster-consistent backup of a sharded database, straight into a bucket, and back.

mod agents;
mod args;
mod certs;
mod chain;
mod cluster;
mod commands;
mod consent;
mod coordinator;
mod exit;
mod failure;
mod importing;
mod journalled;
mod leased;
mod mirrored;
mod moments;
mod operations;
mod printer;
mod removal;
mod repo;
mod restoring;
mod settings;
mod shipping;
mod signals;
mod unfinished;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;
use clap::error::ErrorKind as ClapErrorKind;

use crate::args::{Cli, Command};
pub use crate::coordinator::{obstacle, proof};
use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::{Format, Options, Settings};

/// Runs the program with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return not_parsed(&error, &arguments),
    };
    let name = cli.command.name();
    let early = Options::from(&cli.global).format();
    let (printer, outcome) = match settings(&cli) {
        Ok(settings) => {
            let printer = Printer::new(settings.format(), settings.progress());
            start_log(settings.verbose(), &printer);
            let outcome = run(cli.command, &settings, &printer);
            (printer, outcome)
        }
        Err(failure) => (Printer::new(early, false), Err(failure)),
    };
    let outcome = outcome.and_then(|()| match printer.take_error() {
        None => Ok(()),
        Some(error) => Err(Failure::file("stdout".as_ref(), "write", &error)),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let failure = failure.with_some_next();
            printer.failure(name, &failure);
            ExitCode::from(failure.kind.exit_code())
        }
    }
}

/// Help and version are no errors; a wrong command line is one, in the format that it asks for.
fn not_parsed(error: &clap::Error, arguments: &[OsString]) -> ExitCode {
    let asked = matches!(
        error.kind(),
        ClapErrorKind::DisplayHelp | ClapErrorKind::DisplayVersion
    );
    let says_json = |(first, second): (&OsString, Option<&OsString>)| {
        first == "--output=json" || (first == "--output" && second.is_some_and(|v| v == "json"))
    };
    let next = arguments.iter().skip(1).map(Some).chain([None]);
    let json = arguments.iter().zip(next).any(says_json)
        || std::env::var_os("GS_PITR_OUTPUT").is_some_and(|value| value == "json");
    if asked || !json {
        // Nobody is left to hear that stdout or stderr cannot be written.
        let _ = error.print();
        return ExitCode::from(if asked { 0 } else { 2 });
    }
    let text = error.render().to_string();
    let first = text.lines().next().unwrap_or_default();
    let message = first.strip_prefix("error: ").unwrap_or(first);
    let failure = Failure::usage(message).next("gs_pitr --help");
    Printer::new(Format::Json, false).failure("gs_pitr", &failure);
    ExitCode::from(failure.kind.exit_code())
}

fn settings(cli: &Cli) -> Result<Settings> {
    let own = match &cli.command {
        Command::Backup(args) => args.options(),
        Command::Point(command) => command.options(),
        Command::Restore(args) => args.options(),
        Command::Delete(args) => args.options(),
        Command::Prune(args) => args.options(),
        Command::Verify(args) => args.options(),
        Command::Check(args) => args.options(),
        Command::Unlock(args) => args.options(),
        Command::Metadata(args) => args.options(),
        Command::Operations(args) => args.options(),
        Command::Wal(command) => command.options(),
        Command::Show(args) => args.options(),
        Command::Certs(_) | Command::Completions(_) | Command::Man(_) => Options::default(),
    };
    Settings::resolve(&cli.global, own)
}

fn run(command: Command, settings: &Settings, printer: &Printer) -> Result<()> {
    match command {
        Command::Certs(command) => commands::certs::run(&command, settings, printer),
        Command::Completions(args) => {
            commands::completions::run(&args, printer);
            Ok(())
        }
        Command::Man(args) => commands::man::run(&args, printer),
        Command::Backup(args) => wait(commands::backup::run(&args, settings, printer)),
        Command::Point(command) => wait(commands::point::run(&command, settings, printer)),
        Command::Restore(args) => wait(commands::restore::run(&args, settings, printer)),
        Command::Delete(args) => wait(commands::delete::run(&args, settings, printer)),
        Command::Prune(args) => wait(commands::prune::run(&args, settings, printer)),
        Command::Verify(args) => wait(commands::verify::run(&args, settings, printer)),
        Command::Check(args) => wait(commands::check::run(&args, settings, printer)),
        Command::Unlock(args) => wait(commands::unlock::run(&args, settings, printer)),
        Command::Metadata(args) => wait(commands::metadata::run(&args, settings, printer)),
        Command::Operations(args) => wait(commands::operations::run(&args, settings, printer)),
        Command::Wal(command) => wait(commands::wal::run(&command, settings, printer)),
        Command::Show(args) => wait(commands::show::run(&args, settings, printer)),
    }
}

/// Runs what talks to others. Once it has ended nothing is waited for: a lookup or a read of the
/// terminal that still hangs must not keep the program.
fn wait(work: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| {
            let message = format!("cannot start the runtime: {error}");
            Failure::new(agent_api::ErrorKind::Internal, message)
        })?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_background();
    outcome
}

/// Logs what our own crates say, on stderr. Other crates' logs may hold what nobody should see.
fn start_log(verbose: u8, printer: &Printer) {
    let level = match verbose {
        0 => "error",
        1 => "info",
        _ => "debug",
    };
    let ours = ["gs_pitr", "agent_api", "agent_sql", "catalog", "pipeline"];
    let filter = ours.map(|name| format!("{name}={level}")).join(",");
    let printer = printer.clone();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_ansi(false)
        .with_writer(move || printer.log_writer())
        .init();
}
