//! The proof: what `pg_control` says after recovery has ended by itself.

use std::fs;
use std::path::Path;

use agent_api::{ApiError, ErrorKind, RestoreSpec};
use agent_wal::Lsn;
use agent_wal::control::{ControlFile, DbState};

use super::target::Plan;

/// Reads `global/pg_control`.
///
/// # Errors
/// Why it could not, in words. While a server runs, a read may be torn: try again.
pub(super) fn read_control(data: &Path) -> Result<ControlFile, String> {
    let path = data.join("global/pg_control");
    let bytes = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    ControlFile::parse(&bytes).map_err(|error| error.to_string())
}

/// Checks that the copy is the cluster and version that the manifest names.
///
/// # Errors
/// What differs.
pub(super) fn check_copy(control: &ControlFile, spec: &RestoreSpec) -> Result<(), ApiError> {
    let node = &spec.node;
    let pairs = [
        (
            "system identifier",
            control.system_identifier,
            node.system_identifier,
        ),
        (
            "format version",
            u64::from(control.control_version),
            u64::from(node.control_version),
        ),
        (
            "catalog version",
            u64::from(control.catalog_version),
            u64::from(node.catalog_version),
        ),
    ];
    for (what, copy, manifest) in pairs {
        if copy != manifest {
            let message =
                format!("the copy's pg_control has {what} {copy}, the manifest {manifest}");
            return Err(ApiError::new(ErrorKind::Damaged, message));
        }
    }
    Ok(())
}

/// Whether `pg_control` names an earlier position than the point's, and that may be for want of saying it.
///
/// A server that is shut down in recovery notes how far it has replayed only if it has replayed no checkpoint since its last
/// restart point. If it has, it makes a restart point of that, and the position moves with the pages that are written then: not
/// over records that touch none, such as the end of a backup, a switch of segments and the point itself
/// (`CreateRestartPoint`).
pub(super) fn is_short(control: &ControlFile, plan: &Plan) -> bool {
    control.state == DbState::ShutDownInRecovery && control.min_recovery_point < plan.fork
}

/// Checks that recovery ended exactly at the point.
///
/// # Errors
/// [`ErrorKind::Recovery`] that says where it ended.
pub(super) fn prove(
    control: &ControlFile,
    spec: &RestoreSpec,
    plan: &Plan,
) -> Result<(), ApiError> {
    let point = &spec.point;
    let (fork, reached) = (plan.fork, control.min_recovery_point);
    if plan
        .recoverer
        .stands_at(control, fork, point.timeline, plan.segment_size)
    {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorKind::Recovery,
        format!(
            "recovery did not end at its point `{}` at {fork} on timeline {}: pg_control says '{}' at {reached} on \
             timeline {}",
            point.restore_point, point.timeline, control.state, control.timeline
        ),
    )
    .next("run `gs_pitr show ID`, and restore another backup"))
}

/// Where timeline `timeline` leaves its parent, by the last line of its history file.
pub(super) fn fork_of(history: &str, parent: u32) -> Option<Lsn> {
    let mut lines = history.lines().map(str::trim);
    let last = lines.rfind(|line| !line.is_empty() && !line.starts_with('#'))?;
    let mut words = last.split_whitespace();
    let (timeline, lsn): (u32, Lsn) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    (timeline == parent).then_some(lsn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fork_stands_in_the_last_line_of_the_history() {
        let history = "1\t0/3000148\tat restore point \"a\"\n\n# note\n2\t0/5000160\tat restore point \"b\"\n\n";
        assert_eq!(fork_of(history, 2), Some(Lsn(0x0500_0160)));
        assert_eq!(fork_of(history, 1), None);
        assert_eq!(fork_of("", 1), None);
    }
}
