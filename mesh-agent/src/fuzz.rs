//! What `cargo xtask fuzz` feeds with bytes; compiled for nothing else.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use mesh_cni::agent::Patience;
use mesh_cni::plugin;
use mesh_cni::protocol::{Answer, NamespaceList, Request};
use mesh_proto::ADDRESS_TYPE_URL;
use mesh_proto::discovery::{DeltaDiscoveryResponse, Resource};
use prost::Message as _;
use prost_types::Any;
use rustls_pki_types::CertificateDer;

pub use crate::capture::fuzz::{cgroup, enrolment, greeting, netlink};
pub use crate::config::fuzz::token;
pub use crate::discovery::node_pods::fuzz as node_pods;
use crate::discovery::subscription::Subscription;
use crate::identity::Identity;
pub use crate::identity::certificate::fuzz as answer;
pub use crate::local::fuzz as enrol;
pub use crate::local::handover::fuzz as handover;
pub use crate::memory::fuzz as memory;
use crate::state::Change;
use crate::{proto, proxy, tls};

/// One resource of a discovery response, as each of the types.
pub fn discovery(bytes: &[u8]) {
    let resource = |name: &str| Resource {
        name: name.to_owned(),
        resource: Some(Any {
            type_url: String::new(),
            value: bytes.to_vec(),
        }),
        ..Resource::default()
    };
    for name in ["shop/web", mesh_proto::SETTINGS_NAME] {
        let resource = resource(name);
        let _ = proto::address(&resource);
        let _ = proto::settings(&resource);
        let _ = proto::authorization(&resource);
    }
}

/// The authority of a CONNECT. What is taken is on the tunnel's own address and no port of the agent's.
pub fn connect(bytes: &[u8]) {
    let (method, authority) = match bytes.iter().position(|byte| *byte == 0) {
        Some(at) => (&bytes[..at], &bytes[at + 1..]),
        None => (&b"CONNECT"[..], bytes),
    };
    for local in ["10.0.0.1", "fd00::1"] {
        let Ok(local) = local.parse::<IpAddr>() else { return };
        if let Some(destination) = proxy::fuzz::requested_destination(method, authority, local) {
            assert_eq!(destination.ip(), local);
            assert!(!mesh_common::is_agent_port(destination.port()) && method == b"CONNECT");
        }
    }
}

/// A SPIFFE id. What is taken reads the same when it is written.
pub fn identity(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(identity) = Identity::parse(text)
    {
        assert_eq!(identity.to_string(), text);
    }
}

/// What a control plane sends on a stream, one response after the other. What is held is what another agent would take over.
pub fn responses(mut bytes: &[u8]) {
    let decode = |resource: &Resource| proto::address(resource).map_err(|error| error.to_string());
    let mut subscription = Subscription::new(ADDRESS_TYPE_URL);
    while let Ok(response) = DeltaDiscoveryResponse::decode_length_delimited(&mut bytes) {
        let (nonce, resources) = (response.nonce.clone(), response.resources.len());
        let received = subscription.receive(response, decode, |name| Some(Change::RemoveAddress(name)), |_| None);
        assert_eq!(received.reply.response_nonce, nonce);
        assert!(received.rejected.len() <= resources);
        assert_eq!(received.reply.error_detail.is_some(), !received.rejected.is_empty());
    }
    let mut next = Subscription::new(ADDRESS_TYPE_URL);
    let restored = next.restore(subscription.snapshot(), decode, |_| None);
    assert_eq!((next.held(), restored.rejected.len()), (subscription.held(), 0));
}

/// A network configuration list of another tool's. What was put in comes out again, and the rest is as it was.
pub fn conflist(bytes: &[u8]) {
    use mesh_cni::conflist::{entry, insert, remove};
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let ours = entry("/run/culvert".as_ref(), None);
    if let Ok(Some(with)) = insert(text, &ours) {
        assert_eq!(insert(&with, &ours), Ok(None));
        // An entry that was there before is gone with it.
        let without = remove(text).ok().flatten();
        assert_eq!(
            remove(&with).ok().flatten().as_deref(),
            Some(without.as_deref().unwrap_or(text))
        );
    }
}

/// What the CNI plugin is given: the runtime's configuration, what the agent answers, and the list that it has left, with a zero between
/// each. A DEL never fails, a failure has its code, and what the agent is asked reads the same there.
pub fn cni(bytes: &[u8]) {
    let mut parts = bytes.splitn(3, |byte| *byte == 0);
    let mut next = || parts.next().unwrap_or_default();
    let (input, answer, list) = (next(), next(), next());
    let environment = [
        (
            "CNI_ARGS",
            "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=3f0b6a9e-6f44",
        ),
        ("CNI_CONTAINERID", "c"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/run/netns/web"),
    ];
    for command in ["ADD", "CHECK", "DEL", "GC", "STATUS", "VERSION"] {
        let environment = environment.into_iter().chain([("CNI_COMMAND", command)]);
        let environment: BTreeMap<String, String> = environment.map(|(name, value)| (name.into(), value.into())).collect();
        let outcome = plugin::run(&environment, input, &CniNode { answer, list });
        assert!(!outcome.failed || command != "DEL");
        assert!(!outcome.failed || outcome.result.is_some_and(|result| result["code"].is_u64()));
    }
    // As the agent takes it from the socket.
    if let Ok(request) = serde_json::from_slice::<Request>(input) {
        reads_the_same(&request);
    }
}

struct CniNode<'a> {
    answer: &'a [u8],
    list: &'a [u8],
}

impl plugin::Node for CniNode<'_> {
    fn list(&self, _: &Path) -> io::Result<Option<NamespaceList>> {
        Ok(serde_json::from_slice(self.list)?)
    }

    fn ask(&self, _: &Path, request: &Request, _: Patience) -> io::Result<Answer> {
        reads_the_same(request);
        Ok(serde_json::from_slice(self.answer)?)
    }
}

fn reads_the_same(request: &Request) {
    let text = serde_json::to_vec(request).unwrap_or_default();
    assert_eq!(serde_json::from_slice::<Request>(&text).ok().as_ref(), Some(request));
}

/// A peer's certificate, as TLS hands it on.
pub fn certificate(bytes: &[u8]) {
    if let Ok(identity) = tls::first_identity(&CertificateDer::from(bytes)) {
        assert_eq!(Identity::parse(&identity.to_string()).ok(), Some(identity));
    }
}
