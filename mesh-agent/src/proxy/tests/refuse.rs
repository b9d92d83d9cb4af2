//! What is refused: quickly, with its reason, without a byte.

use super::*;
use crate::policy::{Action, Clause, Match, Policy, Rule, Scope, StringMatch};

fn policy(name: &str, action: Action, m: Match) -> Change {
    Change::Policy(Arc::new(Policy {
        name: format!("shop/{name}").into(),
        namespace: "shop".into(),
        scope: Scope::Namespace,
        action,
        rules: vec![Rule {
            clauses: vec![Clause { matches: vec![m] }],
            unknown: false,
        }],
        dry_run: false,
    }))
}

fn principal(account: &str) -> Match {
    Match {
        principals: vec![StringMatch::Exact(identity(account).principal().into())],
        ..Match::default()
    }
}

/// A plaintext client of a Pod: as sk_lookup would steer it, to the plaintext listener.
async fn plaintext(mesh: &Mesh, pod: &Pod, port: u16) -> TcpStream {
    let listener = TcpListener::bind(SocketAddr::new(pod.ip, port)).await.unwrap();
    mesh.far
        .proxy
        .accept(&pod.handle.context, listener, "plaintext", plaintext::serve);
    TcpStream::connect(SocketAddr::new(pod.ip, port)).await.unwrap()
}

/// A connection that arrives at the Pod's application outside of a tunnel, with the application behind the proxy.
pub(super) async fn plaintext_to_echo(mesh: &Mesh, from: IpAddr, pod: &Pod) -> TcpStream {
    let listener = pod.listen().await;
    let client = socket_at(from).connect(pod.application()).await.unwrap();
    let (stream, address) = listener.accept().await.unwrap();
    // Both stand at one address: the application comes after the proxy has accepted.
    drop(listener);
    let echo = pod.echo().await;
    let accepted = Accepted {
        stream,
        client: ClientAddr::new(address),
        listener: ListenerAddr::new(pod.application()),
    };
    let serving = plaintext::serve(mesh.far.proxy.clone(), pod.handle.context.clone(), accepted);
    tokio::spawn(async move {
        serving.await;
        echo.abort();
    });
    client
}

/// A Pod that is not in the mesh, as discovery tells it.
fn outsider(account: &str, ip: IpAddr) -> Change {
    let mut workload = workload(account, ip);
    workload.membership = Membership::Outside;
    workload.uid = "outsider".into();
    Change::Workload(workload)
}

#[tokio::test]
async fn whom_deny_names_does_not_come_in_without_its_tunnel() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    mesh.tell(vec![policy("not-client", Action::Deny, principal("client"))]);
    // As a Pod with NET_RAW does: past its own capture, to the application's port.
    let mut stream = plaintext_to_echo(&mesh, client.ip, &server).await;
    let exchange = async {
        stream.write_all(b"x").await?;
        stream.read(&mut [0]).await
    };
    let answered = timeout(PATIENCE, exchange).await.expect("neither refused nor served");
    assert!(answered.is_err(), "the application answered whom DENY names");
    let line = mesh.far.logs_reason("denied_by_policy").await;
    assert_eq!(
        (&line["path"], &line["policy"]),
        (&"plaintext".into(), &"shop/not-client".into())
    );
    assert_eq!(line["source_principal"], "", "nothing is proven");

    let outside = fresh_address();
    mesh.tell(vec![outsider("stranger", outside)]);
    assert_echo(
        &mut plaintext_to_echo(&mesh, outside, &server).await,
        "whom DENY does not name",
    )
    .await;
}

#[tokio::test]
async fn whom_deny_names_does_not_come_in_by_opting_out() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    mesh.tell(vec![policy("not-client", Action::Deny, principal("client"))]);
    // A Pod of that account, whose label takes it out of the mesh.
    let outside = fresh_address();
    mesh.tell(vec![outsider("client", outside)]);
    let mut stream = plaintext_to_echo(&mesh, outside, &server).await;
    let exchange = async {
        stream.write_all(b"x").await?;
        stream.read(&mut [0]).await
    };
    let answered = timeout(PATIENCE, exchange).await.expect("neither refused nor served");
    assert!(
        answered.is_err(),
        "the application answered whom DENY names, since he left the mesh"
    );
    mesh.far.logs_reason("denied_by_policy").await;
}

#[tokio::test]
async fn a_valid_certificate_from_an_address_that_nobody_has() {
    let mesh = Mesh::new();
    let client = mesh.unannounced_pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    assert_refused(client.connect(server.application()).await).await;
    mesh.far.logs_reason("identity_unknown").await;
    mesh.near.logs_reason("denied_by_destination").await;
    // In time, it is waited for.
    let mut stream = client.connect(server.application()).await;
    sleep(Duration::from_millis(50)).await;
    mesh.tell(vec![Change::Workload(client.workload.clone())]);
    assert_echo(&mut stream, "hello").await;
}

#[tokio::test]
async fn nobody_is_confirmed_before_everything_was_told() {
    let mut mesh = Mesh::new();
    mesh.far = Node::unsynced(Limits::default());
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    assert_refused(client.connect(server.application()).await).await;
    mesh.far.logs_reason("identity_unknown").await;
    let mut stream = client.connect(server.application()).await;
    sleep(Duration::from_millis(50)).await;
    mesh.tell(vec![Change::Synced]);
    assert_echo(&mut stream, "hello").await;
}

#[tokio::test]
async fn policy_decides_at_the_tunnel() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    mesh.tell(vec![policy("only-other", Action::Allow, principal("other"))]);
    assert_refused(client.connect(server.application()).await).await;
    let line = mesh.far.logs_reason("denied_by_policy").await;
    assert_eq!(line["result"], "refused");
    assert_eq!(line["source_principal"], "spiffe://cluster.local/ns/shop/sa/client");
    mesh.near.logs_reason("denied_by_destination").await;

    mesh.tell(vec![policy("client", Action::Allow, principal("client"))]);
    let mut stream = client.connect(server.application()).await;
    assert_echo(&mut stream, "hello").await;
    drop(stream);
    mesh.far.log_line(|line| line["policy"] == "shop/client").await;

    mesh.tell(vec![policy("not-client", Action::Deny, principal("client"))]);
    assert_refused(client.connect(server.application()).await).await;
    mesh.far.log_line(|line| line["policy"] == "shop/not-client").await;
}

#[tokio::test]
async fn policy_decides_on_plaintext_without_a_principal() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    mesh.tell(vec![policy("any-principal", Action::Allow, principal("client"))]);
    assert_refused(plaintext(&mesh, &server, APPLICATION_PORT).await).await;
    let line = mesh.far.logs_reason("denied_by_policy").await;
    assert_eq!(line["path"], "plaintext");
    assert_eq!(line["source_principal"], "");
    assert_eq!(line["connection_security_policy"], "none");
    let failed = mesh.far.metrics.render();
    assert!(failed.contains(r#"reason="denied_by_policy""#), "{failed}");
}

#[tokio::test]
async fn an_agents_port_is_no_application() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    let agent_port = SocketAddr::new(server.ip, PLAINTEXT_INBOUND_PORT);
    assert_refused(TcpStream::connect(agent_port).await.unwrap()).await;
    mesh.far.logs_reason("agent_port").await;
}

#[tokio::test]
async fn a_connection_of_the_agents_own_that_comes_back_is_refused() {
    let mesh = Mesh::new();
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(fresh_address(), OWN_UPSTREAM_PORT)).unwrap();
    let port = 8081;
    drop(plaintext(&mesh, &server, port).await);
    match socket.connect(SocketAddr::new(server.ip, port)).await {
        Ok(looping) => assert_refused(looping).await,
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    mesh.far.logs_reason("upstream_loop").await;
}

#[tokio::test]
async fn what_the_source_refuses() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;

    assert_refused(client.connect(SocketAddr::new(server.ip, TUNNEL_PORT)).await).await;
    let line = mesh.near.log_line(|_| true).await;
    assert_eq!(line["reason"], "agent_port", "the source let it go on");

    // Not redirected by our programs.
    assert_refused(TcpStream::connect(SocketAddr::new(client.ip, OUTBOUND_PORT)).await.unwrap()).await;
    mesh.near.logs_reason("no_original_destination").await;

    let unknown = client.connect("127.250.0.9:80".parse().unwrap()).await;
    let mut lost = server.workload.clone();
    lost.membership = Membership::Lost;
    mesh.tell(vec![Change::Workload(lost)]);
    let lost = client.connect(server.application()).await;
    let unlisted = client.connect(server.application()).await;
    tokio::join!(assert_refused(unknown), assert_refused(lost), assert_refused(unlisted));
    mesh.near.logs_reason("destination_unknown").await;
    mesh.near.logs_reason("destination_lost").await;
}

#[tokio::test]
async fn a_pod_that_is_told_of_in_time_is_reached() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    let _echo = server.echo().await;
    let mut lost = server.workload.clone();
    lost.membership = Membership::Lost;
    mesh.tell(vec![Change::Workload(lost)]);
    let mut stream = client.connect(server.application()).await;
    sleep(Duration::from_millis(50)).await;
    mesh.tell(vec![Change::Workload(server.workload.clone())]);
    assert_echo(&mut stream, "hello").await;
}

#[tokio::test]
async fn what_the_destination_refuses() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let server = mesh.pod(&mesh.far, "server").await;
    // Nobody listens.
    assert_refused(client.connect(server.application()).await).await;
    mesh.far.logs_reason("connect_failed").await;
    mesh.near.logs_reason("connect_failed_at_destination").await;

    let _echo = server.echo().await;
    // Its agent is told that somebody else has the client's address.
    let mut other = client.workload.clone();
    other.identity = identity("other");
    mesh.far.state.apply(vec![Change::Workload(other)]);
    assert_refused(client.connect(server.application()).await).await;
    mesh.far.logs_reason("identity_mismatch").await;
    mesh.far.state.apply(vec![Change::Workload(client.workload.clone())]);

    // It lists a policy that has not arrived.
    let mut listed = server.workload.clone();
    listed.policies = vec!["shop/late".into()];
    mesh.far.state.apply(vec![Change::Workload(listed.clone())]);
    assert_refused(client.connect(server.application()).await).await;
    mesh.far.logs_reason("policy_missing").await;
    // In time, it is waited for.
    let mut stream = client.connect(server.application()).await;
    sleep(Duration::from_millis(50)).await;
    mesh.far.state.apply(vec![policy("late", Action::Allow, principal("client"))]);
    assert_echo(&mut stream, "hello").await;
}

#[tokio::test]
async fn a_pod_has_only_so_many_connections() {
    let registry = Arc::new(Registry::with_limit(2));
    let pod: Arc<str> = "pod".into();
    let address: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let (direction, path) = (
        crate::telemetry::Direction::Inbound,
        crate::telemetry::ConnectionPath::Plaintext,
    );
    let info = ConnectionInfo::new(direction, path, address, address);
    let first = registry.register(&pod, info.clone()).unwrap();
    let _second = registry.register(&pod, info.clone()).unwrap();
    assert_eq!(registry.register(&pod, info.clone()).unwrap_err().reason(), "limit");
    registry
        .register(&"other".into(), info.clone())
        .expect("another Pod has its own bound");
    drop(first);
    registry.register(&pod, info).expect("released by its guard");
}
