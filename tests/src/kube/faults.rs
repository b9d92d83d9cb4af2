//! An API server that misbehaves: a proxy in front of a real one, which answers in its stead what a test wants, and counts who asks.
//!
//! It speaks plain HTTP on loopback and is a user of its own at the API server, so whoever comes by it is that user.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use kube::Client;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Answer = Response<UnsyncBoxBody<Bytes, Error>>;

/// Bytes of an endless line at a time.
const ENDLESS_PIECE: usize = 1 << 20;

/// Whom a fault meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Everything,
    Lists,
    Watches,
    /// Who calls.
    TokenReviews,
    /// The root's Secret.
    Secrets,
    /// What is written back of objects.
    Statuses,
    /// What people are told.
    Events,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// With a Status, as the API server itself says it.
    Status(u16),
    /// In plain text with `Retry-After`, as its queues say it.
    RetryAfter(u16, u32),
    /// A watch that is granted, and whose first event is this error.
    ErrorEvent(u16),
    /// The connection stays, and nothing is said.
    Hang,
    /// A watch that is granted, and says nothing at all, not even its end.
    Silent,
    /// In the middle of each first event the connection is cut.
    CutMidEvent,
    /// A granted watch whose first event never ends.
    EndlessLine,
    /// So much later.
    Slow(Duration),
}

/// A request that came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at: Instant,
    pub target: Target,
    /// The resource, as `pods`.
    pub resource: String,
    pub method: Method,
}

#[derive(Default)]
struct State {
    /// Whom, of which resource (empty: of any), and how.
    faults: Vec<(Target, &'static str, Fault)>,
    seen: Vec<Seen>,
    /// Bytes of endless lines that were taken.
    endless: usize,
}

/// The proxy; it ends with this.
pub struct FaultyApiServer {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    /// What is open ends at each change: a fault meets watches that were granted before as well.
    changes: watch::Sender<u64>,
    task: JoinHandle<()>,
}

impl FaultyApiServer {
    /// In front of the API server that the kubeconfig names, as its user. On the current runtime.
    ///
    /// # Errors
    /// The kubeconfig cannot be used; no socket.
    pub async fn start(kubeconfig: &Path) -> Result<Self> {
        let client = super::client(kubeconfig).await?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let state = Arc::new(Mutex::new(State::default()));
        let changes = watch::Sender::new(0);
        let task = tokio::spawn(serve(listener, client, Arc::clone(&state), changes.clone()));
        Ok(Self {
            address,
            state,
            changes,
            task,
        })
    }

    /// A client that comes by it, made as mesh-control makes its own.
    ///
    /// # Errors
    /// As the client says.
    pub fn client(&self) -> Result<Client> {
        let url = format!("http://{}", self.address).parse().context("an address")?;
        mesh_control::kubernetes::client::client(kube::Config::new(url))
    }

    /// From now on, until [`Self::heal`]; the last one counts.
    pub fn break_with(&self, target: Target, fault: Fault) {
        self.break_of(target, "", fault);
    }

    /// The same for one resource.
    pub fn break_of(&self, target: Target, resource: &'static str, fault: Fault) {
        lock(&self.state).faults.push((target, resource, fault));
        self.changes.send_modify(|change| *change += 1);
    }

    pub fn heal(&self) {
        lock(&self.state).faults.clear();
        self.changes.send_modify(|change| *change += 1);
    }

    /// What came since `since`.
    #[must_use]
    pub fn seen(&self, target: Target, resource: &str, since: Instant) -> Vec<Seen> {
        let state = lock(&self.state);
        let of_it = |seen: &&Seen| {
            (target == Target::Everything || seen.target == target)
                && seen.at >= since
                && (resource.is_empty() || seen.resource == resource)
        };
        state.seen.iter().filter(of_it).cloned().collect()
    }

    /// Bytes of endless lines that somebody has read.
    #[must_use]
    pub fn endless_bytes(&self) -> usize {
        lock(&self.state).endless
    }
}

impl Drop for FaultyApiServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(listener: TcpListener, client: Client, state: Arc<Mutex<State>>, changes: watch::Sender<u64>) {
    // They end with this task.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (client, state, changes) = (client.clone(), Arc::clone(&state), changes.clone());
        connections.spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                let (client, state, changes) = (client.clone(), Arc::clone(&state), changes.subscribe());
                async move { Ok::<_, Infallible>(answer(request, client, state, changes).await) }
            });
            // Who is cut off, or goes, is what this is about.
            drop(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await,
            );
        });
        while connections.try_join_next().is_some() {}
    }
}

fn target_of(request: &Request<Incoming>) -> (Target, String) {
    let query = request.uri().query().unwrap_or_default();
    let path = request.uri().path();
    // /api/v1/pods, /apis/GROUP/VERSION/namespaces/NAMESPACE/RESOURCE/NAME
    let mut parts: Vec<&str> = path.split('/').skip(if path.starts_with("/apis/") { 4 } else { 3 }).collect();
    if parts.len() > 2 && parts[0] == "namespaces" {
        parts.drain(..2);
    }
    let resource = parts.first().copied().unwrap_or_default().to_owned();
    let target = match resource.as_str() {
        "tokenreviews" => Target::TokenReviews,
        "secrets" => Target::Secrets,
        "events" => Target::Events,
        _ if query.contains("watch=true") || query.contains("watch=1") => Target::Watches,
        _ if request.method() == Method::GET && parts.len() == 1 => Target::Lists,
        _ if parts.get(2) == Some(&"status") => Target::Statuses,
        _ => Target::Everything,
    };
    (target, resource)
}

async fn answer(
    request: Request<Incoming>,
    client: Client,
    state: Arc<Mutex<State>>,
    mut changes: watch::Receiver<u64>,
) -> Answer {
    let (target, resource) = target_of(&request);
    let fault = {
        let mut state = lock(&state);
        let at = Instant::now();
        let meets =
            |wanted: Target, of: &str| (wanted == Target::Everything || wanted == target) && (of.is_empty() || of == resource);
        let found = state.faults.iter().rev().find(|(wanted, of, _)| meets(*wanted, of));
        let found = found.map(|(_, _, fault)| fault.clone());
        let method = request.method().clone();
        state.seen.push(Seen {
            at,
            target,
            resource,
            method,
        });
        found
    };
    match fault {
        Some(Fault::Status(code)) => said(code, "application/json", None, &status(code)),
        Some(Fault::RetryAfter(code, seconds)) => said(
            code,
            "text/plain",
            Some(seconds),
            "Too many requests, please try again later.",
        ),
        Some(Fault::ErrorEvent(code)) => {
            let event = format!("{{\"type\":\"ERROR\",\"object\":{}}}\n", status(code));
            said(200, "application/json", None, &event)
        }
        Some(Fault::Hang) => {
            drop(changes.changed().await);
            said(503, "text/plain", None, "it hung")
        }
        Some(Fault::Silent) => streamed(Spoiled {
            body: None,
            spoil: Spoil::Nothing,
            state,
            change: Box::pin(async move { drop(changes.changed().await) }),
        }),
        Some(Fault::EndlessLine) => streamed(Spoiled {
            body: None,
            spoil: Spoil::Endless,
            state,
            change: Box::pin(async move { drop(changes.changed().await) }),
        }),
        Some(Fault::Slow(by)) => {
            tokio::time::sleep(by).await;
            forward(request, client, Spoil::Nothing, state, changes).await
        }
        Some(Fault::CutMidEvent) => forward(request, client, Spoil::Cut, state, changes).await,
        None => forward(request, client, Spoil::Nothing, state, changes).await,
    }
}

fn status(code: u16) -> String {
    let reason = match code {
        410 => "Expired",
        429 => "TooManyRequests",
        500 => "InternalError",
        503 => "ServiceUnavailable",
        _ => "BadRequest",
    };
    serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": format!("a test wants {code}"), "reason": reason, "code": code,
    })
    .to_string()
}

fn said(code: u16, kind: &str, retry_after: Option<u32>, text: &str) -> Answer {
    let mut response = Response::builder().status(code).header("content-type", kind);
    if let Some(seconds) = retry_after {
        response = response.header("retry-after", seconds);
    }
    let body = Full::new(Bytes::from(text.to_owned())).map_err(|never| match never {});
    response.body(body.boxed_unsync()).unwrap_or_default()
}

fn streamed(body: Spoiled) -> Answer {
    let response = Response::builder().header("content-type", "application/json");
    response.body(body.boxed_unsync()).unwrap_or_default()
}

async fn forward(
    request: Request<Incoming>,
    client: Client,
    spoil: Spoil,
    state: Arc<Mutex<State>>,
    mut changes: watch::Receiver<u64>,
) -> Answer {
    let (mut parts, body) = request.into_parts();
    parts.headers.remove("host");
    let Ok(body) = body.collect().await else {
        return said(400, "text/plain", None, "half a request");
    };
    let request = Request::from_parts(parts, kube::client::Body::from(body.to_bytes().to_vec()));
    match client.send(request).await {
        Ok(answer) => {
            let (parts, body) = answer.into_parts();
            let body = Spoiled {
                body: Some(body),
                spoil,
                state,
                change: Box::pin(async move { drop(changes.changed().await) }),
            };
            Response::from_parts(parts, body.boxed_unsync())
        }
        Err(error) => said(502, "text/plain", None, &error.to_string()),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Spoil {
    Nothing,
    Cut,
    /// After the cut.
    Over,
    Endless,
}

/// An answer's body, with what is done to it. It breaks off at the next change of faults.
struct Spoiled {
    /// `None`: nobody was asked.
    body: Option<kube::client::Body>,
    spoil: Spoil,
    state: Arc<Mutex<State>>,
    change: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Body for Spoiled {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = self.get_mut();
        if this.spoil == Spoil::Over {
            return Poll::Ready(Some(Err("cut".into())));
        }
        if this.spoil == Spoil::Endless {
            lock(&this.state).endless += ENDLESS_PIECE;
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from(vec![b'x'; ENDLESS_PIECE])))));
        }
        let Some(body) = &mut this.body else {
            std::task::ready!(this.change.as_mut().poll(cx));
            return Poll::Ready(Some(Err("over".into())));
        };
        let frame = match Pin::new(body).poll_frame(cx) {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                std::task::ready!(this.change.as_mut().poll(cx));
                return Poll::Ready(Some(Err("over".into())));
            }
        };
        let frame = frame.map(|frame| frame.map_err(Error::from));
        match frame {
            Some(Ok(frame)) if this.spoil == Spoil::Cut => {
                this.spoil = Spoil::Over;
                let data = frame.into_data().unwrap_or_default();
                Poll::Ready(Some(Ok(Frame::data(data.slice(..data.len() / 2)))))
            }
            frame => Poll::Ready(frame),
        }
    }
}
