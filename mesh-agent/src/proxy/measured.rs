//! A tunnel's socket that tells how TCP fares on it.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::capture::tcp_info::{TcpInfo, tcp_info};
use crate::telemetry::{Metrics, OpenTunnel, WorkloadPair};

/// How often the kernel is asked, while the tunnel is used. An idle one has nothing new to tell.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(5);

/// Asks the kernel when it is read, which acknowledgements of streams make it be, and when it is dropped: that needs no timer, and no second descriptor that would
/// keep the connection open.
#[derive(Debug)]
pub(super) struct Measured {
    stream: TcpStream,
    tunnel: TunnelSlot,
    told: TcpInfo,
    next_sample: Instant,
}

/// The tunnel that a socket belongs to, once its handshake has said between whom it is. Before, there is nothing to count it by.
#[derive(Clone, Debug, Default)]
pub(super) struct TunnelSlot(Arc<OnceLock<OpenTunnel>>);

impl TunnelSlot {
    pub(super) fn opened(self, metrics: &Metrics, pair: WorkloadPair) {
        self.0.get_or_init(|| metrics.tunnels().opened(pair));
    }
}

impl Measured {
    pub(super) fn new(stream: TcpStream) -> (Self, TunnelSlot) {
        let tunnel = TunnelSlot::default();
        let measured = Self {
            stream,
            tunnel: tunnel.clone(),
            told: TcpInfo::default(),
            next_sample: Instant::now(),
        };
        (measured, tunnel)
    }

    fn sample_if_due(&mut self) {
        let now = Instant::now();
        if now >= self.next_sample && self.tunnel.0.get().is_some() {
            self.next_sample = now + SAMPLE_INTERVAL;
            self.sample();
        }
    }

    fn sample(&mut self) {
        let Some(tunnel) = self.tunnel.0.get() else { return };
        // An error only on what is no TCP socket.
        let Ok(info) = tcp_info(&self.stream) else { return };
        let sent = info.sent_segments.wrapping_sub(self.told.sent_segments);
        let retransmitted = info.retransmitted_segments.wrapping_sub(self.told.retransmitted_segments);
        if sent > 0 || retransmitted > 0 {
            tunnel.measured(info.smoothed_rtt, sent, retransmitted);
            self.told = info;
        }
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        self.sample();
    }
}

impl AsyncRead for Measured {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.sample_if_due();
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Measured {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
