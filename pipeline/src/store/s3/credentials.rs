//! Where the keys to the store come from, and when they are read again.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, future};
use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
use serde::Deserialize;
use tokio::io::AsyncReadExt as _;
use tokio::sync::Mutex;

use crate::store::{Detail, StoreError};

/// How long a credential command may run.
const COMMAND_DEADLINE: Duration = Duration::from_secs(30);
/// Most bytes a credential command or file may hold.
const MOST_BYTES: u64 = 64 << 10;
/// Keys that expire are asked for again this long before they do.
const RENEW_BEFORE: Duration = Duration::from_mins(5);
/// Keys of a command that names no expiration are kept this long.
const WITHOUT_EXPIRATION: Duration = Duration::from_mins(15);

/// Where the keys to the store come from. `Debug` shows no secret.
#[derive(Clone)]
pub enum CredentialSource {
    /// These, for as long as the store is used.
    Static {
        /// The access key's id.
        access_key_id: String,
        /// Its secret.
        secret_access_key: String,
        /// The token that belongs to temporary keys.
        session_token: Option<String>,
    },
    /// `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN` of this process.
    Environment,
    /// Profile `default` of a file in the AWS ini format; read again whenever the file changes.
    File(PathBuf),
    /// Program and arguments (no shell). It prints the JSON of the AWS setting `credential_process`;
    /// run again before its keys expire. It has 30 seconds.
    Command(Vec<String>),
}

impl fmt::Debug for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Static { access_key_id, .. } => f
                .debug_struct("Static")
                .field("access_key_id", access_key_id)
                .finish_non_exhaustive(),
            Self::Environment => f.write_str("Environment"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            // Arguments may hold secrets.
            Self::Command(argv) => f.debug_tuple("Command").field(&argv.first()).finish(),
        }
    }
}

impl CredentialSource {
    /// The keys that this source has now, as [`CredentialSource::Static`]: to lend to another process.
    ///
    /// # Errors
    /// [`StoreError::Unauthenticated`] if it has none.
    pub async fn resolve(&self) -> Result<Self, StoreError> {
        let keys = match Provider::new(self.clone()).credentials().await {
            Ok(keys) => keys,
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                let why = source.unwrap_or_else(|| error.to_string());
                return Err(StoreError::Unauthenticated(Detail::new("sign", "", why)));
            }
        };
        Ok(Self::Static {
            access_key_id: keys.access_key_id().to_owned(),
            secret_access_key: keys.secret_access_key().to_owned(),
            session_token: keys.session_token().map(str::to_owned),
        })
    }
}

/// Why there are no keys. The words never hold a secret.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
struct NoCredentials(String);

/// What makes a file the same file as before: size, time, inode.
type FileStamp = (u64, Option<SystemTime>, u64);

#[derive(Clone)]
struct Kept {
    credentials: Credentials,
    /// When to ask again; none: when the file's stamp changes.
    renew_at: Option<SystemTime>,
    stamp: Option<FileStamp>,
}

/// Gives the keys of a [`CredentialSource`] to the client, keeping them for as long as they are good.
pub(super) struct Provider {
    source: CredentialSource,
    /// Held while keys are fetched, so that many parts in flight start one command, not many.
    kept: Mutex<Option<Kept>>,
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl Provider {
    pub(super) fn new(source: CredentialSource) -> Self {
        Self {
            source,
            kept: Mutex::new(None),
        }
    }

    /// The store refused the keys as old: true if newer ones could be had, so that one more try is
    /// worth while.
    pub(super) async fn renew(&self) -> bool {
        if matches!(self.source, CredentialSource::Static { .. }) {
            return false;
        }
        let mut kept = self.kept.lock().await;
        let refused = kept.take().map(|kept| kept.credentials);
        let Ok(fresh) = self.fetch().await else {
            return false;
        };
        let changed = refused.is_none_or(|old| old != fresh.credentials);
        *kept = Some(fresh);
        changed
    }

    async fn credentials(&self) -> Result<Credentials, CredentialsError> {
        if let CredentialSource::Static {
            access_key_id,
            secret_access_key,
            session_token,
        } = &self.source
        {
            return Ok(Credentials::new(
                access_key_id,
                secret_access_key,
                session_token.clone(),
                None,
                "Static",
            ));
        }
        let mut kept = self.kept.lock().await;
        if let Some(kept) = kept.as_ref()
            && self.is_current(kept).await
        {
            return Ok(kept.credentials.clone());
        }
        match self.fetch().await {
            Ok(fresh) => Ok(kept.insert(fresh).credentials.clone()),
            // A file caught half written or a command that fails once must not end a backup while
            // the keys in hand are still good.
            Err(problem) => match kept.as_ref() {
                Some(kept) if !is_expired(&kept.credentials) => {
                    tracing::warn!(%problem, "keeping the credentials in hand");
                    Ok(kept.credentials.clone())
                }
                _ => Err(CredentialsError::provider_error(problem)),
            },
        }
    }

    async fn is_current(&self, kept: &Kept) -> bool {
        if kept.renew_at.is_some_and(|at| SystemTime::now() >= at) {
            return false;
        }
        match &self.source {
            CredentialSource::File(path) => file_stamp(path).await.ok() == kept.stamp,
            CredentialSource::Environment => false,
            _ => true,
        }
    }

    async fn fetch(&self) -> Result<Kept, NoCredentials> {
        match &self.source {
            CredentialSource::Static { .. } | CredentialSource::Environment => Ok(Kept {
                credentials: from_environment()?,
                renew_at: None,
                stamp: None,
            }),
            CredentialSource::File(path) => from_file(path).await,
            CredentialSource::Command(argv) => from_command(argv).await,
        }
    }
}

impl ProvideCredentials for Provider {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(self.credentials())
    }
}

fn is_expired(credentials: &Credentials) -> bool {
    credentials
        .expiry()
        .is_some_and(|expiry| expiry <= SystemTime::now())
}

fn from_environment() -> Result<Credentials, NoCredentials> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let needed = |name: &str| {
        variable(name).ok_or_else(|| NoCredentials(format!("{name} is not set in the environment")))
    };
    Ok(Credentials::new(
        needed("AWS_ACCESS_KEY_ID")?,
        needed("AWS_SECRET_ACCESS_KEY")?,
        variable("AWS_SESSION_TOKEN"),
        None,
        "Environment",
    ))
}

async fn file_stamp(path: &Path) -> std::io::Result<FileStamp> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = tokio::fs::metadata(path).await?;
    Ok((meta.len(), meta.modified().ok(), meta.ino()))
}

async fn from_file(path: &Path) -> Result<Kept, NoCredentials> {
    let failed = |problem: &dyn fmt::Display| {
        NoCredentials(format!("credentials file {}: {problem}", path.display()))
    };
    // The stamp is taken first: a change between it and the read is seen by the next call.
    let stamp = file_stamp(path).await.map_err(|error| failed(&error))?;
    if stamp.0 > MOST_BYTES {
        return Err(failed(&"larger than 64 KiB"));
    }
    let text = tokio::fs::read_to_string(path)
        .await
        .map_err(|error| failed(&error))?;
    let credentials = parse_profile(&text, "default").map_err(|problem| failed(&problem))?;
    Ok(Kept {
        credentials,
        renew_at: None,
        stamp: Some(stamp),
    })
}

/// Reads one profile of the AWS ini format.
fn parse_profile(text: &str, profile: &str) -> Result<Credentials, String> {
    let (mut inside, mut found) = (false, false);
    let (mut id, mut secret, mut token) = (None, None, None);
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') || line.starts_with(';') {
            continue;
        }
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.split(']').next())
        {
            inside = name.trim() == profile;
            found |= inside;
            continue;
        }
        let Some((name, value)) = line.split_once('=').filter(|_| inside) else {
            continue;
        };
        let value = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
        match name.trim().to_ascii_lowercase().as_str() {
            "aws_access_key_id" => id = value,
            "aws_secret_access_key" => secret = value,
            "aws_session_token" => token = value,
            _ => {}
        }
    }
    if !found {
        return Err(format!("it has no profile [{profile}]"));
    }
    let id = id.ok_or_else(|| format!("[{profile}] has no aws_access_key_id"))?;
    let secret = secret.ok_or_else(|| format!("[{profile}] has no aws_secret_access_key"))?;
    Ok(Credentials::new(id, secret, token, None, "File"))
}

/// What a credential command prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Printed {
    version: u32,
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
    expiration: Option<String>,
}

async fn from_command(argv: &[String]) -> Result<Kept, NoCredentials> {
    let Some((program, arguments)) = argv.split_first() else {
        return Err(NoCredentials("the credential command is empty".into()));
    };
    let failed =
        |problem: &str| NoCredentials(format!("credential command `{program}`: {problem}"));
    let printed = tokio::time::timeout(COMMAND_DEADLINE, run(program, arguments))
        .await
        .map_err(|_| {
            failed(&format!(
                "no answer within {} s",
                COMMAND_DEADLINE.as_secs()
            ))
        })?
        .map_err(|problem| failed(&problem))?;
    // serde's message could quote what was printed, so only its place is told.
    let printed: Printed = serde_json::from_slice(&printed).map_err(|error| {
        failed(&format!(
            "what it printed is not the JSON of credential_process (line {}, column {})",
            error.line(),
            error.column()
        ))
    })?;
    if printed.version != 1 {
        return Err(failed(&format!(
            "it printed Version {}, not 1",
            printed.version
        )));
    }
    let expiry = match &printed.expiration {
        Some(text) => Some(
            DateTime::from_str(text, DateTimeFormat::DateTimeWithOffset)
                .ok()
                .and_then(|time| SystemTime::try_from(time).ok())
                .ok_or_else(|| failed(&format!("its Expiration `{text}` is not a time")))?,
        ),
        None => None,
    };
    let credentials = Credentials::new(
        printed.access_key_id,
        printed.secret_access_key,
        printed.session_token,
        expiry,
        "Command",
    );
    if is_expired(&credentials) {
        return Err(failed("the credentials it printed have expired"));
    }
    Ok(Kept {
        credentials,
        renew_at: Some(renew_at(SystemTime::now(), expiry)),
        stamp: None,
    })
}

/// Five minutes before the end, or at half of a life that is shorter than ten.
fn renew_at(now: SystemTime, expiry: Option<SystemTime>) -> SystemTime {
    let Some(expiry) = expiry else {
        return now + WITHOUT_EXPIRATION;
    };
    let life = expiry.duration_since(now).unwrap_or_default();
    expiry - RENEW_BEFORE.min(life / 2)
}

/// Whether a variable of ours holds a password.
fn is_secret(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name.starts_with("GS_PITR_") && name.ends_with("PASSWORD")
}

async fn run(program: &str, arguments: &[String]) -> Result<Vec<u8>, String> {
    let mut command = tokio::process::Command::new(program);
    // Passwords of ours are no business of another program, and would stand in its /proc.
    let ours = std::env::vars_os().map(|(name, _)| name);
    for name in ours.filter(|name| is_secret(name)) {
        command.env_remove(name);
    }
    let mut child = command
        .args(arguments.iter().map(OsStr::new))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot be started: {error}"))?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let read_out = async {
        match stdout {
            Some(pipe) => pipe.take(MOST_BYTES).read_to_end(&mut out).await,
            None => Ok(0),
        }
    };
    let read_err = async {
        match stderr {
            Some(pipe) => pipe.take(MOST_BYTES).read_to_end(&mut err).await,
            None => Ok(0),
        }
    };
    let (read_out, _) = tokio::join!(read_out, read_err);
    read_out.map_err(|error| format!("its output cannot be read: {error}"))?;
    let status = child
        .wait()
        .await
        .map_err(|error| format!("cannot be waited for: {error}"))?;
    if !status.success() {
        let words = String::from_utf8_lossy(&err);
        let words: String = words.trim().chars().take(300).collect();
        return Err(format!("{status}: {words}"));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profile_default_is_read_and_others_are_not() {
        let text = "# keys\n[other]\naws_access_key_id = wrong\n[default]\n\
                    aws_access_key_id=ID\n aws_secret_access_key = a=b/c \naws_session_token=T\n\
                    region = x\n[third]\naws_access_key_id = wrong\n";
        let read = parse_profile(text, "default").unwrap();
        assert_eq!(read.access_key_id(), "ID");
        assert_eq!(read.secret_access_key(), "a=b/c");
        assert_eq!(read.session_token(), Some("T"));
    }

    #[test]
    fn what_a_file_lacks_is_named() {
        assert!(
            parse_profile("[x]\n", "default")
                .unwrap_err()
                .contains("[default]")
        );
        let problem = parse_profile("[default]\naws_access_key_id=a\n", "default").unwrap_err();
        assert!(problem.contains("aws_secret_access_key"), "{problem}");
    }

    #[test]
    fn keys_are_renewed_before_they_expire() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let hour = now + Duration::from_hours(1);
        assert_eq!(renew_at(now, Some(hour)), now + Duration::from_mins(55));
        let minute = now + Duration::from_mins(1);
        assert_eq!(renew_at(now, Some(minute)), now + Duration::from_secs(30));
    }

    #[tokio::test]
    async fn a_commands_failure_is_told_in_its_words() {
        let argv = ["sh", "-c", "echo no ticket >&2; exit 3"].map(String::from);
        let problem = from_command(&argv).await.err().unwrap().to_string();
        assert!(
            problem.contains("no ticket") && problem.contains('3'),
            "{problem}"
        );
    }

    #[test]
    fn debug_shows_no_secret() {
        let source = CredentialSource::Static {
            access_key_id: "ID".into(),
            secret_access_key: "hidden".into(),
            session_token: Some("hidden".into()),
        };
        assert!(!format!("{source:?} {:?}", Provider::new(source.clone())).contains("hidden"));
        let source = CredentialSource::Command(vec!["prog".into(), "hidden".into()]);
        assert!(!format!("{source:?}").contains("hidden"));
    }
}
