//! What the control plane counts. Labels come from closed sets, so that their number is bounded.

use prometheus::{Counter, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::compile::membership::{Enrolment, Refusal};
use crate::compile::network_policies::Direction;
use crate::kubernetes::event_queue::Dropped;
use crate::kubernetes::notice_writer::Failed as NoticeFailed;
use crate::objects::Kind;
use crate::registry::{Reason, Rejection};
use crate::tokens::Refusal as TokenRefusal;

/// The labels' values, by family, where no type has them all.
const CONNECTIONS_REFUSED: [&str; 6] = [
    "accept",
    "admin_too_many",
    "handshake",
    "handshake_timeout",
    "too_many",
    "unauthenticated",
];
const STREAMS_CUT: [&str; 7] = [
    "other_node",
    "shutdown",
    "token",
    "too_many",
    "too_much",
    "unacknowledged",
    "unread",
];
const REPORT_STREAMS_CUT: [&str; 5] = ["failed", "shutdown", "token", "too_much", "unread"];
const NODE_PODS_STREAMS_CUT: [&str; 3] = ["shutdown", "token", "unread"];
const CAPTURE_WRITES_FAILED: [&str; 7] = [
    "connection",
    "forbidden",
    "gone",
    "no_room",
    "refused",
    "timeout",
    "too_many_requests",
];
const STATUS_WRITES_FAILED: [&str; 8] = [
    "busy",
    "conflict",
    "connection",
    "forbidden",
    "gone",
    "refused",
    "timeout",
    "trouble",
];
const LEASES: [&str; 3] = ["election", "read", "share"];
const TYPES: [&str; 4] = ["address", "authorization", "settings", "other"];
const CERTIFICATES_REFUSED: [&str; 4] = ["failed", "foreign_identity", "malformed", "not_ready"];

pub struct Metrics {
    registry: Registry,
    pub manifests_rejected: IntGaugeVec,
    pub manifests_rejected_total: IntCounterVec,
    pub manifests_ignored: IntGauge,
    pub objects: IntGaugeVec,
    pub pod_ranges: IntGauge,
    pub registry_reads_failed: IntCounter,
    pub registry_stale: IntGauge,
    pub snapshots: IntCounter,
    pub compile_seconds: Counter,
    pub connections: IntGauge,
    pub connections_refused: IntCounterVec,
    pub streams: IntGauge,
    pub streams_cut: IntCounterVec,
    pub report_streams_cut: IntCounterVec,
    pub node_pods_streams_cut: IntCounterVec,
    pods_refused: IntGaugeVec,
    node_pods_omitted: IntGauge,
    namespaces: IntGaugeVec,
    pub responses: IntCounterVec,
    pub acknowledged: IntCounterVec,
    pub rejected: IntCounterVec,
    pub authentication_failed: IntCounterVec,
    pub token_reviews: IntCounterVec,
    pub token_reviews_spared: IntCounter,
    known_tokens: IntGaugeVec,
    pub certificates_signed: IntCounter,
    pub certificates_refused: IntCounterVec,
    pub report_pods_ignored: IntCounter,
    pub capture_states: IntGaugeVec,
    pub state_writes_failed: IntCounter,
    pub capture_writes: IntCounter,
    pub capture_writes_failed: IntCounterVec,
    pub capture_writes_waiting: IntGauge,
    pub status_writer: IntGauge,
    pub status_writes: IntCounter,
    pub status_writes_failed: IntCounterVec,
    pub status_writes_waiting: IntGauge,
    pub lease_failures: IntCounterVec,
    pub enforcement_left_out: IntGaugeVec,
    network_policies_in_the_way: IntGaugeVec,
    pub network_policies_not_compared: IntGauge,
    pub events_written: IntCounter,
    events_dropped: IntCounterVec,
    notice_writes_failed: IntCounterVec,
    pub watches: IntGaugeVec,
    pub watch_failures: IntCounterVec,
    pub lists: IntCounterVec,
    pub objects_left_out: IntGaugeVec,
    pub serving_certificate_failed: IntCounter,
    pub serving_names_left_out: IntGauge,
    pub roots_failed: IntCounter,
    pub roots_unpublished: IntGauge,
    trusted_roots: IntGauge,
    revoked_identities: IntGauge,
}

/// Label of what people are told by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoticeKind {
    Event,
    Annotation,
}

impl NoticeKind {
    pub const ALL: [Self; 2] = [Self::Event, Self::Annotation];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Annotation => "annotation",
        }
    }
}

impl Metrics {
    /// # Errors
    /// Two metrics of one name: a mistake in this file.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let counters = |name: &str, help: &str, label: &str| -> Result<IntCounterVec, prometheus::Error> {
            let metric = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let metric = IntGauge::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let gauges = |name: &str, help: &str, label: &str| -> Result<IntGaugeVec, prometheus::Error> {
            let metric = IntGaugeVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let metrics = Self {
            manifests_rejected: gauges("mesh_control_manifests_rejected", "Documents not taken at present", "reason")?,
            manifests_rejected_total: counters("mesh_control_manifests_rejected_total", "Documents rejected so far", "reason")?,
            manifests_ignored: gauge(
                "mesh_control_manifests_ignored",
                "Documents not read that look as if they were meant for the mesh",
            )?,
            pod_ranges: gauge(
                "mesh_control_pod_ranges",
                "Address ranges of Pods; without any, unknown addresses are reached in clear",
            )?,
            registry_stale: gauge(
                "mesh_control_registry_stale",
                "1 while the registry cannot be read or was emptied, and the last state stays in force",
            )?,
            snapshots: counter("mesh_control_snapshots_total", "States compiled and published")?,
            compile_seconds: {
                let metric = Counter::new(
                    "mesh_control_compile_seconds_total",
                    "Time taken by compiling and publishing states",
                )?;
                registry.register(Box::new(metric.clone()))?;
                metric
            },
            objects: gauges("mesh_control_objects", "Objects in force", "kind")?,
            registry_reads_failed: counter(
                "mesh_control_registry_reads_failed_total",
                "Reads of the whole registry that failed",
            )?,
            connections: gauge("mesh_control_connections", "Open connections of agents")?,
            connections_refused: counters(
                "mesh_control_connections_refused_total",
                "Connections not taken or not kept",
                "reason",
            )?,
            streams: gauge("mesh_control_discovery_streams", "Open discovery streams")?,
            streams_cut: counters(
                "mesh_control_discovery_streams_cut_total",
                "Discovery streams ended by the server",
                "reason",
            )?,
            report_streams_cut: counters(
                "mesh_control_report_streams_cut_total",
                "Streams of node reports ended by the server",
                "reason",
            )?,
            node_pods_streams_cut: counters(
                "mesh_control_node_pods_streams_cut_total",
                "Streams of a node's Pods ended by the server",
                "reason",
            )?,
            pods_refused: gauges(
                "mesh_control_pods_refused",
                "Pods that ask to be in the mesh and cannot be",
                "reason",
            )?,
            node_pods_omitted: gauge(
                "mesh_control_node_pods_omitted",
                "Pods that their nodes are not told of, for want of room",
            )?,
            namespaces: gauges(
                "mesh_control_namespaces",
                "Namespaces that ask to be in the mesh, by what becomes of it",
                "state",
            )?,
            responses: counters("mesh_control_discovery_responses_total", "Discovery responses sent", "type")?,
            acknowledged: counters("mesh_control_discovery_acknowledged_total", "Responses acknowledged", "type")?,
            rejected: counters(
                "mesh_control_discovery_rejected_total",
                "Responses rejected by an agent",
                "type",
            )?,
            authentication_failed: counters(
                "mesh_control_authentication_failed_total",
                "Calls not authenticated",
                "reason",
            )?,
            token_reviews: counters(
                "mesh_control_token_reviews_total",
                "Service-account tokens that the API server was asked about",
                "result",
            )?,
            token_reviews_spared: counter(
                "mesh_control_token_reviews_spared_total",
                "Rechecks of open streams passed by an earlier word, since the API server could not be asked",
            )?,
            known_tokens: gauges(
                "mesh_control_known_tokens",
                "Service-account tokens whose review is remembered",
                "result",
            )?,
            certificates_signed: counter("mesh_control_certificates_signed_total", "Workload certificates signed")?,
            certificates_refused: counters(
                "mesh_control_certificates_refused_total",
                "Certificate requests refused",
                "reason",
            )?,
            report_pods_ignored: counter(
                "mesh_control_report_pods_ignored_total",
                "Pods in reports that are not of the reporting node's mesh",
            )?,
            capture_states: gauges("mesh_control_pods", "Pods of the mesh by capture state", "state")?,
            state_writes_failed: counter(
                "mesh_control_state_writes_failed_total",
                "Writes of what must outlive a restart that failed",
            )?,
            capture_writes: counter(
                "mesh_control_capture_writes_total",
                "Capture states written on Pods in the API server",
            )?,
            capture_writes_failed: counters(
                "mesh_control_capture_writes_failed_total",
                "Capture states not written on Pods; all but `no_room` and `gone` are tried again",
                "reason",
            )?,
            capture_writes_waiting: gauge(
                "mesh_control_capture_writes_waiting",
                "Capture states that wait to be written on Pods",
            )?,
            status_writer: gauge(
                "mesh_control_status_writer",
                "1 while this replica holds the Lease of who writes statuses",
            )?,
            status_writes: counter(
                "mesh_control_status_writes_total",
                "Statuses of policies and MeshConfigs written to the API server",
            )?,
            status_writes_failed: counters(
                "mesh_control_status_writes_failed_total",
                "Statuses not written; what still differs is tried again",
                "reason",
            )?,
            status_writes_waiting: gauge(
                "mesh_control_status_writes_waiting",
                "Statuses that differ and were not written in their turn",
            )?,
            lease_failures: counters(
                "mesh_control_lease_failures_total",
                "Requests about this replica's Leases that failed",
                "lease",
            )?,
            enforcement_left_out: gauges(
                "mesh_control_enforcement_left_out",
                "Nodes of this replica, and policies and MeshConfigs, of whose enforcement the others are not told, for want of room",
                "what",
            )?,
            network_policies_in_the_way: gauges(
                "mesh_control_network_policies_in_the_way",
                "NetworkPolicies that let ports of the mesh's Pods through and not the mesh's own",
                "direction",
            )?,
            network_policies_not_compared: gauge(
                "mesh_control_network_policies_not_compared",
                "Namespaces with too many NetworkPolicies and Pods to compare them all",
            )?,
            events_written: counter("mesh_control_events_total", "Kubernetes Events written, or counted up")?,
            events_dropped: counters(
                "mesh_control_events_dropped_total",
                "What people are not told by a Kubernetes Event",
                "reason",
            )?,
            notice_writes_failed: {
                let opts = Opts::new(
                    "mesh_control_notice_writes_failed_total",
                    "Writes of Events, and of annotations that tell why a Pod is not protected, that failed",
                );
                let metric = IntCounterVec::new(opts, &["kind", "reason"])?;
                registry.register(Box::new(metric.clone()))?;
                metric
            },
            watches: gauges(
                "mesh_control_watches",
                "1 while objects of the kind are followed in the API server",
                "kind",
            )?,
            watch_failures: counters(
                "mesh_control_watch_failures_total",
                "Lists and watches of the API server that failed; what was read stays in force",
                "kind",
            )?,
            lists: counters("mesh_control_lists_total", "Complete lists read from the API server", "kind")?,
            objects_left_out: gauges(
                "mesh_control_objects_left_out",
                "Objects of the API server that are not taken because there are too many",
                "kind",
            )?,
            serving_certificate_failed: counter(
                "mesh_control_serving_certificate_failed_total",
                "Serving certificates not made",
            )?,
            serving_names_left_out: gauge(
                "mesh_control_serving_names_left_out",
                "Names of this control plane that its serving certificate has no room for",
            )?,
            roots_failed: counter(
                "mesh_control_roots_failed_total",
                "Reads of the trusted roots that failed, so that those of before stay in force",
            )?,
            roots_unpublished: gauge(
                "mesh_control_roots_unpublished",
                "1 while the ConfigMap of the trusted roots cannot be written",
            )?,
            trusted_roots: gauge("mesh_control_trusted_roots", "Roots that the mesh trusts")?,
            revoked_identities: gauge(
                "mesh_control_revoked_identities",
                "Identities whose service account was deleted",
            )?,
            registry,
        };
        // Shown from the start: an absent series and a zero are not the same to an alert.
        for reason in Reason::ALL {
            metrics.manifests_rejected.with_label_values(&[reason.as_str()]).set(0);
            metrics.manifests_rejected_total.with_label_values(&[reason.as_str()]);
        }
        for refusal in TokenRefusal::ALL {
            metrics.authentication_failed.with_label_values(&[refusal.reason()]);
        }
        for (counters, values) in [
            (&metrics.connections_refused, CONNECTIONS_REFUSED.as_slice()),
            (&metrics.streams_cut, &STREAMS_CUT),
            (&metrics.report_streams_cut, &REPORT_STREAMS_CUT),
            (&metrics.node_pods_streams_cut, &NODE_PODS_STREAMS_CUT),
            (&metrics.capture_writes_failed, &CAPTURE_WRITES_FAILED),
            (&metrics.status_writes_failed, &STATUS_WRITES_FAILED),
            (&metrics.lease_failures, &LEASES),
            (&metrics.responses, &TYPES),
            (&metrics.acknowledged, &TYPES),
            (&metrics.rejected, &TYPES),
            (&metrics.certificates_refused, &CERTIFICATES_REFUSED),
        ] {
            for value in values {
                counters.with_label_values(&[value]);
            }
        }
        for what in ["nodes", "policies"] {
            metrics.enforcement_left_out.with_label_values(&[what]);
        }
        for direction in Direction::ALL {
            metrics.network_policies(direction.as_str(), 0);
        }
        for dropped in Dropped::ALL {
            metrics.events_dropped.with_label_values(&[dropped.as_str()]);
        }
        for kind in NoticeKind::ALL {
            for reason in NoticeFailed::REASONS {
                metrics.notice_writes_failed.with_label_values(&[kind.as_str(), reason]);
            }
        }
        for kind in Kind::ALL {
            metrics.lists.with_label_values(&[kind.as_str()]);
            metrics.watch_failures.with_label_values(&[kind.as_str()]);
            metrics.objects_left_out.with_label_values(&[kind.as_str()]).set(0);
        }
        for result in ["accepted", "refused", "failed"] {
            metrics.token_reviews.with_label_values(&[result]);
        }
        metrics.set_known_tokens((0, 0));
        Ok(metrics)
    }

    pub fn event_dropped(&self, dropped: Dropped) {
        self.events_dropped.with_label_values(&[dropped.as_str()]).inc();
    }

    pub fn notice_failed(&self, kind: NoticeKind, reason: &str) {
        self.notice_writes_failed.with_label_values(&[kind.as_str(), reason]).inc();
    }

    pub fn network_policies(&self, direction: &str, count: usize) {
        self.network_policies_in_the_way
            .with_label_values(&[direction])
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Accepted, refused.
    pub fn set_known_tokens(&self, (accepted, refused): (usize, usize)) {
        for (result, count) in [("accepted", accepted), ("refused", refused)] {
            self.known_tokens
                .with_label_values(&[result])
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    pub fn set_trust(&self, roots: usize, revoked: usize) {
        for (gauge, count) in [(&self.trusted_roots, roots), (&self.revoked_identities, revoked)] {
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    pub fn set_enrolment(&self, enrolment: &Enrolment) {
        let size = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        for reason in Refusal::REASONS {
            let count = enrolment
                .refused
                .values()
                .filter(|refusal| refusal.reason() == reason)
                .count();
            self.pods_refused.with_label_values(&[reason]).set(size(count));
        }
        self.node_pods_omitted
            .set(size(enrolment.nodes.values().map(|node| node.omitted).sum()));
        for (state, count) in [
            ("enrolled", enrolment.namespaces.names.len()),
            ("kept_out", enrolment.kept_out.len()),
            ("omitted", enrolment.namespaces.omitted),
        ] {
            self.namespaces.with_label_values(&[state]).set(size(count));
        }
    }

    pub fn set_rejections(&self, rejections: &[Rejection]) {
        for reason in Reason::ALL {
            let count = rejections.iter().filter(|rejection| rejection.reason == reason).count();
            self.manifests_rejected
                .with_label_values(&[reason.as_str()])
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// # Errors
    /// A metric that the text format cannot carry.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_is_there_before_it_has_counted() {
        let metrics = Metrics::new().expect("metrics");
        let text = metrics.text().expect("text");
        let mut counters = 0;
        for family in text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        {
            let zeros = text
                .lines()
                .filter(|line| line.starts_with(family) && line.ends_with(" 0"))
                .count();
            assert!(zeros > 0, "{family} has no series yet");
            counters += 1;
        }
        // A family without a series is not in the text at all.
        assert_eq!(counters, 30, "{text}");
    }
}
