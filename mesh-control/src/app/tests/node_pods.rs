//! The stream by which a node hears of its Pods.

use mesh_proto::node::node_pods_client::NodePodsClient;
use mesh_proto::node::{NodePodsRequest, NodePodsState};
use tokio::time::timeout;
use tonic::Streaming;

use super::*;

async fn watch(bench: &Bench, secret: &str) -> Result<Streaming<NodePodsState>, tonic::Status> {
    let mut client = NodePodsClient::new(bench.channel().await);
    Ok(client.watch(authorized(NodePodsRequest {}, secret)).await?.into_inner())
}

async fn next(states: &mut Streaming<NodePodsState>) -> Result<Option<NodePodsState>, tonic::Status> {
    timeout(PATIENCE, states.message()).await.expect("a message")
}

fn members(state: &NodePodsState) -> Vec<(&str, bool)> {
    state.pods.iter().map(|pod| (pod.uid.as_str(), pod.is_member)).collect()
}

#[tokio::test]
async fn a_node_hears_of_its_own_pods_alone_at_each_change() {
    let probed = "containers: [{ name: app, readinessProbe: { httpGet: { port: 8080 } } }]";
    let web = pod("web", "10.0.0.1", "node-a").replacen("spec: {", &format!("spec: {{ {probed},"), 1);
    let pods = web + &pod("db", "10.0.0.2", "node-b");
    let bench = Bench::start(&pods).await;
    let (a, b) = (bench.token("node-a"), bench.token("node-b"));
    let mut of_a = watch(&bench, &a.secret).await.expect("stream");
    let mut of_b = watch(&bench, &b.secret).await.expect("stream");
    let first = next(&mut of_a).await.expect("state").expect("state");
    assert_eq!(members(&first), [("uid-web", true)]);
    assert_eq!(
        (first.pods[0].service_account.as_str(), first.pods[0].addresses.as_slice()),
        ("web", ["10.0.0.1".to_owned()].as_slice())
    );
    assert_eq!(
        (first.namespaces.len(), first.pods[0].probe_ports.as_slice()),
        (1, [8080].as_slice())
    );
    assert_eq!(
        members(&next(&mut of_b).await.expect("state").expect("state")),
        [("uid-db", true)]
    );

    // What changes on another node alone is not told; the next word is of the next change of its own.
    bench.write("more.yaml", &pod("cache", "10.0.0.3", "node-b"));
    let of_cache = next(&mut of_b).await.expect("state").expect("state");
    assert_eq!(members(&of_cache), [("uid-cache", true), ("uid-db", true)]);
    bench.write("mesh.yaml", &format!("{}{pods}", NAMESPACE.replace("enabled", "disabled")));
    let without = next(&mut of_a).await.expect("state").expect("state");
    assert_eq!((members(&without), without.namespaces.len()), (vec![("uid-web", false)], 0));

    // Both streams are known of, and end with the control plane.
    let status = ask(bench.running.admin, "/status").await;
    assert!(
        status.contains("\"pods_streams\": 1") || status.contains("\"pods_streams\":1"),
        "{status}"
    );
    bench.running.stop().await;
    assert!(!matches!(next(&mut of_a).await, Ok(Some(_))));
}

#[tokio::test]
async fn who_has_no_token_hears_nothing_and_one_node_cannot_open_many() {
    let bench = Bench::start(&pod("web", "10.0.0.1", "node-a")).await;
    for secret in ["", "wrong"] {
        let refused = watch(&bench, secret).await;
        assert_eq!(refused.expect_err("refused").code(), Code::Unauthenticated);
    }
    let token = bench.token("node-a");
    let mut open = Vec::new();
    for _ in 0..crate::limits::MAX_STREAMS_PER_NODE {
        open.push(watch(&bench, &token.secret).await.expect("stream"));
    }
    let refused = watch(&bench, &token.secret).await;
    assert_eq!(refused.expect_err("refused").code(), Code::ResourceExhausted);
    bench.running.stop().await;
}
