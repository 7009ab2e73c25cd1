//! A list of nodes and nothing that ties them together.

use std::time::Duration;

use agent_api::MarkRequest;
use catalog::ids::PointId;
use catalog::model::Consistency;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::{Coordinator, Moment};
use crate::agents::pause;
use crate::failure::Result;
use crate::operations::{Operation, all_or_cancel};
use crate::printer::Printer;

/// Attempts at a point, each under a new name.
const TRIES: u32 = 3;
/// Pause between them.
const PAUSE: Duration = Duration::from_secs(2);

/// Marks all nodes at the same time, with no lock.
#[derive(Debug)]
pub(crate) struct Direct {
    printer: Printer,
}

impl Direct {
    /// A coordinator that tells of failed attempts through `printer`.
    pub(crate) fn new(printer: &Printer) -> Self {
        Self {
            printer: printer.clone(),
        }
    }
}

impl Coordinator for Direct {
    async fn mark(&self, copies: &[Operation], cancel: &CancellationToken) -> Result<Moment> {
        let mut tries = 0;
        loop {
            tries += 1;
            let created = Timestamp::now();
            let point = PointId::generate(created);
            let request = MarkRequest {
                restore_point: format!("gs_pitr_{point}"),
            };
            let marked = all_or_cancel(copies, cancel, |copy, cancel| {
                let request = request.clone();
                async move { copy.agent().mark(copy.id(), &request, &cancel).await }
            });
            match marked.await {
                Ok(marks) => {
                    return Ok(Moment {
                        point,
                        created,
                        consistency: Consistency::PerNode,
                        csn: None,
                        lock_ms: 0,
                        proof: None,
                        marks,
                    });
                }
                Err(failure) if failure.is_permanent() || tries == TRIES => return Err(failure),
                Err(failure) => {
                    let message = format!("no point at attempt {tries} of {TRIES}: {failure}");
                    self.printer.warning(failure.node.as_deref(), &message);
                    pause(PAUSE, cancel).await?;
                }
            }
        }
    }
}
