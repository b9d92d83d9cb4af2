//! The kernel half of the datapath: one file a hook. `maps.rs` names each map's writer and readers; the types, limits and
//! counters are mesh-common's.
//!
//! Built for `bpfel-unknown-none` by `cargo xtask build-ebpf`; for any other target this is an empty program, so that the
//! workspace's ordinary commands treat it like any other crate.
//!
//! Contexts are read field by field: the verifier refuses a context pointer that was moved, which is what a copy of an array
//! out of it compiles to. (Inline assembly is unstable for this target; its compiler runs with RUSTC_BOOTSTRAP.)
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        unsafe_code,
        reason = "contexts and map values are raw pointers that the kernel's verifier checks"
    )
)]

#[cfg(target_arch = "bpf")]
mod address;
#[cfg(target_arch = "bpf")]
mod bind;
#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod names;
#[cfg(target_arch = "bpf")]
mod probes;
#[cfg(target_arch = "bpf")]
mod sk_lookup;
#[cfg(target_arch = "bpf")]
mod sock_create;
#[cfg(target_arch = "bpf")]
mod sockops;
#[cfg(target_arch = "bpf")]
mod tcx;

/// No helper that these programs call is reserved for GPL programs.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
