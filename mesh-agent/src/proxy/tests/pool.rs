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
    let metrics = node.metrics.render();
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix(r#"mesh_tunnels_total{event="opened"} "#));
    line.map_or(0, |count| count.parse().unwrap())
}
