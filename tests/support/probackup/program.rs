//! The stand-in's main.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use super::args::Args;
use super::backup;
use super::catalog::Catalog;
use super::faults::{self, Faults};
use super::log::Log;
use super::{Failure, Kind, STAND_IN_MARK, restore, show, validate};

/// Runs one command. `arguments` begins with the program's name.
///
/// The real programs end with 0, or with 1 after an `ERROR: ` line; so does this one.
pub fn main(arguments: &[String]) -> ExitCode {
    let name = arguments.first().map(String::as_str).unwrap_or_default();
    let Some(kind) = kind_of(name) else {
        let _ = io::stderr().write_all(
            b"ERROR: call the stand-in as gs_probackup or pg_probackup, or set PROBACKUP_STAND_IN to gs or pg\n",
        );
        return ExitCode::FAILURE;
    };
    let log = Log::new(kind);
    match command(kind, log, arguments.get(1..).unwrap_or_default()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // An empty one has been said where it happened.
            if !failure.0.is_empty() {
                log.error(&failure.0);
            }
            ExitCode::FAILURE
        }
    }
}

fn kind_of(program: &str) -> Option<Kind> {
    let asked = std::env::var("PROBACKUP_STAND_IN").unwrap_or_default();
    match (asked.as_str(), Path::new(program).file_name()?.to_str()?) {
        ("gs", _) => Some(Kind::Gs),
        ("pg", _) => Some(Kind::Pg),
        (_, name) => [Kind::Gs, Kind::Pg]
            .into_iter()
            .find(|kind| kind.program() == name),
    }
}

fn version(kind: Kind) -> String {
    match kind {
        // gs_probackup prints the openGauss build, not its own version.
        Kind::Gs => format!(
            "gs_probackup (openGauss 5.0.0 build ) the {STAND_IN_MARK} of gs_pitr's tests\n"
        ),
        Kind::Pg => format!(
            "pg_probackup {} (PostgreSQL 12 to 18) the {STAND_IN_MARK} of gs_pitr's tests\n",
            kind.version()
        ),
    }
}

fn command(kind: Kind, log: Log, arguments: &[String]) -> Result<(), Failure> {
    if matches!(
        arguments.first().map(String::as_str),
        Some("--version" | "version" | "-V")
    ) {
        let _ = io::stdout().write_all(version(kind).as_bytes());
        return Ok(());
    }
    let args = Args::parse(kind, arguments)?;
    let faults = Faults::from_environment()?;
    let root = args.catalog.clone().ok_or_else(|| {
        Failure::new("required parameter not specified: BACKUP_PATH (-B, --backup-path)")
    })?;
    let runtime = runtime()?;
    if args.command == "init" {
        return Catalog::new(kind, log, &root, "").init();
    }
    let Some(instance) = &args.instance else {
        return match args.command.as_str() {
            "show" | "validate" => every_instance(kind, log, &root, &args, &faults),
            _ => Err(Failure::new("required parameter not specified: --instance")),
        };
    };
    let catalog = Catalog::new(kind, log, &root, instance);
    match args.command.as_str() {
        "add-instance" => {
            let data = args.data.clone().ok_or_else(|| {
                Failure::new("Required parameter not specified: PGDATA (-D, --pgdata)")
            })?;
            catalog.add_instance(&data)
        }
        "backup" => backup::run(&catalog, &args, &faults, runtime),
        "restore" => restore::run(&catalog, &args, &faults),
        "validate" => validate::run(&catalog, args.backup_id.as_deref(), &faults),
        "show" => show::show(&catalog, args.backup_id.as_deref(), args.json),
        "delete" => {
            let id = args.backup_id.clone().ok_or_else(|| {
                Failure::new("You must specify at least one of the delete options: -i")
            })?;
            show::delete(&catalog, &id)
        }
        other => Err(Failure::new(format!(
            "the stand-in knows no command \"{other}\""
        ))),
    }
}

fn every_instance(
    kind: Kind,
    log: Log,
    root: &Path,
    args: &Args,
    faults: &Faults,
) -> Result<(), Failure> {
    let directory = root.join("backups");
    let entries = std::fs::read_dir(&directory)
        .map_err(|e| Failure::call("open directory", &directory, e))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let catalog = Catalog::new(kind, log, root, &name);
        match args.command.as_str() {
            "show" => show::show(&catalog, None, args.json)?,
            _ => validate::run(&catalog, None, faults)?,
        }
    }
    Ok(())
}

/// Drives the sessions, and hears the signals that end a command in order.
fn runtime() -> Result<Arc<Runtime>, Failure> {
    let bad = |e: io::Error| Failure::new(format!("cannot start: {e}"));
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(bad)?;
    let context = runtime.enter();
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).map_err(bad)?;
        runtime.spawn(async move {
            while signals.recv().await.is_some() {
                faults::interrupt();
            }
        });
    }
    drop(context);
    Ok(Arc::new(runtime))
}
