//! The agent's own metrics, beside those of connections: read from where they are counted whenever they are asked for.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};

use super::Agent;

/// Gauges and counters that are copied at each scrape. Counters are kept as gauges of rising values, under their counter's name.
#[derive(Debug)]
pub struct AgentMetrics {
    discovery_connected: IntGauge,
    discovery_synced: IntGauge,
    discovery: IntGaugeVec,
    certificate_requests: IntGaugeVec,
    certificates: IntGauge,
    pods: IntGaugeVec,
    local_refused: IntGauge,
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
        Ok(Self {
            discovery_connected: gauge("mesh_discovery_connected", "1 while the discovery stream is open.")?,
            discovery_synced: gauge("mesh_discovery_synced", "1 once every resource type has been answered for.")?,
            discovery: gauges(
                "mesh_discovery_events_total",
                "Streams opened, responses, and resources that could not be used.",
                "event",
            )?,
            certificate_requests: gauges("mesh_certificate_requests_total", "Requests for certificates.", "result")?,
            certificates: gauge("mesh_certificates", "Identities that the agent holds a certificate of.")?,
            pods: gauges("mesh_pods", "Enrolled Pods by the state of their proof.", "proof")?,
            local_refused: gauge(
                "mesh_local_refused_total",
                "Connections to the local socket that were not root's.",
            )?,
        })
    }

    /// Everything, in the Prometheus text format.
    #[must_use]
    pub(super) fn render(&self, agent: &Arc<Agent>) -> String {
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
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
                self.discovery.with_label_values(&[event]).set(number(count));
            }
        }
        for (result, count) in [
            ("ok", &agent.certificates.fetched_total),
            ("failed", &agent.certificates.failed_total),
        ] {
            self.certificate_requests
                .with_label_values(&[result])
                .set(number(count.load(Ordering::Relaxed)));
        }
        self.certificates.set(size(agent.store.identities().len()));
        let pods = agent.pods.list();
        for proof in ["pending", "proven", "lost"] {
            self.pods
                .with_label_values(&[proof])
                .set(size(pods.iter().filter(|pod| pod.proof == proof).count()));
        }
        self.local_refused.set(number(agent.socket.refused()));
        agent.metrics.set_capture_events(&agent.capture.counters());
        agent.metrics.render()
    }
}
