//! A client that shows every message of a server as it came: what drivers hide is what conformance is about.
//!
//! It speaks PostgreSQL's protocol (md5, cleartext) and that of openGauss's drivers (SHA256, protocols 3.0, 3.50 and 3.51).

use std::io;
use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use postgres_protocol::authentication::md5_hash;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// For everything that is answered to one request.
const ANSWER: Duration = Duration::from_secs(90);
/// Rounds that are not told: those of protocol 3.0 with ShardingSphere, and of 3.50.
const ROUNDS_300: u32 = 10_000;
const ROUNDS_350: u32 = 2048;

/// As whom to log in, and how.
#[derive(Debug, Clone)]
pub struct LogIn {
    /// Port on 127.0.0.1.
    pub port: u16,
    /// User.
    pub user: String,
    /// Password.
    pub password: String,
    /// Database: of a proxy the logical one.
    pub database: String,
    /// Minor number of the protocol, 3.x: 0, and openGauss's 50 and 51.
    pub minor: u32,
}

/// One message of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// A question or its end: code and what follows.
    Authentication(u32, Vec<u8>),
    /// A setting.
    Parameter(String, String),
    /// The key to cancel with.
    BackendKey,
    /// An error: its fields in their order.
    Error(Vec<(char, String)>),
    /// Names of columns and the types' numbers.
    Columns(Vec<(String, u32)>),
    /// A row as text.
    Row(Vec<Option<String>>),
    /// Command complete.
    Tag(String),
    /// Ready for the next request: `I`, `T` or `E`.
    Ready(char),
    /// Any other, by its letter.
    Other(char),
}

/// All that was answered to one request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply(pub Vec<Heard>);

impl Reply {
    /// The first error's SQLSTATE and text.
    pub fn error(&self) -> Option<(&str, &str)> {
        Some((self.field('C')?, self.field('M')?))
    }

    /// A field of the first error.
    pub fn field(&self, letter: char) -> Option<&str> {
        let fields = self.0.iter().find_map(|heard| match heard {
            Heard::Error(fields) => Some(fields),
            _ => None,
        })?;
        let found = fields.iter().find(|(known, _)| *known == letter)?;
        Some(&found.1)
    }

    /// The tags.
    pub fn tags(&self) -> Vec<&str> {
        let tags = self.0.iter().filter_map(|heard| match heard {
            Heard::Tag(tag) => Some(tag.as_str()),
            _ => None,
        });
        tags.collect()
    }

    /// The rows.
    pub fn rows(&self) -> Vec<&[Option<String>]> {
        let rows = self.0.iter().filter_map(|heard| match heard {
            Heard::Row(row) => Some(row.as_slice()),
            _ => None,
        });
        rows.collect()
    }

    /// The one value of the one row.
    pub fn value(&self) -> Option<&str> {
        match self.rows().as_slice() {
            [[Some(value)]] => Some(value),
            _ => None,
        }
    }

    /// Names of the columns.
    pub fn columns(&self) -> Vec<&str> {
        let columns = self.0.iter().find_map(|heard| match heard {
            Heard::Columns(columns) => Some(columns),
            _ => None,
        });
        let names = columns.into_iter().flatten().map(|(name, _)| name.as_str());
        names.collect()
    }

    /// Status of the last `ReadyForQuery`.
    pub fn ready(&self) -> Option<char> {
        self.0.iter().rev().find_map(|heard| match heard {
            Heard::Ready(status) => Some(*status),
            _ => None,
        })
    }

    /// A setting that was told.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.0.iter().find_map(|heard| match heard {
            Heard::Parameter(known, value) if known == name => Some(value.as_str()),
            _ => None,
        })
    }

    /// The settings' names in their order.
    pub fn parameters(&self) -> Vec<&str> {
        let names = self.0.iter().filter_map(|heard| match heard {
            Heard::Parameter(name, _) => Some(name.as_str()),
            _ => None,
        });
        names.collect()
    }
}

/// A session.
#[derive(Debug)]
pub struct Raw {
    stream: BufReader<TcpStream>,
    /// All that was said up to the first `ReadyForQuery`.
    pub greeting: Reply,
}

impl Raw {
    /// Logs in. The inner error is all that the server said before it ended the connection.
    ///
    /// # Errors
    /// If there is no server, or it speaks something else.
    pub async fn log_in(who: &LogIn) -> io::Result<Result<Self, Reply>> {
        let both = tokio::time::timeout(ANSWER, Self::try_log_in(who)).await;
        both.unwrap_or_else(|_| Err(silence()))
    }

    async fn try_log_in(who: &LogIn) -> io::Result<Result<Self, Reply>> {
        let stream = TcpStream::connect(("127.0.0.1", who.port)).await?;
        stream.set_nodelay(true)?;
        let mut raw = Self {
            stream: BufReader::new(stream),
            greeting: Reply::default(),
        };
        let mut startup = ((3 << 16) + who.minor).to_be_bytes().to_vec();
        for part in ["user", &who.user, "database", &who.database, ""] {
            cstr(&mut startup, part);
        }
        let length = u32::try_from(startup.len() + 4).expect("a short message");
        raw.send(&[&length.to_be_bytes()[..], &startup].concat())
            .await?;
        loop {
            let heard = raw.receive().await?;
            raw.greeting.0.push(heard.clone());
            match heard {
                Heard::Ready(_) => return Ok(Ok(raw)),
                Heard::Error(_) => return Ok(Err(raw.greeting)),
                Heard::Authentication(0, _) => {}
                Heard::Authentication(code, rest) => {
                    let answer = answer(who, code, &rest);
                    let answer = answer.ok_or_else(|| io::Error::other("an odd question"))?;
                    let mut message = Message::default();
                    message.part(b'p', |body| cstr(body, &answer));
                    raw.send(&message.0).await?;
                }
                _ => {}
            }
        }
    }

    /// One simple query.
    ///
    /// # Errors
    /// If the connection ends.
    pub async fn query(&mut self, sql: &str) -> io::Result<Reply> {
        let mut message = Message::default();
        message.part(b'Q', |body| cstr(body, sql));
        self.exchange(&message.0).await
    }

    /// Parse, Describe of the statement, Sync: what drivers do to prepare.
    ///
    /// # Errors
    /// If the connection ends.
    pub async fn prepare(&mut self, sql: &str) -> io::Result<Reply> {
        let mut message = Message::default();
        message.parse(sql, &[]);
        message.part(b'D', |body| {
            body.push(b'S');
            cstr(body, "");
        });
        message.part(b'S', |_| {});
        self.exchange(&message.0).await
    }

    /// Parse, for each row Bind and Execute, one Sync. Types by their number; none: the server shall find out.
    ///
    /// # Errors
    /// If the connection ends.
    pub async fn batch(&mut self, sql: &str, types: &[u32], rows: &[&[i64]]) -> io::Result<Reply> {
        let mut message = Message::default();
        message.parse(sql, types);
        for row in rows {
            message.bind_and_execute(row);
        }
        message.part(b'S', |_| {});
        self.exchange(&message.0).await
    }

    async fn exchange(&mut self, message: &[u8]) -> io::Result<Reply> {
        let both = async {
            self.send(message).await?;
            let mut reply = Reply::default();
            loop {
                let heard = self.receive().await?;
                let done = matches!(heard, Heard::Ready(_));
                reply.0.push(heard);
                if done {
                    return Ok(reply);
                }
            }
        };
        let both = tokio::time::timeout(ANSWER, both).await;
        both.unwrap_or_else(|_| Err(silence()))
    }

    async fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(message).await
    }

    async fn receive(&mut self) -> io::Result<Heard> {
        let tag = self.stream.read_u8().await?;
        let length = self.stream.read_u32().await?.saturating_sub(4);
        let mut body = vec![0; usize::try_from(length).expect("64 bits")];
        self.stream.read_exact(&mut body).await?;
        Ok(heard(tag, &body))
    }
}

fn silence() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {ANSWER:?}"))
}

/// Messages to be sent in one go.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn part(&mut self, tag: u8, write: impl FnOnce(&mut Vec<u8>)) {
        let mut body = Vec::new();
        write(&mut body);
        self.0.push(tag);
        let length = u32::try_from(body.len() + 4).expect("a short message");
        self.0.extend(length.to_be_bytes());
        self.0.extend(body);
    }

    fn parse(&mut self, sql: &str, types: &[u32]) {
        self.part(b'P', |body| {
            cstr(body, "");
            cstr(body, sql);
            short(body, types.len());
            body.extend(types.iter().flat_map(|number| number.to_be_bytes()));
        });
    }

    /// The unnamed statement and portal, everything as text.
    fn bind_and_execute(&mut self, parameters: &[i64]) {
        self.part(b'B', |body| {
            cstr(body, "");
            cstr(body, "");
            short(body, 0);
            short(body, parameters.len());
            for parameter in parameters {
                let text = parameter.to_string();
                body.extend(u32::try_from(text.len()).expect("digits").to_be_bytes());
                body.extend(text.as_bytes());
            }
            short(body, 0);
        });
        self.part(b'E', |body| {
            cstr(body, "");
            body.extend(0_u32.to_be_bytes());
        });
    }
}

fn cstr(body: &mut Vec<u8>, text: &str) {
    body.extend(text.as_bytes());
    body.push(0);
}

fn short(body: &mut Vec<u8>, number: usize) {
    body.extend(u16::try_from(number).expect("few").to_be_bytes());
}

/// The answer to a question of the log-in.
fn answer(who: &LogIn, code: u32, rest: &[u8]) -> Option<String> {
    match code {
        3 => Some(who.password.clone()),
        5 => {
            let salt = rest.try_into().ok()?;
            Some(md5_hash(who.user.as_bytes(), who.password.as_bytes(), salt))
        }
        10 => {
            let (_, rest) = rest.split_at_checked(4)?;
            let (salt, rest) = rest.split_at_checked(64)?;
            let (token, rest) = rest.split_at_checked(8)?;
            let rounds = match <[u8; 4]>::try_from(rest) {
                Ok(told) => u32::from_be_bytes(told),
                Err(_) if rest.is_empty() => ROUNDS_350,
                Err(_) => ROUNDS_300,
            };
            let (salt, token) = (hex::decode(salt).ok()?, hex::decode(token).ok()?);
            Some(sha256(who.password.as_bytes(), &salt, &token, rounds))
        }
        _ => None,
    }
}

/// openGauss's: HMAC(SHA256(client key), token) XOR client key, in hex.
fn sha256(password: &[u8], salt: &[u8], token: &[u8], rounds: u32) -> String {
    let hmac = |key: &[u8], data: &[u8]| -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("any length");
        mac.update(data);
        mac.finalize().into_bytes().into()
    };
    let key: [u8; 32] = pbkdf2::pbkdf2_hmac_array::<Sha1, 32>(password, salt, rounds);
    let client = hmac(&key, b"Client Key");
    let stored: [u8; 32] = Sha256::digest(client).into();
    let proof = hmac(&stored, token);
    hex::encode(std::array::from_fn::<u8, 32, _>(|at| {
        proof[at] ^ client[at]
    }))
}

fn heard(tag: u8, body: &[u8]) -> Heard {
    let strings = || {
        let mut parts = body.split(|byte| *byte == 0);
        move || String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned()
    };
    match (tag, body) {
        (b'R', [a, b, c, d, rest @ ..]) => {
            Heard::Authentication(u32::from_be_bytes([*a, *b, *c, *d]), rest.to_vec())
        }
        (b'S', _) => {
            let mut next = strings();
            Heard::Parameter(next(), next())
        }
        (b'K', _) => Heard::BackendKey,
        (b'E', _) => {
            let fields = body.split(|byte| *byte == 0).filter_map(|field| {
                let (letter, value) = field.split_first()?;
                Some((*letter as char, String::from_utf8_lossy(value).into_owned()))
            });
            Heard::Error(fields.collect())
        }
        (b'T', [_, _, rest @ ..]) => Heard::Columns(columns(rest)),
        (b'D', [_, _, rest @ ..]) => Heard::Row(row(rest)),
        (b'C', _) => Heard::Tag(strings()()),
        (b'Z', [status]) => Heard::Ready(*status as char),
        (tag, _) => Heard::Other(tag as char),
    }
}

/// Each: name, table, number, type, length, modifier, format.
fn columns(mut rest: &[u8]) -> Vec<(String, u32)> {
    let mut columns = Vec::new();
    while let Some(end) = rest.iter().position(|byte| *byte == 0) {
        let name = String::from_utf8_lossy(&rest[..end]).into_owned();
        let Some((fields, after)) = rest[end + 1..].split_at_checked(18) else {
            break;
        };
        let kind = u32::from_be_bytes([fields[6], fields[7], fields[8], fields[9]]);
        columns.push((name, kind));
        rest = after;
    }
    columns
}

fn row(mut rest: &[u8]) -> Vec<Option<String>> {
    let mut values = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = usize::try_from(i32::from_be_bytes(*length)).ok();
        let (value, after) = after.split_at(length.unwrap_or(0).min(after.len()));
        values.push(length.map(|_| String::from_utf8_lossy(value).into_owned()));
        rest = after;
    }
    values
}
