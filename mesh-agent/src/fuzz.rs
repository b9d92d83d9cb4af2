//! What `cargo xtask fuzz` feeds with bytes; compiled for nothing else.

use std::net::IpAddr;

use mesh_proto::discovery::Resource;
use prost_types::Any;

pub use crate::capture::fuzz::netlink;
use crate::identity::Identity;
use crate::{proto, proxy};

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
