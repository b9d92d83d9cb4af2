//! Kubernetes: the API server as the source of truth for who calls, and the place where the root of trust is kept.

pub mod client;
pub mod review_cache;
pub mod reviews;
pub mod root;
pub mod root_secret;
