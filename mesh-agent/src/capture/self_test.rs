//! Before an agent serves anything: are its own sockets under the programs? If not, each connect to an application would come
//! back to the agent, for ever.

use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use mesh_common::limits::MAX_PODS;
use mesh_common::{AgentSocketValue, socket_kind};
use socket2::{Domain, Protocol, Socket, Type};

use super::kernel::Kernel;
use super::network::{CaptureError, IoContext};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// One after the last: what is noted for it passes no Pod's sk_lookup.
const NO_SLOT: u32 = MAX_PODS;

/// Connects on loopback as to an application, in the namespace of the calling thread.
pub(super) fn upstream_connects_are_noted(kernel: &Kernel, cgroup_root: &Path) -> Result<(), CaptureError> {
    const STEP: &str = "connecting on 127.0.0.1 to test the datapath";
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).step(STEP)?;
    let application = listener.local_addr().step(STEP)?;
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).step(STEP)?;
    let mark = AgentSocketValue {
        kind: socket_kind::INBOUND_UPSTREAM,
        slot: NO_SLOT,
    };
    kernel.mark_socket(socket.as_fd(), mark)?;
    socket.connect_timeout(&application.into(), CONNECT_TIMEOUT).step(STEP)?;
    let client = socket.local_addr().step(STEP)?.as_socket();
    let client = client.ok_or_else(|| CaptureError::Other("a loopback socket without an address".into()))?;
    if kernel.has_upstream(NO_SLOT, client, application)? {
        return Ok(());
    }
    Err(CaptureError::Refused(format!(
        "the agent's own connections do not pass the programs at {}: its cgroup is not below that one; give the root of the \
         node's cgroup-v2 hierarchy with --cgroup-root",
        cgroup_root.display()
    )))
}
