#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::{Encoder, IntCounter, IntCounterVec, Opts, Registry, TextEncoder};

use super::prefix::MetricsPrefix;
use super::tunnels::Tunnels;

/// Distinct label sets of the connection metrics. 10,000 × 4 families × about 1 KiB = 40 MiB at most, and as
/// much again for every four reasons of failure that each of them has met. Beyond it, the workloads and principals of a connection are [`OVERFLOW`].
pub const MAX_CONNECTION_SERIES: usize = 10_000;
/// Policies with series of their own, three each. 1,000 × 3 × about 300 B = 900 KiB.
const MAX_POLICY_SERIES: usize = 1_000;
/// In place of a policy's name. No policy's: those hold a `/`.
const NO_ALLOW_MATCHED: &str = "_no_allow_matched";
/// As [`NO_ALLOW_MATCHED`]: what STRICT mutual TLS refuses or cuts, as a DENY policy would.
const STRICT: &str = "_strict";
/// As [`NO_ALLOW_MATCHED`]: a service account that was deleted, a root that is trusted no longer, an address that is somebody else's.
pub const IDENTITY_REVOKED: &str = "_identity_revoked";
pub const ROOT_REMOVED: &str = "_root_removed";
pub const NEW_HOLDER: &str = "_new_holder";
/// In clear, and its destination is protected now.
pub const PROTECTED: &str = "_destination_protected";
/// Stands for everything that found no room.
pub(super) const OVERFLOW: &str = "_other";

const CONNECTION_LABELS: [&str; 10] = [
    "reporter",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_service",
    "connection_security_policy",
    "response_flags",
];
/// A connection without a fault, and one that is not over.
const NO_FLAGS: &str = "-";

/// Which end of a connection reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    Source,
    Destination,
}

impl Reporter {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// The label that mesh dashboards filter by, with the two words that other ambient proxies use in it. `reason` says more.
fn response_flags(reason: &str) -> &'static str {
    match reason {
        "denied_by_policy"
        | "policy_missing"
        | "denied_by_destination"
        | "cut_by_policy"
        | "identity_revoked"
        | "root_removed"
        | "cut_by_revocation"
        | "cut_by_removed_root" => "DENY",
        "connect_failed" | "connect_timeout" | "connect_failed_at_destination" | "handshake_failed" | "handshake_timeout" => {
            "CONNECT"
        }
        _ => NO_FLAGS,
    }
}

/// The labels of a connection. What is not known is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionLabels {
    pub reporter: Reporter,
    pub source_workload: Arc<str>,
    pub source_workload_namespace: Arc<str>,
    pub source_principal: Arc<str>,
    pub destination_workload: Arc<str>,
    pub destination_workload_namespace: Arc<str>,
    pub destination_principal: Arc<str>,
    /// The hostname of the service that was asked for; only the source knows it.
    pub destination_service: Arc<str>,
    pub connection_security_policy: &'static str,
}

impl ConnectionLabels {
    fn values<'a>(&'a self, response_flags: &'a str) -> [&'a str; 10] {
        [
            self.reporter.as_str(),
            &self.source_workload,
            &self.source_workload_namespace,
            &self.source_principal,
            &self.destination_workload,
            &self.destination_workload_namespace,
            &self.destination_principal,
            &self.destination_service,
            self.connection_security_policy,
            response_flags,
        ]
    }

    fn overflow(&self) -> Self {
        let other: Arc<str> = OVERFLOW.into();
        Self {
            source_workload: other.clone(),
            source_workload_namespace: other.clone(),
            source_principal: other.clone(),
            destination_workload: other.clone(),
            destination_workload_namespace: other.clone(),
            destination_principal: other.clone(),
            destination_service: other,
            ..self.clone()
        }
    }
}

/// The counters of one label set, resolved once a connection.
#[derive(Debug)]
pub struct ConnectionCounters {
    labels: ConnectionLabels,
    pub(super) opened: IntCounter,
    pub(super) closed: IntCounter,
    pub(super) sent_bytes: IntCounter,
    pub(super) received_bytes: IntCounter,
}

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    opened: IntCounterVec,
    closed: IntCounterVec,
    failed: IntCounterVec,
    sent_bytes: IntCounterVec,
    received_bytes: IntCounterVec,
    series: Mutex<HashMap<ConnectionLabels, Arc<ConnectionCounters>>>,
    series_overflow: IntCounter,
    passthrough: IntCounterVec,
    endpoint_retries: IntCounter,
    affinities_not_kept: IntCounter,
    dry_run: IntCounterVec,
    policy_denied: IntCounterVec,
    policy_cut: IntCounterVec,
    /// Those with series of their own.
    policies: Mutex<HashSet<Arc<str>>>,
    tunnel_events: IntCounterVec,
    tunnels: Tunnels,
    accept_errors: IntCounterVec,
    pub(super) access_log_dropped: IntCounter,
    capture_events: IntCounterVec,
    taking_over: Mutex<()>,
}

/// Brings a counter to where something that counts by itself is; one that has begun again begins again here, too. For one caller
/// at a time.
pub fn take_over(counter: &IntCounter, count: u64) {
    let shown = counter.get();
    match count.checked_sub(shown) {
        Some(rise) => counter.inc_by(rise),
        None => {
            counter.reset();
            counter.inc_by(count);
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels).expect("constant names and labels are valid");
            registry
                .register(Box::new(counters.clone()))
                .expect("each name is registered once");
            counters
        };
        let counter = |name: &str, help: &str| counters(name, help, &[]).with_label_values::<&str>(&[]);
        let mut failed_labels = CONNECTION_LABELS.to_vec();
        failed_labels.push("reason");
        let metrics = Self {
            opened: counters(
                "mesh_tcp_connections_opened_total",
                "Connections that were let through to their destination",
                &CONNECTION_LABELS,
            ),
            closed: counters(
                "mesh_tcp_connections_closed_total",
                "Opened connections that have ended",
                &CONNECTION_LABELS,
            ),
            failed: counters(
                "mesh_tcp_connections_failed_total",
                "Connections refused or failed before they were opened, and opened ones that ended with an error",
                &failed_labels,
            ),
            sent_bytes: counters(
                "mesh_tcp_sent_bytes_total",
                "Bytes sent towards the source (the response)",
                &CONNECTION_LABELS,
            ),
            received_bytes: counters(
                "mesh_tcp_received_bytes_total",
                "Bytes received from the source (the request)",
                &CONNECTION_LABELS,
            ),
            series: Mutex::default(),
            series_overflow: counter(
                "mesh_connection_series_overflow_total",
                "Connections counted under _other because there were too many label sets",
            ),
            passthrough: counters(
                "mesh_passthrough_connections_total",
                "Connections passed on in clear: to known outsiders, to Pods of the mesh that are not protected yet, or to what is excluded",
                &["destination"],
            ),
            endpoint_retries: counter(
                "mesh_endpoint_retries_total",
                "Connections to a service that were tried on another endpoint after one had refused",
            ),
            affinities_not_kept: counter(
                "mesh_affinities_not_kept_total",
                "Connections to a service with session affinity whose endpoint was not remembered, as their Pod has too many of them",
            ),
            policy_denied: counters(
                "mesh_policy_denied_total",
                "Connections refused, by the policy that decided",
                &["policy"],
            ),
            policy_cut: counters(
                "mesh_policy_cut_total",
                "Open connections cut, by the changed policy that now denies them",
                &["policy"],
            ),
            dry_run: counters(
                "mesh_policy_dry_run_matches_total",
                "Connections that a dry-run policy matched",
                &["policy"],
            ),
            policies: Mutex::default(),
            tunnels: Tunnels::new(&registry).expect("each name is registered once"),
            tunnel_events: counters("mesh_tunnels_total", "Tunnels opened, accepted or failed", &["event"]),
            accept_errors: counters("mesh_accept_errors_total", "Failed accepts", &["listener"]),
            access_log_dropped: counter(
                "mesh_access_log_dropped_total",
                "Access-log lines dropped because the writer was behind or failed",
            ),
            capture_events: counters("mesh_capture_events_total", "What the kernel programs counted", &["event"]),
            taking_over: Mutex::default(),
            registry,
        };
        metrics.show_zeros();
        metrics
    }
}

impl Metrics {
    /// An absent series and a zero are not the same to an alert.
    fn show_zeros(&self) {
        for destination in ["outside", "pending"] {
            self.passthrough.with_label_values(&[destination]);
        }
        for event in ["opened", "accepted"] {
            self.tunnel_events.with_label_values(&[event]);
        }
        for listener in ["outbound", "tunnel", "plaintext"] {
            self.accept_errors.with_label_values(&[listener]);
        }
        for policies in [&self.policy_denied, &self.policy_cut, &self.dry_run] {
            policies.with_label_values(&[OVERFLOW]);
        }
    }

    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The registry, for metrics of other modules.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    #[must_use]
    pub fn tunnels(&self) -> &Tunnels {
        &self.tunnels
    }

    /// In the Prometheus text format, by their own names.
    #[must_use]
    pub fn render(&self) -> String {
        self.render_as(&MetricsPrefix::default())
    }

    /// In the Prometheus text format, by names that begin as is wanted.
    #[must_use]
    pub fn render_as(&self, prefix: &MetricsPrefix) -> String {
        let mut text = Vec::new();
        let mut families = self.registry.gather();
        prefix.apply(&mut families);
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            tracing::error!(%error, "metrics cannot be rendered");
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    pub(super) fn connection_counters(&self, labels: ConnectionLabels) -> Arc<ConnectionCounters> {
        let mut series = self.series.lock();
        if let Some(counters) = series.get(&labels) {
            return counters.clone();
        }
        let labels = if series.len() < MAX_CONNECTION_SERIES {
            labels
        } else {
            self.series_overflow.inc();
            labels.overflow()
        };
        series
            .entry(labels)
            .or_insert_with_key(|labels| {
                let values = labels.values(NO_FLAGS);
                Arc::new(ConnectionCounters {
                    labels: labels.clone(),
                    opened: self.opened.with_label_values(&values),
                    closed: self.closed.with_label_values(&values),
                    sent_bytes: self.sent_bytes.with_label_values(&values),
                    received_bytes: self.received_bytes.with_label_values(&values),
                })
            })
            .clone()
    }

    pub(super) fn count_failed(&self, counters: &ConnectionCounters, reason: &'static str) {
        let mut values = counters.labels.values(response_flags(reason)).to_vec();
        values.push(reason);
        self.failed.with_label_values(&values).inc();
    }

    /// `destination`: "outside", "pending" or "excluded".
    pub fn count_passthrough(&self, destination: &'static str) {
        self.passthrough.with_label_values(&[destination]).inc();
    }

    /// An endpoint refused, and another one of the service is tried.
    pub fn count_endpoint_retry(&self) {
        self.endpoint_retries.inc();
    }

    /// A client's endpoint was not remembered.
    pub fn count_affinity_not_kept(&self) {
        self.affinities_not_kept.inc();
    }

    /// A dry-run policy matched a connection.
    pub fn count_dry_run(&self, policy: &Arc<str>) {
        self.by_policy(&self.dry_run, policy).inc();
    }

    /// A connection was refused; without a policy, no ALLOW policy matched.
    pub fn count_denied(&self, policy: Option<&Arc<str>>) {
        self.by_policy(&self.policy_denied, policy.unwrap_or(&NO_ALLOW_MATCHED.into()))
            .inc();
    }

    /// An open connection was cut, as a changed policy denies it.
    pub fn count_cut(&self, policy: Option<&Arc<str>>) {
        self.by_policy(&self.policy_cut, policy.unwrap_or(&NO_ALLOW_MATCHED.into()))
            .inc();
    }

    /// A connection in clear was refused, as its Pod takes only mutual TLS.
    pub fn count_plaintext_refused(&self) {
        self.policy_denied.with_label_values(&[STRICT]).inc();
    }

    /// An open connection in clear was cut, as its Pod now takes only mutual TLS.
    pub fn count_plaintext_cut(&self) {
        self.policy_cut.with_label_values(&[STRICT]).inc();
    }

    /// A connection was refused for the end of a proof, such as [`IDENTITY_REVOKED`].
    pub fn count_proof_refused(&self, why: &'static str) {
        self.policy_denied.with_label_values(&[why]).inc();
    }

    /// An open connection was cut for the end of a proof.
    pub fn count_proof_cut(&self, why: &'static str) {
        self.policy_cut.with_label_values(&[why]).inc();
    }

    /// The policy's series, or the common one when there are too many.
    fn by_policy(&self, counters: &IntCounterVec, policy: &Arc<str>) -> IntCounter {
        let mut policies = self.policies.lock();
        let name = if policies.contains(policy) || policies.len() < MAX_POLICY_SERIES {
            policies.insert(policy.clone());
            policy
        } else {
            OVERFLOW
        };
        counters.with_label_values(&[name])
    }

    /// `event`: "opened", "accepted", or why a tunnel failed or, open, was ended by this side.
    pub fn count_tunnel(&self, event: &'static str) {
        self.tunnel_events.with_label_values(&[event]).inc();
    }

    pub fn count_accept_error(&self, listener: &'static str) {
        self.accept_errors.with_label_values(&[listener]).inc();
    }

    /// Takes over the kernel's counters, which only rise while the programs stay loaded. They are read in here: of two scrapes at a
    /// time, none may bring older numbers after newer ones.
    pub fn set_capture_events(&self, read: impl FnOnce() -> Vec<(&'static str, u64)>) {
        let _one_at_a_time = self.taking_over.lock();
        for (event, count) in read() {
            take_over(&self.capture_events.with_label_values(&[event]), count);
        }
    }
}
