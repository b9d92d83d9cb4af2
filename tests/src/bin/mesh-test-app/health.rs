//! A gRPC server that answers every call as grpc.health.v1.Health/Check: SERVING.

use std::io::Write as _;
use std::net::Ipv6Addr;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, header};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};

/// Not compressed, two bytes long: `status: SERVING`.
const ANSWER: [u8; 7] = [0, 0, 0, 0, 2, 0x08, 1];

pub fn serve(port: &str) -> Result<Value> {
    let port: u16 = port.parse().context("a port")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await?;
        writeln!(std::io::stdout(), "health is told at port {port}")?;
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(async move {
                if let Err(error) = answer(stream).await {
                    let _ = writeln!(std::io::stderr(), "{error:#}");
                }
            });
        }
    })
}

async fn answer(stream: TcpStream) -> Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(call) = connection.accept().await {
        let (_, mut respond) = call?;
        let mut head = Response::new(());
        head.headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        let mut body = respond.send_response(head, false)?;
        body.send_data(Bytes::from_static(&ANSWER), false)?;
        let ok = HeaderMap::from_iter([(header::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
        body.send_trailers(ok)?;
    }
    Ok(())
}
