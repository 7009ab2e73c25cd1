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
    /// Longest silence.
    silence: Duration,
    news: watch::Receiver<News>,
}

/// The events of `operation` above `after`, until its end.
pub(super) fn body(operation: Arc<Operation>, after: u64) -> Body {
    let news = operation.log().follow();
    let follower = Follower {
        operation,
        after,
        silence: SIGN_OF_LIFE,
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
            match tokio::time::timeout(self.silence, self.news.changed()).await {
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

#[cfg(test)]
mod tests {
    use agent_api::{ApiError, ErrorKind, Phase};
    use uuid::Uuid;

    use super::*;
    use crate::operation::table::tests::{Act, backup, reach, table};

    #[tokio::test]
    async fn silence_is_broken_and_the_stream_ends_with_the_operation() {
        let operation = table(Act::Whole).start(backup(Uuid::now_v7())).unwrap();
        reach(&operation, Phase::Copied).await;
        let mut follower = Follower {
            news: operation.log().follow(),
            operation: Arc::clone(&operation),
            after: 0,
            silence: Duration::from_millis(300),
        };
        let events = follower.next().await.unwrap().unwrap();
        assert!(events.ends_with(b"\n") && events.len() > 1);
        assert_eq!(follower.next().await.unwrap().unwrap(), "\n");
        let (waited, phase) = operation.log().forgotten_for().unwrap();
        assert_eq!(phase, Phase::Copied);
        assert!(waited >= Duration::from_millis(250), "{waited:?}");
        operation.cancel(ApiError::new(ErrorKind::Cancelled, "enough"));
        let mut rest = Vec::new();
        while let Some(lines) = follower.next().await {
            rest.extend_from_slice(&lines.unwrap());
        }
        let rest = String::from_utf8(rest).unwrap();
        let last = rest.lines().last().unwrap();
        assert!(
            last.contains("\"error\"") && last.contains("enough"),
            "{rest}"
        );
        assert!(operation.log().forgotten_for().is_none());
    }
}
