//! The agent's own metrics, beside those of connections: read from where they are counted whenever they are asked for.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::Agent;
use crate::telemetry::take_over;

/// Gauges and counters that are copied at each scrape.
#[derive(Debug)]
pub struct AgentMetrics {
    discovery_connected: IntGauge,
    discovery_synced: IntGauge,
    discovery: IntCounterVec,
    certificate_requests: IntCounterVec,
    certificates: IntGauge,
    pods: IntGaugeVec,
    local_refused: IntCounter,
    buffered_bytes: IntGauge,
    exclusions: IntGaugeVec,
    /// Of two scrapes at a time, none may bring older numbers after newer ones.
    copying: Mutex<()>,
}

impl AgentMetrics {
    /// # Errors
    /// A name is taken.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let gauges = |name: &str, help: &str, label: &str| {
            let gauges = IntGaugeVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(gauges.clone()))?;
            Ok::<_, prometheus::Error>(gauges)
        };
        let counters = |name: &str, help: &str, label: &str| {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let local_refused = IntCounter::new(
            "mesh_local_refused_total",
            "Connections to the local socket that were not root's.",
        )?;
        registry.register(Box::new(local_refused.clone()))?;
        Ok(Self {
            discovery_connected: gauge("mesh_discovery_connected", "1 while the discovery stream is open.")?,
            discovery_synced: gauge("mesh_discovery_synced", "1 once every resource type has been answered for.")?,
            discovery: counters(
                "mesh_discovery_events_total",
                "Streams opened, responses, and resources that could not be used.",
                "event",
            )?,
            certificate_requests: counters("mesh_certificate_requests_total", "Requests for certificates.", "result")?,
            certificates: gauge("mesh_certificates", "Identities that the agent holds a certificate of.")?,
            pods: gauges("mesh_pods", "Enrolled Pods by the state of their proof.", "proof")?,
            local_refused,
            buffered_bytes: gauge(
                "mesh_buffered_bytes",
                "Data of all Pods' connections that waits in the agent for a reader.",
            )?,
            exclusions: gauges(
                "mesh_exclusions",
                "Ports and address ranges that the mesh's settings take out of the mesh.",
                "kind",
            )?,
            copying: Mutex::default(),
        })
    }

    /// Everything, in the Prometheus text format.
    #[must_use]
    pub(super) fn render(&self, agent: &Arc<Agent>) -> String {
        let _one_at_a_time = self.copying.lock();
        let size = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        {
            let status = agent.discovery.borrow();
            self.discovery_connected.set(i64::from(status.connected));
            self.discovery_synced.set(i64::from(status.synced));
            for (event, count) in [
                ("connected", status.connections),
                ("response", status.responses),
                ("rejected_resource", status.rejected_resources),
            ] {
                take_over(&self.discovery.with_label_values(&[event]), count);
            }
        }
        for (result, count) in [
            ("ok", &agent.certificates.fetched_total),
            ("failed", &agent.certificates.failed_total),
        ] {
            take_over(
                &self.certificate_requests.with_label_values(&[result]),
                count.load(Ordering::Relaxed),
            );
        }
        self.certificates.set(size(agent.store.identities().len()));
        let pods = agent.pods.list();
        for proof in ["pending", "proven", "lost"] {
            self.pods
                .with_label_values(&[proof])
                .set(size(pods.iter().filter(|pod| pod.proof == proof).count()));
        }
        take_over(&self.local_refused, agent.socket.refused());
        self.buffered_bytes.set(size(agent.buffers.held_bytes()));
        let settings = agent.state.read(|state| state.settings().clone());
        for (kind, count) in [
            ("port", settings.excluded.ports.len()),
            ("range", settings.excluded.ranges.len()),
        ] {
            self.exclusions.with_label_values(&[kind]).set(size(count));
        }
        agent.metrics.set_capture_events(|| agent.capture.counters());
        agent.metrics.render()
    }
}
