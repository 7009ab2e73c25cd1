//! Start-up and log-in, as ShardingSphere-Proxy's two frontends do it.
//!
//! Nobody is told before the password that a user or a database is unknown. There is no `BackendKeyData`.

use std::io;
use std::sync::Arc;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;

use super::Frontend;
use super::instance::Instance;
use super::wire::{self, Body, Refusal, Replies, Request, Stream};

const SSL: u32 = 80_877_103;
const GSS: u32 = 80_877_104;
const CANCEL: u32 = 80_877_102;
/// Protocols of openGauss's drivers.
const GAUSS_350: u32 = (3 << 16) + 50;
const GAUSS_351: u32 = (3 << 16) + 51;

/// Who has logged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Client {
    pub user: String,
    /// The logical database; a client may do without.
    pub database: Option<String>,
}

/// What was asked, so that the answer can be checked.
enum Asked {
    Cleartext,
    Md5([u8; 4]),
    Sha256(Question),
}

/// openGauss's question.
struct Question {
    salt: [u8; 32],
    token: [u8; 4],
    rounds: u32,
}

/// Logs a client in; `None`: it went away, or was sent away.
pub(super) async fn log_in(
    mut stream: Box<dyn Stream>,
    proxy: &Arc<Instance>,
) -> io::Result<Option<(Box<dyn Stream>, Client)>> {
    let (protocol, mut parameters) = loop {
        let (code, body) = wire::read_start_up(&mut *stream).await?;
        proxy.thawed().await;
        match code {
            SSL => match &proxy.tls {
                Some(acceptor) => {
                    stream.write_all(b"S").await?;
                    stream.flush().await?;
                    stream = Box::new(acceptor.accept(stream).await?);
                }
                None => stream.write_all(b"N").await?,
            },
            GSS => stream.write_all(b"N").await?,
            CANCEL => return Ok(None),
            protocol => break (protocol, Body(body)),
        }
    };
    let (mut user, mut database, mut encoding) = (String::new(), None, "UTF8".to_owned());
    loop {
        let name = parameters.text()?;
        if name.is_empty() {
            break;
        }
        let value = parameters.text()?;
        match name.as_str() {
            "user" => user = value,
            "database" if !value.is_empty() => database = Some(value),
            "client_encoding" => encoding = value,
            _ => {}
        }
    }
    let password = proxy.registry.password_of(&user);
    let gauss = proxy.frontend == Frontend::OpenGaussSha256;
    let mut replies = Replies::new(gauss);
    let asked = ask(proxy.frontend, protocol, password.as_deref(), &mut replies);
    stream.write_all_buf(&mut replies.bytes).await?;
    stream.flush().await?;
    let Some(Request::Password(answer)) = wire::read(&mut *stream).await? else {
        return Ok(None);
    };
    proxy.thawed().await;
    let mut replies = Replies::new(gauss);
    let client = Client { user, database };
    if let Err(refusal) = check(proxy, &client, password.as_deref(), &asked, &answer) {
        replies.refusal(&refusal);
        stream.write_all_buf(&mut replies.bytes).await?;
        stream.shutdown().await?;
        return Ok(None);
    }
    greet(proxy, &encoding, &mut replies);
    stream.write_all_buf(&mut replies.bytes).await?;
    stream.flush().await?;
    Ok(Some((stream, client)))
}

fn ask(frontend: Frontend, protocol: u32, password: Option<&str>, replies: &mut Replies) -> Asked {
    match frontend {
        // An unknown user has no method of its own, and is asked by the usual one.
        Frontend::PostgresCleartext if password.is_some() => {
            replies.authentication(3, &[]);
            Asked::Cleartext
        }
        Frontend::PostgresCleartext | Frontend::PostgresMd5 => {
            let salt: [u8; 4] = rand::random();
            replies.authentication(5, &salt);
            Asked::Md5(salt)
        }
        Frontend::OpenGaussSha256 => {
            let question = Question {
                salt: rand::random(),
                token: rand::random(),
                rounds: if protocol == GAUSS_350 { 2048 } else { 10_000 },
            };
            let mut body = 2_u32.to_be_bytes().to_vec();
            body.extend(hex::encode(question.salt).into_bytes());
            body.extend(hex::encode(question.token).into_bytes());
            match protocol {
                GAUSS_350 => {}
                GAUSS_351 => body.extend(question.rounds.to_be_bytes()),
                _ => body.extend(question.signature(password.unwrap_or("")).into_bytes()),
            }
            replies.authentication(10, &body);
            Asked::Sha256(question)
        }
    }
}

/// In the order of the real one: database, user, password.
fn check(
    proxy: &Instance,
    client: &Client,
    password: Option<&str>,
    asked: &Asked,
    answer: &str,
) -> Result<(), Refusal> {
    let user = &client.user;
    if let Some(database) = &client.database
        && !proxy.registry.has_database(database)
    {
        let message = format!("database \"{database}\" does not exist");
        return Err(Refusal::fatal("3D000", message));
    }
    let Some(password) = password else {
        return Err(Refusal::fatal("28000", format!("unknown username: {user}")));
    };
    let right = match asked {
        Asked::Cleartext => answer == password,
        Asked::Md5(salt) => {
            let hash = postgres_protocol::authentication::md5_hash;
            answer == hash(user.as_bytes(), password.as_bytes(), *salt)
        }
        Asked::Sha256(question) => question.accepts(password, answer),
    };
    if right {
        return Ok(());
    }
    let message = format!("password authentication failed for user \"{user}\"");
    Err(Refusal::fatal("28P01", message))
}

fn greet(proxy: &Instance, encoding: &str, replies: &mut Replies) {
    let release = proxy.version.release();
    let gauss = proxy.frontend == Frontend::OpenGaussSha256;
    // Not that of the data nodes: what a frontend says if no storage unit was there at its start.
    let database = if gauss { "9.2.4" } else { "12.3" };
    replies.authentication(0, &[]);
    let version = format!("{database}-ShardingSphere-Proxy {release}");
    replies.parameter("server_version", &version);
    replies.parameter("client_encoding", encoding);
    replies.parameter("server_encoding", "UTF8");
    replies.parameter("integer_datetimes", "on");
    if !gauss {
        replies.parameter("standard_conforming_strings", "on");
    }
    replies.ready(b'I');
}

fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("a key of any length will do");
    mac.update(text);
    mac.finalize().into_bytes().into()
}

impl Question {
    fn key(&self, password: &str) -> [u8; 32] {
        pbkdf2::pbkdf2_hmac_array::<Sha1, 32>(password.as_bytes(), &self.salt, self.rounds)
    }

    /// By which the server shows that it knows the password.
    fn signature(&self, password: &str) -> String {
        // "Sever" is how openGauss spells it.
        let key = hmac(&self.key(password), b"Sever Key");
        hex::encode(hmac(&key, &self.token))
    }

    fn accepts(&self, password: &str, answer: &str) -> bool {
        let client = hmac(&self.key(password), b"Client Key");
        let stored: [u8; 32] = Sha256::digest(client).into();
        let mut expected = hmac(&stored, &self.token);
        for (byte, key) in expected.iter_mut().zip(client) {
            *byte ^= key;
        }
        answer == hex::encode(expected)
    }
}
