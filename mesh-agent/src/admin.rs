//! What the agent shows over HTTP: metrics, readiness, and on loopback what it knows.

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Connections of one server at a time; further ones wait in the kernel's queue. A scraper needs one.
const CONNECTIONS: usize = 32;
/// A connection that has not sent its request's head by then is closed.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection lives no longer, so that idle ones cannot hold the places.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(60);
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
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "accept on an HTTP address");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let (pages, stop) = (pages.clone(), stop.clone());
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(move |request| {
                let answer = answer(&pages, &request);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = stop.cancelled() => {}
                ended = timeout(CONNECTION_LIFETIME, connection) => {
                    if let Ok(Err(error)) = ended {
                        debug!(%error, "an HTTP connection");
                    }
                }
            }
        });
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
