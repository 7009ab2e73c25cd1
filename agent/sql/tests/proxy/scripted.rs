//! A proxy that does as it is told: a front end of either protocol, and a script of what is said to which statement.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use rustls::ServerConfig;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

pub(crate) const USER: &str = "root";
pub(crate) const PASSWORD: &str = "Sharding@123";
/// `md5(md5(PASSWORD USER) "salt")` (D 55.2.1).
const MD5_ANSWER: &[u8] = b"md5ff984abf008a2ad6d491d8fcb0f6f248";
const SSL_REQUEST: u32 = 80_877_103;
const SALT: &str = "b211fcad7badcfa4252027578e7e973827a3b8f257e187129a99dd2f61437199";
const TOKEN: &str = "e1f45c3b";
/// What an openGauss front end stores a password with (facts of 5.5.2).
const ROUNDS: u32 = 10_000;

/// How its front end logs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FrontEnd {
    Md5,
    Cleartext,
    Gauss,
}

/// What it says to a statement.
#[derive(Debug, Clone)]
pub(crate) enum Say {
    Success,
    Rows(Vec<Vec<Option<String>>>),
    Error(&'static str, &'static str),
    /// And goes on, as a proxy does.
    Fatal(&'static str, &'static str),
    /// And hangs up.
    LastWords(&'static str, &'static str),
    /// Later, if the client is still there; it goes on then.
    Late(Duration, Box<Say>),
    Nothing,
    HangUp,
}

type Script = Arc<dyn Fn(&str) -> Say + Send + Sync>;

#[derive(Clone)]
pub(crate) struct Scripted {
    front_end: FrontEnd,
    script: Script,
    tls: Option<Arc<ServerConfig>>,
    heard: Arc<Mutex<Vec<String>>>,
    pub(crate) port: u16,
}

impl Scripted {
    pub(crate) async fn start(
        front_end: FrontEnd,
        script: impl Fn(&str) -> Say + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(front_end, None, script).await
    }

    pub(crate) async fn start_with(
        front_end: FrontEnd,
        tls: Option<Arc<ServerConfig>>,
        script: impl Fn(&str) -> Say + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self {
            front_end,
            script: Arc::new(script),
            tls,
            heard: Arc::default(),
            port: listener.local_addr().unwrap().port(),
        };
        let served = proxy.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let proxy = served.clone();
                tokio::spawn(async move { proxy.accept(stream).await });
            }
        });
        proxy
    }

    /// Statements that were sent; and `log-in`, for each that went well.
    pub(crate) fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }

    fn hear(&self, what: &str) {
        self.heard.lock().unwrap().push(what.to_owned());
    }

    async fn accept(&self, mut stream: TcpStream) -> Option<()> {
        let start_up = start_up(&mut stream).await?;
        if u32::from_be_bytes(*start_up.first_chunk()?) != SSL_REQUEST {
            return self.serve(stream, start_up).await;
        }
        let Some(tls) = &self.tls else {
            stream.write_all(b"N").await.ok()?;
            return None;
        };
        stream.write_all(b"S").await.ok()?;
        let acceptor = TlsAcceptor::from(Arc::clone(tls));
        let mut stream = acceptor.accept(stream).await.ok()?;
        self.hear("TLS");
        let start_up = self::start_up(&mut stream).await?;
        self.serve(stream, start_up).await
    }

    async fn serve<S>(&self, mut stream: S, start_up: Vec<u8>) -> Option<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let minor = u32::from_be_bytes(*start_up.first_chunk()?) & 0xffff;
        let text = String::from_utf8(start_up[4..].to_vec()).ok()?;
        let parameters: Vec<_> = text.split('\0').collect();
        let value = |name| {
            let at = parameters.iter().step_by(2).position(|it| *it == name)?;
            Some(parameters[2 * at + 1])
        };
        let right = match self.front_end {
            FrontEnd::Md5 => self.md5(&mut stream).await?,
            FrontEnd::Cleartext => {
                stream.write_all(&message(b'R', &[0, 0, 0, 3])).await.ok()?;
                let (_, answer) = frame(&mut stream).await?;
                answer == [PASSWORD.as_bytes(), b"\0"].concat()
            }
            FrontEnd::Gauss => self.gauss(&mut stream, minor).await?,
        };
        let refused = if value("user") != Some(USER) {
            Some(("28000", "unknown username: nobody"))
        } else if !right {
            Some(("28P01", "password authentication failed for user \"root\""))
        } else if value("database") != Some("postgres") {
            Some(("3D000", "database \"nowhere\" does not exist"))
        } else {
            None
        };
        if let Some((sqlstate, words)) = refused {
            let words = match self.front_end {
                // Recorded.
                FrontEnd::Gauss => {
                    let words = format!("FATAL: {words}\n  Server SQLState: {sqlstate}");
                    error("ERROR", sqlstate, &words)
                }
                FrontEnd::Md5 | FrontEnd::Cleartext => error("FATAL", sqlstate, words),
            };
            return stream.write_all(&words).await.ok();
        }
        self.hear("log-in");
        // No key for cancelling, as a proxy has none.
        let mut ready = message(b'R', &[0; 4]);
        for (name, value) in [("server_version", "12.3"), ("client_encoding", "UTF8")] {
            ready.extend(message(b'S', format!("{name}\0{value}\0").as_bytes()));
        }
        ready.extend(message(b'Z', b"I"));
        stream.write_all(&ready).await.ok()?;
        loop {
            let (kind, body) = frame(&mut stream).await?;
            if kind != b'Q' {
                return None;
            }
            let sql = String::from_utf8(body).ok()?;
            let sql = sql.trim_end_matches('\0');
            self.hear(sql);
            self.answer(&mut stream, (self.script)(sql)).await?;
        }
    }

    async fn md5<S>(&self, stream: &mut S) -> Option<bool>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let question = [&[0, 0, 0, 5][..], b"salt"].concat();
        stream.write_all(&message(b'R', &question)).await.ok()?;
        let (_, answer) = frame(stream).await?;
        Some(answer == [MD5_ANSWER, b"\0"].concat())
    }

    /// As an openGauss front end does it; it asks a user that it does not know too.
    async fn gauss<S>(&self, stream: &mut S, minor: u32) -> Option<bool>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let salt = hex::decode(SALT).ok()?;
        let token = hex::decode(TOKEN).ok()?;
        let k: [u8; 32] =
            pbkdf2::pbkdf2_hmac_array::<sha1::Sha1, 32>(PASSWORD.as_bytes(), &salt, ROUNDS);
        let stored_key: [u8; 32] = Sha256::digest(mac(&k, b"Client Key")).into();
        let mut question = vec![0, 0, 0, 10, 0, 0, 0, 2];
        question.extend_from_slice(SALT.as_bytes());
        question.extend_from_slice(TOKEN.as_bytes());
        if minor < 50 {
            let signature = mac(&mac(&k, b"Sever Key"), &token);
            question.extend_from_slice(hex::encode(signature).as_bytes());
        } else {
            question.extend_from_slice(&ROUNDS.to_be_bytes());
        }
        stream.write_all(&message(b'R', &question)).await.ok()?;
        let (_, answer) = frame(stream).await?;
        let answer = hex::decode(answer.strip_suffix(b"\0")?).ok()?;
        let signature = mac(&stored_key, &token);
        let client_key: Vec<u8> = answer.iter().zip(signature).map(|(a, s)| a ^ s).collect();
        Some(Sha256::digest(client_key)[..] == stored_key)
    }

    async fn answer<S>(&self, stream: &mut S, mut say: Say) -> Option<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        while let Say::Late(pause, then) = say {
            tokio::time::sleep(pause).await;
            say = *then;
        }
        let mut reply = match say {
            Say::Success => message(b'C', b"SUCCESS\0"),
            Say::Rows(rows) => table(&rows),
            Say::Error(sqlstate, words) => error("ERROR", sqlstate, words),
            Say::Fatal(sqlstate, words) => error("FATAL", sqlstate, words),
            Say::LastWords(sqlstate, words) => {
                let last = error("FATAL", sqlstate, words);
                stream.write_all(&last).await.ok()?;
                return None;
            }
            Say::Nothing => {
                std::future::pending::<()>().await;
                return None;
            }
            Say::HangUp | Say::Late(..) => return None,
        };
        reply.extend(message(b'Z', b"I"));
        stream.write_all(&reply).await.ok()
    }
}

async fn start_up(stream: &mut (impl AsyncRead + Unpin)) -> Option<Vec<u8>> {
    let length = stream.read_u32().await.ok()?;
    let mut body = vec![0; usize::try_from(length).ok()?.checked_sub(4)?];
    stream.read_exact(&mut body).await.ok()?;
    Some(body)
}

fn mac(key: &[u8; 32], text: &[u8]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
    mac.update(text);
    mac.finalize().into_bytes().into()
}

async fn frame(stream: &mut (impl AsyncRead + Unpin)) -> Option<(u8, Vec<u8>)> {
    let kind = stream.read_u8().await.ok()?;
    let length = stream.read_u32().await.ok()?;
    let mut body = vec![0; usize::try_from(length).ok()?.checked_sub(4)?];
    stream.read_exact(&mut body).await.ok()?;
    Some((kind, body))
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn table(rows: &[Vec<Option<String>>]) -> Vec<u8> {
    let columns = rows.first().map_or(0, Vec::len);
    let count = u16::try_from(columns).unwrap().to_be_bytes();
    let mut body = count.to_vec();
    for _ in 0..columns {
        body.extend_from_slice(b"column\0");
        // No table, type text, any length, as text.
        body.extend([
            0, 0, 0, 0, 0, 0, 0, 0, 0, 25, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0,
        ]);
    }
    let mut reply = message(b'T', &body);
    for row in rows {
        let mut body = count.to_vec();
        for value in row {
            match value {
                Some(text) => {
                    body.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
                    body.extend(text.as_bytes());
                }
                None => body.extend((-1_i32).to_be_bytes()),
            }
        }
        reply.extend(message(b'D', &body));
    }
    reply.extend(message(b'C', b"SELECT 1\0"));
    reply
}

fn error(severity: &str, sqlstate: &str, words: &str) -> Vec<u8> {
    // As the openGauss front end does, which leaves the field V out.
    let body = format!("S{severity}\0C{sqlstate}\0M{words}\0\0");
    message(b'E', body.as_bytes())
}
