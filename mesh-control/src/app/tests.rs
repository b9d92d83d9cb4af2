//! The whole control plane in this process: a folder, TLS, tokens and a real gRPC client.

use std::path::PathBuf;
use std::time::Duration;

use mesh_proto::ca::IstioCertificateRequest;
use mesh_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status as ErrorDetail};
use mesh_proto::node::node_reports_client::NodeReportsClient;
use mesh_proto::node::{NodeReport, PodReport, Proof, ReportReceipt};
use mesh_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, SETTINGS_TYPE_URL, mesh, workload};
use prost::Message as _;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SignatureAlgorithm};
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Streaming};

use super::*;
use crate::tokens::TokenFile;

mod bounds;
mod node_pods;
mod sizes;

/// Far beyond what any step takes; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(30);
const WEB: &str = "Kubernetes//Pod/shop/web";
const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {culvert.dev/mesh: enabled}}\n";

fn pod(name: &str, ip: &str, node: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: uid-{name}}}\n\
         spec: {{nodeName: {node}, serviceAccountName: {name}}}\nstatus: {{podIPs: [{{ip: {ip}}}]}}\n"
    )
}

struct Bench {
    dir: tempfile::TempDir,
    args: ServeArgs,
    bounds: Bounds,
    running: Running,
}

impl Bench {
    async fn start(pods: &str) -> Self {
        Self::start_within(pods, Bounds::default()).await
    }

    async fn start_within(pods: &str, bounds: Bounds) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        std::fs::create_dir(dir.path().join("registry")).expect("registry");
        std::fs::write(dir.path().join("registry/mesh.yaml"), format!("{NAMESPACE}{pods}")).expect("manifest");
        let args = ServeArgs {
            registry: Some(dir.path().join("registry")),
            kubernetes: false,
            namespace: "culvert-system".into(),
            state_dir: Some(dir.path().join("state")),
            listen: "127.0.0.1:0".parse().expect("address"),
            admin: "127.0.0.1:0".parse().expect("address"),
            metrics: Some("127.0.0.1:0".parse().expect("address")),
            trust_domain: "cluster.local".into(),
            cluster: "Kubernetes".into(),
            certificate_lifetime: Duration::from_secs(3600),
            pod_cidr: vec!["10.0.0.0/8".parse().expect("range")],
            server_name: vec![],
            agent_service_account: "culvert-system/mesh-agent".parse().expect("account"),
        };
        let running = start_within(&args, bounds).await.expect("start");
        Self {
            dir,
            args,
            bounds,
            running,
        }
    }

    fn write(&self, file: &str, text: &str) {
        std::fs::write(self.dir.path().join("registry").join(file), text).expect("manifest");
    }

    fn token(&self, node: &str) -> TokenFile {
        let output: PathBuf = self.dir.path().join(format!("{node}.json"));
        let args = NodeTokenArgs {
            node: node.into(),
            state_dir: self.dir.path().join("state"),
            address: self.running.listen.to_string(),
            output: Some(output.clone()),
            rotate: false,
        };
        node_token(&args).expect("token");
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(std::fs::metadata(&output).expect("token").permissions().mode() & 0o777, 0o600);
        serde_json::from_slice(&std::fs::read(&output).expect("token")).expect("JSON")
    }

    async fn channel(&self) -> Channel {
        let root = self.running.control.trust_bundle()[0].clone();
        connect(self.running.listen, root).await.expect("connect")
    }

    async fn discovery(&self, token: &TokenFile, types: Vec<DeltaDiscoveryRequest>) -> Client {
        Client::open(self.channel().await, &token.secret, types)
            .await
            .expect("stream")
    }

    async fn restart(&mut self) {
        let args = ServeArgs {
            listen: "127.0.0.1:0".parse().expect("address"),
            ..self.args.clone()
        };
        let again = start_within(&args, self.bounds).await.expect("start");
        std::mem::replace(&mut self.running, again).stop().await;
    }
}

async fn connect(address: SocketAddr, root_pem: String) -> Result<Channel, tonic::transport::Error> {
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(root_pem))
        .domain_name("localhost");
    Endpoint::from_shared(format!("https://{address}"))?
        .tls_config(tls)?
        .connect()
        .await
}

fn authorized<T>(message: T, secret: &str) -> Request<T> {
    let mut request = Request::new(message);
    let value: MetadataValue<_> = format!("Bearer {secret}").parse().expect("header");
    request.metadata_mut().insert("authorization", value);
    request
}

fn text_struct(name: &str, value: &str) -> prost_types::Struct {
    let value = prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(value.into())),
    };
    prost_types::Struct {
        fields: [(name.to_owned(), value)].into(),
    }
}

fn first(type_url: &str, node: &str) -> DeltaDiscoveryRequest {
    let node = Node {
        metadata: Some(text_struct("NODE_NAME", node)),
        ..Node::default()
    };
    DeltaDiscoveryRequest {
        node: Some(node),
        type_url: type_url.into(),
        ..DeltaDiscoveryRequest::default()
    }
}

struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Client {
    async fn open(channel: Channel, secret: &str, types: Vec<DeltaDiscoveryRequest>) -> Result<Self, tonic::Status> {
        let (requests, receiver) = mpsc::channel(16);
        for request in types {
            requests.send(request).await.expect("room");
        }
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses = client
            .delta_aggregated_resources(authorized(ReceiverStream::new(receiver), secret))
            .await?
            .into_inner();
        Ok(Self { requests, responses })
    }

    async fn next(&mut self) -> Result<DeltaDiscoveryResponse, tonic::Status> {
        let message = timeout(PATIENCE, self.responses.message()).await.expect("a response in time");
        message.map(|message| message.expect("an open stream"))
    }

    async fn answer(&self, response: &DeltaDiscoveryResponse, error: Option<&str>) {
        let error_detail = error.map(|message| ErrorDetail {
            message: message.into(),
            ..ErrorDetail::default()
        });
        let request = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail,
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(request).await.expect("an open stream");
    }

    /// The next response, acknowledged.
    async fn take(&mut self) -> DeltaDiscoveryResponse {
        let response = self.next().await.expect("a response");
        self.answer(&response, None).await;
        response
    }
}

fn capture_of(response: &DeltaDiscoveryResponse, name: &str) -> mesh::capture::State {
    let resource = response
        .resources
        .iter()
        .find(|resource| resource.name == name)
        .expect("resource");
    let any = resource.resource.as_ref().expect("resource");
    assert_eq!(any.type_url, ADDRESS_TYPE_URL);
    let Some(workload::address::Type::Workload(workload)) =
        workload::Address::decode(any.value.as_slice()).expect("address").r#type
    else {
        panic!("no workload")
    };
    let config = workload.extensions[0].config.as_ref().expect("config");
    mesh::Capture::decode(config.value.as_slice()).expect("capture").state()
}

#[tokio::test]
async fn only_nodes_with_a_token_get_in_and_only_as_themselves() {
    let bench = Bench::start(&pod("web", "10.0.0.1", "node-a")).await;
    let token = bench.token("node-a");
    assert_eq!(token.root_sha256.len(), 64);
    // Another root does not vouch for this server.
    let other = tempfile::tempdir().expect("directory");
    let other = StateDir::open(&other.path().join("state")).expect("state");
    let other = Authority::open(&other, "cluster.local", OffsetDateTime::now_utc()).expect("root");
    assert!(connect(bench.running.listen, other.root_pem().to_owned()).await.is_err());

    for secret in ["", "wrong", "node-a.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"] {
        let refused = Client::open(bench.channel().await, secret, vec![first(ADDRESS_TYPE_URL, "node-a")]).await;
        assert_eq!(refused.err().expect("refused").code(), Code::Unauthenticated);
    }
    let mut foreign = bench.discovery(&token, vec![first(ADDRESS_TYPE_URL, "node-b")]).await;
    assert_eq!(foreign.next().await.expect_err("refused").code(), Code::PermissionDenied);
    let mut own = bench.discovery(&token, vec![first(ADDRESS_TYPE_URL, "node-a")]).await;
    assert_eq!(own.take().await.resources.len(), 1);
    let metrics = bench.running.control.metrics.text().expect("metrics");
    assert!(
        metrics.contains("mesh_control_authentication_failed_total{reason=\"unknown\"} 3"),
        "{metrics}"
    );
    assert!(
        metrics.contains("mesh_control_authentication_failed_total{reason=\"other_node\"} 1"),
        "{metrics}"
    );
    bench.running.stop().await;
}

#[tokio::test]
async fn changes_of_the_folder_are_pushed_and_broken_ones_keep_what_was() {
    let bench = Bench::start(&pod("web", "10.0.0.1", "node-a")).await;
    let token = bench.token("node-a");
    let types = [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, SETTINGS_TYPE_URL].map(|url| first(url, "node-a"));
    let mut client = bench.discovery(&token, types.into()).await;
    let mut seen = std::collections::BTreeMap::new();
    for _ in 0..3 {
        let response = client.take().await;
        seen.insert(response.type_url.clone(), response.resources.len());
    }
    assert_eq!(seen[ADDRESS_TYPE_URL], 1);
    assert_eq!(
        seen[AUTHORIZATION_TYPE_URL], 0,
        "an empty response, or the client would never be ready"
    );
    assert_eq!(seen[SETTINGS_TYPE_URL], 1);

    bench.write("policy.yaml", "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: {action: Allow}\n");
    let response = client.take().await;
    assert_eq!(
        (response.type_url.as_str(), response.resources[0].name.as_str()),
        (AUTHORIZATION_TYPE_URL, "shop/p")
    );
    // Broken beside good: only the good one moves.
    bench.write("policy.yaml", "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: {action: Alow}\n");
    bench.write("more.yaml", &pod("late", "10.0.0.2", "node-b"));
    let response = client.take().await;
    assert_eq!(response.resources[0].name, "Kubernetes//Pod/shop/late");
    assert!(response.removed_resources.is_empty());
    let metrics = bench.running.control.metrics.text().expect("metrics");
    assert!(
        metrics.contains("mesh_control_manifests_rejected{reason=\"field\"} 1"),
        "{metrics}"
    );
    assert!(bench.running.control.status()["rejected_manifests"][0]["last_good_in_force"] == true);
    // Gone for good.
    std::fs::remove_file(bench.dir.path().join("registry/policy.yaml")).expect("remove");
    let response = client.take().await;
    assert_eq!(response.removed_resources, ["shop/p"]);
    bench.running.stop().await;
}

#[tokio::test]
async fn a_restarted_control_plane_resumes_its_clients_and_keeps_proofs() {
    let mut bench = Bench::start(&pod("web", "10.0.0.1", "node-a")).await;
    let (a, b) = (bench.token("node-a"), bench.token("node-b"));
    let mut client = bench.discovery(&a, vec![first(ADDRESS_TYPE_URL, "node-a")]).await;
    assert_eq!(capture_of(&client.take().await, WEB), mesh::capture::State::Pending);

    let report = |sequence, proof: Proof| NodeReport {
        sequence,
        pods: vec![PodReport {
            uid: "uid-web".into(),
            namespace: "shop".into(),
            name: "web".into(),
            proof: proof.into(),
            ..PodReport::default()
        }],
        ..NodeReport::default()
    };
    // Another node's word on the Pod counts nothing.
    let (_foreign, mut receipts) = reports(&bench, &b, report(1, Proof::Proven)).await;
    assert_eq!(receipts.message().await.expect("receipt").expect("receipt").sequence, 1);
    let metrics = bench.running.control.metrics.text().expect("metrics");
    assert!(metrics.contains("mesh_control_report_pods_ignored_total 1"), "{metrics}");
    assert!(metrics.contains("mesh_control_pods{state=\"pending\"} 1"), "{metrics}");

    let (own, mut receipts) = reports(&bench, &a, report(1, Proof::Proven)).await;
    assert_eq!(receipts.message().await.expect("receipt").expect("receipt").sequence, 1);
    let proven = client.take().await;
    assert_eq!(capture_of(&proven, WEB), mesh::capture::State::Proven);
    let version = proven.resources[0].version.clone();

    bench.restart().await;
    drop((own, receipts));
    let held = |versions: &[(&str, &str)]| DeltaDiscoveryRequest {
        initial_resource_versions: versions
            .iter()
            .map(|(name, version)| (name.to_string(), version.to_string()))
            .collect(),
        ..first(ADDRESS_TYPE_URL, "node-a")
    };
    let mut client = bench.discovery(&a, vec![held(&[(WEB, &version), ("gone", "1")])]).await;
    let resumed = client.take().await;
    assert!(resumed.resources.is_empty(), "still proven, and so of the same version");
    assert_eq!(resumed.removed_resources, ["gone"]);

    let (_own, mut receipts) = reports(&bench, &a, report(1, Proof::Lost)).await;
    receipts.message().await.expect("receipt");
    let lost = client.next().await.expect("update");
    assert_eq!(capture_of(&lost, WEB), mesh::capture::State::Lost);
    client.answer(&lost, Some("cannot use it")).await;
    // A rejected resource is not sent again; another one is.
    bench.write("more.yaml", &pod("late", "10.0.0.2", "node-b"));
    let response = client.take().await;
    assert_eq!(
        response
            .resources
            .iter()
            .map(|resource| resource.name.as_str())
            .collect::<Vec<_>>(),
        ["Kubernetes//Pod/shop/late"]
    );
    assert_eq!(
        bench.running.control.status()["nodes"]["node-a"]["refused_responses"][ADDRESS_TYPE_URL],
        "cannot use it"
    );
    bench.running.stop().await;
}

async fn reports(bench: &Bench, token: &TokenFile, report: NodeReport) -> (mpsc::Sender<NodeReport>, Streaming<ReportReceipt>) {
    let (sender, receiver) = mpsc::channel(4);
    sender.send(report).await.expect("room");
    let mut client = NodeReportsClient::new(bench.channel().await);
    let receipts = client
        .report(authorized(ReceiverStream::new(receiver), &token.secret))
        .await
        .expect("stream")
        .into_inner();
    (sender, receipts)
}

#[tokio::test]
async fn certificates_are_signed_for_members_on_the_callers_node_only() {
    let bench = Bench::start(&(pod("web", "10.0.0.1", "node-a") + &pod("db", "10.0.0.2", "node-b"))).await;
    let token = bench.token("node-a");
    let mut client = IstioCertificateServiceClient::new(bench.channel().await);
    let request = |identity: &str, algorithm: &'static SignatureAlgorithm| {
        let key = KeyPair::generate_for(algorithm).expect("key");
        IstioCertificateRequest {
            csr: CertificateParams::default()
                .serialize_request(&key)
                .expect("request")
                .pem()
                .expect("PEM"),
            validity_duration: 86_400,
            metadata: Some(text_struct("ImpersonatedIdentity", identity)),
        }
    };
    let own = "spiffe://cluster.local/ns/shop/sa/web";
    let signed = client
        .create_certificate(authorized(request(own, &PKCS_ECDSA_P256_SHA256), &token.secret))
        .await
        .expect("signed");
    let chain = signed.into_inner().cert_chain;
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1], bench.running.control.trust_bundle()[0]);
    // What was asked for, and never more than the operator allows.
    for (asked, granted) in [(600, 600), (86_400, 3600), (0, 3600)] {
        let before = OffsetDateTime::now_utc().unix_timestamp();
        let request = IstioCertificateRequest {
            validity_duration: asked,
            ..request(own, &PKCS_ECDSA_P256_SHA256)
        };
        let signed = client
            .create_certificate(authorized(request, &token.secret))
            .await
            .expect("signed");
        let after = OffsetDateTime::now_utc().unix_timestamp();
        let chain = signed.into_inner().cert_chain;
        let (_, leaf) = x509_parser::pem::parse_x509_pem(chain[0].as_bytes()).expect("PEM");
        let not_after = leaf.parse_x509().expect("certificate").validity().not_after.timestamp();
        assert!((before + granted..=after + granted).contains(&not_after), "asked for {asked}");
    }

    let cases = [
        (
            "spiffe://cluster.local/ns/shop/sa/db",
            &PKCS_ECDSA_P256_SHA256,
            Code::PermissionDenied,
        ),
        (
            "spiffe://cluster.local/ns/shop/sa/none",
            &PKCS_ECDSA_P256_SHA256,
            Code::PermissionDenied,
        ),
        (own, &PKCS_ED25519, Code::InvalidArgument),
    ];
    for (identity, algorithm, code) in cases {
        let refused = client
            .create_certificate(authorized(request(identity, algorithm), &token.secret))
            .await;
        let status = refused.expect_err(&format!("signed for a node that has no such Pod: {identity}"));
        assert_eq!(status.code(), code, "{identity}");
    }
    let refused = client
        .create_certificate(authorized(request(own, &PKCS_ECDSA_P256_SHA256), "node-a.x"))
        .await;
    assert_eq!(refused.expect_err("refused").code(), Code::Unauthenticated);
    bench.running.stop().await;
}

#[tokio::test]
async fn the_serving_certificate_learns_the_names_of_new_tokens() {
    let bench = Bench::start("").await;
    let tokens = Tokens::open(&StateDir::open(&bench.dir.path().join("state")).expect("state")).expect("tokens");
    tokens.issue("node-z", "mesh.example.test:15012", "00", false).expect("token");
    let root = bench.running.control.trust_bundle()[0].clone();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(root))
        .domain_name("mesh.example.test");
    let endpoint = Endpoint::from_shared(format!("https://{}", bench.running.listen))
        .expect("URI")
        .tls_config(tls)
        .expect("TLS");
    let connected = timeout(PATIENCE, async {
        while endpoint.connect().await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    connected.await.expect("the name is learned");
    bench.running.stop().await;
}

async fn ask(admin: SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(admin).await.expect("connect");
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("write");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("read");
    text
}

#[tokio::test]
async fn admin_answers() {
    let bench = Bench::start("").await;
    for (path, expected) in [
        ("/healthz/ready", "200 OK"),
        ("/metrics", "mesh_control_objects"),
        ("/status", "\"ready\": true"),
        ("/x", "404"),
    ] {
        let text = ask(bench.running.admin, path).await;
        assert!(text.contains(expected), "{path}: {text}");
    }
    // What names the registry's objects stays on loopback.
    let public = bench.running.metrics.expect("--metrics");
    for (path, expected) in [
        ("/healthz/ready", "200 OK"),
        ("/metrics", "mesh_control_objects"),
        ("/status", "404"),
        ("/x", "/metrics, /healthz/ready\n"),
    ] {
        let text = ask(public, path).await;
        assert!(text.contains(expected), "{path}: {text}");
    }
    let mut open = bench.args.clone();
    open.admin = "0.0.0.0:0".parse().expect("address");
    assert!(start(&open).await.err().expect("refused").to_string().contains("loopback"));
    bench.running.stop().await;
}
