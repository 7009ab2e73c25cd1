//! A client of ZooKeeper that can do what tests need: read and write a node, and hold an ephemeral one.
//!
//! The protocol is Jute's (zookeeper.jute of 3.8): every message has its length before it; strings and buffers too.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// For one answer.
const ANSWER: Duration = Duration::from_secs(20);
/// What the server may wait for a sign of life.
const SESSION_MS: i32 = 30_000;
/// How often one is given.
const PING: Duration = Duration::from_secs(5);

const CREATE: i32 = 1;
const GET: i32 = 4;
const SET: i32 = 5;
const CLOSE: i32 = -11;
const PINGING: i32 = 11;
const NO_NODE: i32 = -101;
const NODE_EXISTS: i32 = -110;
/// Ephemeral and sequential.
const EPHEMERAL_SEQUENTIAL: i32 = 3;

/// A session. What it created as ephemeral goes with it.
#[derive(Debug)]
pub(super) struct ZooKeeper {
    stream: Arc<Mutex<TcpStream>>,
    done: Arc<AtomicBool>,
    pinging: Option<JoinHandle<()>>,
}

fn text(into: &mut Vec<u8>, bytes: &[u8]) {
    let length = i32::try_from(bytes.len()).expect("short");
    into.extend(length.to_be_bytes());
    into.extend(bytes);
}

fn send(stream: &mut TcpStream, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len()).expect("short");
    stream.write_all(&[&length.to_be_bytes()[..], body].concat())
}

fn receive(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut body = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut body)?;
    Ok(body)
}

/// Sends a request and returns the error's number and what else was answered.
fn exchange(stream: &mut TcpStream, kind: i32, body: &[u8]) -> io::Result<(i32, Vec<u8>)> {
    // One at a time: the number of a request need not differ, but for pings it is given.
    let number = if kind == PINGING { -2_i32 } else { 1 };
    send(
        stream,
        &[&number.to_be_bytes()[..], &kind.to_be_bytes(), body].concat(),
    )?;
    let answer = receive(stream)?;
    // Number, transaction id, error.
    let error = answer
        .get(12..16)
        .and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
    let error = error.ok_or_else(|| io::Error::other("a short answer"))?;
    Ok((i32::from_be_bytes(error), answer[16..].to_vec()))
}

fn first_text(body: &[u8]) -> String {
    let Some((length, rest)) = body.split_first_chunk::<4>() else {
        return String::new();
    };
    let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
    String::from_utf8_lossy(&rest[..length.min(rest.len())]).into_owned()
}

impl ZooKeeper {
    /// Opens a session with the server on this port of loopback.
    ///
    /// # Errors
    /// If it is not there, or does not answer.
    pub(super) fn open(port: u16) -> io::Result<Self> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_nodelay(true)?;
        let mut hello = Vec::new();
        hello.extend(0_i32.to_be_bytes());
        hello.extend(0_i64.to_be_bytes());
        hello.extend(SESSION_MS.to_be_bytes());
        hello.extend(0_i64.to_be_bytes());
        text(&mut hello, &[0; 16]);
        hello.push(0);
        send(&mut stream, &hello)?;
        receive(&mut stream)?;
        let stream = Arc::new(Mutex::new(stream));
        let done = Arc::new(AtomicBool::new(false));
        let (shared, over) = (Arc::clone(&stream), Arc::clone(&done));
        let pinging = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                std::thread::park_timeout(PING);
                let mut stream = shared.lock().expect("no panic");
                if exchange(&mut stream, PINGING, &[]).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            stream,
            done,
            pinging: Some(pinging),
        })
    }

    fn stream(&self) -> MutexGuard<'_, TcpStream> {
        self.stream.lock().expect("no panic")
    }

    /// The data of a node; `None`: there is no such node.
    ///
    /// # Panics
    /// If the server does not answer.
    pub(super) fn get(&self, path: &str) -> Option<String> {
        let mut body = Vec::new();
        text(&mut body, path.as_bytes());
        body.push(0);
        let (error, answer) = exchange(&mut self.stream(), GET, &body).expect("ZooKeeper answers");
        match error {
            0 => Some(first_text(&answer)),
            NO_NODE => None,
            error => panic!("reading {path}: error {error}"),
        }
    }

    /// Writes the data of a node, which must be there.
    ///
    /// # Panics
    /// If it is not.
    pub(super) fn set(&self, path: &str, data: &str) {
        let mut body = Vec::new();
        text(&mut body, path.as_bytes());
        text(&mut body, data.as_bytes());
        body.extend((-1_i32).to_be_bytes());
        let (error, _) = exchange(&mut self.stream(), SET, &body).expect("ZooKeeper answers");
        assert_eq!(error, 0, "writing {path}");
    }

    /// Makes a node and, if they are missing, those above it.
    fn create(&self, path: &str, flags: i32) -> String {
        for (at, _) in path.match_indices('/').skip(1) {
            let made = self.try_create(&path[..at], 0);
            assert!(made.is_ok() || made == Err(NODE_EXISTS), "{path}: {made:?}");
        }
        let made = self.try_create(path, flags);
        made.unwrap_or_else(|error| panic!("making {path}: error {error}"))
    }

    fn try_create(&self, path: &str, flags: i32) -> Result<String, i32> {
        let mut body = Vec::new();
        text(&mut body, path.as_bytes());
        text(&mut body, b"");
        // One entry: everybody may do everything.
        body.extend(1_i32.to_be_bytes());
        body.extend(31_i32.to_be_bytes());
        text(&mut body, b"world");
        text(&mut body, b"anyone");
        body.extend(flags.to_be_bytes());
        let (error, answer) =
            exchange(&mut self.stream(), CREATE, &body).expect("ZooKeeper answers");
        if error == 0 {
            Ok(first_text(&answer))
        } else {
            Err(error)
        }
    }

    /// Takes a lock as Curator's mutexes are taken: until this session ends, who else wants it waits behind us.
    ///
    /// # Panics
    /// If the server does not answer.
    pub(super) fn take_mutex(&self, path: &str) -> String {
        self.create(&format!("{path}/_c_test-lock-"), EPHEMERAL_SEQUENTIAL)
    }
}

impl Drop for ZooKeeper {
    fn drop(&mut self) {
        let _ = exchange(&mut self.stream(), CLOSE, &[]);
        self.done.store(true, Ordering::Relaxed);
        if let Some(pinging) = self.pinging.take() {
            pinging.thread().unpark();
            let _ = pinging.join();
        }
    }
}
