//! The destination's decision about a connection, the same on both of its ways in. The caller has registered the connection.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::Proxy;
use super::error::{ProxyError, Refusal};
use super::limits::{DISCOVERY_PATIENCE, FRESHNESS_PATIENCE};
use super::pod::PodContext;
use super::proof::{Broken, Proof};
use crate::identity::Identity;
use crate::policy::{self, Connection};
use crate::state::{ApplicablePolicies, State};
use crate::telemetry::{ConnectionRecord, IDENTITY_REVOKED, ROOT_REMOVED};
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
    // The settings are known, too: policies are complete only once everything was told.
    if source.is_none() && proxy.state.read(|state| refuses_plaintext(state, context, destination)) {
        proxy.metrics.count_plaintext_refused();
        return Err(Refusal::PlaintextRefused.into());
    }
    // A Pod that speaks TCP itself evades its capture, and with it its principal; one that opts out has none. To DENY them it helps
    // neither.
    let (claimed, settings) = proxy
        .state
        .read(|state| (state.by_address(source_ip), state.settings().clone()));
    let is_revoked = |workload: &Arc<Workload>| settings.revoked.contains(&workload.identity);
    if source.is_none() && claimed.as_ref().is_some_and(is_revoked) {
        return Err(refused(proxy, Broken::Revoked));
    }
    let connection = Connection {
        source,
        claimed: claimed.as_ref().map(|workload| &workload.identity),
        source_ip,
        destination_ip: destination.ip(),
        destination_port: destination.port(),
    };
    let verdict = policy::evaluate(&applicable.policies, &connection);
    for policy in &verdict.dry_run_matches {
        proxy.metrics.count_dry_run(policy);
    }
    record.dry_run_policies(verdict.dry_run_matches);
    record.policy(verdict.decision.policy().cloned());
    if verdict.decision.is_allow() {
        Ok(())
    } else {
        proxy.metrics.count_denied(verdict.decision.policy());
        Err(Refusal::DeniedByPolicy.into())
    }
}

/// Whether what a tunnel's ends have proven still counts. The caller has registered what relies on it.
pub(super) fn still_proven(proxy: &Proxy, proof: &Proof) -> Result<(), ProxyError> {
    let settings = proxy.state.read(|state| state.settings().clone());
    proof
        .broken_by(&settings)
        .map_or(Ok(()), |broken| Err(refused(proxy, broken)))
}

fn refused(proxy: &Proxy, broken: Broken) -> ProxyError {
    proxy.metrics.count_proof_refused(match broken {
        Broken::Revoked => IDENTITY_REVOKED,
        Broken::RootRemoved => ROOT_REMOVED,
    });
    broken.into()
}

fn refuses_plaintext(state: &State, context: &PodContext, destination: SocketAddr) -> bool {
    let settings = state.settings();
    settings.refuses_plaintext(&context.pod.namespace, destination.ip(), destination.port())
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

/// Whom discovery knows at the address of a tunnel's peer; an error when it is nobody, or someone else than the certificate says, so
/// that a certificate stolen from one node is of no use on another.
pub(super) async fn confirm_source(proxy: &Proxy, address: IpAddr, identity: &Identity) -> Result<Arc<Workload>, ProxyError> {
    // Before everything was told, the address may have a later holder than the one that is known.
    let known = |state: &State| state.by_address(address).filter(|_| state.is_synced());
    let confirmed = |state: &State| known(state).filter(|workload| workload.identity == *identity);
    match proxy.state.wait_for(FRESHNESS_PATIENCE, confirmed).await {
        Some(workload) => Ok(workload),
        None if proxy.state.read(known).is_some() => Err(Refusal::IdentityMismatch.into()),
        None => Err(Refusal::IdentityUnknown.into()),
    }
}
