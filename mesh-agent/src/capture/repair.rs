//! Putting back what somebody took from a Pod's capture while the agent runs. Each piece is made again over what is there.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use super::enrol::{Established, Inner, pod_value};
use super::kernel::inspect::LookupTarget;
use super::network::CaptureError;
use super::{routing, sockets};

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
        let (record, network, listeners) = {
            let pods = self.pods.lock();
            let served = pods
                .get(uid)
                .and_then(|e| Some((e.record.clone(), e.active.clone()?, e.listeners)));
            served.ok_or_else(|| CaptureError::Other(format!("Pod {uid} is not served")))?
        };
        let netns = network.netns();
        let mut repairs = Repairs::default();
        // Outbound first, then inbound: what is open is closed before what only fails is mended.
        let entry = pod_value(&record);
        let known = self.kernel.pods()?;
        if !known.contains(&(record.netns_cookie, entry)) {
            self.kernel.add_pod(record.netns_cookie, &entry)?;
            repairs.repaired.push("pods_entry");
        }
        let inode = nix::sys::stat::fstat(netns.as_fd())
            .map_err(|error| CaptureError::Other(format!("the Pod's network namespace: {error}")))?
            .st_ino;
        if self.kernel.lookup_target(uid)? != LookupTarget::Netns(inode) {
            self.kernel.attach_lookup(record.slot, uid, netns.as_fd())?;
            repairs.repaired.push("sk_lookup");
        }
        if let (_, true) = self.set_up_backstop(&record, netns, false) {
            repairs.repaired.push("backstop");
        }
        let (added, are_listening) = netns.run(|| Ok((routing::set_up(&record.before)?, sockets::are_listening(&listeners)?)))?;
        repairs.repaired.extend(added);
        repairs.is_listener_lost = !are_listening;
        if !repairs.repaired.is_empty() {
            self.events
                .repaired
                .fetch_add(repairs.repaired.len() as u64, Ordering::Relaxed);
            tracing::error!(uid, repaired = ?repairs.repaired, "somebody took pieces of the Pod's capture away: they are put back");
        }
        Ok(repairs)
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
