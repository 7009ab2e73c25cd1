//! A real MinIO on loopback, when there is one on this machine.

use std::fs;
use std::io::Read as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, timeout::TimeoutConfig,
};
use aws_sdk_s3::error::DisplayErrorContext;
use aws_sdk_s3::types::{
    DefaultRetention, ObjectLockConfiguration, ObjectLockEnabled, ObjectLockRetentionMode,
    ObjectLockRule,
};
use aws_smithy_http_client::Builder as HttpBuilder;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use pipeline::store::StoreError;
use pipeline::store::s3::{CredentialSource, S3Config, S3Store};
use tempfile::TempDir;

use crate::s3::Certificates;

/// How long MinIO may take to start.
const START: Duration = Duration::from_mins(1);
const USER: &str = "minio-user";
const PASSWORD: &str = "minio-password";

/// A running MinIO with one empty bucket; it ends when this is dropped.
#[derive(Debug)]
pub struct Minio {
    child: Child,
    directory: TempDir,
    certificates: Option<Certificates>,
    endpoint: String,
    bucket: String,
}

/// The binary: of the environment's `MINIO`, on the PATH, or where `go install` puts it.
pub fn binary() -> Option<PathBuf> {
    program("MINIO", "minio")
}

/// A program that Go installs: of the environment's `variable`, on the PATH, or where `go install` puts it.
pub(crate) fn program(variable: &str, name: &str) -> Option<PathBuf> {
    if let Some(named) = std::env::var_os(variable).filter(|named| !named.is_empty()) {
        return Some(PathBuf::from(named)).filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    if let Some(home) = std::env::var_os("HOME") {
        places.push(Path::new(&home).join("go/bin"));
    }
    if let Ok(go) = Command::new("go").args(["env", "GOPATH"]).output() {
        let path = String::from_utf8_lossy(&go.stdout).trim().to_owned();
        places.push(Path::new(&path).join("bin"));
    }
    places
        .into_iter()
        .map(|place| place.join(name))
        .find(|path| path.is_file())
}

/// MinIO's client, where its server is, or of the environment's `MC`.
pub fn client_binary() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("MC").filter(|named| !named.is_empty()) {
        return Some(PathBuf::from(named)).filter(|path| path.is_file());
    }
    let beside = binary()?.with_file_name("mc");
    beside.is_file().then_some(beside)
}

/// Starts MinIO, with TLS if `tls`, and makes a bucket. `None` if there is no MinIO here.
///
/// # Panics
/// If there is one and it does not start: that is a failure, not a reason to skip.
pub async fn start(tls: bool) -> Option<Minio> {
    let binary = binary()?;
    // Another process may take the free port before MinIO does; then MinIO ends at once.
    for _ in 0..3 {
        let mut minio = Minio::spawn(&binary, tls);
        if minio.make_bucket().await {
            return Some(minio);
        }
    }
    panic!("{} did not start three times", binary.display());
}

impl Minio {
    fn spawn(binary: &Path, tls: bool) -> Self {
        let directory = TempDir::new().expect("a scratch directory");
        let (data, certs) = (
            directory.path().join("data"),
            directory.path().join("certs"),
        );
        fs::create_dir_all(&data).expect("a directory");
        fs::create_dir_all(&certs).expect("a directory");
        let certificates = tls.then(Certificates::generate);
        if let Some(made) = &certificates {
            fs::write(certs.join("public.crt"), &made.cert_pem).expect("a file");
            fs::write(certs.join("private.key"), &made.key_pem).expect("a file");
        }
        let free = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
        let address = free.expect("a free port").to_string();
        let log = fs::File::create(directory.path().join("log")).expect("a file");
        let child = Command::new(binary)
            .args(["server", "--quiet", "--address", &address, "--certs-dir"])
            .arg(&certs)
            .arg(&data)
            .env("MINIO_ROOT_USER", USER)
            .env("MINIO_ROOT_PASSWORD", PASSWORD)
            .env("MINIO_BROWSER", "off")
            .env("MINIO_UPDATE", "off")
            .env("MINIO_SITE_REGION", "us-east-1")
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

    /// Makes the bucket as soon as MinIO answers. False if MinIO has ended.
    async fn make_bucket(&mut self) -> bool {
        let client = self.client();
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
                "MinIO does not answer: {}\n{}",
                DisplayErrorContext(error),
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn client(&self) -> aws_sdk_s3::Client {
        client(&self.endpoint, self.ca_pem(), (USER, PASSWORD))
    }

    /// `http://127.0.0.1:PORT` or `https://...`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The bucket.
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// The root user's name and password, which are its keys.
    pub fn keys(&self) -> (&'static str, &'static str) {
        (USER, PASSWORD)
    }

    /// What clients are to trust, if it speaks TLS.
    pub fn ca_pem(&self) -> Option<&str> {
        self.certificates.as_ref().map(|made| made.ca_pem.as_str())
    }

    /// Where its data lie.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Its process, for measuring or freezing it.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed.
    pub fn log(&self) -> String {
        let mut text = String::new();
        if let Ok(mut file) = fs::File::open(self.directory.path().join("log")) {
            let _ = file.read_to_string(&mut text);
        }
        text
    }

    /// A configuration for the bucket.
    pub fn config(&self) -> S3Config {
        S3Config {
            bucket: self.bucket.clone(),
            endpoint: Some(self.endpoint.clone()),
            region: Some("us-east-1".into()),
            ca_pem: self.ca_pem().map(Into::into),
            credentials: CredentialSource::Static {
                access_key_id: USER.into(),
                secret_access_key: PASSWORD.into(),
                session_token: None,
            },
            ..S3Config::default()
        }
    }

    /// Makes another bucket, with versions and object lock; `days`: its default retention, in compliance mode.
    ///
    /// # Panics
    /// If MinIO refuses.
    pub async fn make_locked_bucket(&self, name: &str, days: Option<i32>) {
        let client = self.client();
        let bucket = client.create_bucket().bucket(name);
        let created = bucket.object_lock_enabled_for_bucket(true).send().await;
        created.unwrap_or_else(|error| panic!("{}", DisplayErrorContext(error)));
        let Some(days) = days else { return };
        let retention = DefaultRetention::builder()
            .mode(ObjectLockRetentionMode::Compliance)
            .days(days)
            .build();
        let rule = ObjectLockRule::builder()
            .default_retention(retention)
            .build();
        let lock = ObjectLockConfiguration::builder()
            .object_lock_enabled(ObjectLockEnabled::Enabled)
            .rule(rule)
            .build();
        let put = client.put_object_lock_configuration().bucket(name);
        let put = put.object_lock_configuration(lock).send().await;
        put.unwrap_or_else(|error| panic!("{}", DisplayErrorContext(error)));
    }

    /// A store on a bucket that [`Self::make_locked_bucket`] made.
    ///
    /// # Errors
    /// As [`S3Store::new`].
    pub fn store_of(&self, bucket: &str) -> Result<S3Store, StoreError> {
        S3Store::new(S3Config {
            bucket: bucket.to_owned(),
            ..self.config()
        })
    }

    /// Makes a user that may do what `policy` (JSON) says, with the prefix `prefix` of the bucket. `None` if there is
    /// no `mc` here. Without TLS only.
    ///
    /// # Panics
    /// If MinIO refuses.
    pub fn user(&self, name: &str, policy: &str, prefix: &str) -> Option<S3Config> {
        let mc = client_binary()?;
        let secret = "a-secret-of-a-user";
        let policy = policy
            .replace("BUCKET", &self.bucket)
            .replace("PREFIX", prefix);
        let file = self.directory.path().join(format!("{name}.json"));
        fs::write(&file, policy).expect("a file");
        let file = file.display().to_string();
        for args in [
            vec!["alias", "set", "here", &self.endpoint, USER, PASSWORD],
            vec!["admin", "policy", "create", "here", name, &file],
            vec!["admin", "user", "add", "here", name, secret],
            vec!["admin", "policy", "attach", "here", name, "--user", name],
        ] {
            let config = self.directory.path().join("mc");
            let output = Command::new(&mc)
                .arg("--config-dir")
                .arg(config)
                .args(&args)
                .output();
            let output = output.expect("mc runs");
            assert!(output.status.success(), "mc {args:?}: {output:?}");
        }
        Some(S3Config {
            prefix: prefix.to_owned(),
            credentials: CredentialSource::Static {
                access_key_id: name.to_owned(),
                secret_access_key: secret.to_owned(),
                session_token: None,
            },
            ..self.config()
        })
    }

    /// A store on the bucket.
    ///
    /// # Errors
    /// As [`S3Store::new`].
    pub fn store(&self) -> Result<S3Store, StoreError> {
        S3Store::new(self.config())
    }
}

/// A bare client of a server on loopback, to make its bucket.
pub(crate) fn client(
    endpoint: &str,
    ca_pem: Option<&str>,
    (user, password): (&str, &str),
) -> aws_sdk_s3::Client {
    let trust = ca_pem.map_or_else(TrustStore::empty, |pem| {
        TrustStore::empty().with_pem_certificate(pem)
    });
    let context = TlsContext::builder().with_trust_store(trust).build();
    let http = HttpBuilder::new()
        .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
        .tls_context(context.expect("a TLS context"))
        .build_https();
    let timeouts = TimeoutConfig::builder().operation_timeout(Duration::from_secs(10));
    let config = aws_sdk_s3::config::Builder::new()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .force_path_style(true)
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .timeout_config(timeouts.build())
        .credentials_provider(Credentials::new(user, password, None, None, "tests"))
        .http_client(http)
        .build();
    aws_sdk_s3::Client::from_conf(config)
}

impl Drop for Minio {
    fn drop(&mut self) {
        // By its pid, through the handle; waited for, so that its directory can go.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
