//! Bringing a Pod's network namespace into the mesh, and out of it again. Everything here blocks, briefly.

use std::collections::HashMap;
use std::fs::File;
use std::net::TcpListener as StdListener;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use mesh_common::limits::{MAX_POD_ADDRESSES, MAX_PODS};
use mesh_common::{PLAINTEXT_LISTENER, PodValue, TUNNEL_LISTENER};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::backstop::Backstop;
use super::enrolments::{EnrolmentRecord, Enrolments, PodToEnroll, uptime_ms};
use super::events::Events;
use super::kernel::Kernel;
use super::kubelet::ProbePorts;
use super::namespace::PodNamespace;
use super::netns::NetNamespace;
use super::network::{CaptureError, IoContext, PodListeners};
use super::recovery::Place;
use super::sockets::StdListeners;
use super::upstreams::Upstreams;
use super::{CapturedPod, routing, sockets, unprotected};
use crate::addr::address_bytes;

pub(super) struct Inner {
    pub(super) kernel: Arc<Kernel>,
    pub(super) enrolments: Enrolments,
    pub(super) node_cookie: u64,
    pub(super) boot_id: String,
    /// One enrolment or release at a time. Taken before `pods`, and on blocking threads only.
    pub(super) change: Mutex<()>,
    /// Another agent takes over, or has: what differs from this one's is its doing. Written with `change`.
    pub(super) is_offered: AtomicBool,
    pub(super) pods: Mutex<HashMap<String, Enrolment>>,
    /// Of an agent before that lives on: uid → outbound, tunnel, plaintext.
    pub(super) adopted: Mutex<HashMap<String, [StdListener; 3]>>,
    /// The node's bound of connections to applications.
    pub(super) upstreams: Arc<Semaphore>,
    pub(super) events: Events,
    pub(super) probe_ports: Mutex<ProbePorts>,
}

pub(super) struct Enrolment {
    pub(super) record: EnrolmentRecord,
    /// Of the listeners that were opened for it, as /proc/net/tcp shows them.
    pub(super) listeners: [u64; 3],
    pub(super) backstop: Backstop,
    /// Of `record.open_before`, those that are still open.
    pub(super) unprotected: Vec<u64>,
    /// `None` until it is recovered: its listeners are not ours yet, and its connections are refused.
    pub(super) active: Option<Arc<PodNamespace>>,
    /// Locked for as long as this agent may carry connections of it.
    pub(super) carried: Option<File>,
    /// Its programs may be those of an agent that began to take over and did not: exchanging them is no repair.
    pub(super) may_be_exchanged: bool,
}

/// What an enrolment has made, before the runtime has it.
pub(super) struct Established {
    pub(super) record: EnrolmentRecord,
    pub(super) network: Arc<PodNamespace>,
    pub(super) listeners: StdListeners,
}

impl Enrolment {
    /// Not taken over yet.
    pub(super) fn of(record: EnrolmentRecord) -> Self {
        Self {
            listeners: [0; 3],
            backstop: Backstop::default(),
            unprotected: record.open_before.clone(),
            record,
            active: None,
            carried: None,
            may_be_exchanged: false,
        }
    }
}

impl Inner {
    pub(super) fn enroll(&self, pod: PodToEnroll, netns: NetNamespace) -> Result<Established, CaptureError> {
        let _change = self.change.lock();
        let cookie = netns.cookie();
        let in_kernel = self.kernel.pods()?;
        let is_captured = in_kernel.iter().any(|(of, _)| *of == cookie);
        let (known, slot) = {
            let pods = self.pods.lock();
            if let Some(other) = pods
                .values()
                .find(|e| e.record.netns_cookie == cookie && e.record.pod.uid != pod.uid)
            {
                return Err(CaptureError::Refused(format!(
                    "the network namespace {} is enrolled for Pod {} already",
                    pod.netns_path.display(),
                    other.record.pod.uid
                )));
            }
            let known = pods.get(&pod.uid).map(|e| (e.record.clone(), e.active.is_some()));
            // Those of Pods whose records are lost: their programs still steer to these slots.
            let without_record = in_kernel.iter().filter(|(of, _)| *of != cookie).map(|(_, value)| value.slot);
            (known, free_slot(pods.values().map(|e| e.record.slot).chain(without_record)))
        };
        let resumed = match known {
            Some((record, _)) if record.netns_cookie != cookie => {
                return Err(CaptureError::Refused(format!(
                    "Pod {} is enrolled with another network namespace: release it first",
                    record.pod.uid
                )));
            }
            Some((record, true)) => return Err(CaptureError::AlreadyEnrolled(record.pod.uid)),
            // A recovery that failed is tried again, with what was there before the *first* attempt.
            Some((record, false)) => Some(EnrolmentRecord {
                pod: pod.clone(),
                is_leaving: false,
                cut_after_ms: 0,
                ..record
            }),
            None => None,
        };
        let is_new = resumed.is_none();
        let record = match resumed {
            Some(record) => record,
            None => EnrolmentRecord {
                boot_id: self.boot_id.clone(),
                netns_cookie: cookie,
                slot: slot.ok_or_else(|| CaptureError::Refused(format!("the node's {MAX_PODS} slots for Pods are taken")))?,
                before: netns.run(routing::observe)?,
                // Those that are opened in the moments until the capture stands are not in it.
                open_before: netns.run(unprotected::open_connections)?,
                is_leaving: false,
                cut_after_ms: 0,
                pod,
            },
        };
        if is_new {
            // An agent that did not know of probes may have released the Pod that had the slot.
            self.kernel.forget_probes(record.slot)?;
        }
        self.enrolments.save(&record)?;
        let uid = record.pod.uid.clone();
        self.pods.lock().insert(uid.clone(), Enrolment::of(record.clone()));
        self.establish(record, netns).inspect_err(|_| {
            // One that an earlier agent captured, and whose record was lost, stays as closed as it is.
            if is_new
                && !is_captured
                && let Err(error) = self.undo(&uid)
            {
                tracing::error!(uid, %error, "a failed enrolment cannot be undone: release the Pod to try again");
            }
        })
    }

    /// Every step is fine with what is there already.
    pub(super) fn establish(&self, record: EnrolmentRecord, netns: NetNamespace) -> Result<Established, CaptureError> {
        let carried = self.enrolments.carry(&record.pod.uid)?;
        let adopted = self.adopted.lock().remove(&record.pod.uid).map(StdListeners::from);
        let listeners = netns.run(|| {
            routing::set_up(&record.before)?;
            match adopted {
                Some(listeners) if sockets::are_listening(&listeners.inodes()?)? => Ok(listeners),
                // Closed before any other can have its port.
                not_usable => {
                    drop(not_usable);
                    StdListeners::open(&self.kernel, record.slot)
                }
            }
        })?;
        self.kernel
            .set_listener(record.slot, TUNNEL_LISTENER, listeners.tunnel.as_fd())?;
        self.kernel
            .set_listener(record.slot, PLAINTEXT_LISTENER, listeners.plaintext.as_fd())?;
        self.kernel.attach_lookup(record.slot, &record.pod.uid, netns.as_fd())?;
        self.kernel.add_pod(record.netns_cookie, &pod_value(&record))?;
        self.tell_probe_ports(std::slice::from_ref(&record))?;
        self.set_up_backstop(&record, &netns, true);
        let network = Arc::new(PodNamespace::new(
            Arc::clone(&self.kernel),
            netns,
            record.slot,
            record.pod.addresses.clone(),
            Upstreams::new(Arc::clone(&self.upstreams)),
        ));
        let inodes = listeners.inodes()?;
        if let Some(enrolment) = self.pods.lock().get_mut(&record.pod.uid) {
            enrolment.active = Some(Arc::clone(&network));
            enrolment.carried = Some(carried);
            enrolment.listeners = inodes;
        }
        Ok(Established {
            record,
            network,
            listeners,
        })
    }

    pub(super) fn release(&self, uid: &str) -> Result<bool, CaptureError> {
        self.has_cut(uid);
        let known = self.pods.lock().get(uid).map(|enrolment| enrolment.record.clone());
        let Some(record) = known else { return Ok(false) };
        // Not under `change`: other Pods' changes go on meanwhile.
        if self.enrolments.is_carried(uid) {
            if !record.is_leaving {
                let _change = self.change.lock();
                self.mark_leaving(record, Duration::ZERO)?;
            }
            self.enrolments.wait_until_cut(&[uid.to_owned()]);
        }
        let _change = self.change.lock();
        if !self.pods.lock().contains_key(uid) {
            return Ok(false);
        }
        self.undo(uid)?;
        Ok(true)
    }

    pub(super) fn carries(&self, uid: &str) -> bool {
        self.pods.lock().get(uid).is_some_and(|enrolment| enrolment.carried.is_some())
    }

    pub(super) fn has_cut(&self, uid: &str) {
        if let Some(enrolment) = self.pods.lock().get_mut(uid) {
            drop(enrolment.carried.take());
        }
    }

    /// Backwards. The record goes last: until then undoing again completes it.
    pub(super) fn undo(&self, uid: &str) -> Result<(), CaptureError> {
        let (record, active) = {
            let pods = self.pods.lock();
            let Some(enrolment) = pods.get(uid) else { return Ok(()) };
            (enrolment.record.clone(), enrolment.active.clone())
        };
        // Found before its link is gone, by which it may be found. Whoever releases knows: it need not be.
        let found = match active {
            Some(_) => None,
            None => match self.locate(&record, Instant::now()) {
                Ok(Place::Living(netns)) => Some(netns),
                Ok(Place::Gone) => None,
                Err(error) => {
                    tracing::warn!(uid, %error, "released; its routes and settings stay");
                    None
                }
            },
        };
        self.forget_in_kernel(&record)?;
        match (active, found) {
            (Some(network), _) => network.netns().run(|| routing::undo(&record.before))?,
            (None, Some(netns)) => netns.run(|| routing::undo(&record.before))?,
            (None, None) => {}
        }
        self.enrolments.remove(uid)?;
        self.pods.lock().remove(uid);
        Ok(())
    }

    /// False: it is not served, and [`Inner::undo`] takes everything away in its turn; its link, by which it is found, as well.
    pub(super) fn let_go(&self, uid: &str, grace: Duration) -> Result<bool, CaptureError> {
        let _change = self.change.lock();
        let record = {
            let pods = self.pods.lock();
            let served = pods.get(uid).filter(|enrolment| enrolment.active.is_some());
            let Some(enrolment) = served else { return Ok(false) };
            enrolment.record.clone()
        };
        // Written down first: without its link an agent that comes after could not tell whether the Pod lives.
        let record = self.mark_leaving(record, grace)?;
        self.stop_capturing(&record)?;
        Ok(true)
    }

    /// An agent that drains cuts the Pod once its grace is over, and one that comes after completes its release.
    fn mark_leaving(&self, record: EnrolmentRecord, grace: Duration) -> Result<EnrolmentRecord, CaptureError> {
        let grace = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let record = EnrolmentRecord {
            is_leaving: true,
            cut_after_ms: uptime_ms().saturating_add(grace),
            ..record
        };
        self.enrolments.save(&record)?;
        if let Some(enrolment) = self.pods.lock().get_mut(&record.pod.uid) {
            enrolment.record = record.clone();
        }
        Ok(record)
    }

    fn stop_capturing(&self, record: &EnrolmentRecord) -> Result<(), CaptureError> {
        self.kernel.stop_redirecting(record.netns_cookie)?;
        self.kernel.detach_backstops(&record.pod.uid)?;
        self.kernel.detach_lookup(&record.pod.uid)?;
        Ok(())
    }

    fn forget_in_kernel(&self, record: &EnrolmentRecord) -> Result<(), CaptureError> {
        self.stop_capturing(record)?;
        self.kernel.remove_pod(record.netns_cookie)?;
        self.kernel.clear_listeners(record.slot);
        self.kernel.forget_probes(record.slot)
    }
}

impl Established {
    pub(super) fn into_captured(self) -> Result<CapturedPod, CaptureError> {
        const STEP: &str = "giving a listener to the runtime";
        Ok(CapturedPod {
            pod: self.record.pod,
            netns_cookie: self.record.netns_cookie,
            slot: self.record.slot,
            network: self.network,
            listeners: PodListeners {
                outbound: TcpListener::from_std(self.listeners.outbound).step(STEP)?,
                tunnel: TcpListener::from_std(self.listeners.tunnel).step(STEP)?,
                plaintext: TcpListener::from_std(self.listeners.plaintext).step(STEP)?,
            },
        })
    }
}

pub(super) fn free_slot(taken: impl Iterator<Item = u32>) -> Option<u32> {
    let mut is_free = vec![true; MAX_PODS as usize];
    for slot in taken {
        if let Some(entry) = is_free.get_mut(slot as usize) {
            *entry = false;
        }
    }
    (0..MAX_PODS).find(|slot| is_free[*slot as usize])
}

pub(super) fn pod_value(record: &EnrolmentRecord) -> PodValue {
    let mut addresses = [[0; 16]; MAX_POD_ADDRESSES];
    for (bytes, address) in addresses.iter_mut().zip(&record.pod.addresses) {
        *bytes = address_bytes(*address);
    }
    PodValue {
        slot: record.slot,
        address_count: record.pod.addresses.len().min(MAX_POD_ADDRESSES) as u32,
        addresses,
    }
}
