//! Putting back what somebody took from a Pod's capture, or from the node's, while the agent runs. Each piece is made again over what is there.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mesh_common::{PLAINTEXT_LISTENER, TUNNEL_LISTENER};
use tokio::net::TcpListener;

use super::enrol::{Established, Inner, pod_value};
use super::kernel::inspect::LookupTarget;
use super::netns::NetNamespace;
use super::network::CaptureError;
use super::{routing, sockets, unprotected};

/// What was missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repairs {
    /// Put back.
    pub repaired: Vec<&'static str>,
    /// A listener is closed; see [`super::Capture::reopen`].
    pub is_listener_lost: bool,
}

impl Inner {
    pub(super) fn repair(&self, uid: &str) -> Result<Repairs, CaptureError> {
        let _change = self.change.lock();
        if self.is_offered.load(Ordering::Relaxed) {
            return Ok(Repairs::default());
        }
        let (record, network, listeners, may_be_exchanged) = {
            let pods = self.pods.lock();
            let enrolment = pods.get(uid);
            if enrolment.is_some_and(|e| e.record.is_leaving) {
                return Ok(Repairs::default());
            }
            let served = enrolment.and_then(|e| Some((e.record.clone(), e.active.clone()?, e.listeners, e.may_be_exchanged)));
            served.ok_or_else(|| CaptureError::Other(format!("Pod {uid} is not served")))?
        };
        let netns = network.netns();
        let mut repairs = Repairs::default();
        // Outbound first, then inbound: what is open is closed before what only fails is mended.
        let entry = pod_value(&record);
        let missing = [
            ("pods_entry", !self.kernel.pods()?.contains(&(record.netns_cookie, entry))),
            ("original_destinations", !self.kernel.has_destinations(record.netns_cookie)),
        ];
        if missing.iter().any(|(_, is_missing)| *is_missing) {
            self.kernel.add_pod(record.netns_cookie, &entry)?;
            let missing = missing.into_iter().filter(|(_, is_missing)| *is_missing);
            repairs.repaired.extend(missing.map(|(piece, _)| piece));
        }
        let inode = nix::sys::stat::fstat(netns.as_fd())
            .map_err(|error| CaptureError::Other(format!("the Pod's network namespace: {error}")))?
            .st_ino;
        let is_attached = self.kernel.lookup_target(uid)? == LookupTarget::Netns(inode);
        if !is_attached || !self.kernel.has_own_lookup(uid)? {
            self.kernel.attach_lookup(record.slot, uid, netns.as_fd())?;
            if !is_attached || !may_be_exchanged {
                repairs.repaired.push("sk_lookup");
            }
        }
        if let (_, true) = self.set_up_backstop(&record, netns, false)
            && !may_be_exchanged
        {
            repairs.repaired.push("backstop");
        }
        if let Some(enrolment) = self.pods.lock().get_mut(uid) {
            enrolment.may_be_exchanged = false;
        }
        repairs.repaired.extend(self.repair_probes(&record)?);
        let (added, are_listening) = netns.run(|| Ok((routing::set_up(&record.before)?, sockets::are_listening(&listeners)?)))?;
        repairs.repaired.extend(added);
        repairs.is_listener_lost = !are_listening;
        self.count_unprotected(uid, netns)?;
        self.tell_of_pod(uid, &repairs.repaired);
        Ok(repairs)
    }

    fn count_unprotected(&self, uid: &str, netns: &NetNamespace) -> Result<(), CaptureError> {
        let before = self.pods.lock().get(uid).map(|enrolment| enrolment.unprotected.clone());
        let Some(before) = before.filter(|before| !before.is_empty()) else {
            return Ok(());
        };
        let open = netns.run(|| unprotected::still_open(&before))?;
        if let Some(enrolment) = self.pods.lock().get_mut(uid) {
            enrolment.unprotected = open;
        }
        Ok(())
    }

    fn tell_of_pod(&self, uid: &str, repaired: &[&'static str]) {
        if !repaired.is_empty() {
            self.events.repaired.fetch_add(repaired.len() as u64, Ordering::Relaxed);
            tracing::error!(
                uid,
                ?repaired,
                "somebody took pieces of the Pod's capture away: they are put back"
            );
        }
    }

    /// The kernel does not tell which socket an entry holds, only that there is none: it is written where nothing is.
    pub(super) fn restore_listeners(&self, uid: &str, listeners: &[Arc<TcpListener>; 2]) -> Result<bool, CaptureError> {
        let _change = self.change.lock();
        if self.is_offered.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let slot = {
            let pods = self.pods.lock();
            pods.get(uid)
                .filter(|e| e.active.is_some() && !e.record.is_leaving)
                .map(|e| e.record.slot)
        };
        // Released meanwhile.
        let Some(slot) = slot else { return Ok(false) };
        let mut restored = Vec::new();
        for (which, listener) in [TUNNEL_LISTENER, PLAINTEXT_LISTENER].into_iter().zip(listeners) {
            if self.kernel.restore_listener(slot, which, listener.as_fd())? {
                restored.push("listeners_entry");
            }
        }
        self.tell_of_pod(uid, &restored);
        Ok(!restored.is_empty())
    }

    /// As [`Inner::repair`], of what all Pods share.
    pub(super) fn repair_node(&self) -> Result<Vec<String>, CaptureError> {
        let _change = self.change.lock();
        if self.is_offered.load(Ordering::Relaxed) {
            return Ok(Vec::new());
        }
        let repaired = self.kernel.repair()?;
        if !repaired.is_empty() {
            self.events.repaired.fetch_add(repaired.len() as u64, Ordering::Relaxed);
            tracing::error!(
                ?repaired,
                "somebody took pieces of the node's capture away: they are put back"
            );
        }
        Ok(repaired)
    }

    /// Leaves everything to another agent that takes over.
    pub(super) fn offer(&self) {
        let _change = self.change.lock();
        self.is_offered.store(true, Ordering::Relaxed);
    }

    /// Nobody took over, but somebody may have begun to: the node's programs may be another ABI version's, and look into maps in which
    /// this agent enrols no Pod. They are exchanged before any is; those of the Pods that are here see the same, and are exchanged by
    /// their next repair, which tells nobody.
    pub(super) fn take_back(&self) {
        let _change = self.change.lock();
        if !self.is_offered.swap(false, Ordering::Relaxed) {
            return;
        }
        for enrolment in self.pods.lock().values_mut() {
            enrolment.may_be_exchanged = true;
        }
        match self.kernel.repair() {
            Ok(repaired) if repaired.is_empty() => {}
            Ok(repaired) => tracing::warn!(
                ?repaired,
                "another agent had begun to take over: the programs are this one's again"
            ),
            Err(error) => tracing::error!(%error, "another agent had begun to take over: its programs cannot be exchanged yet"),
        }
    }

    pub(super) fn reopen(&self, uid: &str) -> Result<Established, CaptureError> {
        let _change = self.change.lock();
        let served = {
            let pods = self.pods.lock();
            pods.get(uid).and_then(|e| Some((e.record.clone(), e.active.clone()?)))
        };
        let (record, network) = served.ok_or_else(|| CaptureError::Other(format!("Pod {uid} is not served")))?;
        let established = self.establish(record, network.netns().try_clone()?)?;
        self.events.repaired.fetch_add(1, Ordering::Relaxed);
        tracing::error!(uid, "a listener of the agent in the Pod was closed: new ones are open");
        Ok(established)
    }
}
