//! What the control plane counts. Labels come from closed sets, so that their number is bounded.

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::compile::membership::{Enrolment, Refusal};
use crate::registry::{Reason, Rejection};
use crate::tokens::Refusal as TokenRefusal;

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
    pub certificates_signed: IntCounter,
    pub certificates_refused: IntCounterVec,
    pub report_pods_ignored: IntCounter,
    pub capture_states: IntGaugeVec,
    pub state_writes_failed: IntCounter,
    pub serving_certificate_failed: IntCounter,
    pub roots_failed: IntCounter,
    trusted_roots: IntGauge,
    revoked_identities: IntGauge,
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
                "1 while the folder cannot be read or was emptied, and the last state stays in force",
            )?,
            snapshots: counter("mesh_control_snapshots_total", "States compiled and published")?,
            objects: gauges("mesh_control_objects", "Objects in force", "kind")?,
            registry_reads_failed: counter(
                "mesh_control_registry_reads_failed_total",
                "Reads of the whole folder that failed",
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
            state_writes_failed: counter("mesh_control_state_writes_failed_total", "Capture states not written to disk")?,
            serving_certificate_failed: counter(
                "mesh_control_serving_certificate_failed_total",
                "Serving certificates not made",
            )?,
            roots_failed: counter(
                "mesh_control_roots_failed_total",
                "Reads of the trusted roots that failed, so that those of before stay in force",
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
        Ok(metrics)
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
