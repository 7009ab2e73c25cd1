//! Bank transfers through proxies: every point is recovered to and compared; points without the proof break.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is a failed test, with its reason"
)]

#[path = "bank/naive.rs"]
mod naive;
#[path = "bank/points.rs"]
mod points;

/// What every client's choices follow from: of `BANK_SEED`, or a new one.
fn seed() -> u64 {
    let given = std::env::var("BANK_SEED")
        .ok()
        .filter(|seed| !seed.is_empty());
    let seed = given.map_or_else(rand::random, |seed| {
        seed.parse().expect("BANK_SEED is a number")
    });
    say(&format!(
        "BANK_SEED={seed} (`make soak SEED={seed}` has the clients do the same again)"
    ));
    seed
}

#[expect(clippy::print_stdout, reason = "shown by --nocapture and on failure")]
fn say(text: &str) {
    println!("{text}");
}
