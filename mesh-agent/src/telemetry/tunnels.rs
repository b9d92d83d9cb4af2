//! What tunnels count: how many are open, how handshakes end, and how TCP fares under them, by the workloads at their ends.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::metrics::{OVERFLOW, Reporter};
use super::record::Peer;

/// Pairs of workloads with series of their own. Each is a histogram of 16 values and two counters: 1,000 × about 6 KiB = 6 MiB at
/// most. Beyond it, both workloads are [`OVERFLOW`].
pub const MAX_PAIRS: usize = 1_000;

const LABELS: [&str; 5] = [
    "reporter",
    "source_workload",
    "source_workload_namespace",
    "destination_workload",
    "destination_workload_namespace",
];

/// Seconds: from a switch's hop to a lossy link around the world.
const RTT_BUCKETS: [f64; 13] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0,
];

/// The ends of a tunnel. What is not known is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WorkloadPair {
    pub reporter: Reporter,
    pub source_workload: Arc<str>,
    pub source_workload_namespace: Arc<str>,
    pub destination_workload: Arc<str>,
    pub destination_workload_namespace: Arc<str>,
}

#[derive(Debug)]
pub struct Tunnels {
    open: IntGaugeVec,
    handshakes: IntCounterVec,
    smoothed_rtt: HistogramVec,
    sent: IntCounterVec,
    retransmitted: IntCounterVec,
    pairs: Mutex<HashMap<WorkloadPair, Arc<PairSeries>>>,
    overflow: IntCounter,
}

#[derive(Debug)]
struct PairSeries {
    smoothed_rtt: Histogram,
    sent: IntCounter,
    retransmitted: IntCounter,
}

/// An open tunnel; counts as one until dropped.
#[derive(Debug)]
pub struct OpenTunnel {
    open: IntGauge,
    series: Arc<PairSeries>,
}

impl Tunnels {
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let opts = |name: &str, help: &str| Opts::new(name, help);
        let open = IntGaugeVec::new(opts("mesh_tunnels_open", "Tunnels that are open"), &["direction"])?;
        let handshakes = IntCounterVec::new(
            opts("mesh_tunnel_handshakes_total", "TLS and HTTP/2 handshakes that ended, by how"),
            &["direction", "result"],
        )?;
        let smoothed_rtt = HistogramVec::new(
            HistogramOpts::new(
                "mesh_tcp_smoothed_rtt_seconds",
                "The kernel's smoothed round-trip time of tunnels between two workloads, sampled while they are used",
            )
            .buckets(RTT_BUCKETS.to_vec()),
            &LABELS,
        )?;
        let sent = IntCounterVec::new(
            opts("mesh_tcp_sent_segments_total", "TCP segments with data that tunnels sent"),
            &LABELS,
        )?;
        let retransmitted = IntCounterVec::new(
            opts(
                "mesh_tcp_retransmitted_segments_total",
                "TCP segments that tunnels sent again: lost on the way, or thought so",
            ),
            &LABELS,
        )?;
        let overflow = IntCounter::new(
            "mesh_tcp_health_series_overflow_total",
            "Tunnels counted under _other because there were too many pairs of workloads",
        )?;
        registry.register(Box::new(open.clone()))?;
        registry.register(Box::new(handshakes.clone()))?;
        registry.register(Box::new(smoothed_rtt.clone()))?;
        registry.register(Box::new(sent.clone()))?;
        registry.register(Box::new(retransmitted.clone()))?;
        registry.register(Box::new(overflow.clone()))?;
        // Shown from the start: an absent series and a zero are not the same to an alert.
        for direction in [Reporter::Source, Reporter::Destination].map(direction) {
            open.with_label_values(&[direction]);
            handshakes.with_label_values(&[direction, "ok"]);
        }
        Ok(Self {
            open,
            handshakes,
            smoothed_rtt,
            sent,
            retransmitted,
            pairs: Mutex::default(),
            overflow,
        })
    }

    /// `failed`: why, where it did not end well.
    pub fn count_handshake(&self, reporter: Reporter, failed: Option<&'static str>) {
        self.handshakes
            .with_label_values(&[direction(reporter), failed.unwrap_or("ok")])
            .inc();
    }

    /// A tunnel is open, and between whom.
    #[must_use]
    pub fn opened(&self, pair: WorkloadPair) -> OpenTunnel {
        let open = self.open.with_label_values(&[direction(pair.reporter)]);
        open.inc();
        OpenTunnel {
            open,
            series: self.series(pair),
        }
    }

    fn series(&self, pair: WorkloadPair) -> Arc<PairSeries> {
        let mut pairs = self.pairs.lock();
        if let Some(series) = pairs.get(&pair) {
            return series.clone();
        }
        let pair = if pairs.len() < MAX_PAIRS {
            pair
        } else {
            self.overflow.inc();
            pair.overflow()
        };
        pairs
            .entry(pair)
            .or_insert_with_key(|pair| {
                let values = pair.values();
                Arc::new(PairSeries {
                    smoothed_rtt: self.smoothed_rtt.with_label_values(&values),
                    sent: self.sent.with_label_values(&values),
                    retransmitted: self.retransmitted.with_label_values(&values),
                })
            })
            .clone()
    }
}

impl OpenTunnel {
    /// What TCP did since the last time.
    pub fn measured(&self, smoothed_rtt: Duration, sent_segments: u32, retransmitted_segments: u32) {
        self.series.smoothed_rtt.observe(smoothed_rtt.as_secs_f64());
        self.series.sent.inc_by(sent_segments.into());
        self.series.retransmitted.inc_by(retransmitted_segments.into());
    }
}

impl Drop for OpenTunnel {
    fn drop(&mut self) {
        self.open.dec();
    }
}

impl WorkloadPair {
    #[must_use]
    pub fn new(reporter: Reporter, source: &Peer, destination: &Peer) -> Self {
        Self {
            reporter,
            source_workload: source.workload.clone(),
            source_workload_namespace: source.namespace.clone(),
            destination_workload: destination.workload.clone(),
            destination_workload_namespace: destination.namespace.clone(),
        }
    }

    fn values(&self) -> [&str; 5] {
        [
            self.reporter.as_str(),
            &self.source_workload,
            &self.source_workload_namespace,
            &self.destination_workload,
            &self.destination_workload_namespace,
        ]
    }

    fn overflow(&self) -> Self {
        let other: Arc<str> = OVERFLOW.into();
        Self {
            reporter: self.reporter,
            source_workload: other.clone(),
            source_workload_namespace: other.clone(),
            destination_workload: other.clone(),
            destination_workload_namespace: other,
        }
    }
}

fn direction(reporter: Reporter) -> &'static str {
    match reporter {
        Reporter::Source => "outbound",
        Reporter::Destination => "inbound",
    }
}
