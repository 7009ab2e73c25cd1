//! The same sum, compiled for the vector unit that the machine has.
//!
//! x86-64 as such has no instruction that multiplies 32-bit words side by side (`pmulld` came with SSE4.1), and the
//! sum is almost nothing but that. So the loop is compiled again with AVX2 allowed, and the machine is
//! asked once. PostgreSQL does the same from version 19 on. Elsewhere (aarch64) the ordinary version is vectorised as it is.

use super::Row;

/// [`super::sum`] by the fastest way this machine knows.
#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "calling a function that was compiled for AVX2 is unsafe, whatever the function does"
)]
pub(super) fn sum(first: &Row, rest: &[Row]) -> u32 {
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has just said that it has AVX2; the function is safe in every other way.
        return unsafe { sum_avx2(first, rest) };
    }
    super::sum(first, rest)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(first: &Row, rest: &[Row]) -> u32 {
    super::sum(first, rest)
}

/// [`super::sum`].
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn sum(first: &Row, rest: &[Row]) -> u32 {
    super::sum(first, rest)
}
