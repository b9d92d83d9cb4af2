//! glibc keeps what was freed for the next one who asks, in each thread's own arena. Loading kernel programs frees many megabytes at
//! once, which nobody asks for again, and buffers that one thread frees are of no use to another: without this, an agent of two Pods
//! stays at 35 MB.
#![allow(unsafe_code, reason = "malloc_trim(3) and mallopt(3)")]

/// Two threads that allocate at once seldom wait for each other: what is hot, the buffers of connections, is allocated once and used
/// again.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 1;

/// For the start of the process: threads that are there already keep their arenas. MALLOC_ARENA_MAX in the environment goes before.
pub fn keep_small() {
    #[cfg(target_env = "gnu")]
    if std::env::var_os("MALLOC_ARENA_MAX").is_none() {
        // SAFETY: mallopt only sets a number of the allocator's, under its lock.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, ARENAS);
        }
    }
}

/// Gives freed memory back to the kernel. A few milliseconds: for after large work, not for a connection's path.
pub(super) fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the allocator's own locks, and touches only what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}
