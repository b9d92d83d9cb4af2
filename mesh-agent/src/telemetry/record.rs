use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::AccessLog;
use super::metrics::{ConnectionCounters, ConnectionLabels, Metrics, Reporter};
use crate::identity::Identity;
use crate::workload::{Service, Workload};

/// Names of dry-run policies in one line of the access log, of up to 317 bytes each (namespace and name); metrics count them all.
pub const MAX_LOGGED_DRY_RUNS: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Inbound,
    Outbound,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionPath {
    Tunnel,
    Plaintext,
    Passthrough,
    /// Passed on in clear as the operator wants it.
    Excluded,
}

/// How a connection is protected between the workloads' nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecurityPolicy {
    MutualTls,
    None,
}

impl SecurityPolicy {
    fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::None => "none",
        }
    }
}

/// One end of a connection, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    pub address: Option<SocketAddr>,
    /// Proven, or demanded of the other end by the tunnel's handshake. A plaintext connection has none.
    pub principal: Option<Identity>,
    pub workload: Arc<str>,
    pub namespace: Arc<str>,
}

impl Peer {
    #[must_use]
    pub fn at(address: SocketAddr) -> Self {
        Self {
            address: Some(address),
            ..Self::default()
        }
    }

    #[must_use]
    pub fn workload(mut self, workload: Option<&Workload>) -> Self {
        if let Some(workload) = workload {
            self.workload = workload.workload_name.clone();
            self.namespace = workload.namespace.clone();
        }
        self
    }

    #[must_use]
    pub fn principal(mut self, identity: Option<&Identity>) -> Self {
        self.principal = identity.cloned();
        self
    }

    fn principal_text(&self) -> Arc<str> {
        self.principal.as_ref().map(|id| id.to_string().into()).unwrap_or_default()
    }
}

/// Owns what is counted and logged of one connection. Finished exactly once: by [`ConnectionRecord::finish`], or when it is dropped.
#[derive(Debug)]
pub struct ConnectionRecord {
    direction: Direction,
    path: ConnectionPath,
    security: SecurityPolicy,
    source: Peer,
    destination: Peer,
    policy: Option<Arc<str>>,
    dry_run_policies: Vec<Arc<str>>,
    /// The hostname of the service that was asked for.
    service: Option<Arc<str>>,
    started: Instant,
    /// From the source towards the destination.
    received_bytes: AtomicU64,
    /// From the destination towards the source.
    sent_bytes: AtomicU64,
    /// Resolved when the connection opens; labels don't change after that.
    counters: Option<Arc<ConnectionCounters>>,
    log: AccessLog,
    finished: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    direction: Direction,
    path: ConnectionPath,
    result: &'a str,
    reason: &'a str,
    source_address: String,
    source_principal: &'a str,
    source_workload: &'a str,
    source_workload_namespace: &'a str,
    destination_address: String,
    destination_principal: &'a str,
    destination_workload: &'a str,
    destination_workload_namespace: &'a str,
    destination_service: &'a str,
    bytes_sent: u64,
    bytes_received: u64,
    duration_ms: u128,
    policy: &'a str,
    dry_run_policies: Vec<&'a str>,
    connection_security_policy: &'a str,
}

impl ConnectionRecord {
    #[must_use]
    pub fn new(direction: Direction, path: ConnectionPath, source: Peer, destination: Peer, log: AccessLog) -> Self {
        Self {
            direction,
            path,
            security: SecurityPolicy::None,
            source,
            destination,
            policy: None,
            dry_run_policies: Vec::new(),
            service: None,
            started: Instant::now(),
            received_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            counters: None,
            log,
            finished: false,
        }
    }

    pub fn path(&mut self, path: ConnectionPath, security: SecurityPolicy) {
        self.path = path;
        self.security = security;
    }

    pub fn source(&mut self, source: Peer) {
        self.source = source;
    }

    pub fn destination(&mut self, destination: Peer) {
        self.destination = destination;
    }

    /// The service whose address was asked for.
    pub fn service(&mut self, service: &Service) {
        self.service = Some(service.hostname.clone());
    }

    /// The policy that decided.
    pub fn policy(&mut self, policy: Option<Arc<str>>) {
        self.policy = policy;
    }

    /// Dry-run policies that matched. The first [`MAX_LOGGED_DRY_RUNS`] are logged.
    pub fn dry_run_policies(&mut self, mut policies: Vec<Arc<str>>) {
        policies.truncate(MAX_LOGGED_DRY_RUNS);
        self.dry_run_policies = policies;
    }

    /// The connection reaches its destination from here on.
    pub fn opened(&mut self) {
        self.resolve().opened.inc();
    }

    /// Bytes that went from the source towards the destination.
    pub fn received(&self, bytes: usize) {
        self.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if let Some(counters) = &self.counters {
            counters.received_bytes.inc_by(bytes as u64);
        }
    }

    /// Bytes that went from the destination towards the source.
    pub fn sent(&self, bytes: usize) {
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if let Some(counters) = &self.counters {
            counters.sent_bytes.inc_by(bytes as u64);
        }
    }

    /// Both ways together: moves while the connection does.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed) + self.sent_bytes.load(Ordering::Relaxed)
    }

    /// `reason`: why it was refused or failed; `None` where it ended as its ends wanted.
    pub fn finish(mut self, reason: Option<&'static str>) {
        self.end(reason);
    }

    fn metrics(&self) -> &Arc<Metrics> {
        self.log.metrics()
    }

    fn resolve(&mut self) -> &Arc<ConnectionCounters> {
        let labels = || ConnectionLabels {
            reporter: match self.direction {
                Direction::Inbound => Reporter::Destination,
                Direction::Outbound => Reporter::Source,
            },
            source_workload: self.source.workload.clone(),
            source_workload_namespace: self.source.namespace.clone(),
            source_principal: self.source.principal_text(),
            destination_workload: self.destination.workload.clone(),
            destination_workload_namespace: self.destination.namespace.clone(),
            destination_principal: self.destination.principal_text(),
            destination_service: self.service.clone().unwrap_or_default(),
            connection_security_policy: self.security.as_str(),
        };
        if self.counters.is_none() {
            let counters = self.log.metrics().connection_counters(labels());
            self.counters = Some(counters);
        }
        self.counters.as_ref().expect("resolved just now")
    }

    fn end(&mut self, reason: Option<&'static str>) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let was_open = self.counters.is_some();
        let counters = self.resolve().clone();
        if was_open {
            counters.closed.inc();
        }
        if let Some(reason) = reason {
            self.metrics().count_failed(&counters, reason);
        }
        let result = match reason {
            None => "ok",
            Some(_) if was_open => "failed",
            Some(_) => "refused",
        };
        self.write_line(result, reason.unwrap_or_default());
    }

    fn write_line(&self, result: &str, reason: &str) {
        let address = |peer: &Peer| peer.address.map(|address| address.to_string()).unwrap_or_default();
        let line = Line {
            time: OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            direction: self.direction,
            path: self.path,
            result,
            reason,
            source_address: address(&self.source),
            source_principal: &self.source.principal_text(),
            source_workload: &self.source.workload,
            source_workload_namespace: &self.source.namespace,
            destination_address: address(&self.destination),
            destination_principal: &self.destination.principal_text(),
            destination_workload: &self.destination.workload,
            destination_workload_namespace: &self.destination.namespace,
            destination_service: self.service.as_deref().unwrap_or_default(),
            bytes_sent: self.sent_bytes.load(Ordering::Relaxed),
            bytes_received: self.received_bytes.load(Ordering::Relaxed),
            duration_ms: self.started.elapsed().as_millis(),
            policy: self.policy.as_deref().unwrap_or_default(),
            dry_run_policies: self.dry_run_policies.iter().map(|name| &**name).collect(),
            connection_security_policy: self.security.as_str(),
        };
        match serde_json::to_string(&line) {
            Ok(line) => self.log.write(line, reason.is_empty()),
            Err(error) => tracing::error!(%error, "an access-log line cannot be written"),
        }
    }
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        // The task was ended with the connection still open: a release, a shutdown, or a panic.
        self.end(Some("aborted"));
    }
}
