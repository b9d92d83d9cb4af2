//! The agent's own metrics, beside those of connections: read from where they are counted whenever they are asked for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use parking_lot::Mutex;
use prometheus::{Gauge, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use tokio::time::Instant;

use super::Agent;
use crate::capture::{Kubelet, Unknown};
use crate::discovery::report::{PodStatus, Proof};
use crate::pods::PodView;
use crate::telemetry::{MetricsPrefix, take_over};

/// Identities whose certificates are shown, those that end first: as many as a node has Pods. The store keeps no more
/// (`mesh_common::limits::MAX_PODS`); were there more, `mesh_certificates` would tell.
const MAX_CERTIFICATES_SHOWN: usize = mesh_common::limits::MAX_PODS as usize;
/// Pods of `mesh_pod_protected`: as many as a node has.
const MAX_PODS_SHOWN: usize = mesh_common::limits::MAX_PODS as usize;
/// Bytes of a version, which another maker's control plane writes as it likes.
const MAX_VERSION_BYTES: usize = 64;
/// Of the source, where the build was told.
const REVISION: &str = match option_env!("CULVERT_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// Gauges and counters that are copied at each scrape.
#[derive(Debug)]
pub struct AgentMetrics {
    discovery_connected: IntGauge,
    discovery_synced: IntGauge,
    discovery: IntCounterVec,
    certificate_requests: IntCounterVec,
    certificates: IntGauge,
    certificate_expiry: IntGaugeVec,
    last_word_age: Gauge,
    enforced: IntGaugeVec,
    map_entries: IntGaugeVec,
    map_entries_max: IntGaugeVec,
    started: Instant,
    prefix: MetricsPrefix,
    pods: IntGaugeVec,
    pods_without_backstop: IntGaugeVec,
    unprotected: IntGaugeVec,
    kubelet_unknown: IntGaugeVec,
    protected: IntGaugeVec,
    not_shown: IntGauge,
    following: IntGaugeVec,
    following_failures: IntCounterVec,
    local_refused: IntCounter,
    buffered_bytes: IntGauge,
    exclusions: IntGaugeVec,
    /// Of two scrapes at a time, none may bring older numbers after newer ones.
    copying: Mutex<()>,
}

impl AgentMetrics {
    /// # Errors
    /// A name is taken.
    pub fn new(registry: &Registry, prefix: MetricsPrefix) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let gauges = IntGaugeVec::new(Opts::new(name, help), labels)?;
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
            "Connections to the local socket or the handover's that were not root's.",
        )?;
        registry.register(Box::new(local_refused.clone()))?;
        let last_word_age = Gauge::new(
            "mesh_discovery_last_word_age_seconds",
            "Since the control plane last said something; since the agent's start if it never did.",
        )?;
        registry.register(Box::new(last_word_age.clone()))?;
        gauges("mesh_build_info", "1, with what runs.", &["version", "revision"])?
            .with_label_values(&[env!("CARGO_PKG_VERSION"), REVISION])
            .set(1);
        Ok(Self {
            certificate_expiry: gauges(
                "mesh_certificate_expiry_timestamp_seconds",
                "When the certificate of an identity ends, in Unix time.",
                &["identity"],
            )?,
            last_word_age,
            enforced: gauges(
                "mesh_discovery_enforced_info",
                "1, with the version of what decisions are made by, for each type of resource.",
                &["type", "version"],
            )?,
            map_entries: gauges("mesh_capture_map_entries", "Entries of a kernel map.", &["map"])?,
            map_entries_max: gauges(
                "mesh_capture_map_entries_max",
                "Entries that a kernel map has room for.",
                &["map"],
            )?,
            started: Instant::now(),
            prefix,
            discovery_connected: gauge("mesh_discovery_connected", "1 while the discovery stream is open.")?,
            discovery_synced: gauge("mesh_discovery_synced", "1 once every resource type has been answered for.")?,
            discovery: counters(
                "mesh_discovery_events_total",
                "Streams opened, responses, and resources that could not be used.",
                "event",
            )?,
            certificate_requests: counters("mesh_certificate_requests_total", "Requests for certificates.", "result")?,
            certificates: gauge("mesh_certificates", "Identities that the agent holds a certificate of.")?,
            pods: gauges("mesh_pods", "Enrolled Pods by the state of their proof.", &["proof"])?,
            pods_without_backstop: gauges(
                "mesh_pods_without_backstop",
                "Enrolled Pods whose raw packets are not checked, by the reason.",
                &["reason"],
            )?,
            unprotected: gauges(
                "mesh_pod_unprotected_connections",
                "Connections of a Pod that were open before it was enrolled, and still are.",
                &["namespace", "pod"],
            )?,
            kubelet_unknown: gauges(
                "mesh_kubelet_unknown",
                "1 while the kubelet's probes are taken for anybody's plaintext, by the reason.",
                &["reason"],
            )?,
            protected: gauges(
                "mesh_pod_protected",
                "1 while the capture of the Pod's traffic is proven.",
                &["namespace", "pod"],
            )?,
            not_shown: gauge(
                "mesh_pods_not_shown",
                "Pods that mesh_pod_protected has no room for; those that are protected are left out first.",
            )?,
            following: gauges(
                "mesh_following_pods",
                "Pods of this node in the control plane's list, by what stands in the way of their enrolment.",
                &["state"],
            )?,
            following_failures: counters(
                "mesh_following_failures_total",
                "Enrolments and releases by the list that did not work and are tried again.",
                "reason",
            )?,
            local_refused,
            buffered_bytes: gauge(
                "mesh_buffered_bytes",
                "Data of all Pods' connections that waits in the agent for a reader.",
            )?,
            exclusions: gauges(
                "mesh_exclusions",
                "Ports and address ranges that the mesh's settings take out of the mesh.",
                &["kind"],
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
            let last_word = status.last_word.unwrap_or(self.started);
            self.last_word_age.set(last_word.elapsed().as_secs_f64());
            // Of the versions before nothing is left.
            self.enforced.reset();
            for (type_url, version) in &status.enforced_versions {
                let short = type_url.rsplit('.').next().unwrap_or(type_url);
                self.enforced.with_label_values(&[short, shortened(version)]).set(1);
            }
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
        self.show_certificates(agent);
        let pods = agent.pods.list();
        for proof in ["pending", "proven", "lost"] {
            self.pods
                .with_label_values(&[proof])
                .set(size(pods.iter().filter(|pod| pod.proof == proof).count()));
        }
        let backstops = agent.capture.backstops();
        for reason in ["no_veth", "failed"] {
            let count = backstops
                .iter()
                .filter(|(_, backstop)| backstop.missing() == Some(reason))
                .count();
            self.pods_without_backstop.with_label_values(&[reason]).set(size(count));
        }
        let failing = agent.noticed.failing(|uid| pods.iter().any(|pod| pod.uid == uid));
        let (shown, left_out) = protection(&pods, &failing, MAX_PODS_SHOWN);
        // Those of Pods that are gone go.
        self.protected.reset();
        for ((namespace, pod), is_protected) in &shown {
            let gauge = self.protected.with_label_values(&[namespace, pod]);
            gauge.set(i64::from(*is_protected));
        }
        self.not_shown.set(size(left_out));
        self.show_following(agent, &pods);
        let kubelet = agent.capture.kubelet();
        for reason in Unknown::REASONS {
            let is_so = matches!(&kubelet, Kubelet::Unknown(why) if why.reason() == reason);
            self.kubelet_unknown.with_label_values(&[reason]).set(i64::from(is_so));
        }
        take_over(&self.local_refused, agent.local_refused.load(Ordering::Relaxed));
        self.buffered_bytes.set(size(agent.buffers.held_bytes()));
        let settings = agent.state.read(|state| state.settings().clone());
        for (kind, count) in [
            ("port", settings.excluded.ports.len()),
            ("range", settings.excluded.ranges.len()),
        ] {
            self.exclusions.with_label_values(&[kind]).set(size(count));
        }
        agent.metrics.set_capture_events(|| agent.capture.counters());
        for map in agent.capture.map_fill() {
            self.map_entries.with_label_values(&[map.name]).set(size(map.entries));
            self.map_entries_max.with_label_values(&[map.name]).set(size(map.max_entries));
        }
        agent.metrics.render_as(&self.prefix)
    }

    fn show_following(&self, agent: &Agent, pods: &[PodView]) {
        let size = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let unprotected = agent.capture.unprotected();
        // Those of Pods that are gone go.
        self.unprotected.reset();
        for pod in pods {
            let count = unprotected
                .iter()
                .find(|(uid, _)| *uid == pod.uid)
                .map_or(0, |(_, count)| *count);
            self.unprotected
                .with_label_values(&[&pod.namespace, &pod.name])
                .set(size(count));
        }
        let followed = agent.followed.lock();
        for (state, count) in [
            ("member", followed.members),
            ("without_address", followed.waiting),
            ("failing", followed.failing.len()),
            ("refused", followed.refused.len()),
        ] {
            self.following.with_label_values(&[state]).set(size(count));
        }
        // Shown from the start: an absent series and a zero are not the same to an alert.
        self.following_failures.with_label_values(&["no_process"]);
        for (reason, count) in &followed.failures {
            take_over(&self.following_failures.with_label_values(&[reason]), *count);
        }
    }

    fn show_certificates(&self, agent: &Agent) {
        let pairs = agent.store.all();
        self.certificates.set(i64::try_from(pairs.len()).unwrap_or(i64::MAX));
        let expiries = pairs.iter().map(|pair| (pair.not_after, pair.identity.to_string())).collect();
        // Those of identities that are gone go.
        self.certificate_expiry.reset();
        for (not_after, identity) in first_to_end(expiries, MAX_CERTIFICATES_SHOWN) {
            let end = not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            self.certificate_expiry
                .with_label_values(&[&identity])
                .set(i64::try_from(end).unwrap_or(i64::MAX));
        }
    }
}

/// `(namespace, name)` → whether it is protected, for enrolled Pods and for members that are not; and how many found no room. Of two
/// Pods with one name, as when one is made anew, the one counts that is not.
fn protection(enrolled: &[PodView], failing: &[PodStatus], most: usize) -> (BTreeMap<(String, String), bool>, usize) {
    let enrolled = enrolled
        .iter()
        .map(|pod| ((pod.namespace.clone(), pod.name.clone()), pod.proof == Proof::Proven.as_str()));
    let failing = failing
        .iter()
        .map(|pod| ((pod.namespace.to_string(), pod.name.to_string()), false));
    let mut all = BTreeMap::new();
    for (pod, is_protected) in enrolled.chain(failing) {
        all.entry(pod)
            .and_modify(|before| *before &= is_protected)
            .or_insert(is_protected);
    }
    let left_out = all.len().saturating_sub(most);
    let mut worst_first: Vec<_> = all.into_iter().collect();
    worst_first.sort_by_key(|(_, is_protected)| *is_protected);
    worst_first.truncate(most);
    (worst_first.into_iter().collect(), left_out)
}

fn shortened(version: &str) -> &str {
    &version[..version.floor_char_boundary(MAX_VERSION_BYTES)]
}

fn first_to_end(mut certificates: Vec<(SystemTime, String)>, most: usize) -> Vec<(SystemTime, String)> {
    certificates.sort_unstable();
    certificates.truncate(most);
    certificates
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_long_version_is_cut_between_characters() {
        assert_eq!(shortened("7-abc"), "7-abc");
        let long = "ü1".repeat(1_000);
        let cut = shortened(&long).len();
        assert!((MAX_VERSION_BYTES - 3..=MAX_VERSION_BYTES).contains(&cut), "{cut}");
    }

    #[test]
    fn pods_that_are_not_protected_are_shown_first_and_what_finds_no_room_is_counted() {
        let view = |name: &str, proof: &'static str| PodView {
            uid: format!("uid-{name}-{proof}"),
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            identity: String::new(),
            addresses: vec![],
            netns_cookie: 1,
            proof,
            origin: "cni",
            reason: String::new(),
            served: true,
            connections: 0,
        };
        let enrolled = [
            view("a", "proven"),
            view("b", "lost"),
            view("c", "pending"),
            view("anew", "proven"),
            view("anew", "lost"),
        ];
        let failing = [crate::discovery::noticed::failing(&"u".into(), "shop", "z", "why", "io")];
        let shown = |most| {
            let (shown, left_out) = protection(&enrolled, &failing, most);
            let names: Vec<(String, bool)> = shown.into_iter().map(|((_, name), protected)| (name, protected)).collect();
            (names, left_out)
        };
        let named = |list: &[(&str, bool)]| list.iter().map(|(name, is)| ((*name).to_owned(), *is)).collect::<Vec<_>>();
        let all = named(&[("a", true), ("anew", false), ("b", false), ("c", false), ("z", false)]);
        assert_eq!(shown(10), (all, 0));
        assert_eq!(
            shown(4),
            (named(&[("anew", false), ("b", false), ("c", false), ("z", false)]), 1)
        );
    }

    #[test]
    fn of_too_many_certificates_those_are_shown_that_end_first() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let all = (0..50).map(|n| (at(1_000 - n), format!("identity-{n}"))).collect();
        let shown = first_to_end(all, 3);
        assert_eq!(
            shown.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>(),
            ["identity-49", "identity-48", "identity-47"]
        );
    }
}
