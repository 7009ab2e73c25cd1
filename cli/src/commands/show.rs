//! `gs_pitr show`: what the repository has.

mod wal;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use agent_api::ErrorKind;
use catalog::Catalog;
use catalog::ids::BackupId;
use catalog::mirror::Mirror;
use catalog::model::{Manifest, ManifestState, NodeBackup, NodePoint, Point, Proof};
use catalog::reach::Reach;
use catalog::repo::{BackupState, ListedBackup, PointState};
use clap::Args;
use comfy_table::{Table, presets};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use crate::coordinator::obstacle::printable;
use crate::failure::{Failure, Result};
use crate::printer::{Printer, bytes, duration};
use crate::settings::{NodesArgs, Options, Settings};
use crate::{mirrored, repo};

/// `gs_pitr show`
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// The backup's id, or the beginning of one that is unique; without it, all are listed
    id: Option<String>,
    /// The same as ID
    #[arg(long = "id", value_name = "ID", conflicts_with = "id")]
    by_id: Option<String>,
    /// Only backups whose point has this commit sequence number; it may be several
    #[arg(long, value_name = "CSN", conflicts_with_all = ["id", "by_id"])]
    csn: Option<String>,
    /// Show what the local mirror had when the bucket was last seen; never a basis for a restore
    #[arg(long)]
    from_mirror: bool,
    #[command(flatten)]
    nodes: NodesArgs,
}

impl ShowArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::from(&self.nodes)
    }
}

/// One backup as it is shown.
#[derive(Debug, Serialize)]
struct Shown {
    id: String,
    mode: Option<String>,
    engine: Option<String>,
    /// What it builds on.
    parent: Option<String>,
    /// `complete`, `deleted`, `abandoned`, `unfinished`, or `damaged`, `newer-format`.
    status: &'static str,
    consistency: Option<catalog::model::Consistency>,
    /// Why it is no better.
    unproved: Option<String>,
    point: Option<String>,
    /// How the point was proved; only when one backup is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    proof: Option<Proof>,
    started: Option<Timestamp>,
    completed: Option<Timestamp>,
    label: Option<String>,
    /// Why it cannot be used.
    problem: Option<String>,
    /// Points beside its own that it can be recovered to; only when one backup is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    other_points: Option<OtherPoints>,
    nodes: Vec<ShownNode>,
}

#[derive(Debug, Serialize)]
struct OtherPoints {
    count: usize,
    /// The newest.
    last: Option<String>,
    last_made: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
struct ShownNode {
    node_id: Uuid,
    host: String,
    port: u16,
    plain_bytes: u64,
    stored_bytes: u64,
    files: u64,
    seconds: f64,
    attempt: u32,
    epoch: String,
    timeline: u32,
    server_version_num: u32,
    start_lsn: String,
    stop_lsn: String,
    wal_first: String,
    wal_last: String,
    data_directory: String,
    tablespaces: usize,
    /// Program and version that made the copy; `null`: the agent itself.
    program: Option<String>,
    corrupt_pages: Vec<String>,
    /// Only when one backup is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    restore_point: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    point_lsn: Option<String>,
}

/// Runs the command.
pub(crate) async fn run(args: &ShowArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let id = args.id.as_deref().or(args.by_id.as_deref());
    if args.from_mirror {
        let mirror = mirrored::find(settings)?;
        let message = "this is what the local mirror had when the bucket was last seen";
        printer.warning(None, message);
        let mut backups = from_mirror(&mirror, id).await?;
        if let Some(csn) = &args.csn {
            let points = mirror.points().await?;
            keep_csn(&mut backups, csn, points.iter());
        }
        printer.text(&text(&backups, id));
        printer.result("show", json!({"source": "mirror", "backups": backups}));
        return Ok(());
    }
    let found = from_bucket(id, settings).await;
    let (mut backups, points, catalog) = found.map_err(|failure| match failure.kind {
        ErrorKind::StoreUnavailable => Failure {
            next: failure
                .next
                .map(|next| format!("{next}; the last known state: gs_pitr show --from-mirror")),
            ..failure
        },
        _ => failure,
    })?;
    // With one backup only it could not be said whether it is the newest.
    let wal = match id {
        None => wal::look(&catalog, &backups, settings, printer).await?,
        Some(_) => Vec::new(),
    };
    if let Some(csn) = &args.csn {
        let listed = catalog.points().await?;
        let points = listed.iter().filter_map(|listed| match &listed.state {
            PointState::Usable(point) => Some(&**point),
            PointState::Unusable(_) => None,
        });
        keep_csn(&mut backups, csn, points);
    }
    let mut words = format!("{}{}", text(&backups, id), wal::text(&wal));
    if let Some(count) = points.filter(|count| *count > 0) {
        let _ = write!(
            words,
            "\n{count} points beside those of the backups: gs_pitr point list"
        );
    }
    printer.text(&words);
    mirrored::refresh(&catalog, settings, printer).await;
    let fields = json!({
        "source": "bucket",
        "backups": backups,
        "wal": wal,
        "other_points": points,
    });
    printer.result("show", fields);
    Ok(())
}

/// Leaves the backups whose point has this CSN.
fn keep_csn<'a>(backups: &mut Vec<Shown>, csn: &str, points: impl Iterator<Item = &'a Point>) {
    let points = points.filter(|point| point.csn.as_deref() == Some(csn));
    let names: Vec<&str> = points.map(|point| point.point_id.as_str()).collect();
    backups.retain(|backup| {
        let point = backup.point.as_deref();
        point.is_some_and(|point| names.contains(&point))
    });
}

fn text(backups: &[Shown], id: Option<&str>) -> String {
    match (id, backups) {
        (Some(_), [backup]) => detail(backup),
        _ => table(backups),
    }
}

/// What the bucket has: the backups; if all are listed, how many points there are beside theirs; the catalog.
async fn from_bucket(
    id: Option<&str>,
    settings: &Settings,
) -> Result<(Vec<Shown>, Option<usize>, Catalog)> {
    let catalog = repo::open(settings).await?;
    let Some(id) = id else {
        let all: Vec<Shown> = catalog.backups().await?.into_iter().map(listed).collect();
        let own: BTreeSet<&str> = all.iter().filter_map(|it| it.point.as_deref()).collect();
        let points = catalog.point_ids().await?;
        let others = points
            .iter()
            .filter(|id| !own.contains(id.as_str()))
            .count();
        return Ok((all, Some(others), catalog));
    };
    let id = catalog.resolve_backup_id(id).await?;
    let found = catalog.restorable(&id).await?;
    let others = other_points(&catalog, &found.manifest).await?;
    let mut shown = shown(found.manifest, Some(&found.point));
    shown.other_points = Some(others);
    Ok((vec![shown], None, catalog))
}

async fn other_points(catalog: &Catalog, manifest: &Manifest) -> Result<OtherPoints> {
    let reach = Reach::read(catalog).await?;
    let own = |point: &&Point| manifest.point.as_ref() == Some(&point.point_id);
    let leads = |point: &&Point| reach.leads(manifest, point, &[]).is_ok();
    let others: Vec<&Point> = reach
        .points()
        .iter()
        .filter(|point| !own(point) && leads(point))
        .collect();
    let last = others.last();
    Ok(OtherPoints {
        count: others.len(),
        last: last.map(|point| point.point_id.to_string()),
        last_made: last.map(|point| point.made()),
    })
}

async fn from_mirror(mirror: &Mirror, id: Option<&str>) -> Result<Vec<Shown>> {
    let manifests = mirror.backups().await?;
    let Some(id) = id else {
        return Ok(manifests
            .into_iter()
            .map(|manifest| shown(manifest, None))
            .collect());
    };
    let matching = |manifest: &Manifest| manifest.backup_id.as_str().starts_with(id);
    let mut found: Vec<_> = manifests.into_iter().filter(matching).collect();
    let manifest = match (found.pop(), found.as_slice()) {
        (Some(manifest), []) => manifest,
        (None, _) => {
            let message = format!("the mirror has no backup `{id}`");
            return Err(Failure::new(ErrorKind::NotFound, message));
        }
        (Some(last), others) => {
            let ids: Vec<&BackupId> = others
                .iter()
                .chain([&last])
                .map(|it| &it.backup_id)
                .collect();
            let ids: Vec<_> = ids.into_iter().map(ToString::to_string).collect();
            let message = format!("backup `{id}` is ambiguous: {}", ids.join(", "));
            return Err(Failure::usage(message));
        }
    };
    let points = mirror.points().await?;
    let point = points
        .iter()
        .find(|point| Some(&point.point_id) == manifest.point.as_ref());
    Ok(vec![shown(manifest, point)])
}

fn listed(backup: ListedBackup) -> Shown {
    let bare = |status, problem| Shown {
        id: backup.name.clone(),
        mode: None,
        engine: None,
        parent: None,
        status,
        consistency: None,
        unproved: None,
        point: None,
        proof: None,
        started: None,
        completed: None,
        label: None,
        problem,
        other_points: None,
        nodes: Vec::new(),
    };
    match backup.state {
        BackupState::Complete(manifest) | BackupState::Abandoned(manifest) => {
            shown(*manifest, None)
        }
        BackupState::Deleted => bare("deleted", None),
        BackupState::Unfinished => bare("unfinished", None),
        BackupState::Unusable(error) => {
            let status = match error {
                catalog::CatalogError::NewerFormat { .. } => "newer-format",
                _ => "damaged",
            };
            bare(status, Some(error.to_string()))
        }
    }
}

fn shown(manifest: Manifest, point: Option<&Point>) -> Shown {
    let points: BTreeMap<Uuid, &NodePoint> = point
        .iter()
        .flat_map(|point| &point.nodes)
        .map(|node| (node.node_id, node))
        .collect();
    let nodes = manifest.nodes.into_iter();
    let nodes = nodes.map(|node| {
        let point = points.get(&node.node_id).copied();
        shown_node(node, point)
    });
    let nodes = nodes.collect();
    let (status, complete) = match manifest.state {
        ManifestState::Complete => ("complete", true),
        ManifestState::Abandoned => ("abandoned", false),
    };
    Shown {
        id: manifest.backup_id.to_string(),
        mode: Some(manifest.mode),
        engine: Some(manifest.engine),
        parent: manifest.parent.map(|parent| parent.to_string()),
        status,
        consistency: complete.then_some(manifest.consistency),
        unproved: manifest.unproved,
        point: manifest.point.map(|point| point.to_string()),
        proof: point.and_then(|point| point.proof.clone()),
        started: Some(manifest.started),
        completed: complete.then_some(manifest.completed),
        label: manifest.label,
        problem: None,
        other_points: None,
        nodes,
    }
}

fn shown_node(node: NodeBackup, point: Option<&NodePoint>) -> ShownNode {
    ShownNode {
        node_id: node.node_id,
        host: node.host,
        port: node.port,
        plain_bytes: node.plain_bytes,
        stored_bytes: node.stored_bytes,
        files: node.files,
        seconds: node.completed.duration_since(node.started).as_secs_f64(),
        attempt: node.attempt,
        epoch: node.epoch.to_string(),
        timeline: node.timeline,
        server_version_num: node.server_version_num,
        start_lsn: node.start_lsn,
        stop_lsn: node.stop_lsn,
        wal_first: node.wal_first,
        // The point's WAL reaches further than the copy's.
        wal_last: point.map_or(node.wal_last, |point| point.wal_last.clone()),
        data_directory: node.data_directory,
        tablespaces: node.tablespaces.len(),
        program: node
            .probackup
            .map(|it| format!("{} {} ({})", it.program, it.version, it.id)),
        corrupt_pages: node.corrupt_pages,
        restore_point: point.map(|point| point.restore_point.clone()),
        point_lsn: point.map(|point| point.end_lsn.clone()),
    }
}

fn moment(time: Option<Timestamp>) -> String {
    time.map_or_else(
        || "-".to_owned(),
        |time| time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
    )
}

fn word(text: Option<&str>) -> &str {
    text.unwrap_or("-")
}

fn consistency(backup: &Shown) -> &'static str {
    match backup.consistency {
        Some(catalog::model::Consistency::PerNode) => "per-node",
        Some(catalog::model::Consistency::Cluster) => "cluster",
        None => "-",
    }
}

fn sum(backup: &Shown, of: impl Fn(&ShownNode) -> u64) -> String {
    if backup.nodes.is_empty() {
        return "-".to_owned();
    }
    bytes(backup.nodes.iter().map(of).fold(0, u64::saturating_add))
}

fn table(backups: &[Shown]) -> String {
    if backups.is_empty() {
        return "no backups".to_owned();
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "ID",
        "MODE",
        "ENGINE",
        "STATUS",
        "CONSISTENCY",
        "COMPLETED",
        "NODES",
        "PLAIN",
        "STORED",
        "LABEL",
    ]);
    for backup in backups {
        table.add_row([
            backup.id.clone(),
            word(backup.mode.as_deref()).to_owned(),
            word(backup.engine.as_deref()).to_owned(),
            backup.status.to_owned(),
            consistency(backup).to_owned(),
            moment(backup.completed),
            backup.nodes.len().to_string(),
            sum(backup, |node| node.plain_bytes),
            sum(backup, |node| node.stored_bytes),
            word(backup.label.as_deref()).to_owned(),
        ]);
    }
    let mut text = table.trim_fmt();
    for backup in backups {
        if let Some(problem) = &backup.problem {
            let _ = write!(text, "\n{}: {problem}", backup.id);
        }
    }
    text
}

/// How the point was proved, or why it was not.
fn proof(backup: &Shown) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    if let Some(why) = &backup.unproved {
        rows.push(("unproved", why.replace(char::is_control, "?")));
    }
    let Some(proof) = &backup.proof else {
        return rows;
    };
    if let Some(ms) = proof.window_ms {
        rows.push((
            "proved",
            format!("at attempt {}, in {ms} ms", proof.attempts),
        ));
    }
    for prepared in &proof.in_doubt {
        let text = format!(
            "`{}` of database `{}` on node {}, prepared for {}",
            printable(&prepared.gid),
            printable(&prepared.database),
            prepared.node_id,
            duration(Duration::from_millis(prepared.age_ms))
        );
        rows.push(("in doubt", text));
    }
    rows
}

fn detail(backup: &Shown) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let version = |number: u32| format!("{}.{}", number / 10_000, number % 10_000);
    let rows = [
        ("backup", backup.id.clone()),
        ("status", backup.status.to_owned()),
        ("mode", word(backup.mode.as_deref()).to_owned()),
        ("engine", word(backup.engine.as_deref()).to_owned()),
        ("consistency", consistency(backup).to_owned()),
        ("point", word(backup.point.as_deref()).to_owned()),
        ("label", word(backup.label.as_deref()).to_owned()),
        ("started", moment(backup.started)),
        ("completed", moment(backup.completed)),
    ];
    for (name, value) in rows {
        table.add_row([name.to_owned(), value]);
        if name == "engine"
            && let Some(parent) = &backup.parent
        {
            table.add_row(["builds on".to_owned(), parent.clone()]);
        }
        if name == "point" {
            for (name, value) in proof(backup) {
                table.add_row([name.to_owned(), value]);
            }
            if let Some(others) = backup.other_points.as_ref().filter(|it| it.count > 0) {
                let last = word(others.last.as_deref());
                let value = format!(
                    "{}, the last {last} ({})",
                    others.count,
                    moment(others.last_made)
                );
                table.add_row(["other points".to_owned(), value]);
            }
        }
    }
    for node in &backup.nodes {
        let stored = format!(
            "{} plain, {} stored, {} files",
            bytes(node.plain_bytes),
            bytes(node.stored_bytes),
            node.files
        );
        let rows = [
            ("", String::new()),
            ("node", node.node_id.to_string()),
            ("  source", format!("{}:{}", node.host, node.port)),
            ("  version", version(node.server_version_num)),
            ("  data directory", node.data_directory.clone()),
            ("  tablespaces", node.tablespaces.to_string()),
            ("  size", stored),
            (
                "  copy",
                format!(
                    "{} to {} on timeline {}",
                    node.start_lsn, node.stop_lsn, node.timeline
                ),
            ),
            (
                "  point",
                format!(
                    "{} ({})",
                    word(node.point_lsn.as_deref()),
                    word(node.restore_point.as_deref())
                ),
            ),
            ("  WAL", format!("{} to {}", node.wal_first, node.wal_last)),
            (
                "  epoch",
                format!("{}, attempt {}", node.epoch, node.attempt),
            ),
        ];
        for (name, value) in rows {
            table.add_row([name.to_owned(), value]);
        }
        if let Some(program) = &node.program {
            table.add_row(["  copied by".to_owned(), program.clone()]);
        }
        if !node.corrupt_pages.is_empty() {
            table.add_row(["  corrupt pages".to_owned(), node.corrupt_pages.join(", ")]);
        }
    }
    table.trim_fmt()
}
