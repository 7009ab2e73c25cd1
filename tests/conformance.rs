//! One suite for every object store: what the trait promises holds on the store in memory, on the S3
//! stand-in and on a real MinIO, so that tests on the first two mean something.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "test code: a panic is a failed test, with its reason"
)]

#[path = "conformance/errors.rs"]
mod errors;
#[path = "conformance/faults.rs"]
mod faults;
#[path = "conformance/keys.rs"]
mod keys;
#[path = "conformance/speed.rs"]
mod speed;
#[path = "conformance/suite.rs"]
mod suite;

use pipeline::store::s3::{S3Config, S3Store};
use suite::Caps;
use support::memory_store::MemoryStore;
use support::s3::{Options, S3Server};
use support::{minio, s3, skip, versitygw};

/// The stand-in, with small pages, so that paging is met early.
async fn stand_in(tls: bool) -> S3Server {
    let options = Options {
        tls,
        page_size: 100,
        ..Options::default()
    };
    s3::start(options).await.unwrap()
}

fn below(config: S3Config, prefix: &str) -> S3Store {
    let prefix = prefix.to_owned();
    S3Store::new(S3Config { prefix, ..config }).unwrap()
}

async fn on_minio(test: &str, tls: bool) {
    let Some(minio) = minio::start(tls).await else {
        skip(test, "there is no minio binary here");
        return;
    };
    suite::all(&minio.store().unwrap(), &Caps::MINIO).await;
    suite::all(&below(minio.config(), "some/where"), &Caps::MINIO).await;
    errors::all(&minio.config()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory() {
    suite::all(&MemoryStore::default(), &Caps::MEMORY).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stand_in_http() {
    let server = stand_in(false).await;
    suite::all(&server.store().unwrap(), &Caps::S3).await;
    suite::all(&below(server.config(), "some/where"), &Caps::S3).await;
    errors::all(&server.config()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stand_in_https() {
    let server = stand_in(true).await;
    suite::all(&server.store().unwrap(), &Caps::S3).await;
    errors::all(&server.config()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn minio_http() {
    on_minio("conformance::minio_http", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versitygw_https() {
    let Some(gateway) = versitygw::start(true).await else {
        let why = "the environment names no versitygw: `make test-full` fetches one (it needs Go)";
        skip("conformance_on_versitygw", why);
        return;
    };
    suite::all(&gateway.store().unwrap(), &Caps::VERSITYGW).await;
    suite::all(&below(gateway.config(), "some/where"), &Caps::VERSITYGW).await;
    errors::all(&gateway.config()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn minio_https() {
    on_minio("conformance::minio_https", true).await;
}
