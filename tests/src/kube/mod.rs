//! Kubernetes itself, for the suites: an API server alone ([`ApiServer`]), ready in seconds, or a whole cluster
//! ([`Cluster`]) whose nodes are namespaces of this machine with real kubelets, container runtimes and kube-proxies.
//!
//! The programs come from `cargo xtask build-kube` (`tests/kube` has their Go modules); a suite that needs them has a name
//! that begins with `kube`, by which `cargo xtask test kube` knows it and gives it `CULVERT_KUBE_DIR`.
//!
//! Nothing is installed or started on the machine, two copies run side by side, and what belongs to a copy ends with its
//! owner: by Drop, by the death of the test's process, or, should that be killed, by the next copy's sweep.

pub mod agent_client;
mod api_server;
pub mod builds;
mod certificates;
mod cluster;
mod control_program;
pub mod culvert;
pub mod faults;
pub mod given;
pub mod helm;
mod hierarchies;
mod image;
mod kubectl;
pub mod load;
pub mod manifests;
mod node;
mod node_config;
pub mod node_init;
pub mod open;
pub mod remains;
pub mod shop;
mod tools;

pub use api_server::{ApiServer, client};
pub use cluster::{APP_IMAGE, Cluster};
pub use control_program::ControlProgram;
pub use image::Image;
pub use kubectl::Kubectl;
pub use node::Node;
pub use tools::{DIR_VARIABLE, Tools, is_missing};

/// Removes what runs that were killed have left on this machine: namespaces, cgroups, folders. Every start does so first.
pub fn sweep() {
    crate::topology::sweep();
    hierarchies::sweep();
}
