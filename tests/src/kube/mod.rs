//! Kubernetes itself, for the suites: an API server alone ([`ApiServer`]), ready in seconds.
//!
//! The programs come from `cargo xtask build-kube` (`tests/kube` has their Go modules); a suite that needs them has a name
//! that begins with `kube`, by which `cargo xtask test kube` knows it and gives it `CULVERT_KUBE_DIR`.
//!
//! Nothing is installed or started on the machine, two copies run side by side, and what belongs to a copy ends with its
//! owner: by Drop, by the death of the test's process, or, should that be killed, by the next copy's sweep.

mod api_server;
mod certificates;
mod kubectl;
mod tools;

pub use api_server::{ApiServer, client};
pub use kubectl::Kubectl;
pub use tools::{DIR_VARIABLE, Tools, is_missing};
