//! What the backend makes of a store that fails, on the stand-in.

use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use pipeline::store::s3::{S3Config, S3Store};
use pipeline::store::{ObjectStore as _, StoreError};
use support::s3::{Fault, Operation, Operation as O, S3Server};

use crate::stand_in;
use crate::suite::{assert_error, bytes, digest, key, part, read};

/// A store that gives up soon.
fn hasty(server: &S3Server) -> S3Store {
    S3Store::new(S3Config {
        reply_timeout: Duration::from_millis(400),
        complete_timeout: Duration::from_millis(400),
        attempts: 2,
        ..server.config()
    })
    .unwrap()
}

#[tokio::test]
async fn a_lost_reply_to_a_put_is_never_success() {
    let server = stand_in(false).await;
    let store = server.store().unwrap();
    for (place, fault) in [Fault::CutAfter, Fault::FailAfter].into_iter().enumerate() {
        let object = key(&format!("lost/{place}"));
        server.inject(Operation::Put, fault);
        let put = store.put_if_absent(&object, "ours".into()).await;
        assert_error!(put, AlreadyExists);
        assert_eq!(read(&store, &object).await, "ours");
    }
    // Lost each time: nobody knows.
    server.inject_at(Operation::Put, 0, 9, Fault::CutBefore);
    let put = store.put_if_absent(&key("lost/9"), "ours".into()).await;
    assert_error!(put, UnknownOutcome);
    assert_eq!(server.bytes("lost/9"), None);
}

#[tokio::test]
async fn a_put_that_was_not_taken_is_repeated() {
    let server = stand_in(false).await;
    let store = server.store().unwrap();
    server.inject_at(Operation::Put, 0, 2, Fault::CutBefore);
    server.inject(
        Operation::Put,
        Fault::Refuse(409, "ConditionalRequestConflict"),
    );
    store.put_if_absent(&key("a"), "ours".into()).await.unwrap();
    assert_eq!(server.calls(Operation::Put), 4);
}

#[tokio::test]
async fn a_lost_reply_to_a_completion_is_never_success() {
    let server = stand_in(false).await;
    let store = server.store().unwrap();
    for (place, fault) in [Fault::CutAfter, Fault::FailAfter].into_iter().enumerate() {
        let object = key(&format!("lost/{place}"));
        let upload = store.create_upload(&object).await.unwrap();
        let body = bytes(1, 1000);
        let sent = part(&store, &object, &upload, 1, &body).await;
        server.inject(Operation::Complete, fault);
        let complete = store.complete_if_absent(&object, &upload, &[sent]).await;
        assert_error!(complete, AlreadyExists | NotFound);
        assert_eq!(read(&store, &object).await, body);
    }
}

#[tokio::test]
async fn a_lost_reply_to_a_new_upload_is_unknown_and_not_repeated() {
    let server = stand_in(false).await;
    let store = server.store().unwrap();
    for (place, fault) in [Fault::CutAfter, Fault::FailAfter].into_iter().enumerate() {
        let object = key(&format!("lost/{place}"));
        server.inject(Operation::CreateUpload, fault);
        assert_error!(store.create_upload(&object).await, UnknownOutcome);
        // What stands can be found and ended.
        let left = store.list_uploads(&object).await.unwrap();
        assert_eq!(left.len(), 1);
        store.abort_upload(&object, &left[0]).await.unwrap();
    }
    assert_eq!(server.calls(Operation::CreateUpload), 2);
    assert_eq!(server.uploads_under_way(), 0);
}

#[tokio::test]
async fn parts_and_aborts_are_repeated_after_a_lost_reply() {
    let server = stand_in(false).await;
    let store = server.store().unwrap();
    let object = key("parts");
    let upload = store.create_upload(&object).await.unwrap();
    let body = bytes(1, 9 << 20);
    for fault in [Fault::CutBefore, Fault::CutAfter, Fault::FailAfter] {
        server.inject(Operation::UploadPart, fault);
        let sent = part(&store, &object, &upload, 1, &body).await;
        assert_eq!(store.list_parts(&object, &upload).await.unwrap(), [sent]);
    }
    server.inject(Operation::Abort, Fault::CutAfter);
    store.abort_upload(&object, &upload).await.unwrap();
    assert_eq!(server.uploads_under_way(), 0);
}

#[tokio::test]
async fn slow_down_is_obeyed_and_tried_again() {
    let server = stand_in(false).await;
    let store = server.store().unwrap();
    let operations = [
        O::Put,
        O::Get,
        O::Head,
        O::List,
        O::Delete,
        O::CreateUpload,
        O::UploadPart,
        O::Complete,
        O::Abort,
        O::ListUploads,
        O::ListParts,
    ];
    for operation in operations {
        server.inject_at(operation, 0, 3, Fault::SLOW_DOWN);
    }
    let (object, other) = (key("slow/a"), key("slow/b"));
    store.put_if_absent(&object, "x".into()).await.unwrap();
    store.head(&object).await.unwrap();
    read(&store, &object).await;
    assert_eq!(
        store.list("").try_collect::<Vec<_>>().await.unwrap().len(),
        1
    );
    store.delete(&[object]).await.unwrap();
    let upload = store.create_upload(&other).await.unwrap();
    let sent = part(&store, &other, &upload, 1, &bytes(1, 9 << 20)).await;
    store.list_parts(&other, &upload).await.unwrap();
    store.list_uploads(&other).await.unwrap();
    store
        .complete_if_absent(&other, &upload, &[sent])
        .await
        .unwrap();
    store.abort_upload(&other, &upload).await.unwrap();

    server.inject_at(Operation::Put, 0, 99, Fault::SLOW_DOWN);
    let put = store.put_if_absent(&key("slow/c"), "x".into()).await;
    assert_error!(put, Throttled);
}

#[tokio::test]
async fn a_body_cut_short_ends_in_an_error() {
    let server = stand_in(false).await;
    let store = hasty(&server);
    let object = key("short");
    let body = bytes(1, 3 << 20);
    store.put_if_absent(&object, body.clone()).await.unwrap();
    for (n, fault) in [0, 1, 2 << 20].map(|n| (n, Fault::Truncate(n))) {
        server.inject_at(Operation::Get, 0, 9, fault);
        let got = store.get(&object, None).await.unwrap();
        let chunks: Result<Vec<_>, _> = got.stream.try_collect().await;
        assert_error!(chunks, Unavailable);
        server.clear_faults();
        server.inject(Operation::Get, Fault::Truncate(n / 2));
        let got = store.get(&object, Some(5..2 << 20)).await.unwrap();
        assert_error!(got.collect(&object, 9 << 20).await, Unavailable);
        server.clear_faults();
    }
    let begun = Instant::now();
    server.inject(Operation::Get, Fault::Hang(1 << 20));
    let got = store.get(&object, None).await.unwrap();
    assert_error!(got.collect(&object, 9 << 20).await, Unavailable);
    assert!(begun.elapsed() < Duration::from_mins(1));
    assert!(read(&store, &object).await == body);
}

#[tokio::test]
async fn no_call_waits_for_ever() {
    let server = stand_in(false).await;
    let store = hasty(&server);
    let object = key("stall");
    let upload = store.create_upload(&object).await.unwrap();
    let sent = part(&store, &object, &upload, 1, &bytes(1, 100)).await;
    let stall = Fault::Stall(Duration::from_mins(1));
    for operation in [
        Operation::Put,
        Operation::Get,
        Operation::UploadPart,
        Operation::Complete,
    ] {
        server.inject_at(operation, 0, 9, stall.clone());
    }
    let begun = Instant::now();
    let put = store.put_if_absent(&key("other"), "x".into()).await;
    assert_error!(put, UnknownOutcome);
    assert_error!(store.get(&object, None).await, Unavailable);
    let body = bytes(2, 100);
    let again = store.upload_part(&object, &upload, 2, body.clone(), digest(&body));
    assert_error!(again.await, Unavailable);
    let complete = store.complete_if_absent(&object, &upload, &[sent]).await;
    assert_error!(complete, UnknownOutcome);
    assert!(begun.elapsed() < Duration::from_mins(1));
}

#[tokio::test]
async fn a_store_that_goes_down_and_comes_back_is_waited_for() {
    let server = stand_in(false).await;
    let store = S3Store::new(S3Config {
        attempts: 40,
        ..server.config()
    })
    .unwrap();
    let object = key("down");
    store.put_if_absent(&object, "x".into()).await.unwrap();
    server.set_down(true);
    let back = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        server.set_down(false);
    };
    let (body, ()) = tokio::join!(read(&store, &object), back);
    assert_eq!(body, "x");
}

#[tokio::test]
async fn the_end_of_a_listing_is_never_taken_for_granted() {
    let server = stand_in(false).await;
    let store = hasty(&server);
    for n in 0..250 {
        let object = key(&format!("page/{n:03}"));
        store.put_if_absent(&object, "x".into()).await.unwrap();
    }
    // The second page cannot be had.
    server.inject_at(Operation::List, 1, 9, Fault::CutBefore);
    let mut seen = 0;
    let listed: Result<(), StoreError> = store
        .list("page/")
        .try_for_each(|_| {
            seen += 1;
            std::future::ready(Ok(()))
        })
        .await;
    assert_error!(listed, Unavailable);
    assert_eq!(seen, 100);
}

#[tokio::test]
async fn damage_behind_the_stores_back_reaches_the_reader() {
    // So that tests above can rely on it: the stand-in hands out what was tampered with.
    let server = stand_in(false).await;
    let store = server.store().unwrap();
    let object = key("damage");
    store.put_if_absent(&object, "abcd".into()).await.unwrap();
    assert!(server.flip_bit("damage", 8));
    assert_eq!(read(&store, &object).await, "accd");
    assert!(!server.flip_bit("damage", 32));
    server.tamper("damage", Some("ab".into()));
    assert_error!(store.get(&object, Some(0..4)).await, Corrupt);
    server.tamper("damage", None);
    assert_error!(store.get(&object, None).await, NotFound);
}

#[tokio::test]
async fn uploads_and_parts_are_listed_across_pages() {
    let server = stand_in(false).await;
    let store = server.store().unwrap();
    let (object, longer) = (key("pages"), key("pages/more"));
    let mut uploads = Vec::new();
    for _ in 0..130 {
        uploads.push(store.create_upload(&object).await.unwrap());
        store.create_upload(&longer).await.unwrap();
    }
    assert_eq!(store.list_uploads(&object).await.unwrap(), uploads);
    let mut parts = Vec::new();
    for number in 1..=230 {
        let body = bytes(number.into(), 10);
        parts.push(part(&store, &object, &uploads[0], number, &body).await);
    }
    let listed = store.list_parts(&object, &uploads[0]).await.unwrap();
    assert_eq!(listed, parts);
}
