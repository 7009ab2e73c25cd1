//! PostgreSQL's protocol, version 3, from the server's side (PostgreSQL's manual, 55.7).

use std::io;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};

/// The stream of a client: TCP, or TLS over it.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for S {}

/// Longer messages are refused: an IMPORT of 16 MB is the largest that anybody tried.
const LONGEST: usize = 64 * 1024 * 1024;

/// What a client sends after its log-in.
#[derive(Debug, Clone)]
pub(super) enum Request {
    Query(String),
    Parse(Parse),
    Bind(Bind),
    /// `statement`: of a statement (`S`), else of a portal (`P`).
    Describe {
        statement: bool,
        name: String,
    },
    Execute {
        portal: String,
        rows: usize,
    },
    Close {
        statement: bool,
        name: String,
    },
    Sync,
    Flush,
    Terminate,
    Password(String),
    Other,
}

/// A statement to be prepared.
#[derive(Debug, Clone)]
pub(super) struct Parse {
    pub name: String,
    pub sql: String,
    pub types: Vec<u32>,
}

/// Values for a prepared statement.
#[derive(Debug, Clone)]
pub(super) struct Bind {
    pub portal: String,
    pub statement: String,
    pub formats: Vec<i16>,
    pub values: Vec<Option<Bytes>>,
    pub result_formats: Vec<i16>,
}

impl Bind {
    /// Whether parameter `index`, from 0, is in binary.
    pub(super) fn is_binary(&self, index: usize) -> bool {
        is_binary(&self.formats, index)
    }
}

/// Whether column or parameter `index`, from 0, is in binary: no codes mean text, one is for all.
pub(super) fn is_binary(formats: &[i16], index: usize) -> bool {
    match formats {
        [] => false,
        [all] => *all == 1,
        each => each.get(index) == Some(&1),
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Reads what has no type: a start-up message, or a request for TLS or to cancel. Code and rest.
pub(super) async fn read_start_up(stream: &mut dyn Stream) -> io::Result<(u32, Bytes)> {
    let length = stream.read_u32().await? as usize;
    if !(8..=65536).contains(&length) {
        return Err(broken("no start-up message"));
    }
    let mut body = vec![0; length - 4];
    stream.read_exact(&mut body).await?;
    let mut body = Bytes::from(body);
    let code = body.get_u32();
    Ok((code, body))
}

/// Reads one request; `None`: the client has gone.
pub(super) async fn read(stream: &mut dyn Stream) -> io::Result<Option<Request>> {
    let kind = match stream.read_u8().await {
        Ok(kind) => kind,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let length = stream.read_u32().await? as usize;
    if !(4..=LONGEST).contains(&length) {
        return Err(broken("a message of an impossible length"));
    }
    let mut body = vec![0; length - 4];
    stream.read_exact(&mut body).await?;
    let mut body = Body(Bytes::from(body));
    Ok(Some(match kind {
        b'Q' => Request::Query(body.text()?),
        b'P' => Request::Parse(body.parse()?),
        b'B' => Request::Bind(body.bind()?),
        b'D' => {
            let (statement, name) = body.named()?;
            Request::Describe { statement, name }
        }
        b'E' => Request::Execute {
            portal: body.text()?,
            rows: body.int()?.try_into().unwrap_or(0),
        },
        b'C' => {
            let (statement, name) = body.named()?;
            Request::Close { statement, name }
        }
        b'S' => Request::Sync,
        b'H' => Request::Flush,
        b'X' => Request::Terminate,
        b'p' => Request::Password(body.text()?),
        _ => Request::Other,
    }))
}

/// The rest of a message that is being read.
pub(super) struct Body(pub(super) Bytes);

impl Body {
    pub(super) fn text(&mut self) -> io::Result<String> {
        let end = self.0.iter().position(|byte| *byte == 0);
        let text = self
            .0
            .split_to(end.ok_or_else(|| broken("a text without an end"))?);
        self.0.advance(1);
        String::from_utf8(text.to_vec()).map_err(|_| broken("a text that is not UTF-8"))
    }

    pub(super) fn short(&mut self) -> io::Result<i16> {
        self.0.try_get_i16().map_err(|_| broken("cut short"))
    }

    pub(super) fn int(&mut self) -> io::Result<i32> {
        self.0.try_get_i32().map_err(|_| broken("cut short"))
    }

    fn count(&mut self) -> io::Result<usize> {
        usize::try_from(self.short()?).map_err(|_| broken("a negative count"))
    }

    fn named(&mut self) -> io::Result<(bool, String)> {
        let kind = self.0.try_get_u8().map_err(|_| broken("cut short"))?;
        Ok((kind == b'S', self.text()?))
    }

    fn parse(&mut self) -> io::Result<Parse> {
        let (name, sql) = (self.text()?, self.text()?);
        let mut types = Vec::new();
        for _ in 0..self.count()? {
            types.push(u32::from_be_bytes(self.int()?.to_be_bytes()));
        }
        Ok(Parse { name, sql, types })
    }

    fn shorts(&mut self) -> io::Result<Vec<i16>> {
        (0..self.count()?).map(|_| self.short()).collect()
    }

    fn bind(&mut self) -> io::Result<Bind> {
        let (portal, statement) = (self.text()?, self.text()?);
        let formats = self.shorts()?;
        let values = self.values()?;
        Ok(Bind {
            portal,
            statement,
            formats,
            values,
            result_formats: self.shorts()?,
        })
    }

    /// A count and so many values: of a Bind, or of a row.
    pub(super) fn values(&mut self) -> io::Result<Vec<Option<Bytes>>> {
        let mut values = Vec::new();
        for _ in 0..self.count()? {
            let length = self.int()?;
            values.push(match usize::try_from(length) {
                Err(_) => None,
                Ok(length) if length <= self.0.len() => Some(self.0.split_to(length)),
                Ok(_) => return Err(broken("a value that is cut short")),
            });
        }
        Ok(values)
    }
}

/// An error, as the client gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub severity: &'static str,
    pub state: String,
    pub message: String,
    /// The fields of a data node's own error, which is handed on as it came.
    pub fields: Option<Bytes>,
}

impl Refusal {
    pub(super) fn new(state: &str, message: impl Into<String>) -> Self {
        Self {
            severity: "ERROR",
            state: state.to_owned(),
            message: message.into(),
            fields: None,
        }
    }

    pub(super) fn fatal(state: &str, message: impl Into<String>) -> Self {
        Self {
            severity: "FATAL",
            ..Self::new(state, message)
        }
    }

    /// What a ShardingSphere error without a better SQLSTATE becomes: `system_error`.
    pub(super) fn system(message: impl Into<String>) -> Self {
        Self::new("58000", message)
    }

    /// A Java exception that nobody expected.
    pub(super) fn unknown(cause: &str) -> Self {
        Self::system(format!("Unknown exception.\nMore details: {cause}"))
    }

    /// Of a data node, from the body of its message.
    pub(super) fn of_node(fields: Bytes) -> Self {
        let mut error = Self::new("58000", "");
        for field in fields.split(|byte| *byte == 0) {
            match field.split_first() {
                Some((b'C', text)) => error.state = String::from_utf8_lossy(text).into_owned(),
                Some((b'M', text)) => error.message = String::from_utf8_lossy(text).into_owned(),
                _ => {}
            }
        }
        error.fields = Some(fields);
        error
    }
}

/// The columns of an answer that is made here.
pub(super) fn columns(names: &[&str]) -> Bytes {
    /// `"char"`, as which the real one sends all that it makes itself, however long.
    const CHAR: u32 = 18;
    let mut body = BytesMut::new();
    body.put_i16(names.len().try_into().unwrap_or(0));
    for name in names {
        put_text(&mut body, name);
        body.put_u32(0);
        body.put_i16(0);
        body.put_u32(CHAR);
        body.put_i16(-1);
        body.put_i32(-1);
        body.put_i16(0);
    }
    body.freeze()
}

/// A row: what a `DataRow` message has in it.
pub(super) fn row<V: AsRef<[u8]>>(values: &[Option<V>]) -> Bytes {
    let mut body = BytesMut::new();
    body.put_i16(values.len().try_into().unwrap_or(0));
    for value in values {
        match value {
            None => body.put_i32(-1),
            Some(value) => {
                body.put_i32(value.as_ref().len().try_into().unwrap_or(0));
                body.put_slice(value.as_ref());
            }
        }
    }
    body.freeze()
}

fn put_text(to: &mut BytesMut, text: &str) {
    to.put_slice(text.as_bytes());
    to.put_u8(0);
}

/// Messages to a client that are not sent yet.
#[derive(Debug)]
pub(super) struct Replies {
    pub bytes: BytesMut,
    /// Errors are to look as openGauss's frontend sends them.
    pub gauss: bool,
}

impl Replies {
    pub(super) fn new(gauss: bool) -> Self {
        Self {
            bytes: BytesMut::new(),
            gauss,
        }
    }

    pub(super) fn message(&mut self, kind: u8, body: &[u8]) {
        self.bytes.put_u8(kind);
        self.bytes.put_i32((body.len() + 4).try_into().unwrap_or(4));
        self.bytes.put_slice(body);
    }

    /// A request to log in.
    pub(super) fn authentication(&mut self, code: u32, rest: &[u8]) {
        self.message(b'R', &[&code.to_be_bytes(), rest].concat());
    }

    pub(super) fn parameter(&mut self, name: &str, value: &str) {
        let mut body = BytesMut::new();
        put_text(&mut body, name);
        put_text(&mut body, value);
        self.message(b'S', &body);
    }

    pub(super) fn complete(&mut self, tag: &str) {
        self.message(b'C', &[tag.as_bytes(), b"\0"].concat());
    }

    pub(super) fn ready(&mut self, status: u8) {
        self.message(b'Z', &[status]);
    }

    pub(super) fn refusal(&mut self, refusal: &Refusal) {
        if let Some(fields) = &refusal.fields {
            return self.message(b'E', fields);
        }
        let (state, message) = (refusal.state.as_str(), refusal.message.as_str());
        let fatal = format!("FATAL: {message}\n  Server SQLState: {state}");
        let fields = match (self.gauss, refusal.severity) {
            (false, severity) => vec![
                (b'S', severity),
                (b'V', severity),
                (b'C', state),
                (b'M', message),
            ],
            (true, "FATAL") => vec![(b'S', "ERROR"), (b'C', state), (b'M', &fatal), (b'c', "0")],
            (true, severity) => vec![
                (b'S', severity),
                (b'C', state),
                (b'M', message),
                (b'c', "0"),
            ],
        };
        let mut body = BytesMut::new();
        for (field, text) in fields {
            body.put_u8(field);
            put_text(&mut body, text);
        }
        body.put_u8(0);
        self.message(b'E', &body);
    }
}
