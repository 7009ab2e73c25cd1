//! `pitr-agent`: runs beside one data node, copies it into the bucket and brings it back.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use agent_api::ErrorKind;
use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use pitr_agent::catalog_fs::{life, private};
use pitr_agent::cleanup::Cleanup;
use pitr_agent::config::{Config, Settings};
use pitr_agent::engines::RealEngines;
use pitr_agent::operation::table::OperationTable;
use pitr_agent::serve::{ServeError, Server};
use pitr_agent::{allocator, facts, logging, restore, walget, walput};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

const EXAMPLES: &str = "\
Examples:
  A node's agent, reached over the network:
    pitr-agent --pgdata /var/lib/postgresql/15/main --listen 0.0.0.0 \\
      --tls-crt /etc/gs_pitr/db1.crt --tls-key /etc/gs_pitr/db1.key --tls-ca /etc/gs_pitr/ca.crt

  A host to restore on, which has no database yet:
    pitr-agent --allow-root /srv/restore --pg-bindir /usr/lib/postgresql/15/bin --config /etc/gs_pitr/agent.toml

  A trial on one host, without certificates:
    pitr-agent --insecure-http --pgdata /var/lib/postgresql/15/main --port 18080

  agent.toml has the flags' names as its keys; a command is an array there:
    listen = \"0.0.0.0\"
    allow-root = [\"/srv/restore\"]
    start-command = [\"sudo\", \"systemctl\", \"start\", \"postgresql@15-main\"]

A flag comes before its environment variable, that before the file, and that before the default.
Signals: SIGTERM and SIGINT stop it, after operations under way are cancelled; SIGHUP reads the certificates again.
Exit codes: 0 stopped as told, 1 failed, 2 wrong command line or configuration (nothing was started).";

/// Runs beside one data node, copies it into the bucket and brings it back.
#[derive(Debug, Parser)]
#[command(name = "pitr-agent", version, args_conflicts_with_subcommands = true)]
#[command(after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fetch one WAL file through a restoring agent's socket (for `restore_command`)
    #[command(name = walget::SUBCOMMAND)]
    WalGet {
        /// The agent's socket
        #[arg(long)]
        socket: std::path::PathBuf,
        /// Name of the WAL file (`%f`)
        file: String,
        /// Where to put it (`%p`)
        path: std::path::PathBuf,
    },
    /// Ask the agent whether the database may let go of a WAL file (for `archive_command` of openGauss)
    #[command(name = walput::SUBCOMMAND)]
    WalPut {
        /// The agent's socket
        #[arg(long)]
        socket: std::path::PathBuf,
        /// Where the WAL file is (`%p`); it is not read
        path: std::path::PathBuf,
        /// Its name (`%f`)
        file: String,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page
    Man,
}

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    // Before clap: a server takes most of clap's exit codes for the end of WAL, and runs both often.
    match args.next() {
        Some(first) if first == walget::SUBCOMMAND => return walget::main(args),
        Some(first) if first == walput::SUBCOMMAND => return walput::main(args),
        // Before anything that might start a thread; and its arguments are another program's.
        Some(first) if first == private::SUBCOMMAND => return private::main(args),
        _ => {}
    }
    let cli = Cli::parse();
    let result = match cli.command {
        None => return serve(cli.settings),
        Some(Command::WalGet { .. }) => return walget::main(std::env::args_os().skip(2)),
        Some(Command::WalPut { .. }) => return walput::main(std::env::args_os().skip(2)),
        Some(Command::Completions { shell }) => completions(shell),
        Some(Command::Man) => manual(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, ErrorKind::Internal),
    }
}

fn serve(settings: Settings) -> ExitCode {
    allocator::give_large_buffers_back();
    let config = match Config::load(settings) {
        Ok(config) => Arc::new(config),
        Err(error) => {
            let error = anyhow::Error::new(error).context("wrong configuration");
            return failed(&error, ErrorKind::Usage);
        }
    };
    logging::start(config.log_level, config.log_format);
    // Keys and passwords are in memory: no core dump, and nobody but root reads /proc/PID/environ or mem.
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!("cannot forbid core dumps: {error}");
    }
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let wrong_files = matches!(error.downcast_ref(), Some(ServeError::Tls(_)));
            let kind = if wrong_files {
                ErrorKind::Usage
            } else {
                ErrorKind::Internal
            };
            failed(&error, kind)
        }
    }
}

fn run(config: &Arc<Config>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("agent-io")
        .enable_all()
        .build()
        .context("cannot start the I/O threads")?;
    runtime.block_on(async {
        let server = Server::bind(Arc::clone(config)).await?;
        let cleanup = Cleanup::default();
        let engines = RealEngines {
            credentials: config.credentials.clone(),
            cleanup: cleanup.clone(),
        };
        let operations = OperationTable::new(Arc::clone(config), Arc::new(engines));
        let machine = facts::machine_id();
        if machine.starts_with("hostname:") {
            tracing::warn!("this host has no /etc/machine-id; it is known as {machine}");
        }
        if config.tls.is_none() {
            tracing::warn!("plain HTTP: every user of this host can give orders");
        }
        for told in life::detach_dead(&config.mount.runtime_dir).await {
            tracing::warn!("{told}");
            cleanup.tell(told);
        }
        // Before the archiver can ask, and before slots are dropped that nothing is shipped from.
        operations.wal().resume();
        if config.pgdata.is_some() {
            cleanup.begin(config, operations.wal()).await;
        }
        let socket = &config.archive_socket;
        match operations.gate().serve(socket) {
            Ok(()) => tracing::debug!("wal-put is answered on {}", socket.display()),
            // Only openGauss asks, and a backup of one says so.
            Err(error) => {
                tracing::warn!("wal-put is not answered on {}: {error}", socket.display());
            }
        }
        tokio::spawn(go_on(Arc::clone(config), operations.clone()));
        say(&format!("listening on {}", server.url())).context("cannot write to stdout")?;
        server.run(operations).await?;
        Ok(())
    })
}

/// Settles what restores have left that were running when the agent ended.
async fn go_on(config: Arc<Config>, operations: OperationTable) {
    for request in restore::at_start(&config).await {
        let operation = request.operation;
        if let Err(error) = operations.start(request) {
            tracing::error!(%operation, "cannot go on with a restore: {error}");
        }
    }
}

fn completions(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "pitr-agent", &mut script);
    io::stdout()
        .write_all(&script)
        .context("cannot write to stdout")
}

fn manual() -> anyhow::Result<()> {
    let page = clap_mangen::Man::new(Cli::command());
    page.render(&mut io::stdout())
        .context("cannot write to stdout")
}

/// The one line that whoever started the agent may wait for.
fn say(line: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}

/// Says why, on stderr: the log may not have begun.
fn failed(error: &anyhow::Error, kind: ErrorKind) -> ExitCode {
    // If stderr is closed, the exit code still says it.
    let _ = writeln!(io::stderr(), "pitr-agent: {error:#}");
    ExitCode::from(kind.exit_code())
}
