//! One list of what a ShardingSphere-Proxy does, tried on the stand-in and on real proxies: that both do it is what makes a
//! test on the stand-in mean something.
//!
//! The real ones are of the distribution that `SHARDINGSPHERE_PROXY_HOME` names; 5.5.2 is what the list was made with.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "test code: a panic is a failed test, with its reason"
)]

#[path = "proxy_conformance/batches.rs"]
mod batches;
#[path = "proxy_conformance/client.rs"]
mod client;
#[path = "proxy_conformance/clock.rs"]
mod clock;
#[path = "proxy_conformance/farm.rs"]
mod farm;
#[path = "proxy_conformance/faults.rs"]
mod faults;
#[path = "proxy_conformance/gauss.rs"]
mod gauss;
#[path = "proxy_conformance/list.rs"]
mod list;
#[path = "proxy_conformance/lock.rs"]
mod lock;
#[path = "proxy_conformance/login.rs"]
mod login;
#[path = "proxy_conformance/metadata.rs"]
mod metadata;
#[path = "proxy_conformance/other.rs"]
mod other;
#[path = "proxy_conformance/passing.rs"]
mod passing;
#[path = "proxy_conformance/transactions.rs"]
mod transactions;

use farm::Shape;
use support::{real_proxy, skip};

const REAL: &str = "real_proxies_do_the_same";
const CLOCK: &str = "real_proxies_count_with_redis";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stand_in() {
    list::run(Shape::Plain, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stand_in_with_xa_and_a_clock() {
    list::run(Shape::XaAndClock, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stand_in_with_open_gauss_s_protocol() {
    list::run(Shape::OpenGauss, None).await;
}

/// One after the other: each needs a gigabyte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_proxies_do_the_same() {
    let Some(home) = real_proxy::home() else {
        skip(REAL, "SHARDINGSPHERE_PROXY_HOME is not set");
        skip(CLOCK, "SHARDINGSPHERE_PROXY_HOME is not set");
        return;
    };
    let only = std::env::var("GS_PITR_PROXY_SHAPE").ok();
    for shape in [Shape::Plain, Shape::XaAndClock, Shape::OpenGauss] {
        if only
            .as_ref()
            .is_some_and(|only| *only != format!("{shape:?}"))
        {
            continue;
        }
        if shape == Shape::XaAndClock && real_proxy::redis_server().is_none() {
            skip(CLOCK, "there is no redis-server here");
            continue;
        }
        list::run(shape, Some(&home)).await;
    }
}
