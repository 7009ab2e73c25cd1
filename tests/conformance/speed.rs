//! A measurement, run by hand: `cargo test -p tests --test conformance -- --ignored --nocapture speed`.

use std::time::Instant;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use pipeline::store::ObjectStore;
use support::{minio, skip};

use crate::stand_in;
use crate::suite::{bytes, digest, key};

const PART: usize = 8 << 20;
const PARTS: u32 = 64;

async fn measure(name: &str, store: &dyn ObjectStore) {
    let object = key("speed");
    let body = bytes(1, PART);
    let sha256 = digest(&body);
    let upload = store.create_upload(&object).await.unwrap();
    let begun = Instant::now();
    let parts = (1..=PARTS).map(|n| store.upload_part(&object, &upload, n, body.clone(), sha256));
    let parts: Vec<_> = stream::iter(parts).buffered(4).try_collect().await.unwrap();
    store
        .complete_if_absent(&object, &upload, &parts)
        .await
        .unwrap();
    let up = begun.elapsed();
    let begun = Instant::now();
    let whole = u64::from(PARTS) * PART as u64;
    let ranges = (0..u64::from(PARTS)).map(|n| n * PART as u64..(n + 1) * PART as u64);
    let got: Vec<_> = stream::iter(ranges)
        .map(async |range| {
            let body = store.get(&object, Some(range)).await?;
            let sizes = body.stream.map_ok(|chunk| chunk.len() as u64);
            sizes
                .try_fold(0, |sum, n| std::future::ready(Ok(sum + n)))
                .await
        })
        .buffered(4)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(got.iter().sum::<u64>(), whole);
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let rate = |time: std::time::Duration| whole as f64 / f64::from(1 << 20) / time.as_secs_f64();
    eprintln!(
        "{name}: up {:.0} MiB/s, down {:.0} MiB/s",
        rate(up),
        rate(begun.elapsed())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn speed() {
    for tls in [false, true] {
        let server = stand_in(tls).await;
        measure(&server.endpoint(), &server.store().unwrap()).await;
        let Some(minio) = minio::start(tls).await else {
            skip("conformance::speed", "there is no minio binary here");
            continue;
        };
        measure(
            &format!("MinIO {}", minio.endpoint()),
            &minio.store().unwrap(),
        )
        .await;
    }
}
