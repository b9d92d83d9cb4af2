//! Carries the connections of enrolled Pods.

pub mod limits;
