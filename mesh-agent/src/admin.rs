//! What the agent shows over HTTP: metrics, readiness, and on loopback what it knows.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Of one server.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Connections at a time; further ones wait in the kernel's queue. 128 × about 20 KiB = 2.5 MiB.
    connections: usize,
    /// Of those, from one address; further ones are closed. A scraper needs one; sixteen clients, not one, would take all.
    per_client: usize,
    /// A connection that has not sent its request's head by then, first or next, is closed.
    head_timeout: Duration,
    /// A connection lives no longer, so that one whose answer is not read cannot keep its place.
    lifetime: Duration,
}

const BOUNDS: Bounds = Bounds {
    connections: 128,
    per_client: 8,
    head_timeout: Duration::from_secs(2),
    lifetime: Duration::from_secs(30),
};
/// Who is closed at the bound is told so often at most: it may be somebody who wants the log to be long.
const SAY_AGAIN: Duration = Duration::from_secs(60);
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// An answer.
#[derive(Debug)]
pub struct Page {
    pub status: StatusCode,
    pub content_type: &'static str,
    pub body: String,
}

impl Page {
    #[must_use]
    pub fn text(status: StatusCode, body: String) -> Self {
        Self {
            status,
            content_type: "text/plain; charset=utf-8",
            body,
        }
    }
    /// Prometheus text format.
    #[must_use]
    pub fn metrics(body: String) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: "text/plain; version=0.0.4; charset=utf-8",
            body,
        }
    }
    #[must_use]
    pub fn json(value: &serde_json::Value) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: "application/json",
            body: format!("{value:#}\n"),
        }
    }
}

/// What a path shows.
pub type Pages = Arc<dyn Fn(&str) -> Option<Page> + Send + Sync>;

/// Listens; separate from [`serve`] so that an address in use is an error at start.
///
/// # Errors
/// The address cannot be listened on; the message names the flag.
pub async fn listen(flag: &'static str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| anyhow::anyhow!("{flag} {address}: {error}"))
}

/// Serves `pages` until `stop`.
pub async fn serve(listener: TcpListener, pages: Pages, stop: CancellationToken) {
    serve_within(BOUNDS, listener, pages, stop).await;
}

async fn serve_within(bounds: Bounds, listener: TcpListener, pages: Pages, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(bounds.connections));
    let clients = Arc::<Clients>::default();
    let mut said_at = None;
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, client) = match accepted {
            Ok((stream, client)) => (stream, client.ip().to_canonical()),
            Err(error) => {
                warn!(%error, "accept on an HTTP address");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Some(client_place) = clients.take(client, bounds.per_client) else {
            if said_at.is_none_or(|at: Instant| at.elapsed() > SAY_AGAIN) {
                said_at = Some(Instant::now());
                warn!(%client, limit = bounds.per_client, "a client has all the HTTP connections that it may have: closed");
            }
            continue;
        };
        let (pages, stop) = (pages.clone(), stop.clone());
        tokio::spawn(async move {
            let _places = (place, client_place);
            let service = service_fn(move |request| {
                let answer = answer(&pages, &request);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(bounds.head_timeout)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = stop.cancelled() => {}
                ended = timeout(bounds.lifetime, connection) => {
                    if let Ok(Err(error)) = ended {
                        debug!(%error, "an HTTP connection");
                    }
                }
            }
        });
    }
}

/// Connections by their client's address; as many as there are connections.
#[derive(Debug, Default)]
struct Clients(Mutex<HashMap<IpAddr, usize>>);

/// Given back when dropped.
struct ClientPlace {
    clients: Arc<Clients>,
    client: IpAddr,
}

impl Clients {
    fn take(self: &Arc<Self>, client: IpAddr, limit: usize) -> Option<ClientPlace> {
        let mut taken = self.0.lock();
        let count = taken.entry(client).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(ClientPlace {
            clients: self.clone(),
            client,
        })
    }
}

impl Drop for ClientPlace {
    fn drop(&mut self) {
        let mut taken = self.clients.0.lock();
        if let Some(count) = taken.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.client);
            }
        }
    }
}

fn answer(pages: &Pages, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let page = if matches!(*request.method(), Method::GET | Method::HEAD) {
        pages(request.uri().path()).unwrap_or_else(|| Page::text(StatusCode::NOT_FOUND, "nothing here\n".to_owned()))
    } else {
        Page::text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned())
    };
    let mut response = Response::new(Full::new(Bytes::from(page.body)));
    *response.status_mut() = page.status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(page.content_type));
    response
}
