//! `pg_checksum_page`: 32 FNV-1a sums side by side over the page's words, folded to 16 bits.

mod simd;

use super::{CHECKSUM_AT, Page};

/// Sums that run side by side.
const LANES: usize = 32;
/// A row: one word for each sum.
type Row = [u8; LANES * 4];

const FNV_PRIME: u32 = 16_777_619;

/// `checksumBaseOffsets`.
const BASE: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// The checksum that a page at `block` must carry. The checksum in the page itself counts as zero.
#[must_use]
pub fn checksum(page: &Page, block: u32) -> u16 {
    let (rows, _) = page.as_chunks::<{ LANES * 4 }>();
    let Some((first, rest)) = rows.split_first() else {
        return 0;
    };
    let mut first = *first;
    first[CHECKSUM_AT] = 0;
    first[CHECKSUM_AT + 1] = 0;
    let sum = simd::sum(&first, rest) ^ block;
    // Never 0, so that a zeroed field is always wrong.
    u16::try_from(sum % 65_535 + 1).unwrap_or(u16::MAX)
}

/// `pg_checksum_block`. Inlined into each version in [`simd`], where the compiler turns the loop over the lanes
/// into vector instructions.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "a call would leave the vector unit of the caller unused"
)]
fn sum(first: &Row, rest: &[Row]) -> u32 {
    let mut sums = BASE;
    round(&mut sums, first);
    for row in rest {
        round(&mut sums, row);
    }
    // Two rounds of zeros mix the last words in.
    round(&mut sums, &[0; LANES * 4]);
    round(&mut sums, &[0; LANES * 4]);
    sums.iter().fold(0, |all, sum| all ^ sum)
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "see `sum`")]
fn round(sums: &mut [u32; LANES], row: &Row) {
    let (words, _) = row.as_chunks::<4>();
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ u32::from_le_bytes(*word);
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As the C code is written: one lane after the other.
    fn plain(page: &Page, block: u32) -> u16 {
        let mut page = *page;
        page[CHECKSUM_AT] = 0;
        page[CHECKSUM_AT + 1] = 0;
        let mut sums = BASE;
        let words = page
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .chain([0; 2 * LANES]);
        for (at, word) in words.enumerate() {
            let mixed = sums[at % LANES] ^ word;
            sums[at % LANES] = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
        }
        let sum = sums.iter().fold(0, |all, sum| all ^ sum) ^ block;
        u16::try_from(sum % 65_535 + 1).unwrap()
    }

    proptest! {
        #[test]
        fn vectors_change_nothing(seed in any::<[u8; 32]>(), block in any::<u32>()) {
            let mut page: Page = [0; 8192];
            for (at, byte) in page.iter_mut().enumerate() {
                *byte = seed[at % 32].wrapping_mul(u8::try_from(at % 251).unwrap());
            }
            prop_assert_eq!(checksum(&page, block), plain(&page, block));
            let (rows, _) = page.as_chunks::<{ LANES * 4 }>();
            prop_assert_eq!(simd::sum(&rows[0], &rows[1..]), sum(&rows[0], &rows[1..]));
        }
    }
}
