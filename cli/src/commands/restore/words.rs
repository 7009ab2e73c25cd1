//! The plan of a restore and its result, for people and for machines.

use std::fmt::Write as _;

use agent_api::Place;
use catalog::model::Consistency;
use serde_json::{Value, json};

use super::places::source;
use super::plan::{Plan, Step};
use super::{Clients, IMPORTED, RestoreArgs};
use crate::printer::bytes;

/// The plan for people.
pub(super) fn text(plan: &Plan, args: &RestoreArgs, clients: &Clients) -> String {
    let mut text = format!("plan: restore {}", plan.backup);
    if let Some(made) = plan.later {
        let of = match plan.consistency {
            Consistency::Cluster => "of the whole cluster",
            Consistency::PerNode => "consistent per node only",
        };
        let made = made.strftime("%Y-%m-%d %H:%M:%S%.3fZ");
        let _ = write!(
            text,
            " and roll it forward to point {}, made {made}, {of}",
            plan.point
        );
    }
    for step in &plan.steps {
        node(&mut text, step, args);
    }
    if !plan.others.is_empty() {
        let others = plan.others.iter();
        let others = others.map(|node| format!("{} ({})", node.node_id, source(node)));
        let others: Vec<_> = others.collect();
        let _ = write!(
            text,
            "\n  these nodes of the backup are left as they are: {}\n    the others go back to the point without them: what was written to both since then is on one side only",
            others.join(", ")
        );
    }
    let started = if args.no_start {
        "promoted and left stopped"
    } else {
        "promoted and left running"
    };
    let over = plan.steps.iter().any(|step| step.place != Place::Fresh);
    let _ = match (over, args.in_place) {
        (false, _) => write!(
            text,
            "\n  {started}; nothing else on these hosts is changed"
        ),
        (true, false) => write!(
            text,
            "\n  until all nodes are proved to be at the point, the databases that run go on, and everything can go back;\n  then all are stopped, moved aside and replaced; {started}"
        ),
        (true, true) => write!(
            text,
            "\n  THERE IS NO WAY BACK: what is there now is stopped and removed before the copies are made; {started}"
        ),
    };
    if over || args.target_dir.is_none() {
        let _ = write!(text, "\n  {}", clients.words());
    }
    if args.import_metadata {
        let _ = write!(text, "\n  {IMPORTED}");
    }
    if args.clone {
        text.push_str("\n  each is a clone: a new node of the repository; the originals and their WAL stay as they are");
    }
    text
}

fn node(text: &mut String, step: &Step, args: &RestoreArgs) {
    let facts = &step.host.facts;
    let _ = write!(
        text,
        "\n  node {} ({}, {}, {})\n    to agent {} on {}: directory {}, port {}\n    recovered to {} at {}, timeline {}",
        step.node.node_id,
        source(&step.node),
        product(step.node.server_version_num / 10_000),
        bytes(step.node.plain_bytes),
        step.host.agent.name(),
        facts.host,
        step.target,
        step.port,
        step.point.restore_point,
        step.point.end_lsn,
        step.point.timeline,
    );
    if step.becomes != step.node.node_id {
        let _ = write!(text, "\n    it becomes a node of its own, {}", step.becomes);
    }
    let _ = write!(text, "\n    there now: {}", now_there(step));
    let fate = match step.place {
        Place::Fresh => None,
        Place::Replace { .. } if args.discard_old => Some(
            "it is kept aside until all nodes are open, and then removed (--discard-old)"
                .to_owned(),
        ),
        Place::Replace { .. } => Some(format!("it is kept as {}", kept_as(step))),
        Place::InPlace { .. } => {
            Some("it is stopped and REMOVED before the copy is made (--in-place)".to_owned())
        }
    };
    if let Some(fate) = fate {
        let _ = write!(text, "\n    {fate}");
    }
    let _ = write!(
        text,
        "\n    room: {} needed, {} free",
        bytes(step.node.plain_bytes),
        bytes(step.there.free_bytes)
    );
    if step.place == Place::Fresh {
        return;
    }
    for manager in &facts.managers {
        let how = if args.manager_paused {
            "you say that it is paused"
        } else {
            "the agent's own start and stop commands are used"
        };
        let _ = write!(
            text,
            "\n    managed by {} ({}); {how}",
            manager.name, manager.evidence
        );
    }
    let standbys = facts.server.iter().flat_map(|server| &server.standbys);
    for standby in standbys {
        let address = standby.address.as_deref().unwrap_or("this host");
        let _ = write!(
            text,
            "\n    standby {} at {address} ({}): it cannot follow; stop it before, rebuild it after",
            standby.application, standby.state
        );
    }
}

/// What is at the target now.
fn now_there(step: &Step) -> String {
    let Some(cluster) = &step.there.cluster else {
        return "nothing".to_owned();
    };
    let server = step.host.facts.server.as_ref();
    let size = server
        .filter(|_| cluster.running)
        .map(|server| server.size_bytes);
    let size = size
        .filter(|size| *size > 0)
        .map(|size| format!(", {}", bytes(size)));
    let size = size.unwrap_or_default();
    let product = product(cluster.major);
    match (cluster.running, cluster.port) {
        (true, Some(port)) => {
            format!("its running database, {product}, port {port}{size}")
        }
        (true, None) => format!("its running database, {product}{size}"),
        (false, _) => format!("its database, {product}, stopped"),
    }
}

/// What a server of this major version is. All openGauss call themselves 9.2.
pub(super) fn product(major: u32) -> String {
    match major {
        9 => "openGauss".to_owned(),
        _ => format!("PostgreSQL {major}"),
    }
}

fn kept_as(step: &Step) -> String {
    if step.there.mount_point {
        format!("{}/.gs_pitr-old-... (it is a mount point)", step.target)
    } else {
        format!("{}.gs_pitr-old-...", step.target)
    }
}

/// The plan for machines.
pub(super) fn fields(plan: &Plan, args: &RestoreArgs, clients: &Clients) -> Value {
    let steps: Vec<_> = plan
        .steps
        .iter()
        .map(|step| step_fields(step, args))
        .collect();
    let others: Vec<_> = plan.others.iter().map(|node| node.node_id).collect();
    json!({
        "operation": plan.operation,
        "backup_id": plan.backup,
        "point": plan.point,
        "point_made": plan.later,
        "consistency": plan.consistency,
        "start": !args.no_start,
        "clone": args.clone,
        "discard_old": args.discard_old,
        "way_back": !args.in_place,
        "nodes": steps,
        "left_out": others,
        "clients": clients.fields(),
    })
}

fn step_fields(step: &Step, args: &RestoreArgs) -> Value {
    let facts = &step.host.facts;
    let server = facts.server.as_ref();
    let cluster = step.there.cluster.as_ref();
    let there = cluster.map(|cluster| {
        let size = server
            .filter(|_| cluster.running)
            .map(|server| server.size_bytes);
        let kept = matches!(step.place, Place::Replace { .. }) && !args.discard_old;
        json!({
            "system_identifier": cluster.system_identifier.to_string(),
            "major": cluster.major,
            "running": cluster.running,
            "port": cluster.port,
            "size_bytes": size,
            "kept": kept,
        })
    });
    let over = step.place != Place::Fresh;
    json!({
        "node_id": step.node.node_id,
        "becomes": step.becomes,
        "source": source(&step.node),
        "node": step.host.agent.name(),
        "host": facts.host,
        "data_directory": step.target,
        "place": step.place,
        "there": there,
        "port": step.port,
        "plain_bytes": step.node.plain_bytes,
        "free_bytes": step.there.free_bytes,
        "restore_point": step.point.restore_point,
        "lsn": step.point.end_lsn,
        "timeline": step.point.timeline,
        "managers": facts.managers.iter().filter(|_| over).collect::<Vec<_>>(),
        "standbys": server.into_iter().filter(|_| over).flat_map(|it| &it.standbys).collect::<Vec<_>>(),
    })
}
