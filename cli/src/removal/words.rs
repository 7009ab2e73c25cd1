//! Plans and reports, for people and for machines.

use std::fmt::Write as _;
use std::time::SystemTime;

use catalog::retention::Stored;
use catalog::retention::apply::{HeldBack, Report};
use catalog::retention::plan::{Plan, Why};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::printer::bytes;

/// Objects, all versions, and their bytes.
fn sum<'a>(stored: impl IntoIterator<Item = &'a Stored>) -> (usize, u64) {
    stored.into_iter().fold((0, 0), |(count, size), it| {
        (count + it.versions.len(), size + it.bytes())
    })
}

fn sum_fields<'a>(stored: impl IntoIterator<Item = &'a Stored>) -> Value {
    let (objects, bytes) = sum(stored);
    json!({"objects": objects, "bytes": bytes})
}

fn moment(time: SystemTime) -> Option<Timestamp> {
    Timestamp::try_from(time).ok()
}

/// What is held back, of all or of one backup: how many, how much, until when, and by legal holds.
struct Holds {
    objects: usize,
    bytes: u64,
    until: Option<Timestamp>,
    legal: usize,
}

impl Holds {
    fn of(held: &[HeldBack], below: &str) -> Self {
        let of: Vec<_> = held
            .iter()
            .filter(|it| it.key.as_str().starts_with(below))
            .collect();
        Self {
            objects: of.len(),
            bytes: of.iter().map(|it| it.bytes).sum(),
            until: of
                .iter()
                .filter_map(|it| it.hold.until)
                .filter_map(moment)
                .max(),
            legal: of.iter().filter(|it| it.hold.legal).count(),
        }
    }

    fn fields(&self) -> Value {
        json!({
            "objects": self.objects,
            "bytes": self.bytes,
            "until": self.until,
            "legal_holds": self.legal,
        })
    }

    fn words(&self) -> String {
        let mut text = format!(
            "{} objects, {}, are held by a lock",
            self.objects,
            bytes(self.bytes)
        );
        if let Some(until) = self.until {
            let _ = write!(text, " until {}", until.strftime("%F %TZ"));
        }
        if self.legal > 0 {
            let _ = write!(text, " ({} by a legal hold)", self.legal);
        }
        text
    }
}

/// A plan for machines.
pub(super) fn plan_fields(plan: &Plan, held: &[HeldBack]) -> Value {
    let removed = plan.removed.iter().map(|it| {
        let mut fields = sum_fields(it.objects.iter().chain(&it.manifest));
        let holds = Holds::of(held, &format!("backups/{}/", it.id));
        fields["id"] = json!(it.id);
        fields["why"] = json!(it.why);
        fields["held_until"] = json!(holds.until);
        fields
    });
    let dead = plan.dead.iter().map(|it| {
        let mut fields = sum_fields(&it.objects);
        fields["id"] = json!(it.id);
        fields["why"] = json!(it.why);
        fields
    });
    let kept = plan
        .kept
        .iter()
        .map(|it| json!({"id": it.id, "why": it.why}));
    let points = plan.points.iter().map(|it| &it.id);
    json!({
        "kept": kept.collect::<Vec<_>>(),
        "removed": removed.collect::<Vec<_>>(),
        "dead": dead.collect::<Vec<_>>(),
        "points": points.collect::<Vec<_>>(),
        "wal": sum_fields(&plan.wal),
        "litter": sum_fields(&plan.litter),
        "uploads": plan.uploads.len(),
        "journals": sum_fields(&plan.journals),
        "leases": sum_fields(&plan.leases),
        "held": Holds::of(held, "").fields(),
        "notes": plan.notes,
        "objects": plan.versions(),
        "bytes": plan.bytes(),
    })
}

/// A plan for people.
pub(super) fn plan_text(plan: &Plan, held: &[HeldBack], command: &str) -> String {
    let mut text = String::new();
    if command == "prune" {
        for kept in &plan.kept {
            let _ = writeln!(text, "keep    {}  ({})", kept.id, kept.why.words());
        }
    }
    for removed in &plan.removed {
        let (objects, size) = sum(removed.objects.iter().chain(&removed.manifest));
        let size = bytes(size);
        let _ = write!(text, "delete  {}  {objects} objects, {size}", removed.id);
        if removed.why == Why::Leftover {
            text.push_str(", left of an earlier deletion");
        }
        let holds = Holds::of(held, &format!("backups/{}/", removed.id));
        if holds.objects > 0 {
            let _ = write!(text, "; of these {}", holds.words());
        }
        text.push('\n');
    }
    for dead in &plan.dead {
        let (objects, size) = sum(&dead.objects);
        let (id, why, size) = (&dead.id, &dead.why, bytes(size));
        let _ = writeln!(
            text,
            "fence   {id}  and delete its {objects} objects, {size}: {why}"
        );
    }
    for point in &plan.points {
        let _ = writeln!(
            text,
            "delete  {}  a point that no backup leads to then",
            point.id
        );
    }
    for (what, all) in [
        ("WAL segments that nothing needs then", &plan.wal),
        ("objects that failed attempts left", &plan.litter),
        ("records of operations that ended long ago", &plan.journals),
        ("old leases", &plan.leases),
    ] {
        let (objects, size) = sum(all);
        if objects > 0 {
            let _ = writeln!(text, "delete  {objects} {what}, {}", bytes(size));
        }
    }
    if !plan.uploads.is_empty() {
        let _ = writeln!(
            text,
            "abort   {} uploads that nobody will finish",
            plan.uploads.len()
        );
    }
    for note in &plan.notes {
        let _ = writeln!(text, "note    {note}");
    }
    if plan.is_empty() {
        text.push_str("nothing to delete");
        return text;
    }
    let _ = write!(
        text,
        "in all  {} objects, {}",
        plan.versions(),
        bytes(plan.bytes())
    );
    if !held.is_empty() {
        let _ = write!(text, "; {}", Holds::of(held, "").words());
    }
    text
}

/// What was done, for machines.
pub(super) fn report_fields(report: &Report) -> Value {
    json!({
        "deleted": report.deleted,
        "fenced": report.fenced,
        "left_for_readers": report.read,
        "points": report.points,
        "objects": report.versions,
        "bytes": report.bytes,
        "uploads": report.uploads,
        "held": Holds::of(&report.held, "").fields(),
    })
}

/// What was done, for people.
pub(super) fn report_text(report: &Report) -> String {
    let mut text = format!(
        "{} backups deleted, {} dead ones fenced, {} points removed; {} objects, {}, deleted; {} uploads aborted",
        report.deleted.len(),
        report.fenced.len(),
        report.points,
        report.versions,
        bytes(report.bytes),
        report.uploads,
    );
    if !report.held.is_empty() {
        let holds = Holds::of(&report.held, "");
        let _ = write!(
            text,
            "\n{}: run `gs_pitr prune` again after that",
            holds.words()
        );
    }
    text
}
