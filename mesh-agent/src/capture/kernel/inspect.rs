//! What the kernel holds, for those who decide whether it is whole, or may be removed.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use aya::maps::{HashMap, Map, MapData};
use mesh_common::UpstreamConnectionKey;

use super::pin_names::pin_name;
use super::{Kernel, bpf_syscalls, failed, typed};
use crate::addr::address_bytes;
use crate::capture::CaptureError;

/// What a Pod's sk_lookup program is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupTarget {
    /// No link is pinned.
    NoLink,
    /// The link outlived its network namespace, or was detached from it.
    Gone,
    /// The network namespace with this inode.
    Netns(u64),
}

impl Kernel {
    /// # Errors
    /// The pin cannot be opened: nothing is known then.
    pub fn lookup_target(&self, pod_uid: &str) -> Result<LookupTarget, CaptureError> {
        let pin = self.directory.join("pods").join(pin_name(pod_uid));
        let target = match bpf_syscalls::object_get(&pin) {
            Ok(link) => bpf_syscalls::link_target(link.as_fd()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(LookupTarget::NoLink),
            Err(error) => Err(error),
        };
        match target.map_err(|error| failed(pin.display(), error))? {
            0 => Ok(LookupTarget::Gone),
            inode => Ok(LookupTarget::Netns(inode)),
        }
    }

    /// Whether sockops noted that connection of the agent's to an application.
    ///
    /// # Errors
    /// The map cannot be read.
    pub(in crate::capture) fn has_upstream(
        &self,
        slot: u32,
        client: SocketAddr,
        application: SocketAddr,
    ) -> Result<bool, CaptureError> {
        const NAME: &str = "UPSTREAM_CONNECTIONS";
        let pinned = MapData::from_pin(self.directory.join(NAME)).map_err(|error| failed(NAME, error))?;
        let upstreams: HashMap<MapData, UpstreamConnectionKey, u64> = typed(Map::HashMap(pinned))?;
        let key = UpstreamConnectionKey {
            slot,
            client_port: client.port(),
            application_port: application.port(),
            client_address: address_bytes(client.ip()),
            application_address: address_bytes(application.ip()),
        };
        match upstreams.get(&key, 0) {
            Ok(_) => Ok(true),
            Err(error) if super::is_missing(&error) => Ok(false),
            Err(error) => Err(failed(NAME, error)),
        }
    }
}
