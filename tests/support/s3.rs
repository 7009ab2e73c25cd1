//! A stand-in: an S3 server of our own in memory, on loopback, with faults on demand.
//!
//! Parsing, signatures and XML are those of the crate `s3s`; what the requests do is ours, and passes
//! the same conformance suite as a real MinIO. Nothing is kept on disk.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use pipeline::store::StoreError;
use pipeline::store::s3::{CredentialSource, S3Config, S3Store};
use s3s::auth::{S3Auth, SecretKey};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, HttpError, HttpResponse, S3Result, s3_error};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub use self::faults::{Fault, Operation};
pub use self::holds::{Hold, When};
pub use self::tls::Certificates;

use self::bucket::Bucket;
use self::faults::Faults;
use self::holds::Holds;

mod api;
mod bucket;
mod faults;
mod holds;
mod tls;

/// How to start the stand-in.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The one bucket.
    pub bucket: String,
    /// The region requests must be signed for.
    pub region: String,
    /// The access key's id.
    pub access_key: String,
    /// Its secret.
    pub secret_key: String,
    /// Whether to speak TLS, with a certificate made now.
    pub tls: bool,
    /// Most entries in a page of a listing.
    pub page_size: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            bucket: "stand-in".into(),
            region: "us-east-1".into(),
            access_key: "stand-in-key".into(),
            secret_key: "stand-in-secret".into(),
            tls: false,
            page_size: 1000,
        }
    }
}

/// What requests share.
#[derive(Debug)]
struct State {
    bucket_name: String,
    region: String,
    page_size: usize,
    bucket: Mutex<Bucket>,
    keys: Mutex<(String, String)>,
    faults: Faults,
    holds: Holds,
    down: AtomicBool,
}

impl State {
    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An object that was taken away, with all that the stand-in knows of it.
#[derive(Debug, Clone)]
pub struct Taken(bucket::Object);

/// A running stand-in; it ends when this is dropped.
#[derive(Debug)]
pub struct S3Server {
    state: Arc<State>,
    options: Options,
    address: SocketAddr,
    certificates: Option<Certificates>,
    stop: CancellationToken,
}

/// Starts the stand-in on the current tokio runtime.
///
/// # Errors
/// If the address cannot be bound.
pub async fn start(options: Options) -> io::Result<S3Server> {
    let listener = TcpListener::bind(options.listen).await?;
    let address = listener.local_addr()?;
    let state = Arc::new(State {
        bucket_name: options.bucket.clone(),
        region: options.region.clone(),
        page_size: options.page_size,
        bucket: Mutex::default(),
        keys: Mutex::new((options.access_key.clone(), options.secret_key.clone())),
        faults: Faults::default(),
        holds: Holds::default(),
        down: AtomicBool::new(false),
    });
    let certificates = options.tls.then(Certificates::generate);
    let acceptor = certificates.as_ref().map(Certificates::acceptor);
    let stop = CancellationToken::new();
    let ended = stop.clone();
    let shared = Arc::clone(&state);
    tokio::spawn(async move {
        tokio::select! {
            () = ended.cancelled() => {}
            () = accept(listener, acceptor, shared) => {}
        }
    });
    Ok(S3Server {
        state,
        options,
        address,
        certificates,
        stop,
    })
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl S3Server {
    /// `http://127.0.0.1:PORT` or `https://...`.
    pub fn endpoint(&self) -> String {
        let scheme = if self.options.tls { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// As started: bucket, region and first keys.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// What clients are to trust, if it speaks TLS.
    pub fn ca_pem(&self) -> Option<&str> {
        self.certificates.as_ref().map(|made| made.ca_pem.as_str())
    }

    /// A configuration for the bucket, with short pauses.
    pub fn config(&self) -> S3Config {
        S3Config {
            bucket: self.options.bucket.clone(),
            endpoint: Some(self.endpoint()),
            region: Some(self.options.region.clone()),
            ca_pem: self.ca_pem().map(Into::into),
            credentials: CredentialSource::Static {
                access_key_id: self.options.access_key.clone(),
                secret_access_key: self.options.secret_key.clone(),
                session_token: None,
            },
            first_pause: Duration::from_millis(5),
            longest_pause: Duration::from_millis(50),
            ..S3Config::default()
        }
    }

    /// A store on the bucket.
    ///
    /// # Errors
    /// As [`S3Store::new`].
    pub fn store(&self) -> Result<S3Store, StoreError> {
        S3Store::new(self.config())
    }

    /// The next call of `operation` meets `fault`.
    pub fn inject(&self, operation: Operation, fault: Fault) {
        self.inject_at(operation, 0, 1, fault);
    }

    /// After `skip` calls of `operation` the following `times` calls meet `fault`.
    pub fn inject_at(&self, operation: Operation, skip: u64, times: u64, fault: Fault) {
        self.state.faults.add(operation, skip, times, fault);
    }

    /// Holds every request of `operation` whose key (of a listing: prefix) `matches`.
    pub fn hold(
        &self,
        operation: Operation,
        when: When,
        matches: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Hold {
        self.state.holds.add(operation, when, matches)
    }

    /// Forgets all faults asked for.
    pub fn clear_faults(&self) {
        self.state.faults.clear();
    }

    /// How many well-signed calls of `operation` came so far.
    pub fn calls(&self, operation: Operation) -> usize {
        self.state.faults.calls(operation)
    }

    /// While down, every connection is cut.
    pub fn set_down(&self, down: bool) {
        self.state.down.store(down, Ordering::SeqCst);
    }

    /// From now on only these keys are accepted.
    pub fn set_keys(&self, access_key: &str, secret_key: &str) {
        let mut keys = self
            .state
            .keys
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *keys = (access_key.to_owned(), secret_key.to_owned());
    }

    /// The names of all objects.
    pub fn keys(&self) -> Vec<String> {
        self.state.bucket().objects.keys().cloned().collect()
    }

    /// How many uploads have neither been completed nor aborted.
    pub fn uploads_under_way(&self) -> usize {
        self.state.bucket().uploads.len()
    }

    /// The keys of the uploads that have neither been completed nor aborted.
    pub fn upload_keys(&self) -> Vec<String> {
        let bucket = self.state.bucket();
        let mut keys: Vec<_> = bucket.uploads.values().map(|it| it.key.clone()).collect();
        keys.sort();
        keys
    }

    /// The stored bytes of an object.
    pub fn bytes(&self, key: &str) -> Option<Bytes> {
        let bucket = self.state.bucket();
        Some(bucket.objects.get(key)?.chunks.concat().into())
    }

    /// Replaces the bytes of an object, or removes it, and says nothing of it: size and checksum of
    /// what was written first stay, as when a disk rots.
    pub fn tamper(&self, key: &str, body: Option<Bytes>) {
        let mut bucket = self.state.bucket();
        match body {
            None => {
                bucket.objects.remove(key);
            }
            Some(body) => {
                if let Some(object) = bucket.objects.get_mut(key) {
                    object.size = body.len() as u64;
                    object.chunks = vec![body];
                }
            }
        }
    }

    /// Takes an object away as if it had never been; [`Self::put_back`] brings it back.
    ///
    /// # Panics
    /// If there is no such object.
    pub fn take(&self, key: &str) -> Taken {
        let object = self.state.bucket().objects.remove(key);
        Taken(object.unwrap_or_else(|| panic!("no object `{key}`")))
    }

    /// Puts a copy of what was taken under `key`, whatever is there now.
    pub fn put_back(&self, key: &str, taken: &Taken) {
        self.state
            .bucket()
            .objects
            .insert(key.to_owned(), taken.0.clone());
    }

    /// Flips one bit of an object, counted from its beginning. False if there is no such bit.
    pub fn flip_bit(&self, key: &str, bit: u64) -> bool {
        let Some(body) = self.bytes(key) else {
            return false;
        };
        let mut body = Vec::from(body);
        let Some(byte) = usize::try_from(bit / 8)
            .ok()
            .and_then(|at| body.get_mut(at))
        else {
            return false;
        };
        *byte ^= 1 << (bit % 8);
        self.tamper(key, Some(body.into()));
        true
    }
}

async fn accept(listener: TcpListener, acceptor: Option<TlsAcceptor>, state: Arc<State>) {
    let mut builder = S3ServiceBuilder::new(api::Api(Arc::clone(&state)));
    builder.set_auth(Keys(Arc::clone(&state)));
    let service = builder.build();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                if !state.down.load(Ordering::SeqCst) {
                    let (acceptor, service) = (acceptor.clone(), service.clone());
                    connections.spawn(connection(stream, acceptor, service, Arc::clone(&state)));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(
    stream: TcpStream,
    acceptor: Option<TlsAcceptor>,
    service: S3Service,
    state: Arc<State>,
) {
    let _ = stream.set_nodelay(true);
    match acceptor {
        None => serve(stream, service, state).await,
        Some(acceptor) => {
            if let Ok(stream) = acceptor.accept(stream).await {
                serve(stream, service, state).await;
            }
        }
    }
}

async fn serve<S>(stream: S, service: S3Service, state: Arc<State>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let answer = |request: hyper::Request<Incoming>| {
        let (service, state) = (service.clone(), Arc::clone(&state));
        async move {
            let cut = Cut::default();
            let mut request = request.map(Body::from);
            request.extensions_mut().insert(cut.clone());
            let response: HttpResponse = service.call(request).await?;
            if cut.is_asked() || state.down.load(Ordering::SeqCst) {
                return Err(HttpError::new("the connection is cut on demand".into()));
            }
            Ok::<_, HttpError>(response)
        }
    };
    // An error here is the client's going away, or a cut that a test asked for.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service_fn(answer))
        .await;
}

/// Travels with a request; whoever sets it has the connection cut instead of an answer.
#[derive(Debug, Clone, Default)]
struct Cut(Arc<AtomicBool>);

impl Cut {
    fn ask(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn is_asked(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Knows one pair of keys, which may change.
struct Keys(Arc<State>);

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        let keys = self.0.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.0 == access_key {
            return Ok(SecretKey::from(keys.1.clone()));
        }
        Err(s3_error!(
            InvalidAccessKeyId,
            "The access key ID you provided does not exist in our records."
        ))
    }
}
