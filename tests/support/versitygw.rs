//! A real versitygw on loopback: S3 over a directory, where the environment's `GS_PITR_TEST_VERSITYGW` names one.
//! `make test-full` does.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use aws_sdk_s3::error::DisplayErrorContext;
use pipeline::store::StoreError;
use pipeline::store::s3::{CredentialSource, S3Config, S3Store};
use tempfile::TempDir;

use crate::minio;
use crate::s3::Certificates;

/// How long it may take to start.
const START: Duration = Duration::from_secs(30);
const USER: &str = "gateway-user";
const PASSWORD: &str = "gateway-password";

/// A running versitygw with one empty bucket; it ends when this is dropped.
#[derive(Debug)]
pub struct Versitygw {
    child: Child,
    directory: TempDir,
    certificates: Option<Certificates>,
    endpoint: String,
    bucket: String,
}

/// Starts it, with TLS if `tls`, and makes a bucket. `None` if the environment names none.
///
/// # Panics
/// If it names one that does not start.
pub async fn start(tls: bool) -> Option<Versitygw> {
    let named = std::env::var_os("GS_PITR_TEST_VERSITYGW").filter(|named| !named.is_empty())?;
    let binary = PathBuf::from(named);
    // Another process may take the free port first; then it ends at once.
    for _ in 0..3 {
        let mut gateway = Versitygw::spawn(&binary, tls);
        if gateway.make_bucket().await {
            return Some(gateway);
        }
    }
    panic!("{} did not start three times", binary.display());
}

impl Versitygw {
    fn spawn(binary: &Path, tls: bool) -> Self {
        let directory = TempDir::new().expect("a scratch directory");
        let at = |name: &str| directory.path().join(name);
        for name in ["data", "iam"] {
            fs::create_dir(at(name)).expect("a directory");
        }
        let free = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
        let address = free.expect("a free port").to_string();
        let mut command = Command::new(binary);
        command
            .args(["--port", &address, "--iam-dir"])
            .arg(at("iam"));
        let certificates = tls.then(Certificates::generate);
        if let Some(made) = &certificates {
            fs::write(at("public.crt"), &made.cert_pem).expect("a file");
            fs::write(at("private.key"), &made.key_pem).expect("a file");
            command.arg("--cert").arg(at("public.crt"));
            command.arg("--key").arg(at("private.key"));
        }
        let log = fs::File::create(at("log")).expect("a file");
        let child = command
            .arg("posix")
            .arg(at("data"))
            .env("ROOT_ACCESS_KEY", USER)
            .env("ROOT_SECRET_KEY", PASSWORD)
            .env("HOME", directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", binary.display()));
        let scheme = if tls { "https" } else { "http" };
        Self {
            child,
            directory,
            certificates,
            endpoint: format!("{scheme}://{address}"),
            bucket: "tests".into(),
        }
    }

    /// Makes the bucket as soon as it answers. False if it has ended.
    async fn make_bucket(&mut self) -> bool {
        let ca = self.certificates.as_ref().map(|made| made.ca_pem.as_str());
        let client = minio::client(&self.endpoint, ca, (USER, PASSWORD));
        let end = Instant::now() + START;
        loop {
            let Err(error) = client.create_bucket().bucket(&self.bucket).send().await else {
                return true;
            };
            if self.child.try_wait().expect("a child of ours").is_some() {
                return false;
            }
            assert!(
                Instant::now() < end,
                "versitygw does not answer: {}\n{}",
                DisplayErrorContext(error),
                fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A configuration for the bucket.
    pub fn config(&self) -> S3Config {
        S3Config {
            bucket: self.bucket.clone(),
            endpoint: Some(self.endpoint.clone()),
            region: Some("us-east-1".into()),
            ca_pem: self
                .certificates
                .as_ref()
                .map(|made| made.ca_pem.clone().into()),
            credentials: CredentialSource::Static {
                access_key_id: USER.into(),
                secret_access_key: PASSWORD.into(),
                session_token: None,
            },
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
}

impl Drop for Versitygw {
    fn drop(&mut self) {
        // By its pid, through the handle; waited for, so that its directory can go.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
