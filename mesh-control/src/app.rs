//! Puts the parts together and runs them until a signal.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use mesh_proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use mesh_proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use mesh_proto::node::node_pods_server::NodePodsServer;
use mesh_proto::node::node_reports_server::NodeReportsServer;
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

use crate::admin::Pages;
use crate::authority::{Authority, AuthorityError};
use crate::certificates::Certificates;
use crate::compile::{EndpointSource, Parameters};
use crate::config::{NodeTokenArgs, RotateRootArgs, ServeArgs};
use crate::control_plane::{ControlPlane, Shared};
use crate::discovery::Discovery;
use crate::limits::{
    ACCEPTED_WAITING, Bounds, HTTP2_KEEPALIVE, HTTP2_KEEPALIVE_TIMEOUT, MAX_REPORT_BYTES, MAX_REQUEST_BYTES,
    MAX_STREAMS_PER_CONNECTION, SERVING_CHECK, SHUTDOWN_GRACE,
};
use crate::metrics::Metrics;
use crate::node_pods::PodLists;
use crate::node_reports::Reports;
use crate::registry::Follow;
use crate::roots::{self, Roots};
use crate::serving::{self, ServingCertificate};
use crate::state_dir::{StateDir, write_private};
use crate::tokens::Tokens;
use crate::trust::{ServerNames, Trust};
use crate::{admin, kubernetes, limits};

#[cfg(test)]
mod tests;

/// A running control plane.
pub struct Running {
    pub control: Arc<ControlPlane>,
    /// Where agents connect.
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    /// Of --metrics.
    pub metrics: Option<SocketAddr>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    /// They end with this.
    _admin_tasks: JoinSet<()>,
    serving_task: JoinHandle<()>,
    trust_task: Option<JoinHandle<()>>,
    publishing_task: JoinHandle<()>,
    follow: Following,
}

/// What is followed.
enum Following {
    Folder(Follow),
    Cluster(kubernetes::Following),
}

impl Running {
    /// Ends everything; open streams get a moment to close.
    pub async fn stop(mut self) {
        match self.follow {
            Following::Folder(follow) => follow.stop(),
            Following::Cluster(follow) => follow.stop().await,
        }
        self.serving_task.abort();
        if let Some(task) = &self.trust_task {
            task.abort();
        }
        self.publishing_task.abort();
        self.control.close();
        // The server may have ended by itself.
        let _ = self.stop.send(());
        if timeout(SHUTDOWN_GRACE, &mut self.server).await.is_err() {
            tracing::info!("connections were still open after {SHUTDOWN_GRACE:?}");
            self.server.abort();
        }
    }

    /// Waits for SIGTERM or SIGINT; an error when the server ends by itself.
    ///
    /// # Errors
    /// The server has ended.
    pub async fn until_signal(mut self) -> anyhow::Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            ended = &mut self.server => {
                ended??;
                bail!("the server has ended");
            }
        }
        tracing::info!("ending");
        self.stop().await;
        Ok(())
    }
}

/// Starts everything and returns once agents can connect.
///
/// # Errors
/// The state directory or a socket cannot be used.
pub async fn start(args: &ServeArgs) -> anyhow::Result<Running> {
    start_within(args, Bounds::default()).await
}

async fn start_within(args: &ServeArgs, bounds: Bounds) -> anyhow::Result<Running> {
    let metrics = Arc::new(Metrics::new()?);
    if args.kubernetes {
        let client = kubernetes::client::connect().await?;
        let trust = Trust::of_cluster(args, &client, &args.namespace, &metrics, &bounds).await?;
        return start_with(args, Source::Cluster(client), trust, metrics, bounds).await;
    }
    let (Some(registry), Some(state_dir)) = (&args.registry, &args.state_dir) else {
        bail!("--registry DIR and --state-dir DIR are needed, or --kubernetes");
    };
    let state = StateDir::open(state_dir).context("state directory")?;
    let trust = Trust::of_state(args, &state, &metrics)?;
    start_with(args, Source::Folder(registry.clone(), state), trust, metrics, bounds).await
}

/// Where objects are read from, and what must outlive this process is kept.
pub enum Source {
    /// A folder of manifests, and the state directory.
    Folder(PathBuf, StateDir),
    /// The API server, for both.
    Cluster(kube::Client),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Folder(folder, _) => folder.display().fmt(f),
            Self::Cluster(_) => f.write_str("the cluster"),
        }
    }
}

/// As [`start`], believed by, and believing, as `trust` says.
///
/// # Errors
/// As [`start`].
pub async fn start_with(
    args: &ServeArgs,
    source: Source,
    mut trust: Trust,
    metrics: Arc<Metrics>,
    bounds: Bounds,
) -> anyhow::Result<Running> {
    if !args.admin.ip().is_loopback() {
        bail!(
            "--admin {}: only loopback addresses are allowed: it is not authenticated",
            args.admin
        );
    }
    let now = OffsetDateTime::now_utc();
    let roots = Arc::clone(&trust.roots);
    let parameters = Parameters {
        trust_domain: args.trust_domain.clone(),
        cluster: args.cluster.clone(),
        pod_ranges: args.pod_cidr.clone(),
        trust_bundle: roots.in_force().bundle.clone(),
        revoked: BTreeSet::new(),
        endpoints: match &source {
            Source::Cluster(_) => EndpointSource::Slices,
            Source::Folder(..) => EndpointSource::Selectors,
        },
        mesh_namespace: args.namespace.clone(),
    };
    let shared = Arc::new(Shared::default());
    let control = Arc::new(match &source {
        Source::Cluster(client) => {
            let deleted = kubernetes::deleted_accounts(client, &args.namespace).await;
            ControlPlane::shared(parameters, deleted, Arc::clone(&shared), Arc::clone(&metrics), bounds)
        }
        Source::Folder(_, state) => {
            ControlPlane::new(parameters, state.clone(), Arc::clone(&metrics), bounds).context("state directory")?
        }
    });

    let certificate = Arc::new(ServingCertificate::new(Arc::clone(&roots)));
    refresh(&certificate, &trust.names, &metrics, now)?;
    let tls = Arc::new(serving::tls_config(Arc::clone(&certificate))?);

    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("--listen {}", args.listen))?;
    let admin_listener = TcpListener::bind(args.admin)
        .await
        .with_context(|| format!("--admin {}", args.admin))?;
    let public_listener = match args.metrics {
        Some(address) => Some(
            TcpListener::bind(address)
                .await
                .with_context(|| format!("--metrics {address}"))?,
        ),
        None => None,
    };
    let metrics_address = public_listener.as_ref().map(TcpListener::local_addr).transpose()?;
    let (listen, admin_address) = (listener.local_addr()?, admin_listener.local_addr()?);

    let registry = source.to_string();
    let follow = match source {
        Source::Cluster(client) => Following::Cluster(kubernetes::Following::start(&client, &args.namespace, &control, &shared)),
        Source::Folder(folder, state) => Following::Folder(Follow::start(&folder, state, Arc::clone(&control))?),
    };
    let mut admin_tasks = JoinSet::new();
    admin_tasks.spawn(admin::serve(admin_listener, Pages::All, Arc::clone(&control)));
    if let Some(listener) = public_listener {
        admin_tasks.spawn(admin::serve(listener, Pages::Public, Arc::clone(&control)));
    }
    let publishing_task = tokio::spawn(Arc::clone(&control).publish_when_due());

    let names = trust.names.clone();
    let serving_task = tokio::spawn(keep_trust(Arc::clone(&roots), Arc::clone(&control), certificate, names));
    let trust_task = trust.follow(&control);

    let authenticator = trust.authenticator;
    let discovery = Discovery {
        control: Arc::clone(&control),
        authenticator: authenticator.clone(),
    };
    let certificates = Certificates {
        control: Arc::clone(&control),
        authenticator: authenticator.clone(),
        roots: Arc::clone(&roots),
        lifetime: args.certificate_lifetime,
    };
    let reports = Reports {
        control: Arc::clone(&control),
        authenticator: authenticator.clone(),
    };
    let pod_lists = PodLists {
        control: Arc::clone(&control),
        authenticator,
    };
    let (connections, incoming) = mpsc::channel(ACCEPTED_WAITING);
    tokio::spawn(serving::accept(listener, tls, metrics, bounds, connections));
    let (stop, stopped) = oneshot::channel();
    let server = Server::builder()
        .http2_keepalive_interval(Some(HTTP2_KEEPALIVE))
        .http2_keepalive_timeout(Some(HTTP2_KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(Some(MAX_STREAMS_PER_CONNECTION))
        .add_service(AggregatedDiscoveryServiceServer::new(discovery).max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(IstioCertificateServiceServer::new(certificates).max_decoding_message_size(2 * limits::MAX_CSR_BYTES))
        .add_service(NodeReportsServer::new(reports).max_decoding_message_size(MAX_REPORT_BYTES))
        .add_service(NodePodsServer::new(pod_lists));
    let server = tokio::spawn(async move {
        let stopped = async { drop(stopped.await) };
        server
            .serve_with_incoming_shutdown(ReceiverStream::new(incoming), stopped)
            .await
    });
    tracing::info!(%listen, admin = %admin_address, registry, "mesh-control serves");
    Ok(Running {
        control,
        listen,
        admin: admin_address,
        stop,
        server,
        metrics: metrics_address,
        _admin_tasks: admin_tasks,
        serving_task,
        trust_task,
        publishing_task,
        follow,
    })
}

fn refresh(certificate: &ServingCertificate, names: &ServerNames, metrics: &Metrics, now: OffsetDateTime) -> anyhow::Result<()> {
    certificate.refresh(names.current()?, now)?;
    let left_out = i64::try_from(certificate.names_left_out()).unwrap_or(i64::MAX);
    metrics.serving_names_left_out.set(left_out);
    Ok(())
}

/// Follows the files of roots, and makes the serving certificate anew when it is time.
async fn keep_trust(roots: Arc<Roots>, control: Arc<ControlPlane>, certificate: Arc<ServingCertificate>, names: ServerNames) {
    let names = Arc::new(names);
    let mut ticks = interval(SERVING_CHECK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        ticks.tick().await;
        let (roots, publisher) = (Arc::clone(&roots), Arc::clone(&control));
        let reloaded = tokio::task::spawn_blocking(move || {
            if roots.reload(OffsetDateTime::now_utc())? {
                publisher.set_trust_bundle(roots.in_force().bundle.clone());
            }
            Ok::<_, AuthorityError>(())
        });
        let failed = reloaded.await.ok().and_then(Result::err);
        if let Some(error) = &failed {
            control.metrics.roots_failed.inc();
            if !failing {
                tracing::error!(%error, "the trusted roots cannot be read; those of before stay in force");
            }
        }
        failing = failed.is_some();
        let (certificate, names) = (Arc::clone(&certificate), Arc::clone(&names));
        let metrics = Arc::clone(&control.metrics);
        let refreshed = tokio::task::spawn_blocking(move || refresh(&certificate, &names, &metrics, OffsetDateTime::now_utc()));
        if let Ok(Err(error)) = refreshed.await {
            control.metrics.serving_certificate_failed.inc();
            tracing::error!("the serving certificate cannot be made anew, the old one stays: {error:#}");
        }
    }
}

/// `mesh-control rotate-root`.
///
/// # Errors
/// As [`roots::rotate`], or as [`kubernetes::root_secret::RootSecret::rotate`].
pub fn rotate_root(args: &RotateRootArgs) -> anyhow::Result<()> {
    let now = OffsetDateTime::now_utc();
    let done = match &args.state_dir {
        Some(state_dir) => {
            let state = StateDir::open(state_dir).context("state directory")?;
            roots::rotate(&state, args.step, &args.trust_domain, now)?
        }
        None => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(async {
                let client = kubernetes::client::connect().await?;
                let secret = kubernetes::root_secret::RootSecret::new(client, &args.namespace, &args.trust_domain);
                anyhow::Ok(secret.rotate(args.step, now).await?)
            })?,
    };
    writeln!(std::io::stdout().lock(), "{done}")?;
    Ok(())
}

/// `mesh-control node-token`.
///
/// # Errors
/// As [`Tokens::issue`]; the file cannot be written.
pub fn node_token(args: &NodeTokenArgs) -> anyhow::Result<()> {
    let state = StateDir::open(&args.state_dir).context("state directory")?;
    // Where no control plane ever ran, the root is made here: the token needs its fingerprint.
    let authority = Authority::open(&state, "cluster.local", OffsetDateTime::now_utc())?;
    let output = args
        .output
        .clone()
        .unwrap_or_else(|| format!("{}.token.json", args.node).into());
    let token = Tokens::open(&state)?.issue(&args.node, &args.address, &authority.root_sha256(), args.rotate)?;
    let written = write_private(&output, &serde_json::to_vec_pretty(&token)?, true);
    written.context("the token was made but its file could not be written; mend that and use --rotate")?;
    writeln!(std::io::stdout().lock(), "wrote {}", output.display())?;
    Ok(())
}
