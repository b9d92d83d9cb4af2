//! Names that nobody should have, and too many of them.

#[path = "../../../tests/src/exposition.rs"]
mod exposition;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::metrics::MAX_CONNECTION_SERIES;
use super::tunnels::MAX_PAIRS;
use super::*;
use crate::identity::Identity;

/// Longer than a loaded machine takes; only a hang meets it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What someone may have called a workload, a service account or a policy, whatever Kubernetes would say to it.
fn hostile_names() -> Vec<String> {
    [
        "new\nline",
        "carriage\r\nreturn",
        "quo\"te",
        "back\\slash\\",
        "ends with a backslash\\",
        "\"} 1\nmesh_forged_total{a=\"",
        "{\"result\":\"ok\"}",
        "später 日本 \u{1f980}",
        "line\u{2028}separator \u{85}",
        "nul\0 escape\u{1b}[31m bell\u{7}",
        "",
        " ",
    ]
    .map(str::to_owned)
    .into_iter()
    .chain(["x".repeat(253), "ü".repeat(253), "\"".repeat(253)])
    .collect()
}

fn lines(path: &Path, count: usize) -> Vec<String> {
    let start = Instant::now();
    loop {
        let text = std::fs::read_to_string(path).unwrap();
        // By newlines alone, as whoever ships the log cuts it.
        if text.matches('\n').count() >= count {
            return text.split_terminator('\n').map(str::to_owned).collect();
        }
        assert!(start.elapsed() < PATIENCE, "{text}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn peer(name: &str) -> Peer {
    Peer {
        address: Some(SocketAddr::from(([10, 0, 0, 1], 1234))),
        principal: Some(Identity::new("cluster.local", name, name)),
        workload: name.into(),
        namespace: name.into(),
    }
}

fn pair(name: &str) -> WorkloadPair {
    WorkloadPair::new(Reporter::Source, &peer(name), &peer(name))
}

/// The value of a label in every series of a family.
fn values(metrics: &Metrics, family: &str, label: &str) -> Vec<String> {
    let families = exposition::parse(&metrics.render()).unwrap();
    let of = |sample: &exposition::Sample| sample.labels.get(label).cloned();
    families
        .get(family)
        .map_or_else(Vec::new, |family| family.samples.iter().filter_map(of).collect())
}

#[test]
fn hostile_names_stay_in_their_line_of_the_log_and_in_their_label() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let metrics = Metrics::new();
    let log = AccessLog::to_file(&path, metrics.clone()).unwrap();
    let names = hostile_names();
    for name in &names {
        let (direction, path) = (Direction::Inbound, ConnectionPath::Tunnel);
        let mut record = ConnectionRecord::new(direction, path, peer(name), peer(name), log.clone());
        record.policy(Some(name.as_str().into()));
        record.opened();
        record.finish(Some("denied_by_policy"));
        metrics.count_denied(Some(&name.as_str().into()));
        metrics.count_cut(Some(&name.as_str().into()));
        metrics.count_dry_run(&name.as_str().into());
        metrics.tunnels().opened(pair(name)).measured(Duration::from_millis(1), 1, 0);
    }
    let lines = lines(&path, names.len());
    assert_eq!(lines.len(), names.len());
    for (line, name) in lines.iter().zip(&names) {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(value.is_object());
        for field in ["source_workload", "destination_workload_namespace", "policy"] {
            assert_eq!(value[field], name.as_str());
        }
        assert_eq!(value["result"], "failed");
    }
    for (family, label) in [
        ("mesh_tcp_connections_opened_total", "source_workload"),
        ("mesh_tcp_connections_failed_total", "destination_workload"),
        ("mesh_policy_denied_total", "policy"),
        ("mesh_policy_cut_total", "policy"),
        ("mesh_policy_dry_run_matches_total", "policy"),
        ("mesh_tcp_retransmitted_segments_total", "source_workload"),
    ] {
        let shown = values(&metrics, family, label);
        for name in &names {
            assert!(shown.contains(name), "{family}: {name:?} is not in {shown:?}");
        }
    }
    assert!(values(&metrics, "mesh_forged_total", "a").is_empty());
}

#[test]
fn connections_beyond_the_bound_are_counted_together() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = Metrics::new();
    let log = AccessLog::to_file(&folder.path().join("access.log"), metrics.clone()).unwrap();
    for number in 0..MAX_CONNECTION_SERIES + 7 {
        let peer = peer(&format!("w{number}"));
        let mut record = ConnectionRecord::new(Direction::Outbound, ConnectionPath::Tunnel, peer.clone(), peer, log.clone());
        record.opened();
        record.finish(None);
    }
    let family = "mesh_tcp_connections_opened_total";
    let families = exposition::parse(&metrics.render()).unwrap();
    assert_eq!(families[family].samples.len(), MAX_CONNECTION_SERIES + 1);
    let other = families[family]
        .samples
        .iter()
        .find(|sample| sample.labels["source_workload"] == "_other");
    assert_eq!(other.unwrap().value, 7.0);
    assert_eq!(families["mesh_connection_series_overflow_total"].samples[0].value, 7.0);
}

#[test]
fn pairs_of_workloads_beyond_the_bound_are_counted_together() {
    let metrics = Metrics::new();
    for number in 0..MAX_PAIRS + 7 {
        metrics
            .tunnels()
            .opened(pair(&format!("w{number}")))
            .measured(Duration::from_millis(1), 10, 1);
    }
    let families = exposition::parse(&metrics.render()).unwrap();
    let retransmitted = &families["mesh_tcp_retransmitted_segments_total"].samples;
    assert_eq!(retransmitted.len(), MAX_PAIRS + 1);
    let other = retransmitted
        .iter()
        .find(|sample| sample.labels["source_workload"] == "_other");
    assert_eq!(other.unwrap().value, 7.0);
    assert_eq!(families["mesh_tcp_health_series_overflow_total"].samples[0].value, 7.0);
}

#[test]
fn policies_beyond_the_bound_are_counted_together() {
    const MORE: usize = 1_300;
    let metrics = Metrics::new();
    for number in 0..MORE {
        let policy: Arc<str> = format!("shop/p{number}").into();
        metrics.count_denied(Some(&policy));
        metrics.count_dry_run(&policy);
    }
    let families = exposition::parse(&metrics.render()).unwrap();
    for family in ["mesh_policy_denied_total", "mesh_policy_dry_run_matches_total"] {
        let samples = &families[family].samples;
        assert_eq!(samples.len(), 1_001, "{family}");
        assert_eq!(samples.iter().map(|sample| sample.value).sum::<f64>(), MORE as f64);
    }
}

#[test]
fn open_tunnels_and_handshakes_are_counted_by_direction() {
    let metrics = Metrics::new();
    let open = |direction: &str| {
        let families = exposition::parse(&metrics.render()).unwrap();
        let samples = families["mesh_tunnels_open"].samples.iter();
        samples
            .filter(|sample| sample.labels["direction"] == direction)
            .map(|sample| sample.value)
            .sum::<f64>()
    };
    let tunnels = [metrics.tunnels().opened(pair("a")), metrics.tunnels().opened(pair("a"))];
    assert_eq!((open("outbound"), open("inbound")), (2.0, 0.0));
    drop(tunnels);
    assert_eq!(open("outbound"), 0.0);
    metrics
        .tunnels()
        .count_handshake(Reporter::Destination, Some("handshake_failed"));
    let results = values(&metrics, "mesh_tunnel_handshakes_total", "result");
    assert_eq!(results, ["handshake_failed", "ok", "ok"]);
}

#[test]
fn a_prefix_renames_every_family_and_no_bad_one_is_taken() {
    let metrics = Metrics::new();
    let prefix: MetricsPrefix = "istio_".parse().unwrap();
    let families = exposition::parse(&metrics.render_as(&prefix)).unwrap();
    assert!(families.keys().all(|name| name.starts_with("istio_")), "{families:?}");
    assert!(families.contains_key("istio_policy_denied_total"));
    for bad in ["", "1x", "a-b", "a b", "a\n", "ä", "a:", &"x".repeat(65)] {
        assert!(bad.parse::<MetricsPrefix>().is_err(), "{bad:?}");
    }
}

#[test]
fn refusals_by_policy_carry_the_flag_that_dashboards_know() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = Metrics::new();
    let log = AccessLog::to_file(&folder.path().join("access.log"), metrics.clone()).unwrap();
    for reason in [Some("denied_by_policy"), Some("connect_failed"), Some("limit"), None] {
        let mut record = ConnectionRecord::new(Direction::Outbound, ConnectionPath::Tunnel, peer("a"), peer("b"), log.clone());
        record.opened();
        record.finish(reason);
    }
    let mut flags = values(&metrics, "mesh_tcp_connections_failed_total", "response_flags");
    flags.sort();
    assert_eq!(flags, ["-", "CONNECT", "DENY"]);
    assert_eq!(values(&metrics, "mesh_tcp_connections_closed_total", "response_flags"), ["-"]);
}
