//! What the backstop takes for the mesh: the map follows what the agent knows, and is never smaller on the way.

use std::collections::BTreeMap;
use std::net::IpAddr;

use aya::maps::lpm_trie::Key;
use aya::maps::{LpmTrie, MapData};
use ipnet::IpNet;
use mesh_common::{AddressBytes, limits};

use super::super::CaptureError;
use super::failed;
use crate::addr::address_bytes;

/// IPv4 is v4-mapped: its prefixes are that much longer.
const V4_MAPPED_BITS: u8 = 96;
const WHAT: &str = "telling the kernel what is in the mesh";

pub(super) struct MeshDestinations {
    map: LpmTrie<MapData, AddressBytes, u8>,
    /// What is in the map, by prefix length and address.
    known: BTreeMap<(u32, AddressBytes), u8>,
}

impl MeshDestinations {
    /// Takes over what an earlier agent left. An empty map would let everything pass: everything is in the mesh then.
    pub(super) fn open(map: LpmTrie<MapData, AddressBytes, u8>) -> Result<Self, CaptureError> {
        let known: BTreeMap<_, _> = map
            .iter()
            .take(limits::MAX_MESH_DESTINATIONS as usize)
            .map(|entry| entry.map(|(key, value)| ((key.prefix_len(), key.data()), value)))
            .collect::<Result<_, _>>()
            .map_err(|error| failed(WHAT, error))?;
        let is_empty = known.is_empty();
        let mut destinations = Self { map, known };
        if is_empty {
            destinations.insert(EVERYTHING, 1)?;
        }
        Ok(destinations)
    }

    /// `true`: they did not fit, and everything is in the mesh.
    pub(super) fn replace(&mut self, prefixes: &[(IpNet, bool)]) -> Result<bool, CaptureError> {
        let mut wanted: BTreeMap<_, _> = prefixes
            .iter()
            .map(|(prefix, is_in_mesh)| (key_of(prefix), u8::from(*is_in_mesh)))
            .collect();
        // One place is kept for the prefix that has it all.
        let is_full = wanted.len() >= limits::MAX_MESH_DESTINATIONS as usize;
        if is_full {
            wanted = BTreeMap::from([(EVERYTHING, 1)]);
        }
        let stale: Vec<_> = self.known.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        // While a full map is exchanged for another there may be no room: what is stale goes first then, below a prefix that has it
        // all. That one is in the map from its first moment until all is told.
        let crowded = self.known.len() + wanted.len() >= limits::MAX_MESH_DESTINATIONS as usize;
        if crowded {
            self.insert(EVERYTHING, 1)?;
            for key in &stale {
                self.remove(key)?;
            }
        }
        for (key, value) in &wanted {
            if self.known.get(key) != Some(value) {
                self.insert(*key, *value)?;
            }
        }
        for key in &stale {
            self.remove(key)?;
        }
        if crowded && !wanted.contains_key(&EVERYTHING) {
            self.remove(&EVERYTHING)?;
        }
        Ok(is_full)
    }

    /// Makes the map again what it was left as; whether somebody had changed it.
    pub(super) fn repair(&mut self) -> Result<bool, CaptureError> {
        let found: BTreeMap<_, _> = self
            .map
            .iter()
            .take(limits::MAX_MESH_DESTINATIONS as usize)
            .map(|entry| entry.map(|(key, value)| ((key.prefix_len(), key.data()), value)))
            .collect::<Result<_, _>>()
            .map_err(|error| failed(WHAT, error))?;
        if found == self.known {
            return Ok(false);
        }
        // What is there too much first: it may be what leaves no room.
        let wanted = std::mem::replace(&mut self.known, found);
        let stale: Vec<_> = self.known.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        let missing: Vec<_> = wanted
            .iter()
            .filter(|(key, value)| self.known.get(key) != Some(value))
            .collect();
        let repaired = stale
            .iter()
            .try_for_each(|key| self.remove(key))
            .and_then(|()| missing.iter().try_for_each(|(key, value)| self.insert(**key, **value)));
        // What could not be put back is looked for again the next time.
        self.known = wanted;
        repaired.map(|()| true)
    }

    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    fn insert(&mut self, key: (u32, AddressBytes), value: u8) -> Result<(), CaptureError> {
        self.map
            .insert(&Key::new(key.0, key.1), value, 0)
            .map_err(|error| failed(WHAT, error))?;
        self.known.insert(key, value);
        Ok(())
    }

    fn remove(&mut self, key: &(u32, AddressBytes)) -> Result<(), CaptureError> {
        if self.known.contains_key(key) {
            match self.map.remove(&Key::new(key.0, key.1)) {
                Err(error) if !super::is_missing(&error) => return Err(failed(WHAT, error)),
                _ => {}
            }
            self.known.remove(key);
        }
        Ok(())
    }
}

/// `::/0`, and with it every IPv4 address.
const EVERYTHING: (u32, AddressBytes) = (0, [0; 16]);

fn key_of(prefix: &IpNet) -> (u32, AddressBytes) {
    let length = match prefix.network() {
        IpAddr::V4(_) => prefix.prefix_len() + V4_MAPPED_BITS,
        IpAddr::V6(_) => prefix.prefix_len(),
    };
    (u32::from(length), address_bytes(prefix.network()))
}
