//! The way to a server, up to where tokio-postgres can take over.
//!
//! openGauss speaks PostgreSQL's protocol, but for its log-in: the code 10 that is SASL to PostgreSQL means `sha256` to
//! openGauss, with a body of its own. So we open the socket and send the start-up message ourselves and look at
//! the first answer. What is openGauss's own is answered here; anything else is handed on unread, and
//! tokio-postgres answers it as ever (trust, cleartext, md5, SCRAM, errors).
//!
//! Which protocol is said first? 3.0, to everybody: PostgreSQL would take 3.51 for one of its own future ones (18 negotiates
//! 3.2 down from it, which changes the key for cancelling; poolers refuse it), and openGauss accepts 3.0. What it
//! leaves out there is the number of rounds, and what it adds is a proof that the server knows the password:
//! if that holds with the usual number of rounds, we answer. If not, the password is wrong or the number another one, and we
//! start again with 3.51, which names it. Going away without an answer is not counted as a failed log-in
//! (`ClientAuthentication`, auth.cpp: `STATUS_EOF`).

mod frame;
mod sha256;
mod socket;
mod stream;

use std::io;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};

use crate::connect::ConnectOptions;
use crate::error::SqlError;
use frame::Frame;
pub(crate) use socket::Socket;
pub(crate) use stream::PreAuthenticated;

/// What openGauss calls its own protocol (pqcomm.h, `PG_PROTOCOL_LATEST`).
const GAUSS: u32 = (3 << 16) + 51;
/// What everybody speaks.
const COMMON: u32 = 3 << 16;
/// Rounds of a password unless `auth_iteration_count` says otherwise (sha2.h, `ITERATION_COUNT`).
const USUAL_ROUNDS: u32 = 10_000;

/// Opens a stream to the server of `options`.
pub(crate) async fn open(options: &ConnectOptions) -> Result<PreAuthenticated<Socket>, SqlError> {
    open_over(options, || socket(options)).await
}

/// As [`open`], over streams that `connect` makes, one or two of them. `options` says who logs in.
pub(crate) async fn open_over<S, F>(
    options: &ConnectOptions,
    connect: impl Fn() -> F,
) -> Result<PreAuthenticated<S>, SqlError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = Result<S, SqlError>>,
{
    match greet(connect().await?, options, COMMON).await? {
        Greeted::Ready(stream) => Ok(stream),
        Greeted::AskAgain => match greet(connect().await?, options, GAUSS).await? {
            Greeted::Ready(stream) => Ok(stream),
            // Not asked for by this protocol.
            Greeted::AskAgain => Err(misunderstood(options, "its log-in has no number of rounds")),
        },
    }
}

/// Only the socket: for a request to cancel.
pub(crate) async fn socket(options: &ConnectOptions) -> Result<Socket, SqlError> {
    Socket::open(&options.host, options.port)
        .await
        .map_err(|error| unreachable(options, &error))
}

/// How far a stream got.
enum Greeted<S> {
    /// tokio-postgres may begin.
    Ready(PreAuthenticated<S>),
    /// The answer depends on the number of rounds, which this protocol does not tell.
    AskAgain,
}

/// Says who we are, and answers what only openGauss asks.
async fn greet<S>(
    mut stream: S,
    options: &ConnectOptions,
    protocol: u32,
) -> Result<Greeted<S>, SqlError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let failed = |error: io::Error| unreachable(options, &error);
    let start_up = frame::start_up(protocol, options).map_err(failed)?;
    stream.write_all(&start_up).await.map_err(failed)?;
    stream.flush().await.map_err(failed)?;
    let first = Frame::read(&mut stream).await.map_err(failed)?;
    let Some(asked) = sha256::Asked::of(&first) else {
        return Ok(Greeted::Ready(PreAuthenticated::new(stream, first.bytes())));
    };
    let asked = asked.map_err(|problem| match problem {
        sha256::Problem::Damaged(what) => misunderstood(options, what),
        sha256::Problem::Unsupported(method) => SqlError::Refused {
            user: options.user.clone(),
            message: format!(
                "the server asks for the log-in `{method}`, which is not supported; \
                 let pg_hba.conf say sha256 for this user"
            ),
        },
    })?;
    let Some(password) = &options.password else {
        return Err(SqlError::WrongPassword {
            user: options.user.clone(),
            message: "the server asks for a password, and none was given".to_owned(),
        });
    };
    // A tenth of a second of arithmetic at most, unless the server asks for many rounds.
    let password = password.clone();
    let answer =
        tokio::task::spawn_blocking(move || asked.answer(password.as_bytes(), USUAL_ROUNDS));
    let answer = answer
        .await
        .map_err(|error| misunderstood(options, &error.to_string()))?;
    let Some(answer) = answer else {
        return Ok(Greeted::AskAgain);
    };
    stream
        .write_all(&frame::password(&answer))
        .await
        .map_err(failed)?;
    stream.flush().await.map_err(failed)?;
    Ok(Greeted::Ready(PreAuthenticated::new(stream, Vec::new())))
}

fn unreachable(options: &ConnectOptions, error: &io::Error) -> SqlError {
    SqlError::Unreachable {
        target: options.target(),
        message: error.to_string(),
    }
}

fn misunderstood(options: &ConnectOptions, what: &str) -> SqlError {
    SqlError::Unreachable {
        target: options.target(),
        message: format!("the server's log-in is not understood: {what}"),
    }
}

#[cfg(test)]
mod tests;
