//! The event stream: JSON lines, with empty ones in between as a sign of life.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{BoxStream, Stream, StreamExt as _, unfold};
use reqwest::Response;

use crate::client::AgentClient;
use crate::error::{ApiError, ErrorKind};
use crate::types::{Event, EventKind};

/// Longest silence: the agent sends a sign of life every 10 seconds.
const SILENCE: Duration = Duration::from_secs(35);
/// Longest line.
const LINE: usize = 1 << 20;

/// Events as they happen. Ends after the operation's last event; an error is the last item.
pub struct EventStream(BoxStream<'static, Result<Event, ApiError>>);

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventStream(..)")
    }
}

impl Stream for EventStream {
    type Item = Result<Event, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(cx)
    }
}

struct Reader {
    client: AgentClient,
    response: Response,
    buffer: Vec<u8>,
    /// An end was seen: the end of the answer is then as it should be.
    ended: bool,
    broken: bool,
}

pub(super) fn follow(client: AgentClient, response: Response) -> EventStream {
    let reader = Reader {
        client,
        response,
        buffer: Vec::new(),
        ended: false,
        broken: false,
    };
    let events = unfold(reader, |mut reader| async move {
        if reader.broken {
            return None;
        }
        let item = reader.next().await.transpose()?;
        reader.broken = item.is_err();
        Some((item, reader))
    });
    EventStream(events.boxed())
}

impl Reader {
    async fn next(&mut self) -> Result<Option<Event>, ApiError> {
        loop {
            while let Some(line) = self.take_line() {
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return self.parse(&line).map(Some);
            }
            let chunk = tokio::time::timeout(SILENCE, self.response.chunk())
                .await
                .map_err(|_| self.client.silent(SILENCE))?
                .map_err(|error| self.client.failure(&error))?;
            let Some(chunk) = chunk else {
                return if self.ended {
                    Ok(None)
                } else {
                    Err(self.cut())
                };
            };
            self.buffer.extend_from_slice(&chunk);
            if self.buffer.len() > LINE {
                return Err(self.client.not_this_api("a line is too long"));
            }
        }
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        let end = self.buffer.iter().position(|byte| *byte == b'\n')?;
        let rest = self.buffer.split_off(end + 1);
        Some(std::mem::replace(&mut self.buffer, rest))
    }

    fn parse(&mut self, line: &[u8]) -> Result<Event, ApiError> {
        let event: Event = serde_json::from_slice(line)
            .map_err(|error| self.client.not_this_api(&error.to_string()))?;
        self.ended |= match &event.what {
            EventKind::Phase { phase } => phase.is_end(),
            EventKind::Error { .. } => true,
            EventKind::Progress { .. } | EventKind::Warning { .. } => false,
        };
        Ok(event)
    }

    fn cut(&self) -> ApiError {
        let address = self.client.address();
        let message = format!("the agent at {address} ended the event stream before its end");
        let error = ApiError::new(ErrorKind::AgentUnreachable, message);
        error.next("ask for the operation's status")
    }
}
