//! Sessions of data nodes, and the pools they are kept in.
//!
//! They speak the protocol as it is on the wire, so that values, in text or in binary, and errors go through
//! to the client as they came.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::FutureExt as _;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::DataNode;
use super::wire::{Bind, Refusal, Stream};

/// How long a statement waits for a session of the pool, and a session for its server.
const PATIENCE: Duration = Duration::from_secs(30);
const CONNECTING: Duration = Duration::from_secs(10);

/// What a node answers to one statement.
#[derive(Debug, Clone, Default)]
pub(super) struct Answer {
    /// Body of `ParameterDescription`.
    pub parameters: Option<Bytes>,
    /// Body of `RowDescription`.
    pub columns: Option<Bytes>,
    /// Bodies of `DataRow`.
    pub rows: Vec<Bytes>,
    /// `INSERT 0 1` and the like.
    pub tag: String,
}

/// One session of a data node.
pub(super) struct Session {
    stream: BufReader<Box<dyn Stream>>,
    /// As of the node's last `ReadyForQuery`.
    status: u8,
}

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::other(what.into())
}

impl Session {
    async fn connect(node: &DataNode) -> Result<Self, Refusal> {
        let opened = tokio::time::timeout(CONNECTING, Self::log_in(node)).await;
        let error = match opened {
            Ok(Ok(session)) => return Ok(session),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        let (host, port) = (&node.host, node.port);
        let message = format!("Connection to {host}:{port} refused: {error}");
        Err(Refusal::new("08001", message))
    }

    async fn log_in(node: &DataNode) -> io::Result<Self> {
        let stream: Box<dyn Stream> = if node.host.starts_with('/') {
            let path = format!("{}/.s.PGSQL.{}", node.host, node.port);
            Box::new(UnixStream::connect(path).await?)
        } else {
            let tcp = TcpStream::connect((node.host.as_str(), node.port)).await?;
            tcp.set_nodelay(true)?;
            Box::new(tcp)
        };
        let mut session = Self {
            stream: BufReader::new(stream),
            status: b'I',
        };
        let mut out = BytesMut::new();
        let parameters = [
            ("user", node.user.as_str()),
            ("database", node.database.as_str()),
            ("application_name", "ShardingSphere-Proxy stand-in"),
            ("client_encoding", "UTF8"),
        ];
        frontend::startup_message(parameters, &mut out)?;
        session.stream.write_all(&out).await?;
        session.answer_questions(node).await?;
        loop {
            match session.message().await? {
                (b'Z', _) => return Ok(session),
                (b'E', body) => return Err(broken(Refusal::of_node(body).message)),
                _ => {}
            }
        }
    }

    async fn answer_questions(&mut self, node: &DataNode) -> io::Result<()> {
        let password = node.password.as_bytes();
        let mut scram = None;
        loop {
            let (kind, body) = self.message().await?;
            if kind != b'R' {
                return Err(broken(Refusal::of_node(body).message));
            }
            let (code, rest) = body.split_at_checked(4).ok_or_else(|| broken("short"))?;
            let mut out = BytesMut::new();
            match u32::from_be_bytes(code.try_into().map_err(io::Error::other)?) {
                0 => return Ok(()),
                3 => frontend::password_message(password, &mut out)?,
                5 => {
                    let salt = rest.try_into().map_err(io::Error::other)?;
                    let hash = md5_hash(node.user.as_bytes(), password, salt);
                    frontend::password_message(hash.as_bytes(), &mut out)?;
                }
                10 => {
                    let binding = sasl::ChannelBinding::unsupported();
                    let new = sasl::ScramSha256::new(password, binding);
                    let first = new.message().to_vec();
                    frontend::sasl_initial_response(sasl::SCRAM_SHA_256, &first, &mut out)?;
                    scram = Some(new);
                }
                11 => {
                    let scram = scram.as_mut().ok_or_else(|| broken("no SASL was begun"))?;
                    scram.update(rest)?;
                    frontend::sasl_response(scram.message(), &mut out)?;
                }
                12 => {
                    let scram = scram.as_mut().ok_or_else(|| broken("no SASL was begun"))?;
                    scram.finish(rest)?;
                }
                code => return Err(broken(format!("log-in by method {code}"))),
            }
            self.stream.write_all(&out).await?;
        }
    }

    async fn message(&mut self) -> io::Result<(u8, Bytes)> {
        let kind = self.stream.read_u8().await?;
        let length = self.stream.read_u32().await? as usize;
        let mut body = vec![0; length.saturating_sub(4)];
        self.stream.read_exact(&mut body).await?;
        Ok((kind, body.into()))
    }

    /// Reads until the node is ready. The outer error: the session is gone.
    async fn answer(&mut self) -> io::Result<Result<Answer, Refusal>> {
        let mut answer = Answer::default();
        let mut refusal = None;
        loop {
            let (kind, body) = self.message().await?;
            match kind {
                b't' => answer.parameters = Some(body),
                b'T' => answer.columns = Some(body),
                b'D' => answer.rows.push(body),
                b'C' => {
                    let tag = body.strip_suffix(b"\0").unwrap_or(&body);
                    answer.tag = String::from_utf8_lossy(tag).into_owned();
                }
                b'E' => refusal = refusal.or(Some(Refusal::of_node(body))),
                b'G' => {
                    let mut out = BytesMut::new();
                    frontend::copy_fail("COPY does not go through the proxy", &mut out)?;
                    self.stream.write_all(&out).await?;
                }
                b'Z' => {
                    self.status = body.first().copied().unwrap_or(b'I');
                    return Ok(refusal.map_or(Ok(answer), Err));
                }
                _ => {}
            }
        }
    }

    async fn simple(&mut self, sql: &str) -> io::Result<Result<Answer, Refusal>> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)?;
        self.stream.write_all(&out).await?;
        self.answer().await
    }

    async fn bound(&mut self, sql: &str, values: &Values) -> io::Result<Result<Answer, Refusal>> {
        let mut out = BytesMut::new();
        frontend::parse("", sql, values.types.iter().copied(), &mut out)?;
        put_bind(&mut out, &values.bind);
        frontend::describe(b'P', "", &mut out)?;
        frontend::execute("", 0, &mut out)?;
        frontend::sync(&mut out);
        self.stream.write_all(&out).await?;
        self.answer().await
    }

    async fn described(&mut self, sql: &str, types: &[u32]) -> io::Result<Result<Answer, Refusal>> {
        let mut out = BytesMut::new();
        frontend::parse("", sql, types.iter().copied(), &mut out)?;
        frontend::describe(b'S', "", &mut out)?;
        frontend::sync(&mut out);
        self.stream.write_all(&out).await?;
        self.answer().await
    }

    /// Whether an idle session is still there.
    fn is_alive(&mut self) -> bool {
        self.stream.fill_buf().now_or_never().is_none()
    }
}

/// Values that go with a statement.
#[derive(Debug, Clone)]
pub(super) struct Values {
    pub types: Vec<u32>,
    pub bind: Bind,
}

fn put_bind(out: &mut BytesMut, bind: &Bind) {
    let mut body = BytesMut::new();
    body.put_slice(b"\0\0");
    put_shorts(&mut body, &bind.formats);
    body.put_slice(&super::wire::row(&bind.values));
    put_shorts(&mut body, &bind.result_formats);
    out.put_u8(b'B');
    out.put_i32((body.len() + 4).try_into().unwrap_or(4));
    out.put_slice(&body);
}

fn put_shorts(body: &mut BytesMut, shorts: &[i16]) {
    body.put_i16(shorts.len().try_into().unwrap_or(0));
    for short in shorts {
        body.put_i16(*short);
    }
}

/// A proxy's sessions of one data node.
pub(super) struct Pool {
    pub node: DataNode,
    idle: Mutex<Vec<Session>>,
    permits: Arc<Semaphore>,
}

impl Pool {
    pub(super) fn new(node: DataNode, size: usize) -> Arc<Self> {
        Arc::new(Self {
            node,
            idle: Mutex::default(),
            permits: Arc::new(Semaphore::new(size)),
        })
    }

    /// Takes a session, or opens one.
    pub(super) async fn take(self: &Arc<Self>) -> Result<Lease, Refusal> {
        let waited = tokio::time::timeout(PATIENCE, Arc::clone(&self.permits).acquire_owned());
        let Ok(Ok(permit)) = waited.await else {
            let message = "Connection is not available, request timed out after 30000ms.";
            return Err(Refusal::new("08000", message));
        };
        loop {
            let idle = self.idle.lock().expect("no panic").pop();
            let session = match idle {
                None => Session::connect(&self.node).await?,
                Some(mut session) => {
                    if !session.is_alive() {
                        continue;
                    }
                    session
                }
            };
            return Ok(Lease {
                session,
                pool: Arc::clone(self),
                lost: false,
                _permit: permit,
            });
        }
    }
}

/// A session taken from its pool. Dropped, it is closed, and the node rolls back what it had begun.
pub(super) struct Lease {
    session: Session,
    pool: Arc<Pool>,
    lost: bool,
    _permit: OwnedSemaphorePermit,
}

impl Lease {
    /// Where it goes.
    pub(super) fn node(&self) -> &DataNode {
        &self.pool.node
    }

    /// Runs one statement by the simple protocol.
    pub(super) async fn simple(&mut self, sql: &str) -> Result<Answer, Refusal> {
        let answer = self.session.simple(sql).await;
        self.judge(answer)
    }

    /// Runs one statement with values.
    pub(super) async fn bound(&mut self, sql: &str, values: &Values) -> Result<Answer, Refusal> {
        let answer = self.session.bound(sql, values).await;
        self.judge(answer)
    }

    /// Asks what a statement takes and gives.
    pub(super) async fn described(&mut self, sql: &str, types: &[u32]) -> Result<Answer, Refusal> {
        let answer = self.session.described(sql, types).await;
        self.judge(answer)
    }

    fn judge(&mut self, answer: io::Result<Result<Answer, Refusal>>) -> Result<Answer, Refusal> {
        answer.unwrap_or_else(|error| {
            self.lost = true;
            let message = format!("An I/O error occurred while sending to the backend: {error}");
            Err(Refusal::new("08006", message))
        })
    }

    /// Gives it back, if it is in no transaction.
    pub(super) fn give_back(self) {
        if !self.lost && self.session.status == b'I' {
            let mut idle = self.pool.idle.lock().expect("no panic");
            idle.push(self.session);
        }
    }
}
