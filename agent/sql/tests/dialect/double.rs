//! A server that talks as the openGauss 5.0.0 did that was recorded: its log-in by SHA256, and answers by heart.

use std::sync::{Arc, Mutex};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// The password of its only user.
pub(crate) const PASSWORD: &str = "Gauss@123";
/// Salt and token that were recorded.
const SALT: &str = "b211fcad7badcfa4252027578e7e973827a3b8f257e187129a99dd2f61437199";
const TOKEN: &str = "e1f45c3b";
const CANCEL: u32 = 80_877_102;

/// What it says to a statement: rows of texts, or an error (SQLSTATE, words).
pub(crate) type Reply = Result<Vec<Vec<Option<String>>>, (&'static str, &'static str)>;

/// How it behaves.
pub(crate) struct Double {
    /// Rounds of its user's password.
    pub(crate) rounds: u32,
    /// Knows the answer to a statement; `None`: there is no such function.
    pub(crate) answer: fn(&str) -> Option<Reply>,
    /// Statements that were sent, and protocols that were said.
    pub(crate) heard: Mutex<Vec<String>>,
    cancelled: Notify,
}

impl Double {
    /// Starts one; returns its port.
    pub(crate) async fn start(rounds: u32, answer: fn(&str) -> Option<Reply>) -> (Arc<Self>, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let double = Arc::new(Self {
            rounds,
            answer,
            heard: Mutex::default(),
            cancelled: Notify::new(),
        });
        let served = Arc::clone(&double);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let double = Arc::clone(&served);
                tokio::spawn(async move { double.serve(stream).await });
            }
        });
        (double, port)
    }

    /// Everything heard so far.
    pub(crate) fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }

    fn hear(&self, what: String) {
        self.heard.lock().unwrap().push(what);
    }

    async fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let length = stream.read_u32().await.ok()?;
        let mut start_up = vec![0; usize::try_from(length).ok()?.checked_sub(4)?];
        stream.read_exact(&mut start_up).await.ok()?;
        let code = u32::from_be_bytes(*start_up.first_chunk()?);
        if code == CANCEL {
            self.cancelled.notify_one();
            return None;
        }
        self.hear(format!("protocol {}.{}", code >> 16, code & 0xffff));
        if !self.log_in(&mut stream, code & 0xffff).await? {
            let words = error("FATAL", "28P01", "Invalid username/password,login denied.");
            return stream.write_all(&words).await.ok();
        }
        let mut ready = message(b'R', &[0; 4]);
        for (name, value) in [
            ("server_version", "9.2.4"),
            ("is_sysadmin", "on"),
            ("TimeZone", "UCT"),
        ] {
            ready.extend(message(b'S', format!("{name}\0{value}\0").as_bytes()));
        }
        ready.extend(message(b'K', &[0, 0, 0, 7, 0, 0, 0, 9]));
        ready.extend(message(b'Z', b"I"));
        stream.write_all(&ready).await.ok()?;
        loop {
            let (kind, body) = frame(&mut stream).await?;
            if kind != b'Q' {
                return None;
            }
            let sql = String::from_utf8(body)
                .ok()?
                .trim_end_matches('\0')
                .to_owned();
            let mut reply = self.reply(&sql).await;
            self.hear(sql);
            reply.extend(message(b'Z', b"I"));
            stream.write_all(&reply).await.ok()?;
        }
    }

    /// The log-in; whether the password is right.
    async fn log_in(&self, stream: &mut TcpStream, minor: u32) -> Option<bool> {
        let salt = hex::decode(SALT).ok()?;
        let token = hex::decode(TOKEN).ok()?;
        let k: [u8; 32] =
            pbkdf2::pbkdf2_hmac_array::<sha1::Sha1, 32>(PASSWORD.as_bytes(), &salt, self.rounds);
        let server_key = mac(&k, b"Sever Key");
        let stored_key: [u8; 32] = Sha256::digest(mac(&k, b"Client Key")).into();
        let mut question = vec![0, 0, 0, 10, 0, 0, 0, 2];
        question.extend_from_slice(SALT.as_bytes());
        question.extend_from_slice(TOKEN.as_bytes());
        if minor < 50 {
            question.extend_from_slice(hex::encode(mac(&server_key, &token)).as_bytes());
        } else {
            question.extend_from_slice(&self.rounds.to_be_bytes());
        }
        stream.write_all(&message(b'R', &question)).await.ok()?;
        let (kind, answer) = frame(stream).await?;
        assert_eq!(kind, b'p');
        self.hear("password".to_owned());
        let answer = hex::decode(answer.strip_suffix(b"\0")?).ok()?;
        // As crypt.cpp does it: what is left without the signature must be the key whose hash is stored.
        let signature = mac(&stored_key, &token);
        let client_key: Vec<u8> = answer.iter().zip(signature).map(|(a, s)| a ^ s).collect();
        Some(Sha256::digest(client_key)[..] == stored_key)
    }

    async fn reply(&self, sql: &str) -> Vec<u8> {
        if sql.contains("pg_sleep") {
            self.cancelled.notified().await;
            return error("ERROR", "57014", "canceling statement due to user request");
        }
        let rows = match (self.answer)(sql) {
            Some(Ok(rows)) => rows,
            Some(Err((sqlstate, words))) => return error("ERROR", sqlstate, words),
            None => {
                let words = format!("function does not exist: {sql}");
                return error("ERROR", "42883", &words);
            }
        };
        let columns = rows.first().map_or(0, Vec::len);
        let mut reply = message(b'T', &description(columns));
        for row in &rows {
            let mut body = u16::try_from(columns).unwrap().to_be_bytes().to_vec();
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
        reply.extend(message(b'C', b"SELECT\0"));
        reply
    }
}

fn mac(key: &[u8; 32], text: &[u8]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
    mac.update(text);
    mac.finalize().into_bytes().into()
}

async fn frame(stream: &mut TcpStream) -> Option<(u8, Vec<u8>)> {
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

fn description(columns: usize) -> Vec<u8> {
    let mut body = u16::try_from(columns).unwrap().to_be_bytes().to_vec();
    for _ in 0..columns {
        body.extend_from_slice(b"column\0");
        // No table, type text, any length, as text.
        body.extend([
            0, 0, 0, 0, 0, 0, 0, 0, 0, 25, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0,
        ]);
    }
    body
}

fn error(severity: &str, sqlstate: &str, words: &str) -> Vec<u8> {
    // Recorded: openGauss has a field 'c' that PostgreSQL has not.
    let body = format!("S{severity}\0c0\0M{words}\0C{sqlstate}\0\0");
    message(b'E', body.as_bytes())
}
