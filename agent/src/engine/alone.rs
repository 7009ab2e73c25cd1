//! A point without a backup: nothing is copied. The node's WAL is shipped all the time, and a restore point in it becomes a
//! moment that an earlier backup can be recovered to.
//!
//! It also takes the place of an operation that was lost with its agent: of a backup's, whose copy is whole, or of another point's. All
//! that such an operation still had to do was to make a restore point, or to see one into the bucket, and the agent's shipping has gone on.
//!
//! Killed here, what is left is a restore point in the WAL that nobody uses.

use std::time::{Duration, Instant};

use agent_api::{ApiError, CopyMade, ErrorKind, Phase, PointSpec, WalState};
use agent_wal::{Lsn, SegmentName};
use tokio::sync::mpsc;

use super::attempt::cancelled;
use super::node::Node;
use super::point::{Ground, Marked, position};
use super::serve::{self, Server};
use crate::identity;
use crate::operation::{BackupCommand, OperationContext};
use crate::wal::service::WalStream;
use crate::wal::ship::Shipper;

/// How long the service may take to begin.
const BEGUN_WITHIN: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(200);

/// Makes restore points as the client asks for them, sees the last one into the bucket, and finds its record there.
///
/// # Errors
/// If the agent does not ship this node's WAL into this epoch, or stops doing so; of the database and the store.
pub async fn run(
    cx: OperationContext,
    spec: PointSpec,
    mut commands: mpsc::Receiver<BackupCommand>,
) -> Result<(), ApiError> {
    cx.report.phase(Phase::Preparing);
    let node = Node::look(&cx).await?;
    identity::check(&cx, (spec.node_id, &spec.epoch), &node.facts).await?;
    let stream = stream(&cx, &spec).await?;
    let work = cx.cancel.child_token();
    // Also if this future is dropped.
    let _work = work.clone().drop_guard();
    let (first, after) = match &spec.copy {
        None => (
            stream.first_segment(),
            (stream.start(), "the first WAL that is shipped"),
        ),
        Some(copy) => behind(copy, &stream)?,
    };
    let marked = spec.marked.map(Marked::known).transpose()?;
    let ground = Ground {
        cx: &cx,
        work: &work,
        node: &node,
        node_id: spec.node_id,
        epoch: spec.epoch,
        timeline: stream.timeline(),
        first,
        after,
        ready: match marked {
            None => Phase::Ready,
            Some(_) => Phase::Marked,
        },
    };
    let shipper = Shipper::follow(&stream, &cx.report);
    let server = Server::new(&ground, &shipper, &mut commands).knowing(marked);
    let (_, point) = server.run().await?;
    cx.report.point(point);
    cx.report.phase(Phase::Shipped);
    let released = serve::until_release(&cx, &mut commands).await?;
    if spec.copy.is_some() {
        stream.based();
    }
    // The client may be gone.
    let _ = released.send(Ok(()));
    Ok(())
}

/// The first segment that a copy needs, and where it ends: all from there on has to be in the stretch that is shipped.
fn behind(
    copy: &CopyMade,
    stream: &WalStream,
) -> Result<(SegmentName, (Lsn, &'static str)), ApiError> {
    let stop = position(&copy.stop_lsn)?;
    let first = SegmentName::parse(&copy.wal_first, stream.segment_size());
    let first = first.ok().filter(|first| first.timeline == copy.timeline);
    let Some(first) = first else {
        let message = format!("`{}` is no segment of the copy's WAL", copy.wal_first);
        return Err(ApiError::new(ErrorKind::Usage, message));
    };
    if copy.timeline != stream.timeline() || first < stream.first_segment() {
        let message = "the WAL that is shipped now does not reach back to the copy";
        return Err(ApiError::new(ErrorKind::Conflict, message).next("start a new backup"));
    }
    Ok((first, (stop, "the end of the copy")))
}

/// The WAL that is shipped, soon after the agent was started too: what its service waits for may have come with this order.
async fn stream(cx: &OperationContext, spec: &PointSpec) -> Result<WalStream, ApiError> {
    let until = Instant::now() + BEGUN_WITHIN;
    loop {
        let error = match cx.wal.stream(spec.node_id, &spec.epoch) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        if cx.wal.status().state != WalState::Waiting || Instant::now() >= until {
            return Err(error);
        }
        tokio::select! {
            () = cx.cancel.cancelled() => return Err(cancelled()),
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}
