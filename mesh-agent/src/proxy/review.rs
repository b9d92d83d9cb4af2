//! Policy covers the living: whenever the policies of a Pod change, or the mesh's settings, or who has which address, its connections
//! are decided again, and those that are now denied are cut: inbound ones by policy, those of either direction whose tunnel's proof
//! counts no longer, and outbound ones in clear whose destination is protected now. A connection is registered before its first decision, so none slips between.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::Proxy;
use super::pod::PodContext;
use super::proof::Broken;
use super::registry::{ConnectionInfo, Registered};
use super::step::Step;
use crate::addr::OriginalDst;
use crate::policy::{self, Connection, Decision, Policy};
use crate::state::{Destination, Settings, State};
use crate::telemetry::{ConnectionRecord, Direction, IDENTITY_REVOKED, NEW_HOLDER, PROTECTED, ROOT_REMOVED};

/// At least between two reviews of a Pod because somebody's address has another holder: each looks at all of its connections, and Pods
/// come and go. Policies and settings do not wait.
pub(super) const PACE: Duration = Duration::from_millis(50);

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
    loop {
        changed.mark_unchanged();
        proxy.steps.done(Step::Reviewing);
        let rules = proxy.state.read(|state| applicable(state, &context));
        let mut again_at = None;
        match &reviewed {
            Some((before, _)) if before.same(&rules) => {}
            Some((before, at)) if before.same_but_for_holders(&rules) && at.elapsed() < PACE => again_at = Some(*at + PACE),
            _ => {
                review(&proxy, &context, &rules);
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

fn review(proxy: &Proxy, context: &PodContext, rules: &Rules) {
    let cut = proxy.state.read(|state| {
        let registry = &proxy.registry;
        registry.cut(&context.pod.pod_uid, |info| {
            unproven(rules, info, state)
                .or_else(|| unprotected(info, state))
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

fn unprotected(info: &ConnectionInfo, state: &State) -> Option<CutBy> {
    let to = info.in_clear?;
    takes_nothing_in_clear(state, info.destination, to).then_some(CutBy::Protection)
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
