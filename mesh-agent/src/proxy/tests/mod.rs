//! Two agents' proxies over plain loopback sockets: every Pod has an address of 127/8 of its own, everything else is as in a node.

mod admission;
mod bounds;
mod carry;
mod descriptors;
mod hostile;
mod memory;
mod pool;
mod raw;
mod refuse;
mod review;
mod service;
mod settings;
mod tls;
mod trust;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use mesh_common::{OUTBOUND_PORT, PLAINTEXT_INBOUND_PORT, TUNNEL_PORT};
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;

use super::*;
use crate::addr::OriginalDst;
use crate::capture::{CaptureError, PodNetwork, Probes, Upstream, UpstreamLease};
use crate::identity::Identity;
use crate::identity::store::CertifiedKeyPair;
use crate::policy::{Action, Clause, Match, Policy, Rule, Scope, StringMatch};
use crate::state::{Change, Settings};
use crate::workload::{Membership, Workload, WorkloadType};

/// Longer than anything here takes on a loaded machine; only a hang meets it.
const PATIENCE: Duration = Duration::from_secs(120);
pub(super) const APPLICATION_PORT: u16 = 8080;
/// The name of every agent's node.
pub(super) const NODE: &str = "node-1";

/// An address that no other test of this process has.
pub(super) fn fresh_address() -> IpAddr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!(next < 2_048, "too many addresses");
    // The process's id keeps runs at the same time apart. The first nets are left to others.
    let net = std::process::id() % 8_000 + 100;
    IpAddr::V4(Ipv4Addr::from(127 << 24 | net << 11 | next))
}

/// A certificate authority.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    roots: Arc<RootCertStore>,
    pub root: CertificateDer<'static>,
}

impl Authority {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        Self {
            issuer: Issuer::new(params, key),
            roots: Arc::new(roots),
            root: certificate.der().clone(),
        }
    }

    pub(super) fn issue(&self, identity: &Identity) -> Arc<CertifiedKeyPair> {
        let usages = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.issue_with(identity, &[&identity.to_string()], &usages, in_an_hour())
    }

    pub(super) fn issue_with(
        &self,
        identity: &Identity,
        uris: &[&str],
        usages: &[ExtendedKeyUsagePurpose],
        not_after: SystemTime,
    ) -> Arc<CertifiedKeyPair> {
        let not_before = not_after - Duration::from_secs(7200);
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        params.extended_key_usages = usages.to_vec();
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        Arc::new(CertifiedKeyPair {
            identity: identity.clone(),
            chain: vec![leaf.der().clone()],
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            roots: self.roots.clone(),
            not_before,
            not_after,
        })
    }
}

pub(super) fn in_an_hour() -> SystemTime {
    SystemTime::now() + Duration::from_secs(3600)
}

pub(super) fn a_minute_ago() -> SystemTime {
    SystemTime::now() - Duration::from_secs(60)
}

pub(super) fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "shop", account)
}

/// A client with this port is one of the agent's own connections to applications, come back. Beyond the ephemeral ones.
pub(super) const OWN_UPSTREAM_PORT: u16 = 61_234;

/// A Pod's network of plain sockets.
struct LoopbackNetwork {
    own: IpAddr,
    destinations: Mutex<HashMap<SocketAddr, OriginalDst>>,
    /// Local ports that the next upstream sockets get, though others may have them.
    shared_ports: Mutex<Vec<u16>>,
}

impl std::fmt::Debug for LoopbackNetwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the network of {}", self.own)
    }
}

impl PodNetwork for LoopbackNetwork {
    fn take_original_destination(&self, client: ClientAddr, _: ListenerAddr) -> Result<OriginalDst, CaptureError> {
        self.destinations
            .lock()
            .remove(&client.socket_addr())
            .ok_or(CaptureError::NoOriginalDestination)
    }

    fn outbound_socket(&self, _: IpAddr) -> Result<TcpSocket, CaptureError> {
        Ok(socket_at(self.own))
    }

    fn upstream_socket(&self, client: IpAddr, _: SocketAddr) -> Result<Upstream, CaptureError> {
        Ok(Upstream {
            socket: match self.shared_ports.lock().pop() {
                Some(port) => shared_socket_at(SocketAddr::new(client, port)),
                None => socket_at(client),
            },
            lease: UpstreamLease::default(),
        })
    }

    fn is_own_upstream(&self, client: ClientAddr, _: OriginalDst) -> bool {
        client.port() == OWN_UPSTREAM_PORT
    }
}

fn shared_socket_at(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    socket
}

fn socket_at(ip: IpAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(ip, 0)).unwrap();
    socket
}

/// An agent.
pub(super) struct Node {
    pub proxy: Arc<Proxy>,
    pub state: Arc<SharedState>,
    pub certificates: Arc<CertificateStore>,
    pub metrics: Arc<Metrics>,
    log: PathBuf,
    _folder: tempfile::TempDir,
}

impl Node {
    pub(super) fn new() -> Self {
        Self::with_limits(Limits::default())
    }

    pub(super) fn with_limits(limits: Limits) -> Self {
        let node = Self::unsynced(limits);
        node.state.apply(vec![Change::Synced]);
        node
    }

    /// An agent that discovery has not told everything yet.
    pub(super) fn unsynced(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("access.log");
        let metrics = Metrics::new();
        let access_log = AccessLog::to_file(&log, metrics.clone()).unwrap();
        let (state, certificates) = (SharedState::new(), CertificateStore::new());
        Self {
            proxy: Proxy::with_limits(
                NODE.into(),
                state.clone(),
                certificates.clone(),
                metrics.clone(),
                access_log,
                limits,
            ),
            state,
            certificates,
            metrics,
            log,
            _folder: folder,
        }
    }

    /// The first line for which `wanted` holds, of those written until then.
    pub(super) async fn log_line(&self, wanted: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        self.search_log(wanted).await.expect("no such line in the access log")
    }

    async fn search_log(&self, wanted: impl Fn(&serde_json::Value) -> bool) -> Option<serde_json::Value> {
        let search = async {
            loop {
                let text = std::fs::read_to_string(&self.log).unwrap();
                let complete = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
                let mut lines = complete.lines().map(|line| serde_json::from_str(line).unwrap());
                if let Some(line) = lines.find(&wanted) {
                    return line;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, search).await.ok()
    }

    /// How many tunnels this happened to.
    pub(super) fn tunnels(&self, event: &str) -> usize {
        let metrics = self.metrics.render();
        let name = format!(r#"mesh_tunnels_total{{event="{event}"}} "#);
        let count = metrics.lines().find_map(|line| line.strip_prefix(&name));
        count.map_or(0, |count| count.parse().unwrap())
    }

    pub(super) async fn logs_reason(&self, reason: &str) -> serde_json::Value {
        let line = self.search_log(|line| line["reason"] == reason).await;
        line.unwrap_or_else(|| panic!("no line with the reason {reason} in the access log"))
    }
}

/// Pods on two agents that know of one another.
pub(super) struct Mesh {
    pub authority: Authority,
    pub near: Node,
    pub far: Node,
}

/// A Pod in the mesh.
pub(super) struct Pod {
    pub ip: IpAddr,
    pub workload: Workload,
    network: Arc<LoopbackNetwork>,
    pub handle: PodProxyHandle,
}

impl Mesh {
    pub(super) fn new() -> Self {
        Self::with_limits(Limits::default())
    }

    /// Both agents with these bounds.
    pub(super) fn with_limits(limits: Limits) -> Self {
        let mesh = Self {
            authority: Authority::new(),
            near: Node::with_limits(limits.clone()),
            far: Node::with_limits(limits),
        };
        mesh.tell(vec![Change::Settings(Settings {
            trust_domain: "cluster.local".into(),
            pod_ranges: vec!["127.250.0.0/16".parse().unwrap()],
            ..Settings::default()
        })]);
        mesh
    }

    /// What the control plane tells both agents.
    pub(super) fn tell(&self, changes: Vec<Change>) {
        self.near.state.apply(changes.clone());
        self.far.state.apply(changes);
    }

    /// A Pod of service account `name`, proven to be in the mesh.
    pub(super) async fn pod(&self, node: &Node, name: &str) -> Pod {
        let pod = self.unannounced_pod(node, name).await;
        self.tell(vec![Change::Workload(pod.workload.clone())]);
        pod
    }

    /// A Pod that discovery does not know.
    pub(super) async fn unannounced_pod(&self, node: &Node, name: &str) -> Pod {
        node.certificates.insert(self.authority.issue(&identity(name)));
        self.pod_of_account(node, name, name).await
    }

    /// A Pod that discovery does not know, of a service account that its node has the certificate of.
    pub(super) async fn pod_of_account(&self, node: &Node, name: &str, account: &str) -> Pod {
        let ip = fresh_address();
        let identity = identity(account);
        let network = Arc::new(LoopbackNetwork {
            own: ip,
            destinations: Mutex::default(),
            shared_ports: Mutex::default(),
        });
        let listener = async |port| TcpListener::bind(SocketAddr::new(ip, port)).await.unwrap();
        let listeners = PodListeners {
            outbound: listener(OUTBOUND_PORT).await,
            tunnel: listener(TUNNEL_PORT).await,
            plaintext: listener(PLAINTEXT_INBOUND_PORT).await,
        };
        let pod = ProxyPod {
            pod_uid: format!("{name}-{ip}").into(),
            namespace: "shop".into(),
            name: name.into(),
            identity: identity.clone(),
            addresses: vec![ip],
            network: network.clone(),
            probes: Arc::<Probes>::default(),
        };
        Pod {
            ip,
            workload: Workload {
                identity,
                ..workload(name, ip)
            },
            network,
            handle: node.proxy.serve(pod, listeners),
        }
    }
}

pub(super) fn workload(name: &str, ip: IpAddr) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/shop/{name}").into(),
        name: name.into(),
        namespace: "shop".into(),
        identity: identity(name),
        addresses: vec![ip],
        host_network: false,
        node: "".into(),
        workload_type: WorkloadType::Pod,
        workload_name: name.into(),
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        cluster: "Kubernetes".into(),
        region: "".into(),
        zone: "".into(),
        membership: Membership::Proven,
        // None: a Pod of a known uid would not be pending again, as tests have it go to and fro.
        pod_uid: "".into(),
        policies: vec![],
        services: vec![],
        healthy: true,
        weight: 1,
    }
}

impl Pod {
    pub(super) fn application(&self) -> SocketAddr {
        SocketAddr::new(self.ip, APPLICATION_PORT)
    }

    /// What an application's connect becomes under the kernel programs.
    pub(super) async fn connect(&self, destination: SocketAddr) -> TcpStream {
        self.try_connect(destination).await.unwrap()
    }

    /// Where the agent runs beside the test, its refusal may come before the connect is noticed.
    pub(super) async fn try_connect(&self, destination: SocketAddr) -> std::io::Result<TcpStream> {
        let socket = socket_at(self.ip);
        let local = socket.local_addr().unwrap();
        self.network.destinations.lock().insert(local, OriginalDst::new(destination));
        socket.connect(SocketAddr::new(self.ip, OUTBOUND_PORT)).await
    }

    /// Listens where the Pod's application does.
    pub(super) async fn listen(&self) -> TcpListener {
        TcpListener::bind(self.application()).await.unwrap()
    }

    /// An application that sends back what it gets.
    pub(super) async fn echo(&self) -> JoinHandle<()> {
        let listener = self.listen().await;
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    // A reset ends it, too.
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        })
    }
}

/// A DENY in the namespace of all Pods here, of a principal.
pub(super) fn deny(name: &str, account: &str) -> Change {
    let conditions = Match {
        principals: vec![StringMatch::Exact(identity(account).principal().into())],
        ..Match::default()
    };
    Change::Policy(Arc::new(Policy {
        name: name.into(),
        namespace: "shop".into(),
        scope: Scope::Namespace,
        action: Action::Deny,
        rules: vec![Rule {
            clauses: vec![Clause {
                matches: vec![conditions],
            }],
            unknown: false,
        }],
        dry_run: false,
    }))
}

/// The stream gives an error before any byte, as a refusal must look.
pub(super) async fn assert_refused(mut stream: TcpStream) {
    let mut byte = [0];
    let read = timeout(PATIENCE, stream.read(&mut byte))
        .await
        .expect("neither refused nor served");
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

/// Until `holds`, which a hang only keeps from it.
pub(super) async fn until(what: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(timeout(PATIENCE, wait).await.is_ok(), "{what}");
}

/// Sends, and gets back the same.
pub(super) async fn assert_echo(stream: &mut TcpStream, text: &str) {
    let exchange = async {
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut back = vec![0; text.len()];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(back, text.as_bytes());
    };
    timeout(PATIENCE, exchange).await.expect("no answer");
}
