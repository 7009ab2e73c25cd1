//! `gs_pitr wal`: what the agents ship all the time, switched on and off.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use agent_api::{ErrorKind, StartWal, WalState, WalStatus};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::agents::{self, Agent};
use crate::cluster::{Cluster, ProxyArgs, Purpose};
use crate::commands::backup::nodes::{Choice, Told, check_hosts, choose};
use crate::exit;
use crate::failure::{Failure, Result};
use crate::operations::all_or_cancel;
use crate::printer::{Printer, bytes, duration};
use crate::repo;
use crate::settings::values::{Address, ByteRate};
use crate::settings::{LevelArgs, NodesArgs, Options, Settings};

/// `gs_pitr wal`
#[derive(Debug, Subcommand)]
pub(crate) enum WalCommand {
    /// Show what each agent ships, how far it is behind, and what is missing
    #[command(after_long_help = exit::help("
        gs_pitr wal status --nodes db1:18080,db2:18080
        gs_pitr wal status --host proxy1 --username backup
        gs_pitr wal status --profile prod --output json"))]
    Status(WalStatusArgs),
    /// Have the agents ship WAL all the time; every backup does it by itself unless `--wal backup` is given
    #[command(after_long_help = exit::help("
        gs_pitr wal start --nodes db1:18080,db2:18080
        gs_pitr wal start --nodes db1:18080 --bandwidth 20MiB --wal-hold 10GiB"))]
    Start(WalStartArgs),
    /// Have the agents stop that, and let the databases remove what they held
    #[command(after_long_help = exit::help("
        gs_pitr wal stop --nodes db1:18080,db2:18080"))]
    Stop(WalStopArgs),
}

/// `gs_pitr wal status`
#[derive(Debug, Args)]
pub(crate) struct WalStatusArgs {
    #[command(flatten)]
    nodes: NodesArgs,
    #[command(flatten)]
    proxy: ProxyArgs,
}

/// `gs_pitr wal stop`
#[derive(Debug, Args)]
pub(crate) struct WalStopArgs {
    #[command(flatten)]
    nodes: NodesArgs,
    #[command(flatten)]
    proxy: ProxyArgs,
}

/// `gs_pitr wal start`
#[derive(Debug, Args)]
pub(crate) struct WalStartArgs {
    #[command(flatten)]
    nodes: NodesArgs,
    /// Most bytes a second that each agent sends to the bucket for this, such as 20MiB
    #[arg(
        long,
        env = "GS_PITR_BANDWIDTH",
        hide_env_values = true,
        value_name = "RATE"
    )]
    bandwidth: Option<ByteRate>,
    /// WAL that may be held back on each node, such as 10GiB; never more than a quarter of what is free on its file system, nor
    /// than the agent's own `--wal-hold`
    #[arg(long, value_name = "SIZE")]
    wal_hold: Option<ByteRate>,
    #[command(flatten)]
    level: LevelArgs,
    /// End what an agent ships for another node, epoch or repository
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    proxy: ProxyArgs,
}

impl WalCommand {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        let own = match self {
            Self::Status(args) => Options::from(&args.nodes),
            Self::Stop(args) => Options::from(&args.nodes),
            Self::Start(args) => Options::from(&args.nodes).combine(Options::from(&args.level)),
        };
        own.combine(Options::from(self.proxy()))
    }

    fn proxy(&self) -> &ProxyArgs {
        match self {
            Self::Status(args) => &args.proxy,
            Self::Stop(args) => &args.proxy,
            Self::Start(args) => &args.proxy,
        }
    }

    /// The command's name as it stands in results.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Status(_) => "wal status",
            Self::Start(_) => "wal start",
            Self::Stop(_) => "wal stop",
        }
    }
}

/// Runs the command.
pub(crate) async fn run(
    command: &WalCommand,
    settings: &Settings,
    printer: &Printer,
) -> Result<()> {
    let cancel = CancellationToken::new();
    let nodes = addresses(command.proxy(), settings, printer, &cancel).await?;
    let statuses = match command {
        WalCommand::Status(_) => asked(&nodes, false, settings, printer, &cancel).await?,
        WalCommand::Start(args) => start(args, &nodes, settings, printer, &cancel).await?,
        WalCommand::Stop(_) => asked(&nodes, true, settings, printer, &cancel).await?,
    };
    for (agent, status) in &statuses {
        let fields = of_agent(agent, status);
        printer.event("wal", fields, None);
    }
    printer.text(&text(&statuses));
    if matches!(command, WalCommand::Stop(_)) {
        for (agent, status) in &statuses {
            if let Some(error) = &status.last_error {
                printer.warning(Some(&agent.name()), error);
            }
        }
    } else if let Some(failure) = worst(&statuses) {
        return Err(failure);
    }
    let nodes: Vec<_> = statuses
        .iter()
        .map(|(agent, status)| of_agent(agent, status))
        .collect();
    printer.result(command.name(), json!({ "nodes": nodes }));
    Ok(())
}

/// The agents: of `--nodes`, or of the data nodes that the proxies tell of. A database may be down.
async fn addresses(
    proxy: &ProxyArgs,
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<Vec<Address>> {
    let access = proxy.access(settings, printer)?;
    let Some(access) = access.filter(|_| !settings.has_nodes()) else {
        return Ok(settings.nodes()?.to_vec());
    };
    let found = Cluster::discover(&access, Purpose::Restore, settings, printer, cancel);
    Ok(found.await?.agents())
}

type Statuses = Vec<(Arc<Agent>, WalStatus)>;

/// What each agent ships; told to `stop`, what it shipped.
async fn asked(
    nodes: &[Address],
    stop: bool,
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<Statuses> {
    let agents = agents::all(nodes, settings, printer)?;
    all_or_cancel(agents, cancel, |agent, cancel| async move {
        let status = if stop {
            agent.stop_wal(&cancel).await?
        } else {
            agent.wal(&cancel).await?
        };
        Ok((agent, status))
    })
    .await
}

async fn start(
    args: &WalStartArgs,
    nodes: &[Address],
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<Statuses> {
    let catalog = repo::open(settings).await?;
    let hosts = agents::connect(nodes, settings, printer, cancel).await?;
    check_hosts(&hosts)?;
    let bandwidth = args.bandwidth.map(|rate| rate.0).or(settings.bandwidth());
    let mut orders = Vec::new();
    for host in hosts {
        let name = host.agent.name();
        let said = Told {
            node_id: &[],
            new_node: &[],
        };
        let choice = choose(&catalog, &host, said).await;
        let (node_id, epoch) = match choice.map_err(|failure| failure.on(&*name))? {
            Choice::Known(node, epoch) => (node, epoch),
            Choice::Moved(_) | Choice::New => {
                let message = format!(
                    "the database of the agent at {name} has no backup where it is now, and WAL without one leads nowhere"
                );
                let failure = Failure::new(ErrorKind::NotFound, message).on(name);
                return Err(failure.next("gs_pitr backup: it starts this, too"));
            }
        };
        let order = StartWal {
            repository: repo::access(settings, !host.facts.has_credentials).await?,
            node_id,
            epoch,
            level: settings.level(),
            bandwidth,
            hold: args.wal_hold.map(|size| size.0),
            replace: args.replace,
        };
        orders.push((host.agent, order));
    }
    all_or_cancel(orders, cancel, |(agent, order), cancel| async move {
        agent.start_wal(&order, &cancel).await?;
        let status = begun(&agent, &cancel).await?;
        Ok((agent, status))
    })
    .await
}

/// Waits a little for the beginning: what is in the way of it shows then.
async fn begun(agent: &Agent, cancel: &CancellationToken) -> Result<WalStatus> {
    let mut status = agent.wal(cancel).await?;
    for _ in 0..50 {
        let settled = status.state != WalState::Waiting || status.last_error.is_some();
        if settled {
            break;
        }
        agents::pause(Duration::from_millis(200), cancel).await?;
        status = agent.wal(cancel).await?;
    }
    Ok(status)
}

fn of_agent(agent: &Agent, status: &WalStatus) -> Value {
    let mut fields = serde_json::to_value(status).unwrap_or_default();
    if let Value::Object(fields) = &mut fields {
        fields.insert("agent".to_owned(), agent.name().into());
    }
    fields
}

/// What an exit code has to say of the agents: the worst of them.
fn worst(statuses: &Statuses) -> Option<Failure> {
    let grave = |status: &WalStatus| match status.state {
        WalState::Refused => 4,
        WalState::Gap => 3,
        _ if status.gap.is_some() => 2,
        WalState::Waiting => 1,
        WalState::Running | WalState::Off => 0,
    };
    let worst = statuses.iter().max_by_key(|(_, status)| grave(status));
    let (agent, status) = worst.filter(|(_, status)| grave(status) > 0)?;
    let why = status.last_error.clone();
    let (kind, message) = match (status.state, &status.gap) {
        (WalState::Refused, _) => (
            ErrorKind::Conflict,
            format!("WAL is not shipped: {}", why.unwrap_or_default()),
        ),
        (_, Some(gap)) => (
            ErrorKind::Damaged,
            format!(
                "WAL from {} to {} is missing in the bucket for good: {}",
                gap.from,
                gap.to.as_deref().unwrap_or("now"),
                gap.why
            ),
        ),
        _ => (
            status.error_kind.unwrap_or(ErrorKind::Timeout),
            format!(
                "WAL waits to be shipped: {}",
                why.unwrap_or_else(|| "it is just beginning".to_owned())
            ),
        ),
    };
    let failure = Failure::new(kind, message).on(agent.name());
    Some(match &status.next {
        Some(next) => failure.next(next.clone()),
        None => failure,
    })
}

fn text(statuses: &Statuses) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "AGENT",
        "STATE",
        "NODE",
        "SHIPPED TO",
        "BEHIND",
        "HELD",
        "SINCE",
    ]);
    for (agent, status) in statuses {
        let node = status.node_id.map(|node| node.to_string());
        let since = status.since.map(|at| at.strftime("%F %TZ").to_string());
        table.add_row([
            agent.name(),
            status.state.to_string(),
            node.unwrap_or_else(|| "-".to_owned()),
            status.shipped_to.clone().unwrap_or_else(|| "-".to_owned()),
            lag(status),
            status.held_bytes.map_or_else(|| "-".to_owned(), bytes),
            since.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    let mut text = table.trim_fmt();
    for (agent, status) in statuses {
        for line in remarks(status) {
            let _ = write!(text, "\n{}: {line}", agent.name());
        }
    }
    text
}

/// How far the bucket is behind the node's disk. What is not a whole segment yet counts in bytes, not in seconds.
pub(crate) fn lag(status: &WalStatus) -> String {
    match (status.lag_bytes, status.lag_seconds) {
        (Some(lag), Some(seconds)) => {
            format!("{}, {}", bytes(lag), duration(Duration::from_secs(seconds)))
        }
        _ => "-".to_owned(),
    }
}

/// What a person should know of one agent's shipping.
pub(crate) fn remarks(status: &WalStatus) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(gap) = &status.gap {
        lines.push(format!(
            "gap from {} to {}: {}",
            gap.from,
            gap.to.as_deref().unwrap_or("where it will begin again"),
            gap.why
        ));
    }
    if let Some(error) = &status.last_error
        && status.gap.as_ref().is_none_or(|gap| gap.why != *error)
    {
        lines.push(error.clone());
    }
    if let Some(next) = &status.next {
        lines.push(format!("next: {next}"));
    }
    lines
}
