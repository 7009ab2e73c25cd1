//! A stream whose log-in has been begun by somebody else.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Swallows the start-up message that tokio-postgres sends, because ours went before it, and shows it
/// what the server has answered to ours. From then on it is the stream itself.
#[derive(Debug)]
pub(crate) struct PreAuthenticated<S> {
    stream: S,
    /// Read already, and still to be shown.
    replay: Vec<u8>,
    shown: usize,
    start_up: StartUp,
}

/// How much of the start-up message has been swallowed.
#[derive(Debug)]
enum StartUp {
    /// Its length is not known yet.
    Length { bytes: [u8; 4], have: usize },
    /// So many bytes are still to come.
    Rest(usize),
}

impl<S> PreAuthenticated<S> {
    pub(super) fn new(stream: S, replay: Vec<u8>) -> Self {
        Self {
            stream,
            replay,
            shown: 0,
            start_up: StartUp::Length {
                bytes: [0; 4],
                have: 0,
            },
        }
    }

    /// Takes what belongs to the start-up message off `bytes`, and returns how much that is.
    fn swallow(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut taken = 0;
        if let StartUp::Length {
            bytes: length,
            have,
        } = &mut self.start_up
        {
            let part = bytes.len().min(4 - *have);
            length[*have..*have + part].copy_from_slice(&bytes[..part]);
            *have += part;
            taken = part;
            if *have < 4 {
                return Ok(taken);
            }
            let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
            let rest = length.checked_sub(4).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, "no start-up message")
            })?;
            self.start_up = StartUp::Rest(rest);
        }
        if let StartUp::Rest(rest) = &mut self.start_up {
            let part = (bytes.len() - taken).min(*rest);
            *rest -= part;
            taken += part;
        }
        Ok(taken)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PreAuthenticated<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let rest = &this.replay[this.shown..];
        if rest.is_empty() {
            return Pin::new(&mut this.stream).poll_read(cx, buffer);
        }
        let part = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..part]);
        this.shown += part;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PreAuthenticated<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if !matches!(this.start_up, StartUp::Rest(0)) {
            return Poll::Ready(this.swallow(bytes));
        }
        Pin::new(&mut this.stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
