//! The real program, and a client that knows nothing of ours.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::certs::{Authority, Files, Leaf};

const PATIENCE: Duration = Duration::from_secs(20);

/// An agent that runs; killed on drop.
pub(crate) struct Agent {
    process: Child,
    pub(crate) address: String,
    log: PathBuf,
    /// Its directory, and its database's: there is none.
    pub(crate) home: TempDir,
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pitr-agent"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("AWS_") || text.starts_with("PITR_AGENT_") {
            command.env_remove(&name);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// Runs it where it is expected to end by itself.
pub(crate) fn run(args: &[&str]) -> Output {
    let mut command = program();
    let child = command
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut agent = Reaper(child);
    let begun = Instant::now();
    let (wake, woken) = std::sync::mpsc::channel::<()>();
    while agent.0.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < PATIENCE, "{args:?} is still running");
        let _ = woken.recv_timeout(Duration::from_millis(10));
    }
    drop(wake);
    let mut output = Output {
        status: agent.0.wait().unwrap(),
        stdout: Vec::new(),
        stderr: Vec::new(),
    };
    agent
        .0
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut output.stdout)
        .unwrap();
    agent
        .0
        .stderr
        .take()
        .unwrap()
        .read_to_end(&mut output.stderr)
        .unwrap();
    output
}

struct Reaper(Child);

impl Drop for Reaper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Agent {
    pub(crate) fn start(args: &[&str]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let log = home.path().join("log");
        let mut process = program()
            .args(["--port", "0"])
            .args(args)
            // Nobody's database, unless the test gives one.
            .env("PITR_AGENT_PG_HOST", home.path())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = process.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line
            .trim()
            .rsplit("://")
            .next()
            .unwrap_or_default()
            .to_owned();
        let agent = Self {
            process,
            address,
            log,
            home,
        };
        let said = line.starts_with("listening on http");
        assert!(said, "it said `{line}` and logged {}", agent.log());
        agent
    }

    /// With a certificate of `authority`, in `directory`.
    pub(crate) fn secure(authority: &Authority, directory: &TempDir) -> Self {
        let files = Files::write(directory.path(), &authority.agent(), authority);
        let flags = files.flags();
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        Self::start(&flags)
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    pub(crate) async fn wait_for_log(&self, words: &str) {
        let begun = Instant::now();
        while !self.log().contains(words) {
            assert!(
                begun.elapsed() < PATIENCE,
                "`{words}` is not in {}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Its exit code after SIGTERM.
    pub(crate) async fn stop(&mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        let begun = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code();
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "it does not stop: {}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// One request over a connection of our own; status and body, or why there were none.
pub(crate) async fn request(
    address: &str,
    tls: Option<ClientConfig>,
    text: &str,
) -> io::Result<(u16, String)> {
    let exchange = async {
        let stream = TcpStream::connect(address).await?;
        let Some(tls) = tls else {
            return talk(stream, text).await;
        };
        let connector = TlsConnector::from(Arc::new(tls));
        let name = "127.0.0.1".try_into().unwrap();
        talk(connector.connect(name, stream).await?, text).await
    };
    tokio::time::timeout(PATIENCE, exchange).await?
}

async fn talk(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    text: &str,
) -> io::Result<(u16, String)> {
    stream.write_all(text.as_bytes()).await?;
    stream.flush().await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Ok((status.unwrap_or(0), body.to_owned()))
}

pub(crate) fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
}

pub(crate) fn post(path: &str, content_type: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: {content_type}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// TLS that trusts `authority` and shows `leaf`.
pub(crate) fn tls(
    authority: &Authority,
    leaf: Option<&Leaf>,
    versions: &[&'static SupportedProtocolVersion],
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    match leaf {
        None => builder.with_no_client_auth(),
        Some(leaf) => {
            let chain = vec![CertificateDer::from_pem_slice(leaf.certificate.as_bytes()).unwrap()];
            let key = PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    }
}
