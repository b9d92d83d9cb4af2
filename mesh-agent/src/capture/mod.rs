//! The datapath's user half: the only module that knows aya.

mod bpf_syscalls;
pub mod kernel;
pub mod network;

pub use network::{CaptureError, PodListeners, PodNetwork};
