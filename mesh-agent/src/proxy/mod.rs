//! Carries the connections of enrolled Pods. Three listeners a Pod: [`outbound`] takes what its applications open, [`inbound`] the
//! tunnels of other Pods, [`plaintext`] everything else that arrives. Each is a straight function in phases; [`authorize`]
//! decides for both ways in, [`copy`] carries the bytes.

mod authorize;
mod buffers;
mod copy;
mod error;
#[cfg(fuzzing)]
pub mod fuzz;
mod inbound;
pub mod limits;
mod measured;
mod outbound;
mod plaintext;
mod pod;
mod pool;
mod proof;
mod quota;
mod registry;
mod review;
mod socket;
mod step;
#[cfg(test)]
mod tests;

use std::borrow::Borrow;
use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

pub use self::buffers::Buffers;
pub use self::error::{Phase, ProxyError, Refusal, ResetBy};
pub use self::limits::Limits;
pub use self::pod::ProxyPod;
pub use self::registry::{ConnectionInfo, Registered, Registry};

use self::limits::{ACCEPT_RETRY, SHUTDOWN_PATIENCE};
use self::pod::PodContext;
use self::pool::Pool;
use crate::addr::{ClientAddr, ListenerAddr};
use crate::capture::PodListeners;
use crate::identity::Identity;
use crate::identity::store::CertificateStore;
use crate::state::SharedState;
use crate::telemetry::{AccessLog, Metrics};
use crate::tls::TlsConfigs;

/// What all Pods of the node share.
#[derive(Debug)]
pub struct Proxy {
    /// The node's name.
    node: Arc<str>,
    state: Arc<SharedState>,
    certificates: Arc<CertificateStore>,
    metrics: Arc<Metrics>,
    access_log: AccessLog,
    registry: Arc<Registry>,
    tls: Arc<TlsConfigs>,
    pool: Arc<Pool>,
    limits: Limits,
    steps: step::Steps,
}

impl Proxy {
    #[must_use]
    pub fn new(
        node: Arc<str>,
        state: Arc<SharedState>,
        certificates: Arc<CertificateStore>,
        metrics: Arc<Metrics>,
        access_log: AccessLog,
    ) -> Arc<Self> {
        Self::with_limits(node, state, certificates, metrics, access_log, Limits::default())
    }

    /// With other bounds than a node's.
    #[must_use]
    pub fn with_limits(
        node: Arc<str>,
        state: Arc<SharedState>,
        certificates: Arc<CertificateStore>,
        metrics: Arc<Metrics>,
        access_log: AccessLog,
        limits: Limits,
    ) -> Arc<Self> {
        let tls = Arc::<TlsConfigs>::default();
        Arc::new(Self {
            node,
            pool: Pool::new(
                state.clone(),
                certificates.clone(),
                tls.clone(),
                metrics.clone(),
                limits.clone(),
            ),
            state,
            certificates,
            metrics,
            access_log,
            registry: Arc::new(Registry::new(&limits)),
            tls,
            limits,
            steps: step::Steps::default(),
        })
    }

    /// Every connection that is carried.
    #[must_use]
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// These identities are no Pod's of this node any longer: their keys are dropped.
    pub fn forget(&self, identities: &[Identity]) {
        for identity in identities {
            self.tls.forget(identity);
        }
    }

    /// Serves a Pod until its handle is shut down.
    #[must_use]
    pub fn serve(self: &Arc<Self>, pod: ProxyPod, listeners: PodListeners) -> PodProxyHandle {
        let buffers = self.registry.buffers().pod(&pod.pod_uid);
        let context = PodContext::new(pod, &self.limits, buffers);
        context.tasks.spawn(review::run(self.clone(), context.clone()));
        let listeners = [listeners.outbound, listeners.tunnel, listeners.plaintext].map(Arc::new);
        let [outbound, tunnel, plaintext] = listeners.clone();
        self.accept(&context, outbound, "outbound", outbound::serve);
        self.accept(&context, tunnel, "tunnel", inbound::serve);
        self.accept(&context, plaintext, "plaintext", plaintext::serve);
        PodProxyHandle {
            context,
            listeners: Mutex::new(Some(listeners)),
        }
    }

    fn accept<F>(
        self: &Arc<Self>,
        context: &Arc<PodContext>,
        listener: impl Borrow<TcpListener> + Send + Sync + 'static,
        name: &'static str,
        serve: impl Fn(Arc<Proxy>, Arc<PodContext>, Accepted) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let (proxy, context) = (self.clone(), context.clone());
        let (tasks, tracker) = (context.tasks.clone(), context.accepted.clone());
        tasks.spawn(tracker.track_future(async move {
            let listener = listener.borrow();
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = context.shutdown.cancelled() => return,
                    () = context.stop_accepting.cancelled() => return,
                };
                let accepted = accepted.and_then(|(stream, client)| {
                    Ok(Accepted {
                        client: ClientAddr::new(client),
                        listener: ListenerAddr::new(stream.local_addr()?),
                        stream,
                    })
                });
                match accepted {
                    Ok(accepted) => {
                        let connection = serve(proxy.clone(), context.clone(), accepted);
                        let shutdown = context.shutdown.clone();
                        context.tasks.spawn(context.accepted.track_future(async move {
                            tokio::select! {
                                () = connection => {}
                                // Dropping it resets both of its ends.
                                () = shutdown.cancelled() => {}
                            }
                        }));
                    }
                    Err(error) => {
                        proxy.metrics.count_accept_error(name);
                        tracing::warn!(%error, listener = name, pod = %context.pod.name, "accept");
                        sleep(ACCEPT_RETRY).await;
                    }
                }
            }
        }));
    }
}

/// A connection as a listener took it.
struct Accepted {
    stream: TcpStream,
    client: ClientAddr,
    listener: ListenerAddr,
}

/// A Pod that is served. Dropped without [`PodProxyHandle::shutdown`], it is shut down in the background.
#[derive(Debug)]
pub struct PodProxyHandle {
    context: Arc<PodContext>,
    /// `None` once they close.
    listeners: Mutex<Option<[Arc<TcpListener>; 3]>>,
}

impl PodProxyHandle {
    /// Outbound, tunnel, plaintext: to be given to the agent that takes over.
    #[must_use]
    pub fn listeners(&self) -> Option<[Arc<TcpListener>; 3]> {
        self.listeners.lock().clone()
    }

    /// Closes the Pod's listeners, so that new connections are refused; those that it has go on. Peers are told to open other
    /// tunnels for new ones.
    pub fn stop_accepting(&self) {
        self.listeners.lock().take();
        self.context.stop_accepting.cancel();
    }

    /// Whether all that was accepted has ended, and nothing more can come: after [`Self::stop_accepting`].
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.context.accepted.is_empty()
    }

    /// Closes the Pod's listeners and tunnels and resets its connections.
    pub async fn shutdown(self) {
        self.listeners.lock().take();
        self.context.shutdown.cancel();
        self.context.tasks.close();
        if timeout(SHUTDOWN_PATIENCE, self.context.tasks.wait()).await.is_err() {
            tracing::warn!(pod = %self.context.pod.name, "connections of a released Pod have not ended");
        }
    }
}

impl Drop for PodProxyHandle {
    fn drop(&mut self) {
        self.context.shutdown.cancel();
    }
}
