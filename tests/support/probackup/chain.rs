//! Which backup stands on which.

use super::Failure;
use super::control::Control;

/// A backup and those it stands on, itself first, its FULL last.
pub(super) fn of(all: &[Control], backup: &Control) -> Result<Vec<Control>, Failure> {
    let mut chain = vec![backup.clone()];
    while let Some(parent) = chain.last().and_then(|last| last.parent.clone()) {
        let found = all.iter().find(|control| control.id() == parent);
        let found = found.ok_or_else(|| {
            Failure::new(format!(
                "Valid full backup for backup {} is not found: no backup {parent}",
                backup.id()
            ))
        })?;
        if chain.len() > all.len() {
            return Err(Failure::new("a chain of backups goes in a circle"));
        }
        chain.push(found.clone());
    }
    if chain.last().is_some_and(|last| last.mode == "FULL") {
        Ok(chain)
    } else {
        Err(Failure::new(format!(
            "Valid full backup for backup {} is not found.",
            backup.id()
        )))
    }
}

/// The newest good backup on the same timeline whose chain is good: the parent of an increment.
pub(super) fn parent_for<'a>(all: &'a [Control], increment: &Control) -> Option<&'a Control> {
    all.iter()
        .filter(|control| control.start < increment.start && control.timeline == increment.timeline)
        .find(|control| of(all, control).is_ok_and(|chain| chain.iter().all(Control::is_good)))
}

/// A backup and all that stand on it, parents before children.
pub(super) fn with_children(all: &[Control], root: &Control) -> Vec<Control> {
    let mut found = vec![root.clone()];
    // Newest first in `all`: a child comes after its parent when walked from the end.
    for control in all.iter().rev() {
        let stands_on = |parent: &Control| control.parent.as_deref() == Some(&parent.id());
        if found.iter().any(stands_on) {
            found.push(control.clone());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probackup::control::id_of;

    fn backup(start: i64, parent: Option<i64>, status: &str) -> Control {
        Control {
            start,
            mode: if parent.is_some() { "DELTA" } else { "FULL" }.to_owned(),
            parent: parent.map(id_of),
            status: status.to_owned(),
            timeline: 1,
            ..Control::default()
        }
    }

    #[test]
    fn parents_are_the_newest_good_ones() {
        let all = [
            backup(40, None, "ERROR"),
            backup(30, Some(20), "DONE"),
            backup(20, Some(10), "OK"),
            backup(10, None, "OK"),
        ];
        let next = backup(50, None, "RUNNING");
        assert_eq!(parent_for(&all, &next).map(|found| found.start), Some(30));
        assert_eq!(of(&all, &all[1]).unwrap().len(), 3);
        let starts: Vec<_> = with_children(&all, &all[3])
            .iter()
            .map(|c| c.start)
            .collect();
        assert_eq!(starts, [10, 20, 30]);
        let damaged = [
            backup(30, Some(20), "DONE"),
            backup(20, Some(10), "CORRUPT"),
            backup(10, None, "OK"),
        ];
        assert_eq!(
            parent_for(&damaged, &next).map(|found| found.start),
            Some(10)
        );
        assert!(of(&damaged[..1], &damaged[0]).is_err());
    }
}
