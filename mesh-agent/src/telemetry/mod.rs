//! What connections leave behind: metrics, and a line in the access log.

mod access_log;
mod metrics;
mod prefix;
mod record;
#[cfg(test)]
mod tests;
mod tunnels;

pub use access_log::AccessLog;
pub use metrics::{
    ConnectionCounters, ConnectionLabels, IDENTITY_REVOKED, Metrics, NEW_HOLDER, PROTECTED, ROOT_REMOVED, Reporter, take_over,
};
pub use prefix::MetricsPrefix;
pub use record::{ConnectionPath, ConnectionRecord, Direction, Peer, SecurityPolicy};
pub use tunnels::{OpenTunnel, Tunnels, WorkloadPair};
