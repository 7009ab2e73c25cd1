//! What was brought back, told by `restore` and by `operations resume`.

use std::fmt::Write as _;

use catalog::model::RestorePlan;
use serde_json::{Value, json};

use crate::printer::Printer;
use crate::restoring::Opened;

/// Tells what was brought back, as the result of `command`.
pub(crate) fn report(command: &str, plan: &RestorePlan, opened: &[Opened], printer: &Printer) {
    let mut text = format!("restored {} at point {}", plan.backup_id, plan.point_id);
    for node in opened {
        node_text(&mut text, node);
    }
    printer.text(&text);
    let nodes: Vec<_> = opened.iter().map(node_fields).collect();
    let fields = json!({
        "backup_id": plan.backup_id,
        "consistency": plan.consistency,
        "point": plan.point_id,
        "nodes": nodes,
    });
    printer.result(command, fields);
}

fn node_text(text: &mut String, node: &Opened) {
    let planned = &node.part.planned;
    let (id, host, port) = (planned.becomes, &planned.host, planned.port);
    let Some(restored) = &node.restored else {
        let _ = write!(
            text,
            "\n  {id} on {host}, port {port}, ended before\n    directory {}",
            planned.target
        );
        return;
    };
    let state = if restored.running {
        "running"
    } else {
        "stopped"
    };
    let _ = write!(
        text,
        "\n  {id} on {host}, port {}, {state}\n    directory {}\n    recovered to {}\n    started by: {}",
        restored.port,
        restored.data_directory,
        restored.recovered_to,
        restored.start_command.join(" "),
    );
    for directory in node.old.iter().flat_map(|old| &old.directories) {
        let _ = write!(text, "\n    what was there before: {directory}");
    }
}

fn node_fields(node: &Opened) -> Value {
    let planned = &node.part.planned;
    let old: Vec<_> = node.old.iter().flat_map(|old| &old.directories).collect();
    let restored = node.restored.as_ref();
    json!({
        "node_id": planned.becomes,
        "source": planned.node_id,
        "node": node.part.agent.name(),
        "host": planned.host,
        "port": restored.map_or(planned.port, |it| it.port),
        "data_directory": restored.map_or(&planned.target, |it| &it.data_directory),
        "recovered_to": restored.map(|it| &it.recovered_to),
        "timeline": restored.map(|it| it.timeline),
        "running": restored.map(|it| it.running),
        "start_command": restored.map(|it| &it.start_command),
        "old": old,
    })
}
