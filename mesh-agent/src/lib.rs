//! The node agent: enrols Pods, keeps their certificates, carries their connections through mutual TLS, authorizes and measures.
//! ARCHITECTURE.md follows a connection through these modules.

pub mod addr;
pub mod admin;
pub mod app;
pub mod balance;
pub mod capture;
pub mod cni_install;
pub mod config;
pub mod discovery;
#[cfg(fuzzing)]
pub mod fuzz;
pub mod identity;
pub mod local;
pub mod memory;
pub mod pods;
pub mod policy;
pub mod proto;
pub mod proxy;
pub mod state;
pub mod telemetry;
pub mod tls;
pub mod workload;
