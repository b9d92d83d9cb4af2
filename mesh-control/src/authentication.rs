//! Who calls: the node that the bearer token names. On Kubernetes the API server says whose a token is, else a file does.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tonic::{Request, Status};

use crate::kubernetes::reviews::Reviewer;
use crate::limits::FAILURE_LOG_INTERVAL;
use crate::metrics::Metrics;
use crate::serving::Authenticated;
use crate::tokens::{Refusal, Tokens};

#[derive(Clone)]
pub struct Authenticator {
    source: Source,
    metrics: Arc<Metrics>,
    log: Arc<Mutex<FailureLog>>,
}

/// Who knows whose a token is.
#[derive(Clone)]
enum Source {
    /// `mesh-control node-token` has written it down.
    Nodes(Tokens),
    /// The API server.
    Reviews(Arc<Reviewer>),
}

#[derive(Default)]
struct FailureLog {
    last: Option<Instant>,
    unlogged: u64,
}

/// An authenticated caller.
#[derive(Clone)]
pub struct Caller {
    pub node: String,
    secret: String,
    host: IpAddr,
}

impl Authenticator {
    #[must_use]
    pub fn new(tokens: Tokens, metrics: Arc<Metrics>) -> Self {
        Self::with(Source::Nodes(tokens), metrics)
    }

    /// By service-account tokens.
    #[must_use]
    pub fn by_reviews(reviewer: Arc<Reviewer>, metrics: Arc<Metrics>) -> Self {
        Self::with(Source::Reviews(reviewer), metrics)
    }

    fn with(source: Source, metrics: Arc<Metrics>) -> Self {
        Self {
            source,
            metrics,
            log: Arc::default(),
        }
    }

    /// # Errors
    /// `UNAUTHENTICATED`, without saying why; `UNAVAILABLE` while nobody can tell.
    pub async fn authenticate<T>(&self, request: &Request<T>) -> Result<Caller, Status> {
        let connection = request.extensions().get::<Authenticated>().cloned();
        let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let Some(secret) = header.and_then(|value| value.strip_prefix("Bearer ")).map(str::to_owned) else {
            return Err(self.refuse(Refusal::Missing));
        };
        // Whoever comes by no connection of ours is one host.
        let host = connection.as_ref().map_or(Ipv6Addr::UNSPECIFIED.into(), Authenticated::host);
        match self.check(&secret, host).await {
            Ok(node) => {
                if let Some(connection) = connection {
                    connection.set();
                }
                Ok(Caller { node, secret, host })
            }
            Err(refusal) => Err(self.refuse(refusal)),
        }
    }

    /// Whether a caller's token still stands.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` once it was replaced or removed, or is over; `UNAVAILABLE` when nobody could tell for too long.
    pub async fn recheck(&self, caller: &Caller) -> Result<(), Status> {
        let checked = match &self.source {
            Source::Nodes(tokens) => match node_of(tokens, &caller.secret).await {
                // A disk that fails for a while cuts nobody off.
                Ok(_) | Err(Refusal::Unreadable) => Ok(()),
                Err(refusal) => Err(refusal),
            },
            Source::Reviews(reviewer) => reviewer.recheck(&caller.secret, caller.host).await,
        };
        checked.map_err(|refusal| self.refuse(refusal))
    }

    async fn check(&self, secret: &str, host: IpAddr) -> Result<String, Refusal> {
        match &self.source {
            Source::Nodes(tokens) => node_of(tokens, secret).await,
            Source::Reviews(reviewer) => reviewer.authenticate(secret, host).await,
        }
    }

    /// Counts a failure and makes the answer.
    #[must_use]
    pub fn refuse(&self, refusal: Refusal) -> Status {
        self.metrics
            .authentication_failed
            .with_label_values(&[refusal.reason()])
            .inc();
        let mut log = self.log.lock();
        if log.last.is_none_or(|last| last.elapsed() >= FAILURE_LOG_INTERVAL) {
            tracing::warn!(
                reason = refusal.reason(),
                more = log.unlogged,
                "a caller was not authenticated: {refusal}"
            );
            *log = FailureLog {
                last: Some(Instant::now()),
                unlogged: 0,
            };
        } else {
            log.unlogged += 1;
        }
        if refusal.is_passing() {
            return Status::unavailable(format!("{refusal}; try again"));
        }
        Status::unauthenticated("not authenticated")
    }
}

/// Reads a small file.
async fn node_of(tokens: &Tokens, secret: &str) -> Result<String, Refusal> {
    let (tokens, secret) = (tokens.clone(), secret.to_owned());
    tokio::task::spawn_blocking(move || tokens.authenticate(&secret))
        .await
        .unwrap_or(Err(Refusal::Unreadable))
}
