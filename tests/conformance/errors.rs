//! A configuration that is wrong in one thing gets an error that names it, from every call.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use pipeline::store::s3::{CredentialSource, S3Config, S3Store};
use pipeline::store::{ObjectStore as _, StoreError};
use support::s3::{Certificates, Fault, Operation};

use crate::stand_in;
use crate::suite::key;

/// Those that every server knows.
pub(crate) async fn all(right: &S3Config) {
    let keys = |id: &str, secret: &str| CredentialSource::Static {
        access_key_id: id.into(),
        secret_access_key: secret.into(),
        session_token: None,
    };
    let CredentialSource::Static { access_key_id, .. } = &right.credentials else {
        panic!("static keys are expected");
    };
    let bucket = S3Config {
        bucket: "another-bucket".into(),
        ..right.clone()
    };
    let is_bucket = |error: &StoreError| matches!(error, StoreError::NoSuchBucket(_));
    every_call_says(bucket, is_bucket, "NoSuchBucket").await;

    let unknown = S3Config {
        credentials: keys("nobody", "secret-secret"),
        ..right.clone()
    };
    let is_keys = |error: &StoreError| matches!(error, StoreError::Unauthenticated(_));
    every_call_says(unknown, is_keys, "InvalidAccessKeyId").await;
    let wrong = S3Config {
        credentials: keys(access_key_id, "not-the-secret"),
        ..right.clone()
    };
    every_call_says(wrong, is_keys, "SignatureDoesNotMatch").await;

    let region = S3Config {
        region: Some("mars-north-7".into()),
        ..right.clone()
    };
    let is_region = |error: &StoreError| matches!(error, StoreError::Invalid(_));
    every_call_says(region, is_region, "us-east-1").await;
}

/// Makes every kind of call and looks at its error and the words in it.
async fn every_call_says(config: S3Config, expected: impl Fn(&StoreError) -> bool, words: &str) {
    let store = S3Store::new(config).unwrap();
    let object = key("some/object");
    // MinIO refuses some deletes as a whole and some key by key.
    let delete = store.delete(std::slice::from_ref(&object)).await;
    let delete = delete.and_then(|refused| refused.into_iter().next().map_or(Ok(()), Err));
    let errors = vec![
        store.put_if_absent(&object, "x".into()).await.map(drop),
        store.get(&object, None).await.map(drop),
        store.get(&object, Some(0..1)).await.map(drop),
        store.head(&object).await.map(drop),
        store.list("").try_collect::<Vec<_>>().await.map(drop),
        delete,
        store.create_upload(&object).await.map(drop),
        store.list_uploads(&object).await.map(drop),
    ];
    for (place, result) in errors.into_iter().enumerate() {
        let Err(error) = result else {
            panic!("call {place}: {words} was expected, not success");
        };
        assert!(expected(&error), "call {place}: {error:?}");
        assert!(error.to_string().contains(words), "call {place}: {error}");
    }
}

#[tokio::test]
async fn access_denied_is_no_matter_of_keys() {
    let server = stand_in(false).await;
    let store = server.store().unwrap();
    server.inject(Operation::Put, Fault::Refuse(403, "AccessDenied"));
    let error = store
        .put_if_absent(&key("a"), "x".into())
        .await
        .unwrap_err();
    assert!(
        matches!(error, StoreError::PermissionDenied(_)),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("put `a`: AccessDenied"),
        "{error}"
    );
}

#[tokio::test]
async fn a_redirect_names_the_region_also_to_head() {
    let server = stand_in(false).await;
    let store = server.store().unwrap();
    for operation in [Operation::Head, Operation::Get] {
        server.inject_at(operation, 0, 9, Fault::Refuse(301, "PermanentRedirect"));
    }
    let error = store.head(&key("a")).await.unwrap_err();
    assert!(matches!(error, StoreError::Invalid(_)), "{error:?}");
    assert!(error.to_string().contains("PermanentRedirect"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unavailable() {
    let gone = stand_in(false).await;
    let config = S3Config {
        attempts: 2,
        ..gone.config()
    };
    drop(gone);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let store = S3Store::new(config).unwrap();
    let read = store.get(&key("a"), None).await.unwrap_err();
    assert!(matches!(read, StoreError::Unavailable(_)), "{read:?}");
    assert!(
        read.to_string().to_lowercase().contains("refused"),
        "{read}"
    );
    // Nothing was sent, so nothing is in doubt.
    let put = store
        .put_if_absent(&key("a"), "x".into())
        .await
        .unwrap_err();
    assert!(matches!(put, StoreError::Unavailable(_)), "{put:?}");
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_unavailable() {
    let config = S3Config {
        bucket: "bucket".into(),
        endpoint: Some("http://no-such-host.invalid:9000".into()),
        attempts: 1,
        ..stand_in(false).await.config()
    };
    let error = S3Store::new(config)
        .unwrap()
        .head(&key("a"))
        .await
        .unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_by_name() {
    let server = stand_in(true).await;
    let config = S3Config {
        ca_pem: Some(Certificates::generate().ca_pem.into()),
        ..server.config()
    };
    let error = S3Store::new(config)
        .unwrap()
        .head(&key("a"))
        .await
        .unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert!(error.to_string().contains("certificate"), "{error}");
    assert_eq!(server.calls(Operation::Head), 0);
}

#[tokio::test]
async fn http_and_https_mixed_up_is_unavailable() {
    let plain = stand_in(false).await;
    let config = S3Config {
        endpoint: Some(plain.endpoint().replace("http:", "https:")),
        attempts: 2,
        ..plain.config()
    };
    let error = S3Store::new(config)
        .unwrap()
        .head(&key("a"))
        .await
        .unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    let tls = stand_in(true).await;
    let config = S3Config {
        endpoint: Some(tls.endpoint().replace("https:", "http:")),
        attempts: 2,
        ..tls.config()
    };
    let error = S3Store::new(config)
        .unwrap()
        .head(&key("a"))
        .await
        .unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
}
