//! Where redirected connections wanted to go: of each enrolled Pod a map of its own, so that no Pod fills another's.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use aya::maps::{HashMap, HashOfMaps, Map, MapData, MapError};
use mesh_common::{OriginalDestinationValue, RedirectedConnectionKey, limits};
use parking_lot::Mutex;

use super::super::CaptureError;
use super::super::bpf_syscalls::{BPF_F_NO_PREALLOC, map_take};
use super::inspect::entries;
use super::{failed, is_missing, programs::typed};

type OfPod = HashMap<MapData, RedirectedConnectionKey, OriginalDestinationValue>;

const NAME: &str = "ORIGINAL_DESTINATIONS";

pub(super) struct Destinations {
    /// The pinned map of the Pods' maps. A change of it waits for running programs, tens of ms: not with `pods` locked.
    map: Mutex<Map>,
    /// The Pods' maps by network-namespace cookie. Locked after `map`.
    pods: Mutex<BTreeMap<u64, Arc<PodDestinations>>>,
}

struct PodDestinations {
    map: Mutex<OfPod>,
    /// The same map, for the one operation that aya lacks.
    fd: OwnedFd,
}

impl PodDestinations {
    fn new(data: MapData) -> Result<Self, CaptureError> {
        let fd = data.fd().as_fd().try_clone_to_owned().map_err(|error| failed(NAME, error))?;
        Ok(Self {
            map: Mutex::new(typed(Map::HashMap(data))?),
            fd,
        })
    }

    fn take(&self, key: &RedirectedConnectionKey) -> Result<Option<OriginalDestinationValue>, CaptureError> {
        map_take(self.fd.as_fd(), key).map_err(|source| CaptureError::Io {
            step: "taking an original destination",
            source,
        })
    }
}

impl Destinations {
    /// Takes over what an earlier agent made.
    pub(super) fn open(map: Map) -> Result<Self, CaptureError> {
        let mut pods = BTreeMap::new();
        {
            let known = HashOfMaps::<_, u64, MapData>::try_from(&map).map_err(|error| failed(NAME, error))?;
            for cookie in known.keys().take(limits::MAX_PODS as usize) {
                let cookie = cookie.map_err(|error| failed(NAME, error))?;
                let data = known.get(&cookie, 0).map_err(|error| failed(NAME, error))?;
                pods.insert(cookie, Arc::new(PodDestinations::new(data)?));
            }
        }
        Ok(Self {
            map: Mutex::new(map),
            pods: Mutex::new(pods),
        })
    }

    /// Makes a Pod's map, if it has none.
    pub(super) fn add_pod(&self, netns_cookie: u64) -> Result<(), CaptureError> {
        const WHAT: &str = "making a Pod's map of original destinations";
        let mut map = self.map.lock();
        // Somebody may have removed it from the kernel meanwhile; that it is known here says nothing.
        if self.pods.lock().contains_key(&netns_cookie) && open_of(&map, netns_cookie).is_ok() {
            return Ok(());
        }
        let made =
            OfPod::create(limits::MAX_ORIGINAL_DESTINATIONS_PER_POD, BPF_F_NO_PREALLOC).map_err(|error| failed(WHAT, error))?;
        HashOfMaps::<_, u64, OfPod>::try_from(&mut *map)
            .and_then(|mut map| map.insert(netns_cookie, &made, 0))
            .map_err(|error| failed(WHAT, error))?;
        // Opened anew: aya does not show the descriptor of a typed map.
        let data = open_of(&map, netns_cookie).map_err(|error| failed(WHAT, error))?;
        let pod = Arc::new(PodDestinations::new(data)?);
        self.pods.lock().insert(netns_cookie, pod);
        Ok(())
    }

    /// Whether the kernel has a Pod's map.
    pub(super) fn has_pod(&self, netns_cookie: u64) -> bool {
        open_of(&self.map.lock(), netns_cookie).is_ok()
    }

    /// Frees a Pod's map with all that is in it; `Ok` when it had none.
    pub(super) fn remove_pod(&self, netns_cookie: u64) -> Result<(), CaptureError> {
        let mut map = self.map.lock();
        self.pods.lock().remove(&netns_cookie);
        let removed = HashOfMaps::<_, u64, MapData>::try_from(&mut *map).and_then(|mut map| map.remove(&netns_cookie));
        match removed {
            Err(error) if !is_missing(&error) => Err(failed("removing a Pod's map of original destinations", error)),
            _ => Ok(()),
        }
    }

    pub(super) fn take(&self, key: &RedirectedConnectionKey) -> Result<Option<OriginalDestinationValue>, CaptureError> {
        let known = self.pods.lock().get(&key.netns_cookie).map(Arc::clone);
        if let Some(pod) = known
            && let Some(value) = pod.take(key)?
        {
            return Ok(Some(value));
        }
        // Another agent may have released the Pod and enrolled it anew meanwhile.
        let map = self.map.lock();
        let pod = match open_of(&map, key.netns_cookie) {
            Ok(data) => Arc::new(PodDestinations::new(data)?),
            Err(error) if is_missing(&error) => {
                self.pods.lock().remove(&key.netns_cookie);
                return Ok(None);
            }
            Err(error) => return Err(failed(NAME, error)),
        };
        self.pods.lock().insert(key.netns_cookie, Arc::clone(&pod));
        drop(map);
        pod.take(key)
    }

    /// Entries of the fullest Pod's map. Should several Pods have filled theirs, the walk ends: that one is full is known by then.
    pub(super) fn fullest(&self) -> usize {
        const FULL_MAPS_WALKED: usize = 4;
        let pods: Vec<_> = self.pods.lock().values().map(Arc::clone).collect();
        let most = limits::MAX_ORIGINAL_DESTINATIONS_PER_POD as usize;
        let (mut fullest, mut left) = (0, FULL_MAPS_WALKED * most);
        for pod in pods {
            let entries = entries(&pod.map.lock(), most.min(left));
            fullest = fullest.max(entries);
            left -= entries;
            if left == 0 {
                break;
            }
        }
        fullest
    }

    /// Removes entries older than `age_ns` of every Pod whose place in the order is `turn` modulo `turns`: a Pod may fill its
    /// map, and the thread that sweeps beats, too. Entries that appear or vanish meanwhile may be missed; the next sweep finds
    /// them.
    pub(super) fn sweep(&self, turn: u32, turns: u32, now_ns: u64, age_ns: u64) {
        let pods: Vec<_> = self
            .pods
            .lock()
            .values()
            .zip(0_u32..)
            .filter(|(_, place)| place % turns == turn % turns)
            .map(|(pod, _)| Arc::clone(pod))
            .collect();
        let removed: usize = pods
            .iter()
            .map(|pod| {
                remove_if(&mut pod.map.lock(), limits::MAX_ORIGINAL_DESTINATIONS_PER_POD, |_, value| {
                    now_ns.saturating_sub(value.connected_at_ns) > age_ns
                })
            })
            .sum();
        if removed > 0 {
            tracing::debug!(removed, "swept original destinations that nobody took");
        }
    }
}

/// A Pod's map in the map of maps.
fn open_of(map: &Map, netns_cookie: u64) -> Result<MapData, MapError> {
    HashOfMaps::<_, u64, MapData>::try_from(map)?.get(&netns_cookie, 0)
}

/// Removes entries of a hash map; how many.
pub(super) fn remove_if<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    max_entries: u32,
    remove: impl Fn(&K, &V) -> bool,
) -> usize {
    let stale: Vec<K> = map
        .iter()
        .take(max_entries as usize)
        .filter_map(Result::<_, MapError>::ok)
        .filter(|(key, value)| remove(key, value))
        .map(|(key, _)| key)
        .collect();
    for key in &stale {
        let _ = map.remove(key);
    }
    stale.len()
}
