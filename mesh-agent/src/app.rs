//! Puts the agent together, in this order: the node's folder, the datapath, discovery, certificates, the Pods of before, the
//! local socket. What fails before that ends the start; what fails later is repaired, or shown.

mod metrics;

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use http::StatusCode;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

use crate::admin::{self, Page, Pages};
use crate::capture::kernel::KernelConfig;
use crate::capture::{Capture, CaptureConfig};
use crate::config::{LogFormat, NodeToken, RunArgs};
use crate::discovery::transport::ControlPlane;
use crate::discovery::{self, DiscoveryStatus, NodeName, report};
use crate::identity::renewal::Certificates;
use crate::identity::store::CertificateStore;
use crate::local::{self, LocalSocket};
use crate::pods::{Pods, TrustDomain};
use crate::proxy::{Buffers, Proxy};
use crate::state::{SharedState, service_name};
use crate::telemetry::{AccessLog, Metrics};
use metrics::AgentMetrics;

/// How long background tasks may take to end after the drain.
const TASKS_PATIENCE: Duration = Duration::from_secs(2);

/// What the pages show, and what they read it from.
struct Agent {
    node: Arc<str>,
    control: String,
    capture: Arc<Capture>,
    socket: Arc<LocalSocket>,
    state: Arc<SharedState>,
    store: Arc<CertificateStore>,
    certificates: Arc<Certificates>,
    metrics: Arc<Metrics>,
    pods: Arc<Pods>,
    buffers: Arc<Buffers>,
    discovery: watch::Receiver<DiscoveryStatus>,
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
/// It cannot start; the message says what is missing.
pub fn run(args: RunArgs) -> anyhow::Result<()> {
    start_logging(&args)?;
    raise_descriptor_limit();
    let token = NodeToken::read(&args.token_file)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(agent(args, token));
    // Blocking tasks (a probe's child, say) end by themselves; the process need not wait for them.
    runtime.shutdown_timeout(TASKS_PATIENCE);
    result
}

async fn agent(args: RunArgs, token: NodeToken) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();

    // First of all what fails without a trace: the folder's lock keeps two agents from sharing a datapath.
    let socket = Arc::new(LocalSocket::listen(&args.run_dir)?);
    let metrics_listener = admin::listen("--metrics", args.metrics).await?;
    let ready_listener = admin::listen("--ready", args.ready).await?;
    let admin_listener = admin::listen("--admin", args.admin).await?;
    let control = ControlPlane::new(&token, args.control.as_deref())?;

    let metrics = Metrics::new();
    let agent_metrics = AgentMetrics::new(metrics.registry(), args.metrics_prefix.clone())?;
    let access_log = if args.access_log.as_os_str() == "-" {
        AccessLog::to_stdout(metrics.clone())?
    } else {
        AccessLog::to_file(&args.access_log, metrics.clone())
            .with_context(|| format!("--access-log {}", args.access_log.display()))?
    };

    let capture = Capture::start(CaptureConfig::new(
        KernelConfig {
            pin_path: args.pin_path.clone(),
            cgroup_root: args.cgroup_root.clone(),
        },
        args.run_dir.clone(),
    ))
    .context("the datapath does not start")?;

    let state = SharedState::new();
    let (status, discovery) = watch::channel(DiscoveryStatus::default());
    let node: Arc<str> = token.node.as_str().into();
    tasks.spawn(discovery::run(
        control.clone(),
        NodeName(node.clone()),
        state.clone(),
        status,
        stop.clone(),
    ));

    let store = CertificateStore::new();
    let certificates = Certificates::new(store.clone());
    tasks.spawn(certificates.clone().run(control.clone(), stop.clone()));
    tasks.spawn(until(
        stop.clone(),
        retry_when_connected(certificates.clone(), discovery.clone()),
    ));
    let trust_domain = TrustDomain::open(&args.run_dir);
    tasks.spawn(until(
        stop.clone(),
        trust_domain.clone().follow(state.clone(), discovery.clone()),
    ));

    let proxy = Proxy::new(state.clone(), store.clone(), metrics.clone(), access_log);
    let buffers = proxy.registry().buffers().clone();
    let pods = Pods::new(capture.clone(), proxy, certificates.clone(), metrics.clone(), trust_domain);
    pods.recover().await;
    tasks.spawn(report::run(control.clone(), pods.status(), discovery.clone(), stop.clone()));

    let agent = Arc::new(Agent {
        node: node.clone(),
        control: control.address().to_owned(),
        capture,
        socket: socket.clone(),
        state,
        store,
        certificates,
        metrics,
        pods: pods.clone(),
        buffers,
        discovery,
    });
    let shown = agent.clone();
    let metrics_pages: Pages = Arc::new(move |path| (path == "/metrics").then(|| Page::metrics(agent_metrics.render(&shown))));
    let shown = agent.clone();
    let ready_pages: Pages = Arc::new(move |path| (path == "/healthz/ready").then(|| shown.readiness()));
    let shown = agent;
    let admin_pages: Pages = Arc::new(move |path| (path == "/config_dump").then(|| shown.dump()));
    for (listener, pages) in [
        (metrics_listener, metrics_pages),
        (ready_listener, ready_pages),
        (admin_listener, admin_pages),
    ] {
        tasks.spawn(admin::serve(listener, pages, stop.clone()));
    }
    let local_stop = stop.child_token();
    let mut local = tokio::spawn(local::serve(socket, pods.clone(), local_stop.clone()));
    info!(%node, control = control.address(), run_dir = %args.run_dir.display(), "the agent runs");

    let result = tokio::select! {
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
        ended = &mut local => Err(anyhow::anyhow!("the local socket failed: {ended:?}")),
    };
    match &result {
        Ok(signal) => info!(
            signal,
            drain_seconds = args.drain_seconds,
            connections = pods.connections(),
            "the agent stops; its Pods stay captured"
        ),
        Err(error) => error!(%error, "the agent stops; its Pods stay captured"),
    }
    local_stop.cancel();
    // Discovery goes on while connections drain. A second signal ends the drain.
    tokio::select! {
        () = pods.stop(Duration::from_secs(args.drain_seconds)) => {}
        _ = terminate.recv() => warn!("a second SIGTERM ends the drain"),
        _ = interrupt.recv() => warn!("a second SIGINT ends the drain"),
    }
    stop.cancel();
    tasks.close();
    if tokio::time::timeout(TASKS_PATIENCE, tasks.wait()).await.is_err() {
        warn!("background tasks have not ended");
    }
    result.map(|_| ())
}

async fn until(stop: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

/// Certificates that failed while the control plane was away are not left to their back-off when it is back.
async fn retry_when_connected(certificates: Arc<Certificates>, mut discovery: watch::Receiver<DiscoveryStatus>) {
    let mut connections = 0;
    while discovery.wait_for(|status| status.connections > connections).await.is_ok() {
        connections = discovery.borrow_and_update().connections;
        certificates.retry_failed();
    }
}

impl Agent {
    fn readiness(&self) -> Page {
        // The datapath is attached since before this server runs: its failure ends the start.
        if self.discovery.borrow().synced {
            Page::text(StatusCode::OK, "ready\n".to_owned())
        } else {
            let missing = format!("missing: discovery has not answered yet ({})\n", self.control);
            Page::text(StatusCode::SERVICE_UNAVAILABLE, missing)
        }
    }

    fn dump(&self) -> Page {
        let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let failures = self.certificates.failures();
        let certificates: Vec<_> = self
            .store
            .identities()
            .into_iter()
            .filter_map(|identity| self.store.current(&identity))
            .map(|pair| {
                json!({
                    "identity": pair.identity.to_string(),
                    "fingerprint": pair.fingerprint(),
                    "not_before_unix_seconds": seconds(pair.not_before),
                    "not_after_unix_seconds": seconds(pair.not_after),
                    "roots": pair.roots.len(),
                })
            })
            .collect();
        let known = self.state.read(|state| {
            let settings = state.settings();
            json!({
                "workloads": state.workloads().count(),
                "services": state.services().map(|service| service_name(service)).collect::<std::collections::BTreeSet<_>>(),
                "policies": state.policies().map(|policy| policy.name.to_string()).collect::<std::collections::BTreeSet<_>>(),
                "trust_domain": settings.trust_domain,
                "pod_ranges": settings.pod_ranges,
                "mtls": settings.mtls.as_str(),
                "mtls_of_namespaces": settings.namespaces.iter().map(|(namespace, mtls)| (namespace.to_string(), mtls.as_str())).collect::<std::collections::BTreeMap<_, _>>(),
                "excluded_ports": settings.excluded.ports,
                "excluded_ranges": settings.excluded.ranges,
            })
        });
        let discovery = self.discovery.borrow().clone();
        Page::json(&json!({
            "node": &*self.node,
            "control": self.control,
            "discovery": {
                "connected": discovery.connected,
                "synced": discovery.synced,
                "enforced_versions": discovery.enforced_versions,
                "rejected": discovery.rejected,
                "denying_stand_ins": discovery.stand_ins,
            },
            "state": known,
            "pods": self.pods.list(),
            "connections": self.pods.connections(),
            "certificates": certificates,
            "certificate_failures": failures.iter().map(|(identity, why)| (identity.to_string(), why)).collect::<std::collections::BTreeMap<_, _>>(),
        }))
    }
}

fn start_logging(args: &RunArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log).context("--log")?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = match args.log_format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("logging: {error}"))
}

/// A connection has two sockets; the soft limit is often 1,024.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "the limit of open descriptors cannot be raised");
    }
}
