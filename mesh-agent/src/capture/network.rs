//! The seam between the datapath and the proxy: what the proxy may ask of a Pod's network namespace.

use std::net::{IpAddr, SocketAddr};
use std::{fmt, io};

use tokio::net::{TcpListener, TcpSocket};

use super::upstreams::UpstreamLease;
use crate::addr::{ClientAddr, ListenerAddr, OriginalDst};

/// A Pod's network namespace as the proxy uses it. The kernel's is `capture::PodNamespace`; the tunnel's tests have one of plain
/// loopback sockets.
pub trait PodNetwork: Send + Sync + fmt::Debug + 'static {
    /// Takes (and removes) where a redirected connection wanted to go.
    ///
    /// # Errors
    /// No entry: the connection was not redirected by our programs, or the map was full. To be refused, never guessed.
    fn take_original_destination(&self, client: ClientAddr, listener: ListenerAddr) -> Result<OriginalDst, CaptureError>;

    /// A socket in the Pod's netns that the connect hooks leave alone, for tunnels and pass-through.
    ///
    /// # Errors
    /// The socket cannot be made or marked.
    fn outbound_socket(&self, towards: IpAddr) -> Result<TcpSocket, CaptureError>;

    /// A socket in the Pod's netns bound to the true client's address (any port), whose connect the Pod's sk_lookup passes to
    /// the application.
    ///
    /// # Errors
    /// The socket cannot be made, marked or bound; there are too many.
    fn upstream_socket(&self, client: IpAddr, application: SocketAddr) -> Result<Upstream, CaptureError>;

    /// Whether an accepted connection is a live upstream socket's: the programs did not note it, and it came back. To be refused,
    /// or it would go round for ever.
    fn is_own_upstream(&self, client: ClientAddr, application: OriginalDst) -> bool;
}

/// A socket towards an application, to be connected to it, and its place in the bounds, to be held until it is closed.
#[derive(Debug)]
pub struct Upstream {
    pub socket: TcpSocket,
    pub lease: UpstreamLease,
}

/// The three listeners inside a Pod's netns; dual-stack where the kernel has IPv6.
#[derive(Debug)]
pub struct PodListeners {
    pub outbound: TcpListener,
    pub tunnel: TcpListener,
    pub plaintext: TcpListener,
}

#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("no original destination is recorded for this connection")]
    NoOriginalDestination,
    /// Nothing was changed; to a caller that asks again this is success.
    #[error("Pod {0} is enrolled already")]
    AlreadyEnrolled(String),
    /// The request cannot be granted as it stands; the text says what to change.
    #[error("{0}")]
    Refused(String),
    #[error("too many connections to applications: the bound of the {0} is reached")]
    UpstreamLimit(&'static str),
    #[error("no local port is free for another connection to the application with the address of {0}")]
    PortsExhausted(IpAddr),
    #[error("{step}: {source}")]
    Io { step: &'static str, source: io::Error },
    #[error("{0}")]
    Other(String),
}

impl CaptureError {
    /// Label in metrics and logs.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoOriginalDestination => "no_original_destination",
            Self::AlreadyEnrolled(_) => "already_enrolled",
            Self::Refused(_) => "refused",
            Self::UpstreamLimit(_) => "limit",
            Self::PortsExhausted(_) => "local_ports_exhausted",
            Self::Io { .. } => "io",
            Self::Other(_) => "capture",
        }
    }
}

/// Names the step that an I/O error broke.
pub(super) trait IoContext<T> {
    fn step(self, step: &'static str) -> Result<T, CaptureError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn step(self, step: &'static str) -> Result<T, CaptureError> {
        self.map_err(|source| CaptureError::Io { step, source })
    }
}
