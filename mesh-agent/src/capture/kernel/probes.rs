//! What the kernel knows of the kubelet: its cgroup, the ports at which Pods say that it asks them, and its connects that are on
//! their way to them. The *kubelet's* probes of applications: those by which the agent proves a capture are in `capture/probe.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};

use aya::Ebpf;
use aya::maps::{Array, HashMap, HashOfMaps, Map, MapData};
use mesh_common::{AddressBytes, KubeletValue, PROBE_VOUCH_NS, ProbePortKey, UpstreamConnectionKey, is_agent_port, limits};
use parking_lot::Mutex;

use super::super::CaptureError;
use super::super::bpf_syscalls::BPF_F_NO_PREALLOC;
use super::destinations::remove_if;
use super::inspect::entries;
use super::programs::{take_map, typed};
use super::{Kernel, failed, is_missing};

const PORTS: &str = "telling the kernel the Pods' probe ports";

type VouchesOfPod = HashMap<MapData, UpstreamConnectionKey, u64>;

pub(super) struct ProbeMaps {
    kubelet: Mutex<Array<MapData, KubeletValue>>,
    /// What the kernel was told last of the kubelet; `None` while another agent may tell it something else.
    told: Mutex<Option<KubeletValue>>,
    /// Somebody has told it something else since.
    has_changed: AtomicBool,
    ports: Mutex<HashMap<MapData, ProbePortKey, u32>>,
    /// Of maps, by slot.
    vouches: Mutex<Map>,
}

/// Where a Pod says that the kubelet asks it.
#[derive(Clone, Copy, Debug)]
pub struct PodProbePorts<'a> {
    pub slot: u32,
    /// At most [`limits::MAX_POD_ADDRESSES`]; more are left out.
    pub addresses: &'a [AddressBytes],
    /// At most [`limits::MAX_PROBE_PORTS_PER_POD`]; more are left out, and so are the agent's own.
    pub ports: &'a [u16],
}

impl PodProbePorts<'_> {
    fn keys(&self) -> impl Iterator<Item = ProbePortKey> {
        let ports = self.ports.iter().take(limits::MAX_PROBE_PORTS_PER_POD);
        ports.filter(|port| !is_agent_port(**port)).flat_map(|port| {
            let addresses = self.addresses.iter().take(limits::MAX_POD_ADDRESSES);
            addresses.map(|address| ProbePortKey {
                address: *address,
                port: *port,
                _pad: 0,
            })
        })
    }
}

impl ProbeMaps {
    pub(super) fn take(programs: &mut Ebpf) -> Result<Self, CaptureError> {
        Ok(Self {
            kubelet: Mutex::new(typed(take_map(programs, "KUBELET")?)?),
            told: Mutex::default(),
            has_changed: AtomicBool::new(false),
            ports: Mutex::new(typed(take_map(programs, "PROBE_PORTS")?)?),
            vouches: Mutex::new(take_map(programs, "PROBE_VOUCHES")?),
        })
    }

    /// Makes a Pod's map of vouches, if it has none; whether it had.
    pub(super) fn add_pod(&self, slot: u32) -> Result<bool, CaptureError> {
        const WHAT: &str = "making a Pod's map of probes";
        let mut map = self.vouches.lock();
        if vouches_of(&map, slot)?.is_some() {
            return Ok(true);
        }
        let made =
            VouchesOfPod::create(limits::MAX_PROBE_VOUCHES_PER_POD, BPF_F_NO_PREALLOC).map_err(|error| failed(WHAT, error))?;
        HashOfMaps::<_, u32, VouchesOfPod>::try_from(&mut *map)
            .and_then(|mut map| map.insert(slot, &made, 0))
            .map_err(|error| failed(WHAT, error))?;
        Ok(false)
    }

    fn tell(&self, value: Option<KubeletValue>, is_alone: bool) -> Result<(), CaptureError> {
        let mut kubelet = self.kubelet.lock();
        let mut told = self.told.lock();
        if told.is_some_and(|told| kubelet.get(&0, 0).ok() != Some(told)) {
            self.has_changed.store(true, Ordering::Relaxed);
        }
        if let Some(value) = value.or(*told) {
            kubelet
                .set(0, value, 0)
                .map_err(|error| failed("telling the kernel who the kubelet is", error))?;
            *told = is_alone.then_some(value);
        }
        Ok(())
    }

    /// Tells the kernel again who the kubelet is; whether somebody had told it something else since the last time.
    pub(super) fn repair_kubelet(&self, is_alone: bool) -> Result<bool, CaptureError> {
        self.tell(None, is_alone)?;
        Ok(self.has_changed.swap(false, Ordering::Relaxed))
    }

    /// Entries whose end the programs could not be told of; they count no longer since they are that old.
    pub(super) fn sweep(&self, now_ns: u64) {
        let map = self.vouches.lock();
        let slots: Vec<u32> = match HashOfMaps::<_, u32, MapData>::try_from(&*map) {
            Ok(map) => map.keys().take(limits::MAX_PODS as usize).filter_map(Result::ok).collect(),
            Err(error) => {
                tracing::warn!(%error, "the kubelet's vouches cannot be swept");
                return;
            }
        };
        for slot in slots {
            if let Ok(Some(mut of_pod)) = vouches_of(&map, slot) {
                remove_if(&mut of_pod, limits::MAX_PROBE_VOUCHES_PER_POD, |_, vouched_at_ns| {
                    now_ns.saturating_sub(*vouched_at_ns) > PROBE_VOUCH_NS
                });
            }
        }
    }
}

fn vouches_of(map: &Map, slot: u32) -> Result<Option<VouchesOfPod>, CaptureError> {
    const WHAT: &str = "a Pod's map of probes";
    let map = HashOfMaps::<_, u32, MapData>::try_from(map).map_err(|error| failed(WHAT, error))?;
    match map.get(&slot, 0) {
        Ok(data) => typed(Map::HashMap(data)).map(Some),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(failed(WHAT, error)),
    }
}

impl Kernel {
    /// Whose connects from the node's own network namespace are probes, by cgroup; `None`: nobody's.
    ///
    /// # Errors
    /// The map refuses.
    pub fn set_kubelet(&self, node_cookie: u64, cgroup_id: Option<u64>) -> Result<(), CaptureError> {
        let value = KubeletValue {
            netns_cookie: node_cookie,
            cgroup_id: cgroup_id.unwrap_or(0),
        };
        self.probes.tell(Some(value), self.is_alone.load(Ordering::Relaxed))
    }

    /// The ports at which these Pods are asked by the kubelet, and no others of theirs. One walk over the map, however many they are.
    ///
    /// # Errors
    /// The map refuses some, and has the others.
    pub fn set_probe_ports(&self, pods: &[PodProbePorts<'_>]) -> Result<(), CaptureError> {
        let wanted: BTreeMap<_, _> = pods.iter().flat_map(|pod| pod.keys().map(|key| (key, pod.slot))).collect();
        let slots: BTreeSet<u32> = pods.iter().map(|pod| pod.slot).collect();
        let mut map = self.probes.ports.lock();
        remove_if(&mut map, limits::MAX_PROBE_PORTS, |key, slot| {
            slots.contains(slot) && !wanted.contains_key(key)
        });
        let mut result = Ok(());
        for (key, slot) in wanted {
            // The same again is no change; one of a Pod that had the address before is this one's now.
            if map.get(&key, 0).ok() != Some(slot)
                && let Err(error) = map.insert(key, slot, 0)
            {
                result = Err(failed(PORTS, error));
            }
        }
        result
    }

    /// Puts back what a Pod lacks of this; the names of those pieces. It looks at the Pod's own entries alone, for this is done often.
    ///
    /// # Errors
    /// A map refuses.
    pub fn repair_probes(&self, pod: &PodProbePorts<'_>) -> Result<Vec<&'static str>, CaptureError> {
        let mut repaired = Vec::new();
        if !self.probes.add_pod(pod.slot)? {
            repaired.push("probe_vouches");
        }
        let mut map = self.probes.ports.lock();
        // What is another Pod's, which has the address by now, is not missing.
        let missing: Vec<ProbePortKey> = (pod.keys())
            .filter(|key| map.get(key, 0).is_err_and(|error| is_missing(&error)))
            .collect();
        for key in &missing {
            map.insert(key, pod.slot, 0).map_err(|error| failed(PORTS, error))?;
        }
        if !missing.is_empty() {
            repaired.push("probe_ports");
        }
        Ok(repaired)
    }

    /// Forgets what was declared for a slot, and with it the vouches.
    ///
    /// # Errors
    /// A map refuses.
    pub fn forget_probes(&self, slot: u32) -> Result<(), CaptureError> {
        self.set_probe_ports(&[PodProbePorts {
            slot,
            addresses: &[],
            ports: &[],
        }])?;
        let mut map = self.probes.vouches.lock();
        let removed = HashOfMaps::<_, u32, MapData>::try_from(&mut *map).and_then(|mut map| map.remove(&slot));
        match removed {
            Err(error) if !is_missing(&error) => Err(failed("removing a Pod's map of probes", error)),
            _ => Ok(()),
        }
    }

    pub(super) fn probe_ports_fill(&self) -> usize {
        entries(&self.probes.ports.lock(), limits::MAX_PROBE_PORTS as usize)
    }
}
