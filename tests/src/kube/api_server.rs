//! etcd and an API server, and nothing else: what a control plane that watches Kubernetes is tested with.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::certificates::Authority;
use super::kubectl::Kubectl;
use super::sweep;
use super::tools::Tools;
use crate::netns;
use crate::poll;
use crate::process::{Place, Process};
use crate::run_folder::RunFolder;
use crate::run_id::RunId;

const PORT: u16 = 6443;
const ETCD_PORT: u16 = 2379;
const ETCD_PEER_PORT: u16 = 2380;
/// It takes four seconds on an idle machine with two cores.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// Of Services; the first is the API server's own.
const SERVICE_CIDRS: &str = "10.96.0.0/16,fd00:96::/112";
const KUBERNETES_SERVICE: &str = "10.96.0.1";
/// What it tells Pods as its own address when it is on loopback, where nobody else can reach it: one for documentation.
const NOWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ADDRESSES_TRIED: usize = 20;
const AUDIT_POLICY: &str = "audit-policy.json";
const AUDIT_LOG: &str = "audit.log";

/// Where the servers listen, and how they behave there.
#[derive(Debug)]
pub(super) struct Seat {
    pub place: Place,
    pub address: Ipv4Addr,
    pub advertised: Ipv4Addr,
    /// Nobody makes service accounts for Pods without controllers; Pods must be creatable all the same.
    pub has_controllers: bool,
}

impl Seat {
    /// On loopback: it asks nobody who they are.
    fn etcd(&self) -> Ipv4Addr {
        if self.address.is_loopback() {
            self.address
        } else {
            Ipv4Addr::LOCALHOST
        }
    }
}

#[derive(Debug)]
pub struct ApiServer {
    server: Option<Process>,
    // After the server, which would complain.
    _etcd: Process,
    seat: Seat,
    pub(super) tools: Tools,
    pub(super) authority: Authority,
    kubectl: Kubectl,
    // The last to go.
    folder: RunFolder,
}

impl ApiServer {
    /// One of its own at a loopback address of its own, empty, and ready.
    ///
    /// There are no controllers: Pods are what a test says they are, namespaces have no `default` service account, and a
    /// namespace that is deleted stays "Terminating".
    ///
    /// # Errors
    /// The tools are missing, or it does not become ready: with the end of its log.
    pub fn start() -> Result<Self> {
        Self::start_in(RunFolder::create(RunId::new().folder())?)
    }

    /// The same, which writes down what these users ask of it; see [`ApiServer::audit`].
    ///
    /// # Errors
    /// As [`ApiServer::start`].
    pub fn start_audited(users: &[&str]) -> Result<Self> {
        let folder = RunFolder::create(RunId::new().folder())?;
        let policy = serde_json::json!({
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [{"level": "Metadata", "users": users}],
        });
        std::fs::write(folder.path().join(AUDIT_POLICY), policy.to_string())?;
        Self::start_in(folder)
    }

    /// What an audited user has asked, as it was answered (`audit.k8s.io/v1`); a watch is there from its beginning.
    ///
    /// # Errors
    /// Nobody is audited.
    pub fn audit(&self, user: &str) -> Result<Vec<Value>> {
        let text = std::fs::read_to_string(self.folder.path().join(AUDIT_LOG)).context("the audit log")?;
        // The last line may be in the making.
        let whole = text.lines().filter_map(|line| serde_json::from_str(line).ok());
        Ok(whole.filter(|event: &Value| event["user"]["username"] == user).collect())
    }

    fn start_in(folder: RunFolder) -> Result<Self> {
        sweep();
        let seat = Seat {
            place: Place::here(),
            address: free_loopback()?,
            advertised: NOWHERE,
            has_controllers: false,
        };
        Self::start_at(seat, folder)
    }

    pub(super) fn start_at(seat: Seat, folder: RunFolder) -> Result<Self> {
        let tools = Tools::find()?;
        let path = folder.path();
        let authority = Authority::create(path.join("pki"))?;
        let server = format!("https://{}", SocketAddr::new(seat.address.into(), PORT));
        let kubectl = Kubectl {
            binary: tools.component("kubectl"),
            kubeconfig: authority.kubeconfig("admin", &server, "admin", &["system:masters"])?,
            place: seat.place.clone(),
            folder: path.to_owned(),
        };
        let names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"];
        let addresses = [
            seat.address.to_string(),
            KUBERNETES_SERVICE.to_owned(),
            Ipv4Addr::LOCALHOST.to_string(),
        ];
        let names = names.into_iter().map(str::to_owned).chain(addresses);
        authority.serving("kube-apiserver", names.collect())?;
        // By which it is known to kubelets.
        authority.kubeconfig("kubelet-client", &server, "kube-apiserver", &["system:masters"])?;
        let etcd = start_etcd(&tools, &seat, path)?;
        let mut server = Self {
            server: None,
            _etcd: etcd,
            seat,
            tools,
            authority,
            kubectl,
            folder,
        };
        server.resume()?;
        Ok(server)
    }

    /// The administrator's.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        self.kubectl.kubeconfig()
    }

    /// Anybody else's; what they may is for the test to grant.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn kubeconfig_of(&self, user: &str, groups: &[&str]) -> Result<PathBuf> {
        let name = user.replace(|letter: char| !letter.is_ascii_alphanumeric(), "-");
        self.authority.kubeconfig(&name, &self.url(), user, groups)
    }

    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", SocketAddr::new(self.seat.address.into(), PORT))
    }

    /// The administrator's.
    #[must_use]
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// Where it runs.
    pub(super) fn place(&self) -> &Place {
        &self.seat.place
    }

    /// The administrator's client, for an API server in this network namespace.
    ///
    /// # Errors
    /// The kubeconfig cannot be used.
    pub async fn client(&self) -> Result<kube::Client> {
        client(self.kubeconfig()).await
    }

    /// A service account's token for an audience, as the API server issues it; bound to a Pod (which then must have that
    /// account) if there is one.
    ///
    /// # Errors
    /// As the API server says.
    pub fn token(&self, namespace: &str, account: &str, audience: &str, pod: Option<&str>) -> Result<String> {
        let audience = format!("--audience={audience}");
        let mut arguments = vec!["-n", namespace, "create", "token", account, &audience];
        if let Some(pod) = pod {
            arguments.extend(["--bound-object-kind=Pod", "--bound-object-name", pod]);
        }
        Ok(self.kubectl.run(&arguments)?.trim().to_owned())
    }

    /// The run's folder, for files of the test.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.folder.path().join("kube-apiserver.log")
    }

    /// `kill -9`: connections are reset, and refused from now on. What it has stored stays.
    pub fn stop(&mut self) {
        self.server.take();
    }

    /// After [`ApiServer::stop`], at the same address.
    ///
    /// # Errors
    /// It does not become ready: with the end of its log.
    pub fn resume(&mut self) -> Result<()> {
        if self.server.is_some() {
            bail!("the API server runs");
        }
        let server = self.launch()?;
        let server = self.server.insert(server);
        let (address, place, kubectl) = (self.seat.address, &self.seat.place, &self.kubectl);
        poll::until_true("the API server is ready", START_DEADLINE, || {
            server.check_running()?;
            // Cheaper than kubectl, and for most of the time enough.
            if !is_listening(place, address)? {
                return Ok(false);
            }
            Ok(kubectl.output(&["get", "--raw", "/readyz"])?.status.success())
        })
        .with_context(|| crate::process::tail(&self.folder.path().join("kube-apiserver.log"), 20))
    }

    /// It hangs: connections stay open, and nothing is answered, until `SIGCONT`.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.server.as_ref().context("the API server is stopped")?.signal(signal)
    }

    fn launch(&self) -> Result<Process> {
        let pki = self.folder.path().join("pki");
        let pki = pki.display();
        let mut flags = vec![
            format!("--etcd-servers=http://{}:{ETCD_PORT}", self.seat.etcd()),
            format!("--bind-address={}", self.seat.address),
            format!("--secure-port={PORT}"),
            format!("--advertise-address={}", self.seat.advertised),
            format!("--service-cluster-ip-range={SERVICE_CIDRS}"),
            format!("--tls-cert-file={pki}/kube-apiserver.crt"),
            format!("--tls-private-key-file={pki}/kube-apiserver.key"),
            format!("--client-ca-file={}", self.authority.certificate().display()),
            // Others ask the API server for it, and complain if it has none.
            format!("--requestheader-client-ca-file={}", self.authority.certificate().display()),
            "--requestheader-allowed-names=nobody".to_owned(),
            "--requestheader-username-headers=X-Remote-User".to_owned(),
            format!("--kubelet-client-certificate={pki}/kubelet-client.crt"),
            format!("--kubelet-client-key={pki}/kubelet-client.key"),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!(
                "--service-account-signing-key-file={}",
                self.authority.accounts_key().display()
            ),
            format!(
                "--service-account-key-file={}",
                self.authority.accounts_public_key().display()
            ),
            "--allow-privileged=true".to_owned(),
        ];
        if self.folder.path().join(AUDIT_POLICY).exists() {
            let folder = self.folder.path().display();
            flags.push(format!("--audit-policy-file={folder}/{AUDIT_POLICY}"));
            flags.push(format!("--audit-log-path={folder}/{AUDIT_LOG}"));
        }
        if !self.seat.has_controllers {
            flags.push("--disable-admission-plugins=ServiceAccount".to_owned());
        }
        start(&self.tools, &self.seat.place, "kube-apiserver", &flags, self.folder.path())
    }
}

/// A client by a kubeconfig, in this network namespace.
///
/// # Errors
/// The kubeconfig cannot be used.
pub async fn client(kubeconfig: &Path) -> Result<kube::Client> {
    let kubeconfig = kube::config::Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default()).await?;
    Ok(kube::Client::try_from(config)?)
}

/// A component with its log beside its kind.
pub(super) fn start(tools: &Tools, place: &Place, name: &str, flags: &[String], folder: &Path) -> Result<Process> {
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let command = place.command(&tools.component(name), &flags)?;
    Process::start(name, command, folder.join(format!("{name}.log")))
}

fn start_etcd(tools: &Tools, seat: &Seat, folder: &Path) -> Result<Process> {
    let client = format!("http://{}:{ETCD_PORT}", seat.etcd());
    let peer = format!("http://{}:{ETCD_PEER_PORT}", seat.etcd());
    let flags = [
        format!("--data-dir={}", folder.join("etcd").display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // What it stores need not outlive the machine.
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
    ];
    start(tools, &seat.place, "etcd", &flags, folder)
}

/// The whole of 127.0.0.0/8 is this machine's: an address where nobody has the ports, so that copies need not share one.
fn free_loopback() -> Result<Ipv4Addr> {
    for _ in 0..ADDRESSES_TRIED {
        let [a, b, c] = rand::random::<[u8; 3]>();
        let address = Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254));
        let is_free = |port| TcpListener::bind((address, port)).is_ok();
        if [PORT, ETCD_PORT, ETCD_PEER_PORT].into_iter().all(is_free) {
            return Ok(address);
        }
    }
    bail!("no loopback address with free ports among {ADDRESSES_TRIED}")
}

fn is_listening(place: &Place, address: Ipv4Addr) -> Result<bool> {
    netns::within(&place.netns, || Ok(TcpStream::connect((address, PORT)).is_ok()))
}
