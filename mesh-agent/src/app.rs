//! Puts the agent together, in this order: the node's folder, the datapath, discovery, certificates, the Pods of before, the
//! local socket. What fails before that ends the start; what fails later is repaired, or shown.

mod enrolment;
mod metrics;
pub mod own_readiness;
mod pages;
mod succession;
mod trust;
pub mod uninstall;

use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

use crate::admin::{self, Page, Pages};
use crate::capture::kernel::KernelConfig;
use crate::capture::{self, Capture, CaptureConfig, boot_id, heap};
use crate::config::{Credentials, LogFormat, RunArgs};
use crate::discovery::noticed::Noticed;
use crate::discovery::transport::ControlPlane;
use crate::discovery::{self, DiscoveryStatus, NodeName, Subscriptions, report};
use crate::identity::renewal::Certificates;
use crate::identity::store::CertificateStore;
use crate::local::handover::{self, Hello, Inherited, Offer};
use crate::local::{self, LocalSocket, SocketError};
use crate::memory::{self, Memory, Remembered};
use crate::pods::following::Followed;
use crate::pods::{Pods, TrustDomain};
use crate::proxy::limits::{CONNECTIONS_PER_POD, DESCRIPTORS_RESERVED};
use crate::proxy::{Buffers, Limits, Proxy};
use crate::state::{SharedState, State};
use crate::telemetry::{AccessLog, Metrics};
use metrics::AgentMetrics;
use succession::{End, abandoned};
use trust::Trust;

/// How long background tasks may take to end after the drain.
const TASKS_PATIENCE: Duration = Duration::from_secs(2);

/// A killed agent's child holds the folder's lock from its fork to its exec; and an agent that has just taken over does not listen
/// for the next one yet.
const FOLDER_TRIES: u32 = 20;
const FOLDER_RETRY: Duration = Duration::from_millis(100);
/// Between two looks at what is in the mesh: some milliseconds of work in a mesh of 100,000 addresses.
const MESH_DESTINATIONS_INTERVAL: Duration = Duration::from_secs(1);
/// Open descriptors that are asked for: a node's Pods have a few hundred thousand connections at most, and it is the kernel's own default
/// for a process (`fs.nr_open`).
const WANTED_DESCRIPTORS: u64 = 1 << 20;
/// With fewer no Pod may have a connection.
const FEWEST_DESCRIPTORS: u64 = 2 * DESCRIPTORS_RESERVED as u64;
/// Why the agent ends, beside signals.
const HANDOVER: &str = "handover";

/// What the pages show, and what they read it from.
struct Agent {
    node: Arc<str>,
    control: String,
    capture: Arc<Capture>,
    local_refused: Arc<AtomicU64>,
    state: Arc<SharedState>,
    store: Arc<CertificateStore>,
    certificates: Arc<Certificates>,
    metrics: Arc<Metrics>,
    pods: Arc<Pods>,
    buffers: Arc<Buffers>,
    discovery: watch::Receiver<DiscoveryStatus>,
    followed: Arc<Mutex<Followed>>,
    noticed: Arc<Noticed>,
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
/// It cannot start; the message says what is missing.
pub fn run(args: RunArgs) -> anyhow::Result<()> {
    // Before any thread: each would have an arena of its own already.
    heap::keep_small();
    start_logging(&args)?;
    let limits = limits()?;
    let credentials = Credentials::read(&args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(agent(args, credentials, limits));
    // Blocking tasks (a probe's child, say) end by themselves; the process need not wait for them.
    runtime.shutdown_timeout(TASKS_PATIENCE);
    match result? {
        End::Done => Ok(()),
        End::StartAgain => succession::start_again(),
    }
}

async fn agent(args: RunArgs, credentials: Credentials, limits: Limits) -> anyhow::Result<End> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    // What only one agent does: it ends when another takes over.
    let alone = stop.child_token();
    let tasks = TaskTracker::new();

    // First of all what fails without a trace: the folder's lock keeps two agents from sharing a datapath.
    let hello = Hello::new(credentials.node(), &args.pin_path);
    let (socket, mut inherited) = local_socket(&args, &hello).await?;
    let mut pages = Vec::new();
    for (flag, address) in [("--metrics", args.metrics), ("--ready", args.ready), ("--admin", args.admin)] {
        let listener = match inherited.as_mut().and_then(|inherited| inherited.page(address)) {
            Some(listener) => listener,
            None => admin::listen(flag, address).await?.into_std()?,
        };
        pages.push(listener);
    }
    let Ok(pages) = <[TcpListener; 3]>::try_from(pages) else {
        anyhow::bail!("there are three pages");
    };
    let control = ControlPlane::new(&credentials)?;

    let metrics = Metrics::new();
    let agent_metrics = AgentMetrics::new(metrics.registry(), args.metrics_prefix.clone())?;
    let access_log = if args.access_log.as_os_str() == "-" {
        AccessLog::to_stdout(metrics.clone())?
    } else {
        AccessLog::to_file(&args.access_log, metrics.clone())
            .with_context(|| format!("--access-log {}", args.access_log.display()))?
    };

    capture::use_settings_at(&args.sysctl_root);
    let capture = Capture::start(CaptureConfig::new(
        KernelConfig {
            pin_path: args.pin_path.clone(),
            cgroup_root: args.cgroup_root.clone(),
        },
        args.run_dir.clone(),
    ))
    .context("the datapath does not start")?;

    if let Some(inherited) = &mut inherited {
        capture.adopt(std::mem::take(&mut inherited.pods));
    }

    // Another agent that takes over keeps it whole from then on.
    let noticed = Arc::new(Noticed::default());
    let tell = noticed.clone();
    let whole = capture.clone().keep_whole(move |repaired| tell.node_repaired(repaired));
    tasks.spawn(until(alone.clone(), whole));
    let kubelet = capture.clone().follow_kubelet(args.kubelet_cgroup.clone());
    tasks.spawn(until(alone.clone(), kubelet));

    let state = SharedState::new();
    let store = CertificateStore::new();
    let certificates = Certificates::new(store.clone());
    let owner = memory::Owner {
        node: credentials.node().to_owned(),
        root_sha256: credentials.mesh(),
        boot_id: boot_id()?,
    };
    let (subscriptions, from_memory) = recall(&args.run_dir, &owner, &state, &certificates);
    let (status, discovery) = watch::channel(DiscoveryStatus {
        synced: from_memory,
        from_memory,
        ..DiscoveryStatus::default()
    });
    if !memory::is_on_tmpfs(&args.run_dir) {
        warn!(
            run_dir = %args.run_dir.display(),
            "--run-dir is not on a tmpfs: the keys that are kept there for the next agent are written to a disk"
        );
    }
    let memory = {
        let (subscriptions, certificates) = (subscriptions.clone(), certificates.clone());
        Memory::new(&args.run_dir, owner, move || {
            let snapshot = subscriptions.lock().snapshot()?;
            Some(Remembered {
                snapshot: snapshot.into(),
                certificates: certificates.to_remember(),
            })
        })
    };
    let node: Arc<str> = credentials.node().into();
    let trust = Trust {
        state: state.clone(),
        control: control.clone(),
        certificates: certificates.clone(),
    };
    // The control plane may have to prove itself by what is remembered.
    let _ = trust.apply();
    tasks.spawn(discovery::run(
        control.clone(),
        NodeName(node.clone()),
        subscriptions,
        state.clone(),
        status,
        stop.clone(),
    ));

    tasks.spawn(certificates.clone().run(control.clone(), alone.clone()));
    tasks.spawn(until(
        stop.clone(),
        retry_when_connected(certificates.clone(), discovery.clone()),
    ));
    let trust_domain = TrustDomain::open(&args.run_dir);
    tasks.spawn(until(
        alone.clone(),
        trust_domain.clone().follow(state.clone(), discovery.clone()),
    ));

    tasks.spawn(until(alone.clone(), tell_the_mesh(capture.clone(), state.clone())));

    let proxy = Proxy::with_limits(
        node.clone(),
        state.clone(),
        store.clone(),
        metrics.clone(),
        access_log,
        limits,
    );
    tasks.spawn(until(stop.clone(), trust.follow(proxy.clone())));
    let buffers = proxy.registry().buffers().clone();
    let pods = Pods::new(capture.clone(), proxy, certificates.clone(), trust_domain, noticed.clone());
    pods.recover().await;
    certificates.forget_remembered();
    // From here on it is this agent's: what the Pods of before have taken up is in it again.
    tasks.spawn(until(
        alone.clone(),
        memory.clone().keep([state.changed(), certificates.changed()]),
    ));
    tasks.spawn(report::run(
        control.clone(),
        pods.status(),
        discovery.clone(),
        noticed.clone(),
        alone.clone(),
    ));

    let followed = Arc::new(Mutex::new(Followed::default()));

    let agent = Arc::new(Agent {
        node: node.clone(),
        control: control.address().to_owned(),
        capture: capture.clone(),
        local_refused: socket.refused(),
        state,
        store,
        certificates,
        metrics,
        pods: pods.clone(),
        buffers,
        discovery,
        noticed,
        followed: followed.clone(),
    });
    let shown = agent.clone();
    let metrics_pages: Pages = Arc::new(move |path| (path == "/metrics").then(|| Page::metrics(agent_metrics.render(&shown))));
    let shown = agent.clone();
    let ready_pages: Pages = Arc::new(move |path| (path == "/healthz/ready").then(|| shown.readiness()));
    if let Some(path) = &args.ready_socket {
        let (shown, alone, listener) = (agent.clone(), alone.clone(), own_readiness::listen(path)?);
        let run_dir = args.wait_for_sigterm.then(|| args.run_dir.clone());
        // For as long as the process lives: that it waits for its end is for whoever asks, too.
        tokio::spawn(own_readiness::serve(listener, move || {
            if alone.is_cancelled() {
                return succession::readiness(run_dir.as_deref());
            }
            shown.readiness()
        }));
    }
    let shown = agent;
    let admin_pages: Pages = Arc::new(move |path| (path == "/config_dump").then(|| shown.dump()));
    for (listener, pages) in pages.iter().zip([metrics_pages, ready_pages, admin_pages]) {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener.try_clone()?)?;
        tasks.spawn(admin::serve(listener, pages, alone.clone()));
    }
    let local_stop = alone.child_token();
    let mut local = tokio::spawn(local::serve(socket.clone(), pods.clone(), local_stop.clone()));
    if let Some(inherited) = inherited {
        inherited.serving().context("taking over")?;
        socket.set_handed_over(false);
        socket.stay();
        info!("the agent before is taken over");
    }
    capture.stand_alone();
    tasks.spawn(until(alone.clone(), pods.clone().complete_releases()));
    // Only now: until then it may go on with the Pods.
    if args.follow_pods {
        let parts = enrolment::Parts {
            control: control.clone(),
            pods: pods.clone(),
            socket: socket.clone(),
            shown: followed,
        };
        enrolment::follow(&args, parts, &tasks, &alone)?;
    }
    let successors = local::listen_at(&handover::socket_path(&args.run_dir)).context("the handover socket")?;
    let offer = Offer {
        hello,
        local: socket,
        pages,
        pods: pods.clone(),
        memory,
    };
    let mut handover = tokio::spawn(handover::give(successors, Arc::new(offer)));
    info!(%node, control = control.address(), run_dir = %args.run_dir.display(), "the agent runs");

    let result = tokio::select! {
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
        _ = &mut handover => Ok(HANDOVER),
        ended = &mut local => Err(anyhow::anyhow!("the local socket failed: {ended:?}")),
    };
    let is_handed_over = matches!(result, Ok(HANDOVER));
    let drain_seconds = if is_handed_over {
        args.handover_drain_seconds
    } else {
        args.drain_seconds
    };
    match &result {
        Ok(HANDOVER) => info!(
            drain_seconds,
            connections = pods.connections(),
            "another agent has taken over; this one ends with its connections"
        ),
        Ok(signal) => info!(
            signal,
            drain_seconds,
            connections = pods.connections(),
            "the agent stops; its Pods stay captured"
        ),
        Err(error) => error!(%error, "the agent stops; its Pods stay captured"),
    }
    local_stop.cancel();
    if is_handed_over {
        alone.cancel();
        capture.fall_silent();
    } else {
        handover.abort();
    }
    // Discovery goes on while connections drain. Whoever was taken over is told to end as soon as the other is ready, where Kubernetes
    // rolls it out; its drain goes on then. A signal after that ends it.
    let mut is_told_to_end = !is_handed_over;
    let mut end = End::Done;
    let waits_to_end = is_handed_over && args.wait_for_sigterm;
    {
        let drained = pods.stop(Duration::from_secs(drain_seconds));
        tokio::pin!(drained);
        loop {
            let signal = tokio::select! {
                () = &mut drained => break,
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                () = abandoned(&args.run_dir), if waits_to_end && !is_told_to_end => {
                    end = End::StartAgain;
                    break;
                }
            };
            if is_told_to_end {
                warn!("a second signal ({signal}) ends the drain");
                break;
            }
            is_told_to_end = true;
            info!(
                signal,
                connections = pods.connections(),
                "this agent ends when its drain does"
            );
        }
    }
    stop.cancel();
    tasks.close();
    if waits_to_end && !is_told_to_end && end == End::Done {
        info!("nothing is left to do; SIGTERM is waited for");
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = abandoned(&args.run_dir) => end = End::StartAgain,
        }
    }
    if end == End::StartAgain {
        error!("the agent that took over is gone, and none has come after it: this one starts again");
    }
    if tokio::time::timeout(TASKS_PATIENCE, tasks.wait()).await.is_err() {
        warn!("background tasks have not ended");
    }
    if end == End::StartAgain {
        end = succession::unless_told_to_end(&mut terminate, &mut interrupt).await;
    }
    result.map(|_| end)
}

/// The run directory's lock and socket: free, or taken over from the agent that runs there.
async fn local_socket(args: &RunArgs, hello: &Hello) -> anyhow::Result<(Arc<LocalSocket>, Option<Inherited>)> {
    let mut tries = FOLDER_TRIES;
    let mut inherited = loop {
        let in_use = match LocalSocket::listen(&args.run_dir) {
            Ok(socket) => return Ok((Arc::new(socket), None)),
            Err(in_use @ SocketError::InUse(_)) => in_use,
            Err(error) => return Err(error.into()),
        };
        let (run_dir, hello) = (args.run_dir.clone(), hello.clone());
        let error = match tokio::task::spawn_blocking(move || handover::take(&run_dir, &hello)).await? {
            Ok(inherited) => break inherited,
            Err(error) => error,
        };
        tries -= 1;
        let nobody_listens = matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound);
        if tries == 0 || !nobody_listens {
            anyhow::bail!("{in_use}, and cannot be taken over from: {error}");
        }
        tokio::time::sleep(FOLDER_RETRY).await;
    };
    let (lock, local) = inherited.lock_and_socket()?;
    let socket = LocalSocket::inherit(&args.run_dir, lock, local)?;
    // Should this start fail, the file is still the other agent's.
    socket.set_handed_over(true);
    Ok((Arc::new(socket), Some(inherited)))
}

/// What the agent before this one knew, where it is to be believed.
fn recall(
    run_dir: &Path,
    owner: &memory::Owner,
    state: &SharedState,
    certificates: &Certificates,
) -> (Arc<Mutex<Subscriptions>>, bool) {
    let mut subscriptions = Subscriptions::default();
    let Some(remembered) = memory::recall(run_dir, owner) else {
        return (Arc::new(Mutex::new(subscriptions)), false);
    };
    let restored = subscriptions.restore(remembered.snapshot, state);
    if restored {
        info!(
            certificates = remembered.certificates.len(),
            "the state of the agent before is taken over, until discovery answers"
        );
        certificates.remember(remembered.certificates);
    } else {
        warn!("what an earlier agent remembered is not whole, and not used");
    }
    (Arc::new(Mutex::new(subscriptions)), restored)
}

async fn until(stop: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

/// The backstops follow the state. A change that cannot be told is tried again with the next look.
async fn tell_the_mesh(capture: Arc<Capture>, state: Arc<SharedState>) {
    let mut changed = state.changed();
    loop {
        changed.mark_unchanged();
        let told = capture.set_mesh_destinations(state.read(State::prefixes)).await;
        if let Err(error) = &told {
            error!(%error, "the backstops do not know what is in the mesh");
        }
        tokio::time::sleep(MESH_DESTINATIONS_INTERVAL).await;
        if told.is_ok() && changed.changed().await.is_err() {
            return;
        }
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

fn start_logging(args: &RunArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log).context("--log")?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = match args.log_format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("logging: {error}"))
}

/// A connection has two sockets. The soft limit of descriptors is often 1,024; the hard one can be raised only by whom the kernel lets.
fn limits() -> anyhow::Result<Limits> {
    let of_process = || getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit of open descriptors");
    let (before, hard) = of_process()?;
    let most = hard.max(WANTED_DESCRIPTORS);
    let raised = setrlimit(Resource::RLIMIT_NOFILE, most, most).or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, before, hard, "the limit of open descriptors cannot be raised");
    }
    let (descriptors, _) = of_process()?;
    anyhow::ensure!(
        descriptors >= FEWEST_DESCRIPTORS,
        "{descriptors} open descriptors are allowed (`ulimit -Hn`): the agent needs at least {FEWEST_DESCRIPTORS}, and {WANTED_DESCRIPTORS} \
         are enough for {CONNECTIONS_PER_POD} connections of each Pod"
    );
    let limits = Limits::for_descriptors(usize::try_from(descriptors).unwrap_or(usize::MAX));
    let connections_per_pod = limits.connections_per_pod;
    if connections_per_pod < CONNECTIONS_PER_POD {
        warn!(
            descriptors,
            connections_per_pod,
            "few open descriptors are allowed (`ulimit -Hn`), so that each Pod may have fewer than {CONNECTIONS_PER_POD} connections; \
             {WANTED_DESCRIPTORS} are enough"
        );
    }
    Ok(limits)
}
