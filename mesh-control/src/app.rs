//! Puts the parts together and runs them until a signal.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use mesh_proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use mesh_proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use mesh_proto::node::node_pods_server::NodePodsServer;
use mesh_proto::node::node_reports_server::NodeReportsServer;
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

use crate::authentication::Authenticator;
use crate::authority::{Authority, AuthorityError};
use crate::certificates::Certificates;
use crate::compile::Parameters;
use crate::config::{NodeTokenArgs, RotateRootArgs, ServeArgs};
use crate::control_plane::ControlPlane;
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
use crate::{admin, limits};

#[cfg(test)]
mod tests;

/// Names that the serving certificate always has.
const OWN_NAMES: [&str; 4] = ["localhost", "127.0.0.1", "::1", "mesh-control.culvert-system.svc"];

/// A running control plane.
pub struct Running {
    pub control: Arc<ControlPlane>,
    /// Where agents connect.
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    admin_task: JoinHandle<()>,
    serving_task: JoinHandle<()>,
    publishing_task: JoinHandle<()>,
    follow: Follow,
}

impl Running {
    /// Ends everything; open streams get a moment to close.
    pub async fn stop(mut self) {
        self.follow.stop();
        self.serving_task.abort();
        self.publishing_task.abort();
        self.control.close();
        // The server may have ended by itself.
        let _ = self.stop.send(());
        if timeout(SHUTDOWN_GRACE, &mut self.server).await.is_err() {
            tracing::info!("connections were still open after {SHUTDOWN_GRACE:?}");
            self.server.abort();
        }
        self.admin_task.abort();
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
    if !args.admin.ip().is_loopback() {
        bail!(
            "--admin {}: only loopback addresses are allowed: it is not authenticated",
            args.admin
        );
    }
    let now = OffsetDateTime::now_utc();
    let (Some(registry), Some(state_dir)) = (&args.registry, &args.state_dir) else {
        bail!("--registry DIR and --state-dir DIR are needed");
    };
    let state = StateDir::open(state_dir).context("state directory")?;
    let roots = Arc::new(Roots::open(&state, &args.trust_domain, now)?);
    let tokens = Tokens::open(&state).context("state directory")?;
    let metrics = Arc::new(Metrics::new()?);
    let parameters = Parameters {
        trust_domain: args.trust_domain.clone(),
        cluster: args.cluster.clone(),
        pod_ranges: args.pod_cidr.clone(),
        trust_bundle: roots.in_force().bundle.clone(),
        revoked: BTreeSet::new(),
    };
    let control =
        Arc::new(ControlPlane::new(parameters, state.clone(), Arc::clone(&metrics), bounds).context("state directory")?);

    let certificate = Arc::new(ServingCertificate::new(Arc::clone(&roots)));
    let names = ServerNames {
        tokens: tokens.clone(),
        extra: args.server_name.clone(),
    };
    certificate.refresh(names.current()?, now)?;
    let tls = Arc::new(serving::tls_config(Arc::clone(&certificate))?);

    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("--listen {}", args.listen))?;
    let admin_listener = TcpListener::bind(args.admin)
        .await
        .with_context(|| format!("--admin {}", args.admin))?;
    let (listen, admin_address) = (listener.local_addr()?, admin_listener.local_addr()?);

    let follow = Follow::start(registry, state, Arc::clone(&control))?;
    let admin_task = tokio::spawn(admin::serve(admin_listener, Arc::clone(&control)));
    let publishing_task = tokio::spawn(Arc::clone(&control).publish_when_due());

    let serving_task = tokio::spawn(keep_trust(Arc::clone(&roots), Arc::clone(&control), certificate, names));

    let authenticator = Authenticator::new(tokens, Arc::clone(&metrics));
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
    tracing::info!(%listen, admin = %admin_address, registry = %registry.display(), "mesh-control serves");
    Ok(Running {
        control,
        listen,
        admin: admin_address,
        stop,
        server,
        admin_task,
        serving_task,
        publishing_task,
        follow,
    })
}

struct ServerNames {
    tokens: Tokens,
    extra: Vec<String>,
}

impl ServerNames {
    fn current(&self) -> Result<Vec<String>, crate::state_dir::StateError> {
        let own = OWN_NAMES.iter().map(ToString::to_string);
        Ok(own.chain(self.extra.iter().cloned()).chain(self.tokens.hosts()?).collect())
    }
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
        let refreshed = tokio::task::spawn_blocking(move || -> anyhow::Result<bool> {
            Ok(certificate.refresh(names.current()?, OffsetDateTime::now_utc())?)
        });
        if let Ok(Err(error)) = refreshed.await {
            control.metrics.serving_certificate_failed.inc();
            tracing::error!("the serving certificate cannot be made anew, the old one stays: {error:#}");
        }
    }
}

/// `mesh-control rotate-root`.
///
/// # Errors
/// As [`roots::rotate`].
pub fn rotate_root(args: &RotateRootArgs) -> anyhow::Result<()> {
    let state = StateDir::open(&args.state_dir).context("state directory")?;
    let done = roots::rotate(&state, args.step, &args.trust_domain, OffsetDateTime::now_utc())?;
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
