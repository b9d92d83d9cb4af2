use std::future::Future;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};

use super::error::{Phase, ProxyError};
use super::limits::{CONNECT_TIMEOUT, UPSTREAM_TRIES};
use super::pod::PodContext;
use crate::capture::UpstreamLease;

/// Finds peers that vanished without a word; the ends of an open connection may otherwise be silent for ever.
const KEEP_ALIVE: Duration = Duration::from_secs(180);

/// One side of a connection. Dropped before [`Carried::close`] it is reset: an end that is given up never looks like a proper
/// end of the stream.
#[derive(Debug)]
pub(super) struct Carried(TcpStream);

impl Carried {
    pub(super) fn new(stream: TcpStream) -> Self {
        let socket = SockRef::from(&stream);
        // Each fails only on a socket that is broken already, and that the first read tells.
        let _ = socket.set_linger(Some(Duration::ZERO));
        let _ = socket.set_tcp_nodelay(true);
        let _ = socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(KEEP_ALIVE / 6));
        Self(stream)
    }

    /// To the application or to an outsider.
    pub(super) async fn connect(socket: TcpSocket, to: SocketAddr, what: &'static str) -> Result<Self, ProxyError> {
        connect(socket, to, what).await.map(Self::new)
    }

    /// To the Pod's application, from the client's address; with it the place that the connection has among the Pod's.
    pub(super) async fn to_application(
        context: &PodContext,
        client: IpAddr,
        destination: SocketAddr,
    ) -> Result<(UpstreamLease, Self), ProxyError> {
        let mut tries = UPSTREAM_TRIES;
        loop {
            let upstream = context.pod.network.upstream_socket(client, destination)?;
            tries -= 1;
            match Self::connect(upstream.socket, destination, "application").await {
                // When most ports are busy one is shared, and it may be the very one of a connection that lives: another may do.
                Err(ProxyError::Connect { source, .. }) if source.kind() == io::ErrorKind::AddrNotAvailable && tries > 0 => {}
                connected => return connected.map(|application| (upstream.lease, application)),
            }
        }
    }

    /// Ends it properly: what was written is still delivered.
    pub(super) fn close(self) {
        let _ = SockRef::from(&self.0).set_linger(None);
    }

    /// Hands it on without the reset.
    pub(super) fn into_inner(self) -> TcpStream {
        let _ = SockRef::from(&self.0).set_linger(None);
        self.0
    }

    /// Tells the other end that nothing more comes.
    pub(super) fn shutdown_write(&self) -> io::Result<()> {
        SockRef::from(&self.0).shutdown(Shutdown::Write)
    }

    /// As much as the socket takes now.
    pub(super) fn try_write_some(&self, data: &[u8]) -> io::Result<usize> {
        if data.is_empty() {
            return Ok(0);
        }
        match self.0.try_write(data) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }

    /// All of it, with the back-pressure of the socket.
    pub(super) async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            match self.0.try_write(data) {
                Ok(written) => data = &data[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.0.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Deref for Carried {
    type Target = TcpStream;
    fn deref(&self) -> &TcpStream {
        &self.0
    }
}

/// A TCP connect within its time.
pub(super) async fn connect(socket: TcpSocket, to: SocketAddr, what: &'static str) -> Result<TcpStream, ProxyError> {
    within(CONNECT_TIMEOUT, Phase::Connect, async {
        socket.connect(to).await.map_err(|source| ProxyError::Connect {
            what,
            source: Arc::new(source),
        })
    })
    .await
}

/// The outcome of a phase, or that it took too long.
pub(super) async fn within<T, E: Into<ProxyError>>(
    limit: Duration,
    phase: Phase,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, ProxyError> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(ProxyError::Timeout(phase)),
    }
}
