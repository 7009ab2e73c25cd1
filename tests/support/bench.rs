//! What the benchmarks share.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Stdio;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use pipeline::store::{
    Detail, Key, ObjectBody, ObjectMeta, ObjectStore, Part, Sha256Digest, StoreError, UploadId,
};
use pipeline::upload::UploadJournal;

use crate::minio::Minio;
use crate::os;
use crate::postgres::Cluster;

/// A stand-in: a store that says yes and drops what it gets.
#[derive(Debug)]
pub struct Sink;

fn refused<T>(operation: &'static str) -> Result<T, StoreError> {
    Err(StoreError::NotFound(Detail::new(
        operation,
        "",
        "a sink has nothing",
    )))
}

fn meta(key: &Key, size: u64) -> ObjectMeta {
    ObjectMeta {
        key: key.clone(),
        size,
        etag: None,
        checksum: None,
        last_modified: None,
    }
}

#[async_trait]
impl ObjectStore for Sink {
    fn describe(&self) -> String {
        "a sink (a stand-in)".into()
    }

    async fn now(&self) -> Result<SystemTime, StoreError> {
        Ok(SystemTime::now())
    }

    async fn put_if_absent(&self, key: &Key, body: Bytes) -> Result<ObjectMeta, StoreError> {
        Ok(meta(key, body.len() as u64))
    }

    async fn get(&self, _: &Key, _: Option<Range<u64>>) -> Result<ObjectBody, StoreError> {
        refused("get")
    }

    async fn head(&self, _: &Key) -> Result<ObjectMeta, StoreError> {
        refused("head")
    }

    fn list(&self, _: &str) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        futures_util::stream::empty().boxed()
    }

    async fn delete(&self, _: &[Key]) -> Result<Vec<StoreError>, StoreError> {
        Ok(Vec::new())
    }

    async fn create_upload(&self, key: &Key) -> Result<UploadId, StoreError> {
        Ok(UploadId(key.to_string()))
    }

    async fn upload_part(
        &self,
        _: &Key,
        _: &UploadId,
        number: u32,
        body: Bytes,
        sha256: Sha256Digest,
    ) -> Result<Part, StoreError> {
        Ok(Part {
            number,
            size: body.len() as u64,
            etag: String::new(),
            sha256: Some(sha256),
        })
    }

    async fn complete_if_absent(
        &self,
        key: &Key,
        _: &UploadId,
        parts: &[Part],
    ) -> Result<ObjectMeta, StoreError> {
        Ok(meta(key, parts.iter().map(|part| part.size).sum()))
    }

    async fn abort_upload(&self, _: &Key, _: &UploadId) -> Result<(), StoreError> {
        Ok(())
    }

    async fn list_uploads(&self, _: &Key) -> Result<Vec<UploadId>, StoreError> {
        Ok(Vec::new())
    }

    async fn list_parts(&self, _: &Key, _: &UploadId) -> Result<Vec<Part>, StoreError> {
        refused("list parts")
    }
}

#[async_trait]
impl UploadJournal for Sink {
    async fn intend(&self, _: &Key) -> Result<(), StoreError> {
        Ok(())
    }
}

/// The middle one.
///
/// # Panics
/// If there is none.
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Prints a figure and its bound.
#[expect(clippy::print_stdout, reason = "benchmarks print their figures")]
pub fn goal(name: &str, measured: f64, bound: f64) {
    let verdict = if measured <= bound { "met" } else { "missed" };
    println!("GOAL {name} {measured:.2} <= {bound} {verdict}");
}

/// Runs a script as the database user.
///
/// # Panics
/// If it fails, with what it said.
pub fn shell(script: &str, environment: &[(&str, &str)]) {
    let mut command = os::command("/bin/bash");
    command
        .args(["-c", &format!("set -euo pipefail; {script}")])
        .envs(environment.iter().copied());
    let output = command.stdin(Stdio::null()).output().expect("bash");
    assert!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The words that begin each command line of `mc` for the database user, who knows `minio` as `b`.
///
/// # Panics
/// If `mc` cannot be put in `directory`, or does not reach the server.
pub fn ready_mc(mc: &Path, minio: &Minio, directory: &Path) -> String {
    let config = directory.join("mc");
    let authorities = config.join("certs/CAs");
    fs::create_dir_all(&authorities).expect("the CA directory");
    fs::write(authorities.join("ca.crt"), minio.ca_pem().expect("TLS")).expect("the CA");
    // The databases' user may not be able to reach the place where it is installed.
    let reachable = directory.join("bin/mc");
    fs::copy(mc, &reachable).expect("mc");
    for path in [
        &config,
        &config.join("certs"),
        &authorities,
        &authorities.join("ca.crt"),
    ] {
        os::give(path);
    }
    let (user, password) = minio.keys();
    let words = format!(
        "'{}' --quiet --config-dir '{}'",
        reachable.display(),
        config.display()
    );
    let alias = format!("{words} alias set b {} {user} {password}", minio.endpoint());
    shell(&alias, &[]);
    words
}

/// Fills a database with `rows` rows that compress about 2:1, about 136 bytes a row with its header and an index beside them; returns the size
/// of all databases in bytes.
///
/// # Panics
/// If the database refuses.
pub async fn fill(cluster: &Cluster, rows: u64) -> u64 {
    let sql = format!(
        "CREATE TABLE data (id uuid, amount double precision, other double precision, words text);
         INSERT INTO data SELECT gen_random_uuid(), random() * 1e6, random(), (
             SELECT string_agg((ARRAY['amber','basin','cedar','delta','ember','fjord','grove','haven','inlet','jetty','knoll','ledge',
                 'marsh','north','ocean','plain','quarry','ridge','shore','tundra'])[1 + ((g * 7919 + w * 104729 + (random() * 19)::int) % 20)], ' ')
             FROM generate_series(1, 10) w) FROM generate_series(1, {rows}::bigint) g;
         CREATE INDEX ON data (id);"
    );
    cluster.execute(&sql).await;
    cluster.execute("VACUUM FREEZE data").await;
    cluster.execute("CHECKPOINT").await;
    let size = cluster
        .query_one(
            "postgres",
            "SELECT sum(pg_database_size(oid)) FROM pg_database",
        )
        .await;
    size.parse().expect("a number")
}
