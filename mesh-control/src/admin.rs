//! `/metrics`, `/healthz/ready` and `/status`, over HTTP.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};

use crate::control_plane::ControlPlane;
use crate::limits::ACCEPT_PAUSE;
use crate::places::Places;

/// Which pages an address has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// On loopback.
    All,
    /// For everybody: without `/status`, which names what is in the registry.
    Public,
}

/// Serves until it is dropped.
pub async fn serve(listener: TcpListener, pages: Pages, control: Arc<ControlPlane>) {
    let bounds = control.bounds;
    let places = Places::new(bounds.admin_connections, bounds.admin_connections_per_address, None);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "admin accept");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(place) = places.take(peer.ip()) else {
            control
                .metrics
                .connections_refused
                .with_label_values(&["admin_too_many"])
                .inc();
            continue;
        };
        let control = Arc::clone(&control);
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(|request| {
                let response = answer(&request, pages, &control);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(bounds.admin)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // A client that does not read its answer is let go of, too.
            drop(timeout(bounds.admin * 2, connection).await);
        });
    }
}

fn answer(request: &Request<Incoming>, pages: Pages, control: &ControlPlane) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET\n".to_owned());
    }
    match request.uri().path() {
        "/metrics" => match control.metrics.text() {
            Ok(metrics) => text(StatusCode::OK, "text/plain; version=0.0.4", metrics),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
        },
        "/healthz/ready" => {
            // What is in force is still served, and certificates are signed for it: not to be ready would stop that, too.
            let (status, body) = match (control.is_ready(), control.registry_problem()) {
                (true, None) => (StatusCode::OK, "ready".to_owned()),
                (true, Some(problem)) => (StatusCode::OK, format!("ready, with what was in force before: {problem}")),
                (false, None) => (StatusCode::SERVICE_UNAVAILABLE, "the registry is not read yet".to_owned()),
                (false, Some(problem)) => (StatusCode::SERVICE_UNAVAILABLE, problem),
            };
            text(status, "text/plain", body + "\n")
        }
        "/status" if pages == Pages::All => text(StatusCode::OK, "application/json", format!("{:#}\n", control.status())),
        _ => text(
            StatusCode::NOT_FOUND,
            "text/plain",
            match pages {
                Pages::All => "/metrics, /healthz/ready, /status\n",
                Pages::Public => "/metrics, /healthz/ready\n",
            }
            .to_owned(),
        ),
    }
}

fn text(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}
