//! Policy covers the living: whenever the policies of a Pod change, or the mesh's settings, its inbound connections are decided again,
//! and those that are now denied are cut. A connection is registered before its first decision, so none slips between.

use std::sync::Arc;

use super::Proxy;
use super::pod::PodContext;
use super::registry::{ConnectionInfo, Registered};
use crate::identity::Identity;
use crate::policy::{self, Connection, Decision, Policy};
use crate::state::{Settings, State};
use crate::telemetry::{ConnectionRecord, Direction};

/// What a Pod's connections are decided by.
struct Rules {
    policies: Vec<Arc<Policy>>,
    settings: Arc<Settings>,
}

/// Reviews a Pod's connections until it is shut down.
pub(super) async fn run(proxy: Arc<Proxy>, context: Arc<PodContext>) {
    let mut changed = proxy.state.changed();
    let mut reviewed: Option<Rules> = None;
    loop {
        changed.mark_unchanged();
        if let Some(rules) = proxy.state.read(|state| applicable(state, &context))
            && !reviewed.as_ref().is_some_and(|before| before.same(&rules))
        {
            review(&proxy, &context, &rules);
            reviewed = Some(rules);
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
fn applicable(state: &State, context: &PodContext) -> Option<Rules> {
    let applicable = state.policies_for(&*context.workload(state)?);
    applicable.complete.then(|| Rules {
        policies: applicable.policies,
        settings: state.settings().clone(),
    })
}

impl Rules {
    fn same(&self, other: &Self) -> bool {
        let (a, b) = (&self.policies, &other.policies);
        let same_policies = a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b));
        same_policies && Arc::ptr_eq(&self.settings, &other.settings)
    }
}

fn review(proxy: &Proxy, context: &PodContext, rules: &Rules) {
    let cut = proxy.registry.cut(&context.pod.pod_uid, |info| {
        let claimed = proxy.state.read(|state| state.member_at(info.source_address.ip()));
        let claimed = claimed.as_ref().map(|workload| &workload.identity);
        denied_by(rules, &context.pod.namespace, info, claimed)
    });
    for by in &cut {
        match by {
            CutBy::Policy(policy) => proxy.metrics.count_cut(Some(policy)),
            CutBy::NoAllowMatched => proxy.metrics.count_cut(None),
            CutBy::Settings => proxy.metrics.count_plaintext_cut(),
        }
    }
    if !cut.is_empty() {
        tracing::info!(pod = %context.pod.name, connections = cut.len(), "changed policies or settings deny connections that were open: cut");
    }
}

/// The record of a connection that was cut tells by what.
pub(super) fn name_policy(record: &mut ConnectionRecord, registered: &Registered) {
    match registered.cut_by() {
        Some(CutBy::Policy(policy)) => record.policy(Some(policy.clone())),
        Some(CutBy::NoAllowMatched | CutBy::Settings) => record.policy(None),
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
}

fn denied_by(rules: &Rules, namespace: &str, info: &ConnectionInfo, claimed: Option<&Identity>) -> Option<CutBy> {
    // What a Pod opens is decided where it arrives.
    if info.direction == Direction::Outbound {
        return None;
    }
    let (destination_ip, destination_port) = (info.destination.ip(), info.destination.port());
    let settings = &rules.settings;
    if info.source.is_none() && settings.refuses_plaintext(namespace, destination_ip, destination_port) {
        return Some(CutBy::Settings);
    }
    let connection = Connection {
        source: info.source.as_ref(),
        claimed,
        source_ip: info.source_address.ip(),
        destination_ip,
        destination_port,
    };
    match policy::evaluate(&rules.policies, &connection).decision {
        Decision::Allow { .. } => None,
        Decision::Deny { policy } => Some(policy.map_or(CutBy::NoAllowMatched, CutBy::Policy)),
    }
}
