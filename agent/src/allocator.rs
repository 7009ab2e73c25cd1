//! The C library's allocator, told that large buffers are the system's.
//!
//! Left to itself it raises the size from which a buffer has pages of its own to that of the largest one freed so far (up to
//! 32 MiB). From then on parts of 8 MiB come out of arenas, one for each few threads, which are never given back whole:
//! three backups took an agent with a budget of 128 MiB to 300 MiB. A fixed size keeps that from happening (mallopt(3),
//! `M_MMAP_THRESHOLD`).

/// Buffers from this size on, in bytes, go back to the system when they are freed. Frames (1 MiB) stay below: they come
/// and go too fast for that.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 2 << 20;

/// Call it once, before threads are started.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "the C library has no safe way to say it")]
pub fn give_large_buffers_back() {
    // SAFETY: no other thread is there yet, and the value is one that mallopt(3) documents.
    let taken = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
    debug_assert!(taken == 1, "the C library refuses M_MMAP_THRESHOLD");
}

/// Another C library is left as it is.
#[cfg(not(target_env = "gnu"))]
pub fn give_large_buffers_back() {}
