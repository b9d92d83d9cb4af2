//! A service's address: an endpoint is chosen, another one tried when it refuses, and what was decided is final.

use super::*;
use crate::workload::{Service, ServicePort};

const SERVICE: &str = "shop/web.shop.svc.cluster.local";
const PORT: u16 = 80;
/// Enough that each of two endpoints is chosen at least once, but for one run in 2⁵⁹.
const MANY: usize = 60;

fn ports() -> Vec<ServicePort> {
    vec![ServicePort {
        port: PORT,
        target: APPLICATION_PORT,
    }]
}

fn web(vip: IpAddr) -> Service {
    Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc.cluster.local".into(),
        addresses: vec![vip],
        ports: ports(),
        only_healthy: true,
        node_local: false,
        affinity: None,
    }
}

impl Mesh {
    fn service(&self) -> IpAddr {
        let vip = fresh_address();
        self.tell(vec![Change::Service(web(vip))]);
        vip
    }

    async fn endpoint(&self, name: &str) -> Pod {
        let mut pod = self.unannounced_pod(&self.far, name).await;
        pod.workload.services = vec![(SERVICE.into(), ports())];
        self.tell(vec![Change::Workload(pod.workload.clone())]);
        pod
    }
}

#[tokio::test]
async fn an_endpoint_that_refuses_is_stood_in_for() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let vip = SocketAddr::new(mesh.service(), PORT);
    let _closed = mesh.endpoint("closed").await;
    let open = mesh.endpoint("open").await;
    let _application = open.echo().await;
    for _ in 0..MANY {
        assert_echo(&mut client.connect(vip).await, "by the service").await;
    }
    let metrics = mesh.near.metrics.render();
    let retries = metrics
        .lines()
        .find_map(|line| line.strip_prefix("mesh_endpoint_retries_total "))
        .unwrap();
    let retries: usize = retries.parse().unwrap();
    assert!((1..MANY).contains(&retries), "{retries}");
    let line = mesh.near.log_line(|line| line["result"] == "ok").await;
    assert_eq!(line["destination_service"], "web.shop.svc.cluster.local");
    assert_eq!(line["destination_address"], open.application().to_string());
    assert_eq!(line["destination_principal"], open.workload.identity.to_string());
}

/// The first try went in clear, and was refused: what becomes of that endpoint is nothing to the tunnel to the other one.
#[tokio::test]
async fn a_tunnel_does_not_end_with_the_endpoint_that_refused_before_it() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let vip = SocketAddr::new(mesh.service(), PORT);
    let closed = mesh.endpoint("closed").await;
    let standing = |membership| {
        let mut workload = closed.workload.clone();
        workload.membership = membership;
        mesh.near.state.apply(vec![Change::Workload(workload)]);
    };
    standing(Membership::Pending);
    let open = mesh.endpoint("open").await;
    let _application = open.echo().await;
    let mut streams = Vec::new();
    for _ in 0..MANY {
        let mut stream = client.connect(vip).await;
        assert_echo(&mut stream, "by the tunnel").await;
        streams.push(stream);
    }
    let metrics = mesh.near.metrics.render();
    assert!(!metrics.contains("mesh_endpoint_retries_total 0"), "none was tried in clear");
    // One that is in clear to that endpoint ends with the same review.
    let other_port = SocketAddr::new(closed.ip, APPLICATION_PORT + 1);
    let listener = TcpListener::bind(other_port).await.unwrap();
    let mut in_clear = client.connect(other_port).await;
    let _accepted = listener.accept().await.unwrap();
    standing(Membership::Lost);
    let mut byte = [0];
    assert!(timeout(PATIENCE, in_clear.read(&mut byte)).await.unwrap().is_err());
    for stream in &mut streams {
        assert_echo(stream, "still").await;
    }
}

/// Of three endpoints two refuse: a connection that chooses them both is refused, though the third would take it.
#[tokio::test]
async fn a_third_endpoint_is_not_tried() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let vip = SocketAddr::new(mesh.service(), PORT);
    let _closed = [mesh.endpoint("closed").await, mesh.endpoint("shut").await];
    let open = mesh.endpoint("open").await;
    let _application = open.echo().await;
    let mut refused = 0;
    for _ in 0..MANY {
        let mut stream = client.connect(vip).await;
        stream.write_all(b"x").await.unwrap();
        let mut byte = [0];
        refused += usize::from(timeout(PATIENCE, stream.read(&mut byte)).await.unwrap().is_err());
    }
    assert!((1..MANY).contains(&refused), "{refused} of {MANY} were refused");
    mesh.near.logs_reason("connect_failed_at_destination").await;
    let metrics = mesh.near.metrics.render();
    let retries = metrics
        .lines()
        .find_map(|line| line.strip_prefix("mesh_endpoint_retries_total "))
        .unwrap();
    let retries: usize = retries.parse().unwrap();
    assert!(
        (refused..=MANY).contains(&retries),
        "{retries} retries, {refused} were refused"
    );
}

#[tokio::test]
async fn what_no_endpoint_can_take_is_refused_with_its_reason() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let vip = mesh.service();
    assert_refused(client.connect(SocketAddr::new(vip, PORT)).await).await;
    mesh.near.logs_reason("no_healthy_endpoint").await;
    let mut endpoint = mesh.endpoint("server").await;
    assert_refused(client.connect(SocketAddr::new(vip, PORT + 1)).await).await;
    mesh.near.logs_reason("service_port_unknown").await;
    assert_refused(client.connect(SocketAddr::new(vip, PORT)).await).await;
    mesh.near.logs_reason("connect_failed_at_destination").await;
    let _application = endpoint.echo().await;
    assert_echo(&mut client.connect(SocketAddr::new(vip, PORT)).await, "the only one").await;
    endpoint.workload.healthy = false;
    mesh.tell(vec![Change::Workload(endpoint.workload.clone())]);
    assert_refused(client.connect(SocketAddr::new(vip, PORT)).await).await;
}

#[tokio::test]
async fn a_denial_is_not_asked_of_another_endpoint() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let vip = SocketAddr::new(mesh.service(), PORT);
    let mut running = Vec::new();
    for name in ["denies", "allows"] {
        let mut endpoint = mesh.endpoint(name).await;
        if name == "denies" {
            endpoint.workload.policies = vec!["shop/deny".into()];
            mesh.tell(vec![
                Change::Policy(Arc::new(Policy {
                    name: "shop/deny".into(),
                    namespace: "shop".into(),
                    scope: Scope::WorkloadSelector,
                    action: Action::Deny,
                    rules: vec![Rule::default()],
                    dry_run: false,
                })),
                Change::Workload(endpoint.workload.clone()),
            ]);
        }
        running.push((endpoint.echo().await, endpoint));
    }
    let mut refused = 0;
    for _ in 0..MANY {
        let mut stream = client.connect(vip).await;
        stream.write_all(b"x").await.unwrap();
        let mut byte = [0];
        refused += usize::from(timeout(PATIENCE, stream.read(&mut byte)).await.unwrap().is_err());
    }
    assert!((1..MANY).contains(&refused), "{refused}");
    mesh.near.logs_reason("denied_by_destination").await;
}

impl Mesh {
    /// Where so many connections went.
    async fn chosen(&self, client: &Pod, vip: SocketAddr, times: usize) -> Vec<String> {
        let mut chosen = Vec::new();
        for _ in 0..times {
            let mut stream = client.connect(vip).await;
            let port = stream.local_addr().unwrap().port();
            assert_echo(&mut stream, "by the service").await;
            drop(stream);
            let source = format!("{}:{port}", client.ip);
            // One that was refused before may have had the port.
            let line = self
                .near
                .log_line(|line| line["source_address"] == source.as_str() && line["result"] != "refused")
                .await;
            chosen.push(line["destination_address"].as_str().unwrap().to_owned());
        }
        chosen
    }

    fn not_kept(&self) -> String {
        let metrics = self.near.metrics.render();
        let mut lines = metrics.lines();
        lines
            .find_map(|line| line.strip_prefix("mesh_affinities_not_kept_total "))
            .unwrap()
            .to_owned()
    }
}

#[tokio::test]
async fn a_client_keeps_the_endpoint_that_took_it() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let vip = fresh_address();
    let affinity = Some(Duration::from_secs(3600));
    mesh.tell(vec![Change::Service(Service { affinity, ..web(vip) })]);
    let vip = SocketAddr::new(vip, PORT);
    // Of 21 endpoints the address's own choice is another one, 20 times out of 21; what is kept does not change with them.
    let first = mesh.endpoint("first").await;
    let _first = first.echo().await;
    let kept = mesh.chosen(&client, vip, 1).await;
    let mut others = Vec::new();
    for n in 0..20 {
        let other = mesh.endpoint(&format!("other-{n}")).await;
        others.push((other.echo().await, other));
    }
    let chosen = mesh.chosen(&client, vip, MANY).await;
    assert!(chosen.iter().all(|address| *address == kept[0]), "{kept:?}, then {chosen:?}");
    assert_eq!(mesh.not_kept(), "0");
}

#[tokio::test]
async fn an_endpoint_that_is_not_remembered_is_counted_and_the_same_while_nothing_changes() {
    let mesh = Mesh::with_limits(Limits {
        affinities_per_pod: 0,
        ..Limits::default()
    });
    let client = mesh.pod(&mesh.near, "client").await;
    let vip = fresh_address();
    let affinity = Some(Duration::from_secs(3600));
    mesh.tell(vec![Change::Service(Service { affinity, ..web(vip) })]);
    let mut endpoints = Vec::new();
    for n in 0..3 {
        let endpoint = mesh.endpoint(&format!("endpoint-{n}")).await;
        endpoints.push((endpoint.echo().await, endpoint));
    }
    let chosen = mesh.chosen(&client, SocketAddr::new(vip, PORT), MANY).await;
    assert!(chosen.iter().all(|address| *address == chosen[0]), "{chosen:?}");
    assert_eq!(mesh.not_kept(), MANY.to_string());
}

#[tokio::test]
async fn a_service_of_the_node_has_no_endpoint_elsewhere() {
    let mesh = Mesh::new();
    let client = mesh.pod(&mesh.near, "client").await;
    let vip = fresh_address();
    mesh.tell(vec![Change::Service(Service {
        node_local: true,
        ..web(vip)
    })]);
    let vip = SocketAddr::new(vip, PORT);
    assert_refused(client.connect(vip).await).await;
    mesh.near.logs_reason("no_healthy_endpoint").await;
    let mut elsewhere = mesh.endpoint("elsewhere").await;
    elsewhere.workload.node = "node-2".into();
    mesh.tell(vec![Change::Workload(elsewhere.workload.clone())]);
    let _elsewhere = elsewhere.echo().await;
    assert_refused(client.connect(vip).await).await;
    mesh.near.logs_reason("no_local_endpoint").await;
    let mut here = mesh.endpoint("here").await;
    here.workload.node = NODE.into();
    mesh.tell(vec![Change::Workload(here.workload.clone())]);
    let _here = here.echo().await;
    let chosen = mesh.chosen(&client, vip, MANY).await;
    assert!(
        chosen.iter().all(|address| *address == here.application().to_string()),
        "{chosen:?}"
    );
}
