//! The control plane: objects from a registry, compiled to discovery resources, served to node agents; and the certificate
//! authority that signs for them.
//!
//! `registry` → `control_plane` (world and capture states) → `compile` → `discovery`. Pure: `registry` but for its folder,
//! `accounts`, `capture_states`, `compile`, `discovery::subscription`, `enforcement`, `network_policy`.

pub mod accounts;
pub mod admin;
pub mod app;
pub mod authentication;
pub mod authority;
pub mod capture_states;
pub mod certificates;
pub mod compile;
pub mod config;
pub mod control_plane;
pub mod discovery;
pub mod enforcement;
#[cfg(fuzzing)]
pub mod fuzz;
pub mod kubernetes;
pub mod limits;
pub mod metrics;
pub mod network_policy;
pub mod node_pods;
pub mod node_reports;
pub mod node_streams;
pub mod objects;
pub mod places;
pub mod proto;
pub mod registry;
pub mod roots;
pub mod serving;
pub mod state_dir;
pub mod tokens;
pub mod troubles;
pub mod trust;
