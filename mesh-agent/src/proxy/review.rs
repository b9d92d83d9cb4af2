//! Policy covers the living: whenever the policies of a Pod change, or the mesh's settings, or who has which address, its connections
//! are decided again, and those that are now denied are cut: inbound ones by policy, those of either direction whose tunnel's proof
//! counts no longer, and outbound ones in clear whose destination is protected now (after
//! [`PROTECTION_GRACE`], where the same Pod is at the other end still). A connection is registered before its first decision, so none slips between.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::Proxy;
use super::pod::PodContext;
use super::proof::Broken;
use super::registry::{ConnectionInfo, InClear, Registered};
use super::step::Step;
use crate::addr::OriginalDst;
use crate::policy::{self, Connection, Decision, Policy};
use crate::state::{Destination, Settings, State};
use crate::telemetry::{ConnectionRecord, Direction, IDENTITY_REVOKED, NEW_HOLDER, PROTECTED, ROOT_REMOVED};
use crate::workload::{Membership, Workload};

/// At least between two reviews of a Pod because somebody's address has another holder: each looks at all of its connections, and Pods
/// come and go. Policies and settings do not wait.
pub(super) const PACE: Duration = Duration::from_millis(50);
/// How long a connection in clear may go on to a Pod that is to be spoken to by tunnel since: longer than most requests take.
pub(super) const PROTECTION_GRACE: Duration = Duration::from_secs(2);

/// What a Pod's connections are decided by.
struct Rules {
    /// Those that are known.
    policies: Vec<Arc<Policy>>,
    /// While they are not all known, a connection is not cut because none allows it: one may yet arrive. New ones are refused meanwhile.
    complete: bool,
    settings: Arc<Settings>,
    /// Which state of who has which address.
    holders: u64,
}

/// Reviews a Pod's connections until it is shut down.
pub(super) async fn run(proxy: Arc<Proxy>, context: Arc<PodContext>) {
    let mut changed = proxy.state.changed();
    let mut reviewed: Option<(Rules, Instant)> = None;
    let mut due: Option<Instant> = None;
    loop {
        changed.mark_unchanged();
        proxy.steps.done(Step::Reviewing);
        let rules = proxy.state.read(|state| applicable(state, &context));
        let is_due = due.is_some_and(|due| due <= Instant::now());
        let mut again_at = due;
        match &reviewed {
            Some((before, _)) if before.same(&rules) && !is_due => {}
            Some((before, at)) if before.same_but_for_holders(&rules) && at.elapsed() < PACE => again_at = Some(*at + PACE),
            _ => {
                due = review(&proxy, &context, &rules);
                again_at = due;
                reviewed = Some((rules, Instant::now()));
            }
        }
        let paced = async {
            match again_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = context.shutdown.cancelled() => return,
            () = paced => {}
            more = changed.changed() => {
                if more.is_err() {
                    return;
                }
            }
        }
    }
}

fn applicable(state: &State, context: &PodContext) -> Rules {
    let applicable = context.workload(state).map(|workload| state.policies_for(&workload));
    Rules {
        complete: applicable.as_ref().is_some_and(|applicable| applicable.complete),
        policies: applicable.map(|applicable| applicable.policies).unwrap_or_default(),
        settings: state.settings().clone(),
        holders: state.holders(),
    }
}

impl Rules {
    fn same(&self, other: &Self) -> bool {
        self.same_but_for_holders(other) && self.holders == other.holders
    }

    fn same_but_for_holders(&self, other: &Self) -> bool {
        let same_policies = self.policies.len() == other.policies.len()
            && self.policies.iter().zip(&other.policies).all(|(a, b)| Arc::ptr_eq(a, b));
        same_policies && self.complete == other.complete && Arc::ptr_eq(&self.settings, &other.settings)
    }
}

/// When it is to be done again, whatever changes.
fn review(proxy: &Proxy, context: &PodContext, rules: &Rules) -> Option<Instant> {
    let (now, mut again) = (Instant::now(), None);
    let cut = proxy.state.read(|state| {
        let registry = &proxy.registry;
        registry.cut(&context.pod.pod_uid, |info| {
            unproven(rules, info, state)
                .or_else(|| unprotected(info, state, now, &mut again))
                .or_else(|| denied_by(rules, &context.pod.namespace, info, state))
        })
    });
    for by in &cut {
        match by {
            CutBy::Policy(policy) => proxy.metrics.count_cut(Some(policy)),
            CutBy::NoAllowMatched => proxy.metrics.count_cut(None),
            CutBy::Settings => proxy.metrics.count_plaintext_cut(),
            CutBy::Revoked => proxy.metrics.count_proof_cut(IDENTITY_REVOKED),
            CutBy::RootRemoved => proxy.metrics.count_proof_cut(ROOT_REMOVED),
            CutBy::NewHolder => proxy.metrics.count_proof_cut(NEW_HOLDER),
            CutBy::Protection => proxy.metrics.count_proof_cut(PROTECTED),
        }
    }
    if let Some(by) = cut.first() {
        let pod = &context.pod.name;
        tracing::info!(%pod, connections = cut.len(), first_by = ?by, "changed policies, settings or addresses deny connections that were open: cut");
    }
    again
}

/// The record of a connection that was cut tells by what.
pub(super) fn name_policy(record: &mut ConnectionRecord, registered: &Registered) {
    match registered.cut_by() {
        Some(CutBy::Policy(policy)) => record.policy(Some(policy.clone())),
        Some(_) => record.policy(None),
        None => {}
    }
}

/// What now denies a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CutBy {
    Policy(Arc<str>),
    NoAllowMatched,
    /// It is in clear, and its Pod takes only mutual TLS.
    Settings,
    /// The service account of one of its ends was deleted.
    Revoked,
    /// One of its ends has proven itself by a root that is trusted no longer.
    RootRemoved,
    /// Its peer's address is somebody else's, or nobody's.
    NewHolder,
    /// It goes in clear to where a tunnel, or nothing, would lead now.
    Protection,
}

/// Of either direction: what its tunnel's ends have proven counts no longer.
fn unproven(rules: &Rules, info: &ConnectionInfo, state: &State) -> Option<CutBy> {
    let proof = info.proof.as_ref()?;
    match proof.broken_by(&rules.settings) {
        Some(Broken::Revoked) => Some(CutBy::Revoked),
        Some(Broken::RootRemoved) => Some(CutBy::RootRemoved),
        // Undecided, it may be waiting for just that.
        None => (info.decided && !proof.peer_is_there(state)).then_some(CutBy::NewHolder),
    }
}

/// At once, but where there is a tunnel by now to the same Pod, and nothing forbids what is in clear: a label that is set is no reason
/// for a request on its way to fail. `again`: when there is more to cut.
fn unprotected(info: &mut ConnectionInfo, state: &State, now: Instant, again: &mut Option<Instant>) -> Option<CutBy> {
    let asked = info.destination;
    let clear = info.in_clear.as_mut()?;
    if !takes_nothing_in_clear(state, asked, clear.to) {
        clear.protected_at = None;
        return None;
    }
    if !may_still_end_in_clear(state, clear) {
        return Some(CutBy::Protection);
    }
    let due = *clear.protected_at.get_or_insert(now) + PROTECTION_GRACE;
    if due <= now {
        return Some(CutBy::Protection);
    }
    *again = Some(again.map_or(due, |at| at.min(due)));
    None
}

fn may_still_end_in_clear(state: &State, clear: &InClear) -> bool {
    let same = |now: &Arc<Workload>| {
        let before = clear.holder.as_ref();
        now.membership == Membership::Proven
            && !state.settings().is_strict(&now.namespace)
            && before.is_some_and(|before| (&before.uid, &before.pod_uid) == (&now.uid, &now.pod_uid))
    };
    state.by_address(clear.to.ip()).as_ref().is_some_and(same)
}

/// Whether a connection to what was asked for, that goes to `to`, would not be let out in clear. Where nothing is known nothing is cut:
/// what stood there has gone, and its connections with it.
pub(super) fn takes_nothing_in_clear(state: &State, asked: SocketAddr, to: OriginalDst) -> bool {
    // An endpoint of a service is never taken for excluded: what was asked for counts.
    let standing = if to.socket_addr() == asked {
        state.destination(to)
    } else {
        state.by_address(to.ip()).map_or(Destination::Unknown, Destination::of)
    };
    match standing {
        Destination::Mesh(_) | Destination::Lost(_) | Destination::ServiceVip(_) => true,
        Destination::Pending(workload) => state.settings().is_strict(&workload.namespace),
        Destination::Excluded(_) | Destination::Outside(_) | Destination::Unknown => false,
    }
}

fn denied_by(rules: &Rules, namespace: &str, info: &ConnectionInfo, state: &State) -> Option<CutBy> {
    // What a Pod opens is decided where it arrives.
    if info.direction == Direction::Outbound {
        return None;
    }
    let (destination_ip, destination_port) = (info.destination.ip(), info.destination.port());
    let settings = &rules.settings;
    if info.source.is_none() && settings.refuses_plaintext(namespace, destination_ip, destination_port) {
        return Some(CutBy::Settings);
    }
    let claimed = state.by_address(info.source_address.ip());
    let claimed = claimed.as_ref().map(|workload| &workload.identity);
    if claimed.is_some_and(|claimed| info.source.is_none() && settings.revoked.contains(claimed)) {
        return Some(CutBy::Revoked);
    }
    let connection = Connection {
        source: info.source.as_ref(),
        claimed,
        source_ip: info.source_address.ip(),
        destination_ip,
        destination_port,
    };
    match policy::evaluate(&rules.policies, &connection).decision {
        Decision::Deny { policy: Some(policy) } => Some(CutBy::Policy(policy)),
        Decision::Deny { policy: None } if rules.complete => Some(CutBy::NoAllowMatched),
        Decision::Deny { policy: None } | Decision::Allow { .. } => None,
    }
}
