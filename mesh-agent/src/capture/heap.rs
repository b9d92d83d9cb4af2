//! glibc keeps what was freed for the next one who asks, in each thread's own arena. Loading kernel programs frees many megabytes at
//! once, which nobody asks for again: without this, an agent of two Pods stays at 35 MB instead of 25.
#![allow(unsafe_code, reason = "malloc_trim(3)")]

/// Gives freed memory back to the kernel. A few milliseconds: for after large work, not for a connection's path.
pub(super) fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the allocator's own locks, and touches only what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}
