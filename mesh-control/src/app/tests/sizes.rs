//! How much of an agent's words is taken, and how much of it kept.

use super::bounds::{patient, web};
use super::*;
use crate::limits::{MAX_NACK_BYTES, MAX_REJECTED};

#[tokio::test]
async fn of_what_an_agent_says_only_so_many_bytes_are_kept() {
    let bench = Bench::start_within(&web(), patient()).await;
    let token = bench.token("node-a");
    // Two bytes a character, and an odd one before them: no bound may fall inside of one.
    let long = format!("x{}", "é".repeat(2 * MAX_NACK_BYTES));
    let kept = |shown: &serde_json::Value| {
        let shown = shown.as_str().expect("a text").to_owned();
        assert!(long.starts_with(&shown));
        shown.len()
    };

    let mut client = bench.discovery(&token, vec![first(ADDRESS_TYPE_URL, "node-a")]).await;
    let response = client.next().await.expect("a response");
    client.answer(&response, Some(&long)).await;
    bench
        .until_metric("mesh_control_discovery_rejected_total{type=\"address\"} 1")
        .await;
    let status = bench.running.control.status();
    assert_eq!(
        kept(&status["nodes"]["node-a"]["refused_responses"][ADDRESS_TYPE_URL]),
        MAX_NACK_BYTES - 1
    );

    let report = NodeReport {
        enforced_versions: [(ADDRESS_TYPE_URL.to_owned(), long.clone())].into(),
        rejected: vec![long.clone(); MAX_REJECTED + 1],
        ..NodeReport::default()
    };
    let (_open, mut receipts) = reports(&bench, &token, report).await;
    receipts.message().await.expect("taken");
    let node = &bench.running.control.status()["nodes"]["node-a"];
    assert_eq!(kept(&node["enforced"][ADDRESS_TYPE_URL]), MAX_NACK_BYTES - 1);
    let rejected = node["rejected_by_agent"].as_array().expect("a list");
    assert_eq!(rejected.len(), MAX_REJECTED);
    assert!(rejected.iter().all(|text| kept(text) == MAX_NACK_BYTES - 1));
    bench.running.stop().await;
}

#[tokio::test]
async fn a_report_has_so_many_bytes() {
    let bench = Bench::start_within(&web(), patient()).await;
    let token = bench.token("node-a");
    let of_bytes = |bytes: usize| {
        let with = |length: usize| NodeReport {
            sequence: 1,
            rejected: vec!["x".repeat(length)],
            ..NodeReport::default()
        };
        let overhead = with(bytes).encoded_len() - bytes;
        with(bytes - overhead)
    };
    assert_eq!(of_bytes(MAX_REPORT_BYTES).encoded_len(), MAX_REPORT_BYTES);
    let (_open, mut receipts) = reports(&bench, &token, of_bytes(MAX_REPORT_BYTES)).await;
    receipts.message().await.expect("taken").expect("a receipt");
    let (_open, mut receipts) = reports(&bench, &token, of_bytes(MAX_REPORT_BYTES + 1)).await;
    assert_eq!(receipts.message().await.expect_err("refused").code(), Code::OutOfRange);
    assert!(bench.metric("mesh_control_report_streams_cut_total{reason=\"too_much\"} 1"));
    bench.running.stop().await;
}

#[tokio::test]
async fn a_request_has_so_many_bytes() {
    let bench = Bench::start_within(&web(), patient()).await;
    let token = bench.token("node-a");
    let large = DeltaDiscoveryRequest {
        resource_names_subscribe: vec!["x".repeat(MAX_REQUEST_BYTES)],
        ..first(ADDRESS_TYPE_URL, "node-a")
    };
    let mut client = bench.discovery(&token, vec![large]).await;
    assert_eq!(client.next().await.expect_err("refused").code(), Code::OutOfRange);
    assert!(bench.metric("mesh_control_discovery_streams_cut_total{reason=\"too_much\"} 1"));
    bench.running.stop().await;
}
