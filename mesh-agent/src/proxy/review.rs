//! Policy covers the living: whenever the policies of a Pod change, its inbound connections are decided again, and those that are
//! now denied are cut. A connection is registered before its first decision, so none slips between.

use std::sync::Arc;

use super::Proxy;
use super::pod::PodContext;
use super::registry::{ConnectionInfo, Registered};
use crate::identity::Identity;
use crate::policy::{self, Connection, Decision, Policy};
use crate::state::State;
use crate::telemetry::{ConnectionRecord, Direction};

/// Reviews a Pod's connections until it is shut down.
pub(super) async fn run(proxy: Arc<Proxy>, context: Arc<PodContext>) {
    let mut changed = proxy.state.changed();
    let mut reviewed: Option<Vec<Arc<Policy>>> = None;
    loop {
        changed.mark_unchanged();
        if let Some(policies) = proxy.state.read(|state| applicable(state, &context))
            && !reviewed.as_deref().is_some_and(|before| same(before, &policies))
        {
            review(&proxy, &context, &policies);
            reviewed = Some(policies);
        }
        tokio::select! {
            () = context.shutdown.cancelled() => return,
            more = changed.changed() => {
                if more.is_err() {
                    return;
                }
            }
        }
    }
}

/// `None` while they are not all known: a connection is not cut for what may yet arrive; new ones are refused meanwhile.
fn applicable(state: &State, context: &PodContext) -> Option<Vec<Arc<Policy>>> {
    let applicable = state.policies_for(&*context.workload(state)?);
    applicable.complete.then_some(applicable.policies)
}

fn same(a: &[Arc<Policy>], b: &[Arc<Policy>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
}

fn review(proxy: &Proxy, context: &PodContext, policies: &[Arc<Policy>]) {
    let cut = proxy.registry.cut(&context.pod.pod_uid, |info| {
        let claimed = proxy.state.read(|state| state.member_at(info.source_address.ip()));
        denied_by(policies, info, claimed.as_ref().map(|workload| &workload.identity))
    });
    for by in &cut {
        proxy.metrics.count_cut(by.policy.as_ref());
    }
    if !cut.is_empty() {
        tracing::info!(pod = %context.pod.name, connections = cut.len(), "a changed policy denies connections that were open: cut");
    }
}

/// The record of a connection that was cut tells by what.
pub(super) fn name_policy(record: &mut ConnectionRecord, registered: &Registered) {
    if let Some(by) = registered.cut_by() {
        record.policy(by.policy.clone());
    }
}

/// Which policy now denies it; without one, no ALLOW policy matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutBy {
    pub policy: Option<Arc<str>>,
}

fn denied_by(policies: &[Arc<Policy>], info: &ConnectionInfo, claimed: Option<&Identity>) -> Option<CutBy> {
    // What a Pod opens is decided where it arrives.
    if info.direction == Direction::Outbound {
        return None;
    }
    let connection = Connection {
        source: info.source.as_ref(),
        claimed,
        source_ip: info.source_address.ip(),
        destination_ip: info.destination.ip(),
        destination_port: info.destination.port(),
    };
    match policy::evaluate(policies, &connection).decision {
        Decision::Allow { .. } => None,
        Decision::Deny { policy } => Some(CutBy { policy }),
    }
}
