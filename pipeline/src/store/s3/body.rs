//! The bytes of a `get` as they arrive, counted, each wait with a deadline.

use std::time::Duration;

use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};

use super::failure::{Subject, chain};
use crate::store::{Key, StoreError};

/// Where a body stands.
struct Body {
    key: Key,
    stream: ByteStream,
    expected: u64,
    received: u64,
    wait: Duration,
}

/// The bytes of `stream`, which must be `expected` in number. Ends after its first error.
pub(super) fn checked(
    key: Key,
    stream: ByteStream,
    expected: u64,
    wait: Duration,
) -> BoxStream<'static, Result<Bytes, StoreError>> {
    let body = Body {
        key,
        stream,
        expected,
        received: 0,
        wait,
    };
    stream::try_unfold(body, Body::next).boxed()
}

impl Body {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, StoreError> {
        // The deadline runs only while a chunk is waited for, not while the reader is busy.
        let chunk = match tokio::time::timeout(self.wait, self.stream.next()).await {
            Err(_) => Err(format!("nothing came for {} s", self.wait.as_secs())),
            Ok(Some(Err(error))) => Err(chain(&error)),
            Ok(Some(Ok(chunk))) => Ok(Some(chunk)),
            Ok(None) if self.received < self.expected => Err("the store sent no more".to_owned()),
            Ok(None) => Ok(None),
        };
        let at = format!("body, byte {} of {}", self.received, self.expected);
        let subject = Subject {
            operation: "get",
            key: self.key.as_str(),
        };
        match chunk {
            Err(words) => {
                let detail = subject.detail(format!("{at}: {words}"));
                Err(StoreError::Unavailable(detail))
            }
            Ok(None) => Ok(None),
            Ok(Some(chunk)) if self.received + chunk.len() as u64 > self.expected => {
                let detail = subject.detail(format!("{at}: more bytes than announced"));
                Err(StoreError::Corrupt(detail))
            }
            Ok(Some(chunk)) => {
                self.received += chunk.len() as u64;
                Ok(Some((chunk, self)))
            }
        }
    }
}
