//! What every store must do.

use std::slice::from_ref;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use pipeline::store::{Key, ObjectStore, Part, Sha256Digest, StoreError, UploadId};
use sha2::{Digest as _, Sha256};

/// The least size of a part that is not the last.
const PART: usize = 5 << 20;
const WRITERS: usize = 8;

/// How far to go with a store.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one store's own way, and none implies another"
)]
pub(crate) struct Caps {
    /// Rounds of the race to put an object.
    put_rounds: usize,
    /// Rounds of the race to complete an upload.
    complete_rounds: usize,
    /// Objects in the long listing.
    many: usize,
    /// Whether an object whose key goes on after another's key and `/` is listed. MinIO stores it and
    /// hands it out, but does not list it: no key of ours is like that.
    nested: bool,
    /// Whether such an object can be created at all. versitygw keeps objects as files, and refuses it.
    nests: bool,
    /// Whether completing an upload again that made its object may succeed again. versitygw knows the upload: it is
    /// no lie, and nothing is made.
    completes_again: bool,
    /// Whether a page of versions may begin with the one that the page before ended with. versitygw's do; to delete
    /// a version twice does no harm.
    repeats_versions: bool,
}

impl Caps {
    pub(crate) const MEMORY: Self = Self {
        put_rounds: 200,
        complete_rounds: 100,
        many: 1100,
        nested: true,
        nests: true,
        completes_again: false,
        repeats_versions: false,
    };
    pub(crate) const MINIO: Self = Self {
        nested: false,
        ..Self::S3
    };
    pub(crate) const VERSITYGW: Self = Self {
        nests: false,
        completes_again: true,
        repeats_versions: true,
        ..Self::MINIO
    };
    pub(crate) const S3: Self = Self {
        put_rounds: 40,
        complete_rounds: 20,
        many: 1100,
        nested: true,
        nests: true,
        completes_again: false,
        repeats_versions: false,
    };
}

/// Everything. The functions use keys of their own, so they may share a store.
pub(crate) async fn all(store: &dyn ObjectStore, caps: &Caps) {
    what_is_put_is_read_back(store).await;
    nothing_is_overwritten(store).await;
    ranges(store).await;
    missing_things(store).await;
    listing_is_in_order(store, caps).await;
    long_listing_and_deletes(store, caps).await;
    versions(store, caps).await;
    multipart(store, caps).await;
    wrong_part(store).await;
    wrong_completion(store).await;
    completion_onto_an_object(store).await;
    race_to_put(store, caps).await;
    race_to_complete(store, caps).await;
}

pub(crate) fn key(name: &str) -> Key {
    Key::new(name).unwrap()
}

pub(crate) fn digest(bytes: &[u8]) -> Sha256Digest {
    Sha256::digest(bytes).into()
}

/// Bytes that differ from place to place, and by `seed`.
pub(crate) fn bytes(seed: u64, length: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut all = Vec::with_capacity(length + 8);
    while all.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        all.extend_from_slice(&state.to_le_bytes());
    }
    all.truncate(length);
    all.into()
}

pub(crate) async fn read(store: &dyn ObjectStore, key: &Key) -> Bytes {
    let body = store.get(key, None).await.unwrap();
    let size = usize::try_from(body.size).unwrap();
    body.collect(key, size).await.unwrap()
}

pub(crate) async fn part(
    store: &dyn ObjectStore,
    key: &Key,
    upload: &UploadId,
    number: u32,
    body: &Bytes,
) -> Part {
    let sent = store.upload_part(key, upload, number, body.clone(), digest(body));
    let part = sent.await.unwrap();
    assert_eq!(part.number, number);
    assert_eq!(part.size, body.len() as u64);
    assert_eq!(part.sha256, Some(digest(body)));
    assert!(!part.etag.is_empty());
    part
}

macro_rules! assert_error {
    ($result:expr, $($variant:ident)|+) => {{
        let result = $result;
        assert!(
            matches!(&result, Err($(StoreError::$variant(_))|+)),
            "{} expected, not {:?}", stringify!($($variant)|+), result.map(|_| "success")
        );
    }};
}
pub(crate) use assert_error;

async fn what_is_put_is_read_back(store: &dyn ObjectStore) {
    let names = [
        "plain",
        "a b+c%20&=~'()#?;x@$!,",
        "Grüße/資料",
        "x.y/z..w/-_",
    ];
    let sizes = [0, 1, 300 << 10, 9 << 20];
    for (name, size) in names.into_iter().zip(sizes) {
        let key = key(&format!("put/{name}"));
        let body = bytes(size as u64, size);
        let put = store.put_if_absent(&key, body.clone()).await.unwrap();
        assert_eq!((put.key, put.size), (key.clone(), size as u64));
        assert!(read(store, &key).await == body, "{key}");
        let head = store.head(&key).await.unwrap();
        assert_eq!(head.key, key);
        assert_eq!(head.size, size as u64);
        assert_eq!(head.etag, put.etag);
        assert_eq!(head.checksum, Some(BASE64.encode(digest(&body))));
        let written = head.last_modified.unwrap();
        let age = SystemTime::now().duration_since(written);
        assert!(age.unwrap_or_default() < Duration::from_mins(10));
    }
}

async fn nothing_is_overwritten(store: &dyn ObjectStore) {
    let key = key("twice/object");
    store.put_if_absent(&key, "first".into()).await.unwrap();
    for body in ["first", "second", ""] {
        let again = store.put_if_absent(&key, body.into()).await;
        let told = again.as_ref().err().map(|error| error.detail().key.clone());
        assert_eq!(told.as_deref(), Some("twice/object"));
        assert_error!(again, AlreadyExists);
    }
    assert_eq!(read(store, &key).await, "first");
}

async fn ranges(store: &dyn ObjectStore) {
    let key = key("ranges/object");
    let body = bytes(7, 1 << 20);
    store.put_if_absent(&key, body.clone()).await.unwrap();
    let size = body.len() as u64;
    for range in [
        0..1,
        0..size,
        1..size,
        size - 1..size,
        1000..70_000,
        5..5,
        0..0,
        size..size,
    ] {
        let got = store.get(&key, Some(range.clone())).await.unwrap();
        assert_eq!(got.size, size, "the size of the whole object");
        let got = got.collect(&key, body.len()).await.unwrap();
        let at = |n: u64| usize::try_from(n).unwrap();
        assert!(got == body[at(range.start)..at(range.end)], "{range:?}");
    }
    #[expect(clippy::reversed_empty_ranges, reason = "it is to be refused")]
    let bad = [
        0..size + 1,
        size - 1..size + 1,
        size..size + 1,
        size + 5..size + 9,
        9..3,
    ];
    for range in bad {
        let got = store.get(&key, Some(range)).await;
        assert_error!(got, Corrupt);
    }
    let too_small = store.get(&key, None).await.unwrap();
    assert_error!(too_small.collect(&key, 100).await, Corrupt);
}

async fn missing_things(store: &dyn ObjectStore) {
    let none = key("missing/object");
    assert_error!(store.get(&none, None).await, NotFound);
    assert_error!(store.get(&none, Some(0..4)).await, NotFound);
    assert_error!(store.get(&none, Some(4..4)).await, NotFound);
    assert_error!(store.head(&none).await, NotFound);
    assert!(store.delete(from_ref(&none)).await.unwrap().is_empty());
    assert!(store.delete(&[]).await.unwrap().is_empty());
    assert!(store.list_uploads(&none).await.unwrap().is_empty());
    let listed: Vec<_> = store.list("missing/").try_collect().await.unwrap();
    assert!(listed.is_empty());

    // An upload that was, and is no more: an id in the store's own form.
    let upload = store.create_upload(&none).await.unwrap();
    let body = bytes(1, 100);
    let sent = part(store, &none, &upload, 1, &body).await;
    store.abort_upload(&none, &upload).await.unwrap();
    store.abort_upload(&none, &upload).await.unwrap();
    let late = store.upload_part(&none, &upload, 2, body.clone(), digest(&body));
    assert_error!(late.await, NotFound);
    assert_error!(store.list_parts(&none, &upload).await, NotFound);
    let complete = store.complete_if_absent(&none, &upload, &[sent]).await;
    assert_error!(complete, NotFound);
    assert!(store.list_uploads(&none).await.unwrap().is_empty());
    assert_error!(store.head(&none).await, NotFound);
}

async fn listing_is_in_order(store: &dyn ObjectStore, caps: &Caps) {
    let mut names = [
        "list/a",
        "list/a!b",
        "list/a-b",
        "list/a/b",
        "list/a/b/c",
        "list/a0",
        "list/ab",
        "list/A",
        "list/ä",
        "list/\u{10000}",
        "list/\u{ffee}",
        "list-2/x",
        "list/a b",
        "list/a+b",
        "list/a&b",
    ];
    for name in names {
        if !caps.nests && name.starts_with("list/a/b") {
            continue;
        }
        store
            .put_if_absent(&key(name), Bytes::from(name))
            .await
            .unwrap();
    }
    names.sort_unstable();
    for prefix in [
        "list", "list/", "list/a", "list/a/", "list/a/b", "lis", "list-2/x", "list/a&",
    ] {
        let listed: Vec<_> = store.list(prefix).try_collect().await.unwrap();
        let found: Vec<_> = listed.iter().map(|meta| meta.key.as_str()).collect();
        let expected: Vec<_> = names
            .iter()
            .copied()
            .filter(|name| name.starts_with(prefix))
            .filter(|name| caps.nested || !name.starts_with("list/a/b"))
            .collect();
        assert_eq!(found, expected, "below `{prefix}`");
        assert!(
            listed
                .iter()
                .all(|meta| meta.size == meta.key.as_str().len() as u64)
        );
        assert!(listed.iter().all(|meta| meta.last_modified.is_some()));
    }
    let all: Vec<_> = store.list("").try_collect().await.unwrap();
    assert!(all.len() > names.len());
    assert!(all.is_sorted_by(|a, b| a.key < b.key));
}

async fn long_listing_and_deletes(store: &dyn ObjectStore, caps: &Caps) {
    let keys: Vec<_> = (0..caps.many)
        .map(|n| key(&format!("many/{n:05}")))
        .collect();
    let puts = keys.iter().map(|key| store.put_if_absent(key, "x".into()));
    let puts: Vec<_> = stream::iter(puts)
        .buffer_unordered(16)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(puts.len(), keys.len());
    let listed: Vec<_> = store
        .list("many/")
        .map_ok(|meta| meta.key)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(listed, keys);

    // Read only in part: the rest is not fetched, and nothing hangs.
    let some: Vec<_> = store.list("many/").take(3).try_collect().await.unwrap();
    assert_eq!(some.len(), 3);

    assert!(store.delete(&keys).await.unwrap().is_empty());
    let left: Vec<_> = store.list("many/").try_collect().await.unwrap();
    assert!(left.is_empty());
    assert!(store.delete(&keys[..5]).await.unwrap().is_empty());
    store.put_if_absent(&keys[0], "again".into()).await.unwrap();
    assert_eq!(read(store, &keys[0]).await, "again");
}

/// Of each object all versions are listed and deleted for good; these stores keep one of each.
async fn versions(store: &dyn ObjectStore, caps: &Caps) {
    let keys: Vec<_> = (0..caps.many)
        .map(|n| key(&format!("versions/{n:05}")))
        .collect();
    let puts = keys
        .iter()
        .map(|key| store.put_if_absent(key, "xyz".into()));
    let puts: Vec<_> = stream::iter(puts)
        .buffer_unordered(16)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(puts.len(), keys.len());
    let mut listed: Vec<_> = store
        .list_versions("versions/")
        .try_collect()
        .await
        .unwrap();
    listed.sort_by(|a, b| a.key.cmp(&b.key));
    if caps.repeats_versions {
        listed.dedup_by(|a, b| a.key == b.key && a.version == b.version);
    }
    let listed_keys: Vec<_> = listed.iter().map(|it| it.key.clone()).collect();
    let missing: Vec<_> = keys
        .iter()
        .filter(|key| !listed_keys.contains(key))
        .collect();
    let mut twice = listed_keys.windows(2).filter(|pair| pair[0] == pair[1]);
    assert_eq!((missing.as_slice(), twice.next()), (&[][..], None));
    assert_eq!(listed_keys.len(), keys.len());
    for found in &listed {
        assert!(
            found.is_latest && !found.is_marker && found.size == 3,
            "{found:?}"
        );
        assert!(found.last_modified.is_some(), "{found:?}");
    }
    let one = &listed[0];
    // What prune asks first: a store that holds nothing is not asked for each version, and versitygw without a
    // directory for versions answers 400 to a HEAD of the version `null` that it lists.
    let version = one.version.as_ref().filter(|_| !caps.repeats_versions);
    let held = store.hold(&one.key, version).await.unwrap();
    assert_eq!(held, None);
    assert!(!store.holds_objects().await.unwrap());
    let all: Vec<_> = listed.into_iter().map(|it| (it.key, it.version)).collect();
    for _ in 0..2 {
        let left = store.delete_versions(&all).await.unwrap();
        assert!(left.is_empty(), "{left:?}");
    }
    let left: Vec<_> = store
        .list_versions("versions/")
        .try_collect()
        .await
        .unwrap();
    assert!(left.is_empty(), "{left:?}");
    assert_error!(store.head(&keys[0]).await, NotFound);
}

async fn multipart(store: &dyn ObjectStore, caps: &Caps) {
    let (object, longer) = (key("multipart/object"), key("multipart/object-2"));
    let bodies = [bytes(1, PART), bytes(2, PART + 3), bytes(3, 1)];
    let upload = store.create_upload(&object).await.unwrap();
    let other = store.create_upload(&longer).await.unwrap();
    assert_eq!(
        store.list_uploads(&object).await.unwrap(),
        from_ref(&upload)
    );
    assert!(store.list_parts(&object, &upload).await.unwrap().is_empty());

    // Out of order, and one of them twice.
    let third = part(store, &object, &upload, 3, &bodies[2]).await;
    let first = part(store, &object, &upload, 1, &bodies[0]).await;
    part(store, &object, &upload, 2, &bytes(9, PART)).await;
    let second = part(store, &object, &upload, 2, &bodies[1]).await;
    let parts = [first, second, third];
    assert_eq!(store.list_parts(&object, &upload).await.unwrap(), parts);
    assert_error!(store.head(&object).await, NotFound);

    let made = store
        .complete_if_absent(&object, &upload, &parts)
        .await
        .unwrap();
    let whole = bodies.concat();
    assert_eq!((&made.key, made.size), (&object, whole.len() as u64));
    assert!(read(store, &object).await == whole);
    let head = store.head(&object).await.unwrap();
    let digests: Vec<_> = bodies.iter().flat_map(|body| digest(body)).collect();
    let composite = format!("{}-3", BASE64.encode(digest(&digests)));
    assert_eq!(head.checksum, Some(composite));
    assert_eq!((head.size, head.etag), (whole.len() as u64, made.etag));
    let across = PART as u64 - 2..PART as u64 + 2;
    let across = store.get(&object, Some(across)).await.unwrap();
    assert!(across.collect(&object, 4).await.unwrap() == whole[PART - 2..PART + 2]);

    // The upload is gone, and completing it again never says that it was made now.
    assert!(store.list_uploads(&object).await.unwrap().is_empty());
    let again = store.complete_if_absent(&object, &upload, &parts).await;
    if !(caps.completes_again && again.is_ok()) {
        assert_error!(again, AlreadyExists | NotFound);
    }
    store.abort_upload(&object, &upload).await.unwrap();
    assert!(read(store, &object).await == whole);

    assert_eq!(store.list_uploads(&longer).await.unwrap(), from_ref(&other));
    store.abort_upload(&longer, &other).await.unwrap();
    assert!(store.list_uploads(&longer).await.unwrap().is_empty());
}

async fn wrong_part(store: &dyn ObjectStore) {
    let object = key("wrong-part/object");
    let upload = store.create_upload(&object).await.unwrap();
    let body = bytes(1, PART);
    let mut damaged = Vec::from(body.clone());
    damaged[PART / 2] ^= 4;
    let sent = store.upload_part(&object, &upload, 1, damaged.into(), digest(&body));
    assert_error!(sent.await, Corrupt);
    assert!(store.list_parts(&object, &upload).await.unwrap().is_empty());
    // The right bytes may still be sent.
    let sent = part(store, &object, &upload, 1, &body).await;
    store
        .complete_if_absent(&object, &upload, &[sent])
        .await
        .unwrap();
    assert!(read(store, &object).await == body);
}

async fn wrong_completion(store: &dyn ObjectStore) {
    let object = key("wrong-completion/object");
    let upload = store.create_upload(&object).await.unwrap();
    let small = part(store, &object, &upload, 1, &bytes(1, 1000)).await;
    let last = part(store, &object, &upload, 2, &bytes(2, 1000)).await;
    let too_small = [small.clone(), last.clone()];
    let complete = store.complete_if_absent(&object, &upload, &too_small).await;
    assert_error!(complete, Invalid);
    let other = Part {
        etag: "0123456789abcdef0123456789abcdef".into(),
        ..last.clone()
    };
    let complete = store.complete_if_absent(&object, &upload, &[other]).await;
    assert_error!(complete, Invalid);
    let absent = Part { number: 7, ..last };
    let complete = store.complete_if_absent(&object, &upload, &[absent]).await;
    assert_error!(complete, Invalid);
    assert_error!(store.head(&object).await, NotFound);
    store
        .complete_if_absent(&object, &upload, &[small])
        .await
        .unwrap();
}

async fn completion_onto_an_object(store: &dyn ObjectStore) {
    let object = key("onto/object");
    let upload = store.create_upload(&object).await.unwrap();
    let sent = part(store, &object, &upload, 1, &bytes(1, 1000)).await;
    store.put_if_absent(&object, "first".into()).await.unwrap();
    for _ in 0..2 {
        let complete = store.complete_if_absent(&object, &upload, from_ref(&sent));
        assert_error!(complete.await, AlreadyExists);
    }
    assert_eq!(read(store, &object).await, "first");
    assert_eq!(
        store.list_uploads(&object).await.unwrap(),
        from_ref(&upload)
    );
    assert_eq!(store.list_parts(&object, &upload).await.unwrap(), [sent]);
    store.abort_upload(&object, &upload).await.unwrap();
    assert!(store.list_uploads(&object).await.unwrap().is_empty());
}

/// The one winner's place; all others must have met an object.
fn winner<T>(results: Vec<Result<T, StoreError>>, round: usize) -> usize {
    let mut winners = Vec::new();
    for (place, result) in results.into_iter().enumerate() {
        match result {
            Ok(_) => winners.push(place),
            Err(StoreError::AlreadyExists(_)) => {}
            Err(error) => panic!("round {round}, writer {place}: {error}"),
        }
    }
    assert_eq!(winners.len(), 1, "round {round}: {winners:?}");
    winners[0]
}

async fn race_to_put(store: &dyn ObjectStore, caps: &Caps) {
    for round in 0..caps.put_rounds {
        let object = key(&format!("race-put/{round:04}"));
        let bodies: Vec<_> = (0..WRITERS)
            .map(|n| bytes(n as u64 + 1, 2000 + n))
            .collect();
        let puts = bodies
            .iter()
            .map(|body| store.put_if_absent(&object, body.clone()));
        let first = winner(join_all(puts).await, round);
        assert!(read(store, &object).await == bodies[first]);
    }
}

async fn race_to_complete(store: &dyn ObjectStore, caps: &Caps) {
    for round in 0..caps.complete_rounds {
        let object = key(&format!("race-complete/{round:04}"));
        let bodies: Vec<_> = (0..WRITERS)
            .map(|n| bytes(n as u64 + 1, 2000 + n))
            .collect();
        let uploads = bodies.iter().map(|body| async {
            let upload = store.create_upload(&object).await.unwrap();
            let sent = part(store, &object, &upload, 1, body).await;
            (upload, sent)
        });
        let uploads = join_all(uploads).await;
        let completions = uploads
            .iter()
            .map(|(upload, sent)| store.complete_if_absent(&object, upload, from_ref(sent)));
        let first = winner(join_all(completions).await, round);
        assert!(read(store, &object).await == bodies[first]);
        // The losers' uploads stay until they are aborted.
        let left = store.list_uploads(&object).await.unwrap();
        assert_eq!(left.len(), WRITERS - 1);
        for upload in left {
            store.abort_upload(&object, &upload).await.unwrap();
        }
        assert!(store.list_uploads(&object).await.unwrap().is_empty());
    }
}
