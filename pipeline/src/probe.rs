//! Does a store keep what everything here rests on? Asked of the store itself, with objects of no other use.
//!
//! Each probe is one promise of [`ObjectStore`]: that nothing is overwritten, that of several who create one object
//! one wins, that damaged bytes are refused, that what was written is listed. A store that breaks one may work for
//! years and then lose a backup.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use futures_util::future::join_all;
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, timeout_at};

use crate::store::{Key, ObjectStore, Part, StoreError, UploadId};

/// For one probe, which is a handful of requests.
const STEP: Duration = Duration::from_secs(25);
/// For all of them.
const ALL: Duration = Duration::from_secs(100);
/// For the uploads that a failed probe left.
const CLEAN_UP: Duration = Duration::from_secs(10);

/// Objects that a probe writes, and one that it does not. Nobody else may use these keys.
#[derive(Debug, Clone)]
pub struct ProbeKeys {
    /// Never written.
    pub absent: Key,
    /// Written at once.
    pub object: Key,
    /// Written in parts.
    pub upload: Key,
}

/// Why a probe did not succeed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ProbeError {
    /// The store does not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store does it, and breaks a promise that the repository rests on.
    #[error("{0}")]
    Broken(String),
    /// It lacks something that can be done without.
    #[error("{0}")]
    Lacking(String),
    /// No answer in time.
    #[error("no answer within {} s", .0.as_secs())]
    Late(Duration),
}

/// One promise, and whether the store keeps it: in a person's words.
#[derive(Debug)]
pub struct Probe {
    /// A word or two.
    pub name: &'static str,
    /// What was seen.
    pub result: Result<String, ProbeError>,
}

/// What was seen of a store.
#[derive(Debug, Default)]
pub struct Probes {
    /// In the order they were made. Those that need one that failed are not there.
    pub all: Vec<Probe>,
    /// Uploads that could not be aborted.
    pub left: Vec<(Key, UploadId)>,
}

impl Probes {
    /// Whether objects can be created, and are not overwritten: whether it is worth a race.
    #[must_use]
    pub fn usable(&self) -> bool {
        let good = |name| {
            self.all
                .iter()
                .any(|probe| probe.name == name && probe.result.is_ok())
        };
        good(CREATE) && good(ABSENT)
    }
}

const REACH: &str = "reach";
const CREATE: &str = "create";
const ABSENT: &str = "create-if-absent";

/// Asks a store for every promise but deletion. Writes two of the objects of `keys`.
pub async fn probe(store: &dyn ObjectStore, keys: &ProbeKeys) -> Probes {
    let mut probing = Probing {
        store,
        keys,
        body: Bytes::copy_from_slice(&rand::random::<[u8; 32]>()),
        until: Instant::now() + ALL,
        uploads: Vec::new(),
        probes: Probes::default(),
    };
    probing.run().await;
    probing.clean_up().await;
    probing.probes
}

/// Creates one object with each of `bodies` at once: what each create was answered.
pub async fn race(
    store: &dyn ObjectStore,
    key: &Key,
    bodies: &[String],
) -> Vec<Result<(), ProbeError>> {
    let until = Instant::now() + STEP;
    let creates = bodies.iter().map(|body| async move {
        let create = store.put_if_absent(key, Bytes::from(body.clone()));
        match timeout_at(until, create).await {
            Ok(created) => created.map(drop).map_err(ProbeError::from),
            Err(_) => Err(ProbeError::Late(STEP)),
        }
    });
    join_all(creates).await
}

/// Tries to delete an object of no use. Whether it is gone; `false`: these credentials may not, or something
/// holds it.
///
/// # Errors
/// If the store does not answer, or in a way that is neither.
pub async fn may_delete(store: &dyn ObjectStore, key: &Key) -> Result<bool, ProbeError> {
    let delete = async {
        let refused = match store.delete(std::slice::from_ref(key)).await {
            Ok(refused) => refused.into_iter().next(),
            Err(error) => Some(error),
        };
        match refused {
            None => Ok(true),
            Some(StoreError::PermissionDenied(_)) => Ok(false),
            Some(error) => Err(error.into()),
        }
    };
    let within = tokio::time::timeout(STEP, delete).await;
    within.unwrap_or(Err(ProbeError::Late(STEP)))
}

type Seen = Result<String, ProbeError>;

struct Probing<'a> {
    store: &'a dyn ObjectStore,
    keys: &'a ProbeKeys,
    body: Bytes,
    until: Instant,
    uploads: Vec<UploadId>,
    probes: Probes,
}

impl Probing<'_> {
    async fn run(&mut self) {
        let (store, keys) = (self.store, self.keys);
        let body = self.body.clone();
        if !self.step(REACH, reach(store, keys)).await {
            return;
        }
        if !self.step(CREATE, create(store, keys, &body)).await {
            return;
        }
        self.step(ABSENT, create_again(store, keys, &body)).await;
        self.step("checksums kept", checksum(store, keys, &body))
            .await;
        self.step("reads and ranges", read(store, keys, &body))
            .await;
        self.step("listing", listing(store, keys, &body)).await;
        let mut uploads = Vec::new();
        if self
            .step("parts", begin(store, keys, &body, &mut uploads))
            .await
        {
            self.step("complete-if-absent", complete(store, keys, &body, &uploads))
                .await;
        }
        self.uploads = uploads;
    }

    /// Makes one probe; whether it succeeded.
    async fn step(&mut self, name: &'static str, work: impl Future<Output = Seen>) -> bool {
        let until = self.until.min(Instant::now() + STEP);
        let allowed = until.saturating_duration_since(Instant::now());
        let result = match timeout_at(until, work).await {
            Ok(seen) => seen,
            Err(_) => Err(ProbeError::Late(allowed)),
        };
        let good = result.is_ok();
        self.probes.all.push(Probe { name, result });
        good
    }

    /// Ends every upload that was begun.
    async fn clean_up(&mut self) {
        let until = Instant::now() + CLEAN_UP;
        let key = &self.keys.upload;
        let mut uploads = std::mem::take(&mut self.uploads);
        if uploads.is_empty() {
            return;
        }
        // One that was begun and whose reply was lost is known to the store only.
        if let Ok(Ok(listed)) = timeout_at(until, self.store.list_uploads(key)).await {
            uploads.extend(listed);
        }
        uploads.sort_by(|a, b| a.0.cmp(&b.0));
        uploads.dedup();
        for upload in uploads {
            let abort = timeout_at(until, self.store.abort_upload(key, &upload)).await;
            if !matches!(abort, Ok(Ok(()))) {
                self.probes.left.push((key.clone(), upload));
            }
        }
    }
}

fn broken<T>(what: impl Into<String>) -> Result<T, ProbeError> {
    Err(ProbeError::Broken(what.into()))
}

async fn reach(store: &dyn ObjectStore, keys: &ProbeKeys) -> Seen {
    match store.head(&keys.absent).await {
        Err(StoreError::NotFound(_)) => Ok(store.describe()),
        Err(error) => Err(error.into()),
        Ok(_) => broken("it says that an object is there which nobody has written"),
    }
}

async fn create(store: &dyn ObjectStore, keys: &ProbeKeys, body: &Bytes) -> Seen {
    store.put_if_absent(&keys.object, body.clone()).await?;
    Ok("an object was created".to_owned())
}

async fn create_again(store: &dyn ObjectStore, keys: &ProbeKeys, body: &Bytes) -> Seen {
    match store.put_if_absent(&keys.object, "another".into()).await {
        Err(StoreError::AlreadyExists(_)) => {}
        Err(error) => return Err(error.into()),
        Ok(_) => {
            return broken(
                "it ignores `If-None-Match: *`: an object that is there was created again",
            );
        }
    }
    if whole(store, &keys.object).await? == *body {
        return Ok("an object that is there is not created again".to_owned());
    }
    broken("it said that the object is there, and replaced it all the same")
}

async fn checksum(store: &dyn ObjectStore, keys: &ProbeKeys, body: &Bytes) -> Seen {
    let meta = store.head(&keys.object).await?;
    if meta.size != body.len() as u64 {
        return broken(format!(
            "{} bytes were written, it says {}",
            body.len(),
            meta.size
        ));
    }
    match meta.checksum {
        Some(kept) if kept == BASE64.encode(Sha256::digest(body)) => {
            Ok("the SHA-256 of an object is kept and returned".to_owned())
        }
        Some(kept) => broken(format!(
            "it keeps the SHA-256 {kept}, which is not that of the bytes"
        )),
        None => Err(ProbeError::Lacking(
            "it keeps no SHA-256 of objects: what it does to them is found when they are read"
                .to_owned(),
        )),
    }
}

async fn read(store: &dyn ObjectStore, keys: &ProbeKeys, body: &Bytes) -> Seen {
    if whole(store, &keys.object).await? != *body {
        return broken("an object does not read back as it was written");
    }
    let range = store.get(&keys.object, Some(5..21)).await?;
    if range.size != body.len() as u64 {
        return broken("the answer to a range has another size of the whole object");
    }
    if range.collect(&keys.object, body.len()).await? != body[5..21] {
        return broken("a range of an object does not read back as it was written");
    }
    Ok("objects and ranges of them read back as written".to_owned())
}

async fn listing(store: &dyn ObjectStore, keys: &ProbeKeys, body: &Bytes) -> Seen {
    let listed = store
        .list(keys.object.as_str())
        .try_collect::<Vec<_>>()
        .await?;
    match listed.iter().find(|meta| meta.key == keys.object) {
        Some(meta) if meta.size == body.len() as u64 => {
            Ok("what was just written is listed".to_owned())
        }
        Some(meta) => broken(format!(
            "the listing says {} bytes, written were {}",
            meta.size,
            body.len()
        )),
        None => broken("what was just written is not listed"),
    }
}

/// Begins two uploads of one object, each with one part.
async fn begin(
    store: &dyn ObjectStore,
    keys: &ProbeKeys,
    body: &Bytes,
    uploads: &mut Vec<UploadId>,
) -> Seen {
    let key = &keys.upload;
    for _ in 0..2 {
        uploads.push(store.create_upload(key).await?);
    }
    let listed = store.list_uploads(key).await?;
    if let Some(missing) = uploads.iter().find(|upload| !listed.contains(upload)) {
        return broken(format!(
            "the upload {} that was just begun is not listed",
            missing.0
        ));
    }
    let [first, ..] = uploads.as_slice() else {
        return broken("no upload was begun");
    };
    let wrong = Sha256::digest("other bytes").into();
    match store.upload_part(key, first, 1, body.clone(), wrong).await {
        Err(StoreError::Corrupt(_)) => {}
        Err(error) => return Err(error.into()),
        Ok(_) => return broken("it takes a part whose SHA-256 is not that of its bytes"),
    }
    for (upload, body) in uploads.iter().zip(bodies(body)) {
        part(store, key, upload, &body).await?;
        let listed = store.list_parts(key, upload).await?;
        if !matches!(listed.as_slice(), [part] if part.size == body.len() as u64) {
            return broken("a part that was just sent is not listed");
        }
    }
    Ok("parts are taken and listed, a wrong SHA-256 is refused".to_owned())
}

/// Completes both at once: one makes the object.
async fn complete(
    store: &dyn ObjectStore,
    keys: &ProbeKeys,
    body: &Bytes,
    uploads: &[UploadId],
) -> Seen {
    let key = &keys.upload;
    let mut parts = Vec::new();
    for (upload, body) in uploads.iter().zip(bodies(body)) {
        // A part may be sent again: the answer has what completion needs.
        parts.push([part(store, key, upload, &body).await?]);
    }
    let completions = uploads.iter().zip(&parts);
    let completions =
        completions.map(|(upload, parts)| store.complete_if_absent(key, upload, parts));
    let (mut winner, mut winners) = (None, 0);
    for (place, made) in join_all(completions).await.into_iter().enumerate() {
        match made {
            Ok(_) => {
                winner = Some(place);
                winners += 1;
            }
            Err(StoreError::AlreadyExists(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (Some(winner), 1) = (winner, winners) else {
        return broken(format!(
            "two uploads of one object were completed at once with `If-None-Match: *`, and {winners} of them succeeded"
        ));
    };
    if Some(whole(store, key).await?) != bodies(body).into_iter().nth(winner) {
        return broken("the upload that was refused has made the object all the same");
    }
    for upload in uploads {
        store.abort_upload(key, upload).await?;
    }
    if !store.list_uploads(key).await?.is_empty() {
        return broken("an upload that was aborted is still listed");
    }
    Ok("of two uploads completed at once one made the object, the other was aborted".to_owned())
}

fn bodies(body: &Bytes) -> [Bytes; 2] {
    [
        body.clone(),
        Bytes::copy_from_slice(&[&body[..], b"2"].concat()),
    ]
}

async fn part(
    store: &dyn ObjectStore,
    key: &Key,
    upload: &UploadId,
    body: &Bytes,
) -> Result<Part, StoreError> {
    let digest = Sha256::digest(body).into();
    store
        .upload_part(key, upload, 1, body.clone(), digest)
        .await
}

async fn whole(store: &dyn ObjectStore, key: &Key) -> Result<Bytes, StoreError> {
    store.get(key, None).await?.collect(key, 1 << 10).await
}
