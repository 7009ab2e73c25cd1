//! What a request must keep to before anything is begun.

use agent_api::{ApiError, ErrorKind, OperationSpec, RepositoryAccess, StartOperation};

/// More would only take memory: cores and connections end long before.
const MOST_JOBS: u32 = 64;
/// PostgreSQL cuts restore point names at 63 bytes; a cut name would never be found again.
const RESTORE_POINT_BYTES: usize = 63;

fn usage(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::Usage, message)
}

pub(super) fn start(request: &StartOperation) -> Result<(), ApiError> {
    bandwidth(request.bandwidth)?;
    repository(&request.repository)?;
    match &request.spec {
        OperationSpec::Backup(spec) => {
            jobs(spec.jobs)?;
            if spec.attempt == 0 {
                return Err(usage("attempts are counted from 1"));
            }
            if !(1..=19).contains(&spec.level) {
                let message = format!("compression level {} is not in 1..=19", spec.level);
                return Err(usage(message));
            }
            let label = spec.label.as_deref().unwrap_or_default();
            if label.len() > 512 || label.chars().any(char::is_control) {
                return Err(usage("a label is one line of at most 512 bytes"));
            }
            Ok(())
        }
        OperationSpec::Point(_) => Ok(()),
        OperationSpec::Restore(spec) => jobs(spec.jobs),
    }
}

fn repository(access: &RepositoryAccess) -> Result<(), ApiError> {
    if access.bucket.is_empty() {
        return Err(usage("the repository has no bucket"));
    }
    if access.prefix.starts_with('/') || access.prefix.ends_with('/') {
        return Err(usage("the repository's prefix begins or ends with a slash"));
    }
    Ok(())
}

fn jobs(jobs: u32) -> Result<(), ApiError> {
    if (1..=MOST_JOBS).contains(&jobs) {
        return Ok(());
    }
    Err(usage(format!(
        "{jobs} jobs: at least 1, at most {MOST_JOBS}"
    )))
}

pub(super) fn bandwidth(rate: Option<u64>) -> Result<(), ApiError> {
    if rate == Some(0) {
        return Err(usage(
            "a bandwidth of 0 would stand still: leave it out for no limit",
        ));
    }
    Ok(())
}

pub(super) fn restore_point(name: &str) -> Result<(), ApiError> {
    let good = !name.is_empty()
        && name.len() <= RESTORE_POINT_BYTES
        && name.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if good {
        return Ok(());
    }
    Err(usage(format!(
        "a restore point's name has 1 to {RESTORE_POINT_BYTES} printable ASCII characters"
    )))
}
