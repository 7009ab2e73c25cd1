//! Keys to the store that change while it is used.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use pipeline::store::s3::{CredentialSource, S3Config, S3Store};
use pipeline::store::{ObjectStore as _, StoreError};
use support::s3::{Fault, Operation, S3Server};

use crate::stand_in;
use crate::suite::{assert_error, key};

fn store(server: &S3Server, credentials: CredentialSource) -> S3Store {
    S3Store::new(S3Config {
        credentials,
        ..server.config()
    })
    .unwrap()
}

fn write(path: &Path, id: &str, secret: &str) {
    let text = format!("[default]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n");
    fs::write(path, text).unwrap();
}

#[tokio::test]
async fn a_file_is_read_again_when_it_changes() {
    let server = stand_in(false).await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("credentials");
    let store = store(&server, CredentialSource::File(path.clone()));
    let object = key("a");
    let missing = store.head(&object).await.unwrap_err();
    assert!(
        matches!(missing, StoreError::Unauthenticated(_)),
        "{missing:?}"
    );
    assert!(missing.to_string().contains("credentials"), "{missing}");

    write(
        &path,
        &server.options().access_key,
        &server.options().secret_key,
    );
    store.put_if_absent(&object, "x".into()).await.unwrap();
    server.set_keys("second-key", "second-secret");
    assert_error!(store.head(&object).await, Unauthenticated);
    write(&path, "second-key", "second-secret");
    store.head(&object).await.unwrap();
    // Caught half written: the keys in hand are still good.
    fs::write(&path, "[defa").unwrap();
    store.head(&object).await.unwrap();
}

#[tokio::test]
async fn a_command_is_run_once_and_again_before_its_keys_expire() {
    let server = stand_in(false).await;
    let directory = tempfile::tempdir().unwrap();
    let (runs, json) = (directory.path().join("runs"), directory.path().join("json"));
    let print = |seconds: u64| {
        let expires = SystemTime::now() + Duration::from_secs(seconds);
        let text = serde_json::json!({
            "Version": 1,
            "AccessKeyId": server.options().access_key,
            "SecretAccessKey": server.options().secret_key,
            "Expiration": Timestamp::try_from(expires).unwrap().to_string(),
        });
        fs::write(&json, text.to_string()).unwrap();
    };
    print(3600);
    let script = "echo run >> \"$1\"; cat \"$2\"";
    let argv = [
        "sh",
        "-c",
        script,
        "sh",
        &runs.to_string_lossy(),
        &json.to_string_lossy(),
    ];
    let command = CredentialSource::Command(argv.map(String::from).to_vec());
    let count = || fs::read_to_string(&runs).unwrap().lines().count();
    let object = key("a");

    let long = store(&server, command.clone());
    long.put_if_absent(&object, "x".into()).await.unwrap();
    for _ in 0..10 {
        long.head(&object).await.unwrap();
    }
    assert_eq!(count(), 1);
    // Refused as old: asked for once more, and since they are the same keys, that is the answer.
    server.inject(Operation::Head, Fault::Refuse(400, "ExpiredToken"));
    server.inject(Operation::Get, Fault::Refuse(400, "ExpiredToken"));
    assert_error!(long.head(&object).await, Unauthenticated);
    assert_eq!(count(), 2);

    print(1);
    let short = store(&server, command);
    short.head(&object).await.unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    print(3600);
    short.head(&object).await.unwrap();
    short.head(&object).await.unwrap();
    assert_eq!(count(), 4);
}

#[tokio::test]
async fn a_command_that_fails_says_why() {
    let server = stand_in(false).await;
    let cases: [(&[&str], &str); 5] = [
        (&["/no/such/program"], "cannot be started"),
        (
            &["sh", "-c", "echo ticket expired >&2; exit 4"],
            "ticket expired",
        ),
        (&["sh", "-c", "echo hidden-secret"], "credential_process"),
        (
            &[
                "sh",
                "-c",
                r#"echo '{"Version":2,"AccessKeyId":"a","SecretAccessKey":"b"}'"#,
            ],
            "Version 2",
        ),
        (&[], "empty"),
    ];
    for (argv, words) in cases {
        let argv = argv.iter().copied().map(String::from).collect();
        let store = store(&server, CredentialSource::Command(argv));
        let error = store.head(&key("a")).await.unwrap_err();
        assert!(matches!(error, StoreError::Unauthenticated(_)), "{error:?}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(!error.to_string().contains("hidden-secret"), "{error}");
    }
    assert_eq!(server.calls(Operation::Head), 0);
}
