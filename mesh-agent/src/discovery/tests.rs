//! The client against a control plane that is played by hand, over real TLS.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_proto::discovery::aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer};
use mesh_proto::discovery::{DeltaDiscoveryRequest, Resource};
use mesh_proto::workload::{Address, Workload as WireWorkload, address};
use prost::Message as _;
use prost_types::Any;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity as TlsIdentity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::config::{Credentials, NodeToken, Secret};

/// Far longer than anything here takes: it only keeps a broken test from hanging.
const PATIENCE: Duration = Duration::from_secs(30);
const SECRET: &str = "s3cret";

/// One stream as the server sees it.
struct Peer {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

impl Peer {
    async fn request(&mut self) -> DeltaDiscoveryRequest {
        tokio::time::timeout(PATIENCE, self.requests.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
    }

    /// The first three requests of a stream, by type.
    async fn openings(&mut self) -> BTreeMap<String, DeltaDiscoveryRequest> {
        let mut openings = BTreeMap::new();
        for _ in 0..3 {
            let request = self.request().await;
            openings.insert(request.type_url.clone(), request);
        }
        openings
    }

    async fn respond(&mut self, type_url: &str, nonce: &str, resources: Vec<Resource>, removed: &[&str]) {
        let response = DeltaDiscoveryResponse {
            type_url: type_url.to_owned(),
            nonce: nonce.to_owned(),
            system_version_info: format!("version-of-{nonce}"),
            resources,
            removed_resources: removed.iter().map(|&name| name.to_owned()).collect(),
        };
        self.responses.send(Ok(response)).await.unwrap();
    }

    async fn answer_all_empty(&mut self) {
        for type_url in [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, SETTINGS_TYPE_URL] {
            self.respond(type_url, type_url, vec![], &[]).await;
            assert_eq!(self.request().await.response_nonce, type_url);
        }
    }
}

struct Service(mpsc::Sender<Peer>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        if request
            .metadata()
            .get("authorization")
            .is_none_or(|value| value != &format!("Bearer {SECRET}"))
        {
            return Err(Status::unauthenticated("no"));
        }
        let (responses, receiver) = mpsc::channel(16);
        let peer = Peer {
            requests: request.into_inner(),
            responses,
        };
        self.0.send(peer).await.map_err(|_| Status::unavailable("test is over"))?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// A root and a serving certificate that it signed.
struct Pki {
    root_sha256: [u8; 32],
    tls: TlsIdentity,
}

fn pki(server_name: &str) -> Pki {
    let root_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&root_key).unwrap();
    let issuer = Issuer::new(params, root_key);
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec![server_name.to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    Pki {
        root_sha256: Sha256::digest(root.der()).into(),
        tls: TlsIdentity::from_pem(format!("{}{}", leaf.pem(), root.pem()), key.serialize_pem()),
    }
}

/// Serves until the token is cancelled; streams come out of the channel.
async fn serve(address: SocketAddr, tls: TlsIdentity) -> (SocketAddr, mpsc::Receiver<Peer>, CancellationToken) {
    // A restarted server's port may still be in use for a moment.
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let address = listener.local_addr().unwrap();
    let (peers, receiver) = mpsc::channel(4);
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let server = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(tls))
        .unwrap()
        .add_service(AggregatedDiscoveryServiceServer::new(Service(peers)))
        // Ends connections too, as a process that ends does.
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped.cancelled_owned());
    tokio::spawn(async move { server.await.unwrap() });
    (address, receiver, stop)
}

fn by_token(token: NodeToken) -> Credentials {
    Credentials::Node { token, control: None }
}

struct Client {
    state: Arc<SharedState>,
    status: watch::Receiver<DiscoveryStatus>,
    stop: CancellationToken,
}

impl Client {
    fn start(address: SocketAddr, root_sha256: [u8; 32]) -> Self {
        let token = NodeToken {
            node: "node-a".to_owned(),
            secret: Secret::new(SECRET.to_owned()),
            root_sha256,
            address: address.to_string(),
        };
        let control = ControlPlane::new(&by_token(token)).unwrap();
        let (state, stop) = (SharedState::new(), CancellationToken::new());
        let (sender, status) = watch::channel(DiscoveryStatus::default());
        let subscriptions = Arc::default();
        tokio::spawn(run(
            control,
            NodeName("node-a".into()),
            subscriptions,
            state.clone(),
            sender,
            stop.clone(),
        ));
        Self { state, status, stop }
    }

    async fn until(&mut self, what: impl FnMut(&DiscoveryStatus) -> bool) {
        tokio::time::timeout(PATIENCE, self.status.wait_for(what))
            .await
            .unwrap()
            .unwrap();
    }

    fn knows(&self, uid: &str) -> bool {
        self.state.read(|state| state.by_uid(uid).is_some())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn next(peers: &mut mpsc::Receiver<Peer>) -> Peer {
    tokio::time::timeout(PATIENCE, peers.recv()).await.unwrap().unwrap()
}

fn workload(name: &str, version: &str) -> Resource {
    let uid = format!("c//Pod/shop/{name}");
    let workload = WireWorkload {
        uid: uid.clone(),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![vec![10, 0, 0, 1]],
        ..WireWorkload::default()
    };
    resource(
        &uid,
        version,
        Address {
            r#type: Some(address::Type::Workload(workload)),
        }
        .encode_to_vec(),
    )
}

fn resource(name: &str, version: &str, value: Vec<u8>) -> Resource {
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(Any {
            type_url: ADDRESS_TYPE_URL.to_owned(),
            value,
        }),
        ..Resource::default()
    }
}

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

#[tokio::test]
async fn subscribes_applies_and_then_acknowledges() {
    let pki = pki(transport::CONTROL_SERVER_NAME);
    let (address, mut peers, _stop) = serve(ANY_PORT, pki.tls).await;
    let mut client = Client::start(address, pki.root_sha256);
    let mut peer = next(&mut peers).await;
    for (_, opening) in peer.openings().await {
        let metadata = opening.node.unwrap().metadata.unwrap();
        assert_eq!(
            metadata.fields["NODE_NAME"].kind,
            Some(Kind::StringValue("node-a".to_owned()))
        );
        assert!(opening.initial_resource_versions.is_empty());
    }
    peer.respond(ADDRESS_TYPE_URL, "n1", vec![workload("web", "1")], &[]).await;
    let ack = peer.request().await;
    assert_eq!(
        (ack.type_url.as_str(), ack.response_nonce.as_str(), ack.error_detail),
        (ADDRESS_TYPE_URL, "n1", None)
    );
    assert!(client.knows("c//Pod/shop/web"), "acknowledged is applied");
    assert!(!client.status.borrow().synced, "two types have not answered");
    peer.answer_all_empty().await;
    client.until(|status| status.synced).await;
    assert_eq!(
        client.status.borrow().enforced_versions[ADDRESS_TYPE_URL],
        format!("version-of-{ADDRESS_TYPE_URL}")
    );
    peer.respond(ADDRESS_TYPE_URL, "n2", vec![], &["c//Pod/shop/web"]).await;
    assert_eq!(peer.request().await.response_nonce, "n2");
    assert!(!client.knows("c//Pod/shop/web"));
}

#[tokio::test]
async fn a_restarted_server_is_told_what_is_held_and_nothing_is_lost_meanwhile() {
    let pki = pki(transport::CONTROL_SERVER_NAME);
    let (address, mut peers, stop) = serve(ANY_PORT, pki.tls.clone()).await;
    let mut client = Client::start(address, pki.root_sha256);
    let mut peer = next(&mut peers).await;
    peer.openings().await;
    peer.answer_all_empty().await;
    peer.respond(ADDRESS_TYPE_URL, "n1", vec![workload("web", "7"), workload("gone", "8")], &[])
        .await;
    peer.request().await;
    // The stream ends, and then the server.
    drop(peer);
    stop.cancel();
    drop(peers);
    client.until(|status| !status.connected).await;
    assert!(client.knows("c//Pod/shop/web") && client.status.borrow().synced);

    let (_, mut peers, _stop) = serve(address, pki.tls).await;
    let mut peer = next(&mut peers).await;
    let openings = peer.openings().await;
    let held: BTreeMap<_, _> = openings[ADDRESS_TYPE_URL]
        .initial_resource_versions
        .clone()
        .into_iter()
        .collect();
    assert_eq!(
        held.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect::<Vec<_>>(),
        [("c//Pod/shop/gone", "8"), ("c//Pod/shop/web", "7")]
    );
    peer.respond(ADDRESS_TYPE_URL, "n1", vec![], &["c//Pod/shop/gone"]).await;
    peer.request().await;
    assert!(client.knows("c//Pod/shop/web") && !client.knows("c//Pod/shop/gone"));
}

#[tokio::test]
async fn garbage_is_refused_by_name_and_the_stream_goes_on() {
    let pki = pki(transport::CONTROL_SERVER_NAME);
    let (address, mut peers, _stop) = serve(ANY_PORT, pki.tls).await;
    let client = Client::start(address, pki.root_sha256);
    let mut peer = next(&mut peers).await;
    peer.openings().await;
    let all = vec![
        resource("noise", "1", vec![0xff; 40]),
        workload("good", "1"),
        resource("nothing", "1", vec![]),
    ];
    peer.respond(ADDRESS_TYPE_URL, "n1", all, &[]).await;
    let nack = peer.request().await;
    let message = nack.error_detail.unwrap().message;
    assert!(
        message.contains("noise") && message.contains("nothing") && !message.contains("good"),
        "{message}"
    );
    assert!(client.knows("c//Pod/shop/good"));
    assert_eq!(client.status.borrow().rejected.len(), 2);

    peer.respond("type.googleapis.com/nobody.asked", "n2", vec![], &[]).await;
    let nack = peer.request().await;
    assert!(nack.error_detail.is_some() && nack.type_url == "type.googleapis.com/nobody.asked");
    // Something else arrives: those two are as unusable as before, and the control plane must not take them for enforced.
    peer.respond(ADDRESS_TYPE_URL, "n3", vec![workload("good", "2")], &["noise"])
        .await;
    assert!(peer.request().await.error_detail.is_none());
    let rejected = client.status.borrow().rejected.clone();
    assert!(
        rejected.len() == 1 && rejected[0].starts_with("Address nothing: "),
        "{rejected:?}"
    );
    peer.respond(ADDRESS_TYPE_URL, "n4", vec![], &["nothing"]).await;
    assert!(peer.request().await.error_detail.is_none());
    assert!(client.status.borrow().rejected.is_empty());
}

#[tokio::test]
async fn settings_are_not_waited_for_for_ever() {
    let pki = pki(transport::CONTROL_SERVER_NAME);
    let (address, mut peers, _stop) = serve(ANY_PORT, pki.tls).await;
    let mut client = Client::start(address, pki.root_sha256);
    let mut peer = next(&mut peers).await;
    peer.openings().await;
    for type_url in [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL] {
        peer.respond(type_url, "n", vec![], &[]).await;
        peer.request().await;
    }
    client.until(|status| status.synced).await;
}

#[tokio::test]
async fn settings_that_cannot_be_used_are_not_taken_for_the_defaults() {
    let pki = pki(transport::CONTROL_SERVER_NAME);
    let (address, mut peers, _stop) = serve(ANY_PORT, pki.tls).await;
    let client = Client::start(address, pki.root_sha256);
    let mut peer = next(&mut peers).await;
    peer.openings().await;
    for type_url in [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL] {
        peer.respond(type_url, "n", vec![], &[]).await;
        peer.request().await;
    }
    let noise = Resource {
        resource: Some(Any {
            type_url: SETTINGS_TYPE_URL.to_owned(),
            value: vec![0xff; 4],
        }),
        ..resource(mesh_proto::SETTINGS_NAME, "1", vec![])
    };
    peer.respond(SETTINGS_TYPE_URL, "n", vec![noise], &[]).await;
    assert!(peer.request().await.error_detail.is_some());
    tokio::time::sleep(SETTINGS_PATIENCE + Duration::from_millis(200)).await;
    peer.respond(ADDRESS_TYPE_URL, "n2", vec![], &[]).await;
    peer.request().await;
    assert!(!client.status.borrow().synced);
}

#[tokio::test]
async fn a_policy_that_cannot_be_read_denies_until_it_can() {
    let pki = pki(transport::CONTROL_SERVER_NAME);
    let (address, mut peers, _stop) = serve(ANY_PORT, pki.tls).await;
    let client = Client::start(address, pki.root_sha256);
    let mut peer = next(&mut peers).await;
    peer.openings().await;
    let noise = Resource {
        resource: Some(Any {
            type_url: AUTHORIZATION_TYPE_URL.to_owned(),
            value: vec![0xff; 4],
        }),
        ..resource("shop/broken", "1", vec![])
    };
    peer.respond(AUTHORIZATION_TYPE_URL, "n", vec![noise], &[]).await;
    assert!(peer.request().await.error_detail.is_some());
    let policy = client.state.read(|state| state.policies().next().cloned()).unwrap();
    let denies = |namespace: &str| policy.scope == crate::policy::Scope::Namespace && &*policy.namespace == namespace;
    assert!(denies("shop") && policy.has_unknown_part() && !policy.dry_run);
    assert_eq!(policy.action, crate::policy::Action::Deny);
    assert_eq!(client.status.borrow().stand_ins, ["shop/broken"]);
    peer.respond(AUTHORIZATION_TYPE_URL, "n2", vec![], &["shop/broken"]).await;
    assert!(peer.request().await.error_detail.is_none());
    assert_eq!(client.state.read(|state| state.policies().count()), 0);
    assert!(client.status.borrow().stand_ins.is_empty());
}

#[tokio::test]
async fn an_unreadable_policy_that_is_deleted_meanwhile_denies_no_longer() {
    let pki = pki(transport::CONTROL_SERVER_NAME);
    let (address, mut peers, _stop) = serve(ANY_PORT, pki.tls).await;
    let client = Client::start(address, pki.root_sha256);
    let mut peer = next(&mut peers).await;
    peer.openings().await;
    // Of another type: not even looked into.
    peer.respond(AUTHORIZATION_TYPE_URL, "n", vec![resource("shop/broken", "1", vec![])], &[])
        .await;
    assert!(peer.request().await.error_detail.is_some());
    let policies = || client.state.read(|state| state.policies().count());
    assert_eq!(policies(), 1, "stands in");
    drop(peer);
    let mut peer = next(&mut peers).await;
    assert!(
        peer.openings().await[AUTHORIZATION_TYPE_URL]
            .initial_resource_versions
            .is_empty()
    );
    assert_eq!(policies(), 1, "until the server has answered");
    peer.respond(AUTHORIZATION_TYPE_URL, "n", vec![], &[]).await;
    peer.request().await;
    assert_eq!(policies(), 0);
}

#[tokio::test]
async fn a_server_that_drops_streams_is_come_back_to() {
    let pki = pki(transport::CONTROL_SERVER_NAME);
    let (address, mut peers, _stop) = serve(ANY_PORT, pki.tls).await;
    let mut client = Client::start(address, pki.root_sha256);
    for round in 1..=3 {
        let mut peer = next(&mut peers).await;
        peer.openings().await;
        peer.responses.send(Err(Status::internal("dropped"))).await.unwrap();
        client.until(|status| status.connections >= round && !status.connected).await;
    }
}

#[tokio::test]
async fn only_the_pinned_root_and_the_right_name_are_trusted() {
    for (name, root_is_pinned) in [(transport::CONTROL_SERVER_NAME, false), ("somebody-else", true)] {
        let presented = pki(name);
        let pinned = if root_is_pinned {
            presented.root_sha256
        } else {
            pki(name).root_sha256
        };
        let (address, mut peers, _stop) = serve(ANY_PORT, presented.tls).await;
        let token = NodeToken {
            node: "node-a".to_owned(),
            secret: Secret::new(SECRET.to_owned()),
            root_sha256: pinned,
            address: address.to_string(),
        };
        let (requests, receiver) = mpsc::channel(1);
        requests.send(DeltaDiscoveryRequest::default()).await.unwrap();
        let mut discovery = ControlPlane::new(&by_token(token)).unwrap().discovery();
        let status = discovery
            .delta_aggregated_resources(ReceiverStream::new(receiver))
            .await
            .unwrap_err();
        let why = causes(&status);
        assert!(why.contains("invalid peer certificate"), "{why}");
        assert!(peers.try_recv().is_err(), "no request, and no secret, has reached it");
    }
}
