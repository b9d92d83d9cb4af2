//! A Pod's network namespace as the proxy uses it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_common::RedirectedConnectionKey;
use tokio::net::TcpSocket;

use super::kernel::Kernel;
use super::netns::NetNamespace;
use super::network::{CaptureError, IoContext, PodNetwork, Upstream};
use super::sockets;
use super::upstreams::Upstreams;
use crate::addr::{ClientAddr, ListenerAddr, OriginalDst, address_bytes, ip_from_bytes};

/// The kernel's [`PodNetwork`].
pub struct PodNamespace {
    kernel: Arc<Kernel>,
    netns: NetNamespace,
    slot: u32,
    addresses: Vec<IpAddr>,
    upstreams: Upstreams,
}

impl PodNamespace {
    pub(super) fn new(kernel: Arc<Kernel>, netns: NetNamespace, slot: u32, addresses: Vec<IpAddr>, upstreams: Upstreams) -> Self {
        Self {
            kernel,
            netns,
            slot,
            addresses,
            upstreams,
        }
    }

    #[must_use]
    pub fn netns(&self) -> &NetNamespace {
        &self.netns
    }

    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot
    }
}

impl std::fmt::Debug for PodNamespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PodNamespace")
            .field("netns_cookie", &self.netns.cookie())
            .field("slot", &self.slot)
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl PodNetwork for PodNamespace {
    fn take_original_destination(&self, client: ClientAddr, listener: ListenerAddr) -> Result<OriginalDst, CaptureError> {
        let key = RedirectedConnectionKey {
            netns_cookie: self.netns.cookie(),
            client_address: address_bytes(client.ip()),
            listener_address: address_bytes(listener.ip()),
            client_port: client.port(),
            listener_port: listener.port(),
            _pad: 0,
        };
        let value = self
            .kernel
            .take_original_destination(&key)?
            .ok_or(CaptureError::NoOriginalDestination)?;
        Ok(OriginalDst::new((ip_from_bytes(value.address), value.port).into()))
    }

    fn outbound_socket(&self, towards: IpAddr) -> Result<TcpSocket, CaptureError> {
        self.netns.run(|| sockets::outbound(&self.kernel, self.slot, towards))
    }

    fn upstream_socket(&self, client: IpAddr, application: SocketAddr) -> Result<Upstream, CaptureError> {
        let mut lease = self.upstreams.reserve()?;
        let client_is_pod = self.addresses.contains(&client.to_canonical());
        let towards = application.ip();
        let socket = self
            .netns
            .run(|| sockets::upstream(&self.kernel, self.slot, client, client_is_pod, towards))?;
        let local = socket.local_addr().step("reading an upstream socket's address")?;
        self.upstreams.register(&mut lease, local, application);
        Ok(Upstream { socket, lease })
    }

    fn is_own_upstream(&self, client: ClientAddr, application: OriginalDst) -> bool {
        self.upstreams.is_live(client, application)
    }
}
