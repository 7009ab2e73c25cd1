//! `gs_pitr point list`: every point, and where it can be reached from.

use std::fmt::Write as _;
use std::time::Duration;

use catalog::model::Point;
use catalog::reach::{NoBase, Reach, Surveyed};
use clap::Args;
use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::create::consistency;
use crate::failure::Result;
use crate::moments::Moment;
use crate::printer::{Printer, duration};
use crate::repo;
use crate::settings::Settings;

/// The command's name in results.
pub(super) const COMMAND: &str = "point list";

/// `gs_pitr point list`
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only points that were not made before this: RFC 3339, or a local date and time
    #[arg(long, value_name = "TIME")]
    from: Option<Moment>,
    /// Only points that were not made after this
    #[arg(long, value_name = "TIME")]
    to: Option<Moment>,
    /// Only points that no backup leads to
    #[arg(long)]
    unreachable: bool,
    /// List so many, the newest; 0: all
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
}

/// Runs the command.
pub(super) async fn run(args: &ListArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let catalog = repo::open(settings).await?;
    let reach = Reach::read(&catalog).await?;
    for unusable in reach.unusable() {
        let message = format!("point {} cannot be used: {}", unusable.name, unusable.error);
        printer.warning(None, &message);
    }
    let wanted = |it: &Surveyed<'_>| {
        let made = it.point.made();
        args.from.is_none_or(|from| from.0 <= made)
            && args.to.is_none_or(|to| made <= to.0)
            && !(args.unreachable && it.base.is_ok())
    };
    let all: Vec<_> = reach.survey().filter(wanted).collect();
    let skipped = match args.limit {
        0 => 0,
        limit => all.len().saturating_sub(limit),
    };
    let shown = &all[skipped..];
    printer.text(&text(shown, skipped));
    let points: Vec<_> = shown.iter().map(fields).collect();
    printer.result(COMMAND, json!({"points": points, "not_shown": skipped}));
    Ok(())
}

fn text(points: &[Surveyed<'_>], skipped: usize) -> String {
    if points.is_empty() {
        return "no points".to_owned();
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "ID",
        "MADE",
        "CONSISTENCY",
        "CSN",
        "LOCKED",
        "REACHED FROM",
        "LABEL",
    ]);
    for it in points {
        let Point { csn, lock_ms, .. } = it.point;
        let from = match &it.base {
            Ok(base) => base.backup_id.to_string(),
            Err(_) => "unreachable".to_owned(),
        };
        table.add_row([
            it.point.point_id.to_string(),
            it.point.made().strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
            consistency(it.point).to_owned(),
            csn.clone().unwrap_or_else(|| "-".to_owned()),
            match lock_ms {
                0 => "-".to_owned(),
                ms => duration(Duration::from_millis(*ms)),
            },
            from,
            it.point.label.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    let mut text = table.trim_fmt();
    for it in points {
        if let Err(why) = &it.base {
            let _ = write!(text, "\n{}: {why}", it.point.point_id);
        }
    }
    if skipped > 0 {
        let _ = write!(text, "\n{skipped} older ones are not shown (--limit)");
    }
    text
}

fn fields(it: &Surveyed<'_>) -> Value {
    let point = it.point;
    let (base, unreachable) = match &it.base {
        Ok(base) => (Some(&base.backup_id), None),
        Err(why) => (None, Some(why)),
    };
    let older = match unreachable {
        Some(NoBase::Unreachable(id, _)) => Some(id),
        _ => None,
    };
    json!({
        "point_id": point.point_id,
        "made": point.made(),
        "created": point.created,
        "consistency": point.consistency,
        "csn": point.csn,
        "lock_ms": point.lock_ms,
        "label": point.label,
        "base": base,
        "made_on": point.base,
        "unreachable": unreachable.map(ToString::to_string),
        "unreachable_from": older,
        "nodes": point.nodes.iter().map(|node| node.node_id).collect::<Vec<_>>(),
    })
}
