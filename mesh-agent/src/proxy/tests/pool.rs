use super::raw::{RawTunnel, assert_stream_echo};
use super::*;

#[tokio::test]
async fn connections_share_a_tunnel_and_keys_separate_them() {
    let mesh = Mesh::new();
    let one = mesh.pod(&mesh.near, "one").await;
    let two = mesh.pod(&mesh.near, "two").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let mut open = Vec::new();
    for _ in 0..5 {
        let mut stream = one.connect(server.application()).await;
        assert_echo(&mut stream, "hello").await;
        open.push(stream);
    }
    let tunnels = || mesh.near.proxy.pool.tunnel_count();
    assert_eq!(tunnels(), 1);
    let mut stream = two.connect(server.application()).await;
    assert_echo(&mut stream, "hello").await;
    assert_eq!(tunnels(), 2, "another Pod has a tunnel of its own");
    assert_eq!(opened(&mesh.near), 2);
}

#[tokio::test]
async fn a_renewed_certificate_serves_new_connections() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let mut before = client.connect(server.application()).await;
    assert_echo(&mut before, "hello").await;
    mesh.near.certificates.insert(mesh.authority.issue(&identity("client")));
    let mut after = client.connect(server.application()).await;
    assert_echo(&mut after, "hello").await;
    assert_eq!(opened(&mesh.near), 2);
    assert_echo(&mut before, "open ones go on").await;
}

#[tokio::test]
async fn an_expired_certificate_opens_nothing() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let own = identity("client");
    let expired = mesh.authority.issue_with(&own, &[&own.to_string()], &[], a_minute_ago());
    mesh.near.certificates.insert(expired);
    assert_refused(client.connect(server.application()).await).await;
    mesh.near.logs_reason("certificate_expired").await;
    mesh.near.certificates.remove(&own);
    assert_refused(client.connect(server.application()).await).await;
    mesh.near.logs_reason("certificate_missing").await;
}

#[tokio::test]
async fn the_first_certificate_is_waited_for() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let pair = mesh.near.certificates.remove(&identity("client")).unwrap();
    let mut stream = client.connect(server.application()).await;
    let early = timeout(Duration::from_millis(100), stream.read(&mut [0])).await;
    assert!(early.is_err(), "refused before the certificate came: {early:?}");
    mesh.near.certificates.insert(pair);
    assert_echo(&mut stream, "hello").await;
}

#[tokio::test]
async fn a_tunnel_that_fails_leaves_nothing() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let nowhere = fresh_address();
    mesh.tell(vec![Change::Workload(workload("gone", nowhere))]);
    for _ in 0..3 {
        assert_refused(client.connect(SocketAddr::new(nowhere, APPLICATION_PORT)).await).await;
    }
    mesh.near.logs_reason("connect_failed").await;
    assert_eq!(mesh.near.proxy.pool.tunnel_count(), 0);
}

/// How many tunnels were opened.
fn opened(node: &Node) -> usize {
    node.tunnels("opened")
}

#[tokio::test]
async fn two_pods_of_one_service_account_share_no_tunnel() {
    let mesh = Mesh::new();
    let one = mesh.pod(&mesh.near, "one").await;
    let two = mesh.pod_of_account(&mesh.near, "two", "one").await;
    mesh.tell(vec![Change::Workload(two.workload.clone())]);
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let mut streams = Vec::new();
    for pod in [&one, &two] {
        let mut stream = pod.connect(server.application()).await;
        assert_echo(&mut stream, "hello").await;
        streams.push(stream);
        let line = mesh.far.proxy.registry.count(&server.handle.context.pod.pod_uid);
        assert_eq!(line, streams.len());
    }
    assert_eq!(mesh.near.proxy.pool.tunnel_count(), 2);
}

#[tokio::test]
async fn an_address_that_becomes_somebody_elses_is_proven_anew() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let mut before = client.connect(server.application()).await;
    assert_echo(&mut before, "hello").await;
    mesh.near.state.apply(vec![
        Change::RemoveAddress(server.workload.uid.to_string()),
        Change::Workload(workload("next", server.ip)),
    ]);
    // There is a tunnel to that address, but nobody has proven there to be the next.
    assert_refused(client.connect(server.application()).await).await;
    mesh.near.logs_reason("handshake_failed").await;
    assert_eq!(opened(&mesh.near), 1);
    // Who was there is gone.
    review::assert_cut(&mut before).await;
    mesh.near.logs_reason("cut_by_new_holder").await;
    let metrics = mesh.near.metrics.render();
    assert!(
        metrics.contains(r#"mesh_policy_cut_total{policy="_new_holder"} 1"#),
        "{metrics}"
    );
}

/// A certificate that is over at a whole second soon; `believed` is what its holder's agent takes for its end.
fn short_lived(mesh: &Mesh, account: &str, believed: Option<SystemTime>) -> (Arc<CertifiedKeyPair>, SystemTime) {
    let identity = identity(account);
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(since_epoch.as_secs() + 4);
    let pair = mesh.authority.issue_with(&identity, &[&identity.to_string()], &[], not_after);
    let mut pair = Arc::try_unwrap(pair).unwrap();
    pair.not_after = believed.unwrap_or(not_after);
    (Arc::new(pair), not_after)
}

async fn past(time: SystemTime) {
    let rest = time.duration_since(SystemTime::now()).unwrap_or_default();
    sleep(rest + Duration::from_millis(50)).await;
}

#[tokio::test]
async fn a_tunnel_takes_nothing_new_once_our_certificate_is_over() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let (pair, end) = short_lived(&mesh, "client", None);
    mesh.near.certificates.insert(pair);
    let mut open = client.connect(server.application()).await;
    assert_echo(&mut open, "hello").await;
    past(end).await;
    assert_refused(client.connect(server.application()).await).await;
    mesh.near.logs_reason("certificate_expired").await;
    assert_echo(&mut open, "open ones go on").await;
}

#[tokio::test]
async fn a_tunnel_takes_nothing_new_once_its_peers_certificate_is_over() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    // The far agent would still take streams: what counts here is what we see of its certificate.
    let (pair, end) = short_lived(&mesh, "server", Some(in_an_hour()));
    mesh.far.certificates.insert(pair);
    let mut open = client.connect(server.application()).await;
    assert_echo(&mut open, "hello").await;
    mesh.far.certificates.insert(mesh.authority.issue(&identity("server")));
    past(end).await;
    let mut next = client.connect(server.application()).await;
    assert_echo(&mut next, "hello").await;
    assert_eq!(opened(&mesh.near), 2);
    assert_echo(&mut open, "open ones go on").await;
}

#[tokio::test]
async fn a_peer_opens_nothing_once_its_certificate_is_over() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let (pair, end) = short_lived(&mesh, "client", None);
    let tunnel = RawTunnel::open(&mesh, fresh_address(), &server, pair).await;
    let (status, mut send, mut receive) = tunnel.connect(server.application()).await.unwrap();
    assert_eq!(status, 200);
    past(end).await;
    assert!(tunnel.connect(server.application()).await.is_err(), "a second CONNECT");
    assert_stream_echo(&mut send, &mut receive, "open ones go on").await;
}
