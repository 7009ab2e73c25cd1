//! How fast page checksums are computed: `cargo run -p agent-wal --example page_checksum`.

#![expect(clippy::print_stdout, reason = "a program that prints a figure")]

use std::hint::black_box;
use std::time::Instant;

use agent_wal::page::{Page, check, checksum};

fn main() {
    // 64 MiB: more than the caches hold.
    let mut pages: Vec<Page> = vec![[0; 8192]; 8192];
    for (block, page) in (0u32..).zip(&mut pages) {
        for (at, byte) in (0u32..).zip(page.iter_mut()) {
            *byte = at.wrapping_mul(block | 1).to_le_bytes()[1];
        }
        let sum = checksum(page, block).to_le_bytes();
        page[8..10].copy_from_slice(&sum);
    }
    for _ in 0..5 {
        let start = Instant::now();
        for (block, page) in (0u32..).zip(&pages) {
            black_box(check(black_box(page), block));
        }
        let rate = 64.0 / 1024.0 / start.elapsed().as_secs_f64();
        println!("{rate:.1} GiB/s");
    }
}
