//! Messages of the protocol, as far as the log-in needs them (D 55.7).

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::connect::ConnectOptions;

/// The longest first answer of a server: an error with all its fields.
const LONGEST: usize = 64 * 1024;

/// A message with a type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub kind: u8,
    pub body: Vec<u8>,
}

impl Frame {
    /// Reads a server's first answer: a question about who we are, or an error.
    pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut header = [0; 5];
        stream.read_exact(&mut header).await.map_err(ended)?;
        let [kind, length @ ..] = header;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        // 'R': authentication, 'E': error, 'N': notice, 'v': another protocol version.
        let known = matches!(kind, b'R' | b'E' | b'N' | b'v');
        if !known || !(4..=LONGEST).contains(&length) {
            let message = "what answers there is neither PostgreSQL nor openGauss";
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let mut body = vec![0; length - 4];
        stream.read_exact(&mut body).await.map_err(ended)?;
        Ok(Self { kind, body })
    }

    /// As it came.
    pub(super) fn bytes(&self) -> Vec<u8> {
        message(Some(self.kind), &self.body)
    }
}

fn ended(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return io::Error::new(
            error.kind(),
            "the server closed the connection during the log-in",
        );
    }
    error
}

/// The start-up message, with the parameters that tokio-postgres sends.
pub(super) fn start_up(protocol: u32, options: &ConnectOptions) -> io::Result<Vec<u8>> {
    let mut body = protocol.to_be_bytes().to_vec();
    for (name, value) in [
        ("client_encoding", "UTF8"),
        ("user", &options.user),
        ("database", &options.database),
        ("application_name", &options.application_name),
    ] {
        for text in [name, value] {
            if text.contains('\0') {
                let message = format!("the {name} has a NUL in it");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
    }
    body.push(0);
    Ok(message(None, &body))
}

/// A password message.
pub(super) fn password(text: &str) -> Vec<u8> {
    let mut body = text.as_bytes().to_vec();
    body.push(0);
    message(Some(b'p'), &body)
}

fn message(kind: Option<u8>, body: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = kind.into_iter().collect();
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}
