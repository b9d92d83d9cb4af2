//! The testbed: two nodes and their Pods as network namespaces on one machine, the real binaries on them, and what the
//! demo and the suites ask of them. Nothing here knows the insides of the mesh; only command lines, files and sockets.
//!
//! Everything that is made carries the run's own id, is removed when its owner is dropped, and what a killed run left behind
//! is swept by the next one.

pub mod access_log;
pub mod app;
pub mod bench;
pub mod binaries;
pub mod bpf;
pub mod cgroup;
pub mod dashboards;
pub mod demo;
pub mod disk;
pub mod exposition;
pub mod firewall;
pub mod foreign;
pub mod http;
pub mod kube;
pub mod load;
pub mod manifests;
pub mod memory_limit;
pub mod mesh;
pub mod netns;
pub mod pins;
pub mod poll;
pub mod process;
pub mod readme;
pub mod requirements;
pub mod run_folder;
pub mod run_id;
pub mod snapshot;
pub mod stream;
pub mod suite;
pub mod talk;
pub mod topology;
pub mod wire;
