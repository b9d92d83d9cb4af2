//! What the kernel holds, for those who decide whether it is whole, or may be removed.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use aya::maps::{HashMap, Map, MapData};
use mesh_common::{UpstreamConnectionKey, limits};

use super::programs::NODE_PROGRAMS;
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

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFill {
    pub name: &'static str,
    pub entries: usize,
    pub max_entries: usize,
}

/// A map's keys, up to its size: a Pod that changes its map meanwhile can make the walk begin again.
pub(super) fn entries<K: aya::Pod, V: aya::Pod>(map: &HashMap<MapData, K, V>, max_entries: usize) -> usize {
    map.keys().take(max_entries).filter(Result::is_ok).count()
}

impl Kernel {
    /// Of the node's programs, those that are no longer attached: detached by hand, or cleaned up beside this agent.
    #[must_use]
    pub fn detached_programs(&self) -> Vec<&'static str> {
        let is_attached = |name: &str| {
            let link = bpf_syscalls::object_get(&self.link_pin(name))?;
            bpf_syscalls::link_target(link.as_fd())
        };
        NODE_PROGRAMS
            .iter()
            .map(|(name, ..)| *name)
            .filter(|name| !is_attached(name).is_ok_and(|cgroup| cgroup != 0))
            .collect()
    }

    /// As [`Kernel::detached_programs`], with those in whose place another's is.
    pub(super) fn lost_programs(&self) -> Vec<&'static str> {
        let mut lost = self.detached_programs();
        let others = NODE_PROGRAMS.iter().map(|(name, ..)| *name);
        let others = others.filter(|name| self.has_own_program(&self.link_pin(name)).is_ok_and(|is_own| !is_own));
        lost.extend(others.filter(|name| !lost.contains(name)).collect::<Vec<_>>());
        lost
    }

    /// Whether a Pod's sk_lookup program is this agent's.
    ///
    /// # Errors
    /// The pin cannot be opened: nothing is known then.
    pub fn has_own_lookup(&self, pod_uid: &str) -> Result<bool, CaptureError> {
        let pin = self.lookup_pin(pod_uid);
        self.has_own_program(&pin).map_err(|error| failed(pin.display(), error))
    }

    /// One system call an entry: some 100,000 and 50 ms when all is full; the maps are nearly empty unless something is wrong.
    #[must_use]
    pub fn map_fill(&self) -> Vec<MapFill> {
        let fill = |name, entries, max_entries: u32| MapFill {
            name,
            entries,
            max_entries: max_entries as usize,
        };
        let (pods, upstreams) = (limits::MAX_PODS, limits::MAX_UPSTREAM_CONNECTIONS);
        vec![
            fill("pods", entries(&self.pods.lock(), pods as usize), pods),
            fill(
                "upstream_connections",
                entries(&self.upstreams.lock(), upstreams as usize),
                upstreams,
            ),
            fill(
                "original_destinations_of_the_fullest_pod",
                self.destinations.fullest(),
                limits::MAX_ORIGINAL_DESTINATIONS_PER_POD,
            ),
            fill(
                "mesh_destinations",
                self.mesh_destinations.lock().len(),
                limits::MAX_MESH_DESTINATIONS,
            ),
            fill("probe_ports", self.probe_ports_fill(), limits::MAX_PROBE_PORTS),
        ]
    }

    /// # Errors
    /// The pin cannot be opened: nothing is known then.
    pub fn lookup_target(&self, pod_uid: &str) -> Result<LookupTarget, CaptureError> {
        let pin = self.lookup_pin(pod_uid);
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
        let pinned = MapData::from_pin(self.pins.map(NAME)).map_err(|error| failed(NAME, error))?;
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
