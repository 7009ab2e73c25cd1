//! The event stream: a JSON line an event, an empty line as a sign of life.

use std::sync::Arc;
use std::time::Duration;

use agent_api::Event;
use axum::body::Body;
use bytes::Bytes;
use futures_util::stream::unfold;
use tokio::sync::watch;

use crate::operation::log::News;
use crate::operation::table::Operation;

/// Clients take 35 s of silence for a dead agent.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);

struct Follower {
    operation: Arc<Operation>,
    after: u64,
    news: watch::Receiver<News>,
}

/// The events of `operation` above `after`, until its end.
pub(super) fn body(operation: Arc<Operation>, after: u64) -> Body {
    let news = operation.log().follow();
    let follower = Follower {
        operation,
        after,
        news,
    };
    Body::from_stream(unfold(follower, |mut follower| async move {
        let lines = follower.next().await?;
        Some((lines, follower))
    }))
}

impl Follower {
    async fn next(&mut self) -> Option<Result<Bytes, serde_json::Error>> {
        loop {
            // Asked for more: somebody reads. A reader that has stalled does not keep an operation waiting.
            self.operation.log().touch();
            // Looked at before the events: what comes in between is not missed.
            let ended = self.news.borrow_and_update().ended;
            let events = self.operation.log().events_after(self.after);
            if let Some(last) = events.last() {
                self.after = last.seq;
                return Some(lines(&events));
            }
            if ended {
                return None;
            }
            match tokio::time::timeout(SIGN_OF_LIFE, self.news.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return None,
                Err(_) => return Some(Ok(Bytes::from_static(b"\n"))),
            }
        }
    }
}

fn lines(events: &[Event]) -> Result<Bytes, serde_json::Error> {
    let mut lines = Vec::new();
    for event in events {
        serde_json::to_writer(&mut lines, event)?;
        lines.push(b'\n');
    }
    Ok(lines.into())
}
