//! What arrives at a Pod outside of a tunnel: authorized like everything else, without a principal.

use std::sync::Arc;

use super::authorize::authorize;
use super::copy;
use super::error::{ProxyError, Refusal};
use super::pod::PodContext;
use super::registry::ConnectionInfo;
use super::review;
use super::socket::Carried;
use super::step::Step;
use super::{Accepted, Proxy};
use crate::addr::{ClientAddr, OriginalDst};
use crate::capture::is_probe;
use crate::telemetry::{ConnectionPath, ConnectionRecord, Direction, Peer};

pub(super) async fn serve(proxy: Arc<Proxy>, context: Arc<PodContext>, accepted: Accepted) {
    let Accepted {
        stream,
        client,
        listener,
    } = accepted;
    // sk_lookup steers without rewriting: the local address is where the client wanted to go.
    let destination = OriginalDst::new(listener.socket_addr());
    if is_probe(destination) {
        return context.pod.probes.answer(&context.pod.pod_uid, destination, stream).await;
    }
    let client_side = Carried::new(stream);
    let mut record = proxy.state.read(|state| {
        let source = state.by_address(client.ip());
        ConnectionRecord::new(
            Direction::Inbound,
            ConnectionPath::Plaintext,
            Peer::at(client.socket_addr()).workload(source.as_deref()),
            context.peer(Peer::at(destination.socket_addr()), state),
            proxy.access_log.clone(),
        )
    });
    let result = carry(&proxy, &context, client_side, client, destination, &mut record).await;
    record.finish(result.err().map(|error| error.reason()));
}

async fn carry(
    proxy: &Arc<Proxy>,
    context: &PodContext,
    client_side: Carried,
    client: ClientAddr,
    destination: OriginalDst,
    record: &mut ConnectionRecord,
) -> Result<(), ProxyError> {
    let (client, destination) = (client.socket_addr(), destination.socket_addr());
    if mesh_common::is_agent_port(destination.port()) {
        return Err(Refusal::AgentPort.into());
    }
    if context
        .pod
        .network
        .is_own_upstream(ClientAddr::new(client), OriginalDst::new(destination))
    {
        return Err(Refusal::UpstreamLoop.into());
    }
    proxy.steps.done(Step::Accepted);
    let registered = proxy.registry.register(
        &context.pod.pod_uid,
        ConnectionInfo::new(Direction::Inbound, ConnectionPath::Plaintext, client, destination),
    )?;
    proxy.steps.done(Step::Registered);
    authorize(proxy, context, None, client.ip(), destination, record).await?;
    proxy.steps.done(Step::Evaluated);
    registered.decided();
    proxy.steps.done(Step::Decided);
    let (_lease, application) = Carried::to_application(context, client.ip(), destination).await?;
    proxy.steps.done(Step::Connected);
    record.opened();
    let result = copy::plain(client_side, application, record, &registered).await;
    review::name_policy(record, &registered);
    result
}
