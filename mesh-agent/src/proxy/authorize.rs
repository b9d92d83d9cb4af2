//! The destination's decision about a connection, the same on both of its ways in. The caller has registered the connection.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::Proxy;
use super::error::{ProxyError, Refusal};
use super::limits::{DISCOVERY_PATIENCE, FRESHNESS_PATIENCE};
use super::pod::PodContext;
use crate::identity::Identity;
use crate::policy::{self, Connection};
use crate::state::{ApplicablePolicies, State};
use crate::telemetry::ConnectionRecord;
use crate::workload::Workload;

/// `source`: the proven identity; a plaintext connection has none.
pub(super) async fn authorize(
    proxy: &Proxy,
    context: &PodContext,
    source: Option<&Identity>,
    source_ip: IpAddr,
    destination: SocketAddr,
    record: &mut ConnectionRecord,
) -> Result<(), ProxyError> {
    let applicable = applicable_policies(proxy, context).await?;
    let connection = Connection {
        source,
        source_ip,
        destination_ip: destination.ip(),
        destination_port: destination.port(),
    };
    let verdict = policy::evaluate(&applicable.policies, &connection);
    for policy in &verdict.dry_run_matches {
        proxy.metrics.count_dry_run(policy);
    }
    record.policy(verdict.decision.policy().cloned());
    if verdict.decision.is_allow() {
        Ok(())
    } else {
        Err(Refusal::DeniedByPolicy.into())
    }
}

async fn applicable_policies(proxy: &Proxy, context: &PodContext) -> Result<ApplicablePolicies, ProxyError> {
    // A Pod that discovery doesn't know yet has policies that we don't know yet.
    proxy
        .state
        .wait_for(DISCOVERY_PATIENCE, |state| context.workload(state))
        .await
        .ok_or(ProxyError::Refused(Refusal::DestinationUnknown))?;
    let complete = |state: &State| {
        let applicable = state.policies_for(&*context.workload(state)?);
        applicable.complete.then_some(applicable)
    };
    proxy
        .state
        .wait_for(FRESHNESS_PATIENCE, complete)
        .await
        .ok_or(ProxyError::Refused(Refusal::PolicyMissing))
}

/// What discovery knows at the address of a tunnel's peer; an error when it is someone else than the certificate says, so that a
/// certificate stolen from one node is of no use on another. An unknown address contradicts nothing.
pub(super) async fn confirm_source(
    proxy: &Proxy,
    address: IpAddr,
    identity: &Identity,
) -> Result<Option<Arc<Workload>>, ProxyError> {
    let confirmed = |state: &State| match state.by_address(address) {
        Some(workload) if workload.identity == *identity => Some(Some(workload)),
        Some(_) => None,
        None => Some(None),
    };
    proxy
        .state
        .wait_for(FRESHNESS_PATIENCE, confirmed)
        .await
        .ok_or(ProxyError::Refused(Refusal::IdentityMismatch))
}
