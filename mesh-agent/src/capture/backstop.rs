//! The backstop of each Pod: found by the Pod's veths, attached at their other ends in the agent's own namespace. A second line of
//! defence: a Pod that cannot have one is enrolled all the same, and shown.

use std::fs::File;
use std::os::fd::AsFd;

use super::enrol::Inner;
use super::enrolments::EnrolmentRecord;
use super::netlink::Netlink;
use super::netns::NetNamespace;
use super::network::{CaptureError, IoContext};

/// Whether a Pod has its backstop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backstop {
    /// At the other ends of all of its veths.
    Attached,
    /// It has no veth whose other end is in the agent's namespace: another kind of network.
    NoVeth,
    /// The kernel has no tcx, or refused; the log has its words.
    #[default]
    Failed,
}

impl Backstop {
    /// Why a Pod has none, as metrics have it.
    #[must_use]
    pub fn missing(self) -> Option<&'static str> {
        match self {
            Self::Attached => None,
            Self::NoVeth => Some("no_veth"),
            Self::Failed => Some("failed"),
        }
    }
}

impl Inner {
    /// Attaches what is missing, or with `renew` everything anew, in place. Nothing is detached: a Pod that takes its veth out of
    /// its namespace stays behind the program. The second value tells whether something had been missing.
    pub(super) fn set_up_backstop(&self, record: &EnrolmentRecord, netns: &NetNamespace, renew: bool) -> (Backstop, bool) {
        let uid = &record.pod.uid;
        let result = host_ends(netns).and_then(|ends| {
            let attached = self.kernel.backstops(uid)?;
            let missing: Vec<u32> = ends.iter().filter(|end| !attached.contains(end)).copied().collect();
            let is_anothers = !self.kernel.has_own_backstops(uid, &attached)?;
            let wanted = if renew || is_anothers {
                attached.iter().chain(&missing).copied().collect()
            } else {
                missing.clone()
            };
            if !wanted.is_empty() {
                self.kernel.attach_backstop(record.netns_cookie, uid, &wanted)?;
            }
            let backstop = if ends.is_empty() && attached.is_empty() {
                Backstop::NoVeth
            } else {
                Backstop::Attached
            };
            Ok((backstop, is_anothers || !missing.is_empty()))
        });
        let (backstop, was_missing) = result.unwrap_or_else(|error| {
            if self.backstop_of(uid) != Some(Backstop::Failed) || renew {
                tracing::warn!(uid, %error, "the Pod has no backstop: raw packets that its processes may send are not checked");
            }
            (Backstop::Failed, false)
        });
        if backstop == Backstop::NoVeth && renew {
            tracing::warn!(
                uid,
                "the Pod has no veth to this namespace, and so no backstop: raw packets that its processes may send are not checked"
            );
        }
        if let Some(enrolment) = self.pods.lock().get_mut(uid) {
            enrolment.backstop = backstop;
        }
        (backstop, was_missing)
    }

    fn backstop_of(&self, uid: &str) -> Option<Backstop> {
        self.pods.lock().get(uid).map(|enrolment| enrolment.backstop)
    }
}

/// The interfaces of the agent's own namespace that are the other ends of the Pod's veths.
pub(super) fn host_ends(netns: &NetNamespace) -> Result<Vec<u32>, CaptureError> {
    const STEP: &str = "looking for the Pod's veths";
    let own = File::open("/proc/thread-self/ns/net").step(STEP)?;
    netns.run(|| {
        let netlink = Netlink::open().step(STEP)?;
        let peers = netlink.veth_peers().step(STEP)?;
        // The dump above has given every namespace that it shows a number.
        let own = netlink.nsid_of(own.as_fd()).step(STEP)?;
        Ok(peers
            .iter()
            .filter(|peer| Some(peer.nsid) == own)
            .map(|peer| peer.interface)
            .collect())
    })
}
