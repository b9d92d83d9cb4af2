//! The wire interfaces, generated from `proto/`. Nothing but a crate's `proto.rs` may use these types: there they become domain
//! types, and the rest of the program knows only those.
#![allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    missing_docs,
    reason = "generated code"
)]

mod words;

pub use words::{PIECES, PROBLEMS};

/// Delta discovery, `envoy.service.discovery.v3`.
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}
/// `istio.workload`: workloads and services.
pub mod workload {
    tonic::include_proto!("istio.workload");
}
/// `istio.security`: authorizations.
pub mod security {
    tonic::include_proto!("istio.security");
}
/// `istio.v1.auth`: the certificate service.
pub mod ca {
    tonic::include_proto!("istio.v1.auth");
}
/// `culvert.mesh.v1`: what this mesh adds to discovery.
pub mod mesh {
    tonic::include_proto!("culvert.mesh.v1");
}
/// `culvert.node.v1`: the upward stream.
pub mod node {
    tonic::include_proto!("culvert.node.v1");
}
/// `culvert.local.v1`: the enrolment socket of the node.
pub mod local {
    tonic::include_proto!("culvert.local.v1");
}

pub const ADDRESS_TYPE_URL: &str = "type.googleapis.com/istio.workload.Address";
pub const AUTHORIZATION_TYPE_URL: &str = "type.googleapis.com/istio.security.Authorization";
pub const SETTINGS_TYPE_URL: &str = "type.googleapis.com/culvert.mesh.v1.Settings";
pub const CAPTURE_TYPE_URL: &str = "type.googleapis.com/culvert.mesh.v1.Capture";
/// Name of the workload extension that carries [`mesh::Capture`].
pub const CAPTURE_EXTENSION: &str = "culvert.dev/capture";
pub const AFFINITY_TYPE_URL: &str = "type.googleapis.com/culvert.mesh.v1.SessionAffinity";
/// Name of the service extension that carries [`mesh::SessionAffinity`].
pub const AFFINITY_EXTENSION: &str = "culvert.dev/session-affinity";
/// Ends `system_version_info` of our control plane while the rest of what a client lacks follows in further responses.
pub const PARTIAL_VERSION: &str = "+partial";
/// Policies in this namespace without a selector apply to the whole mesh.
pub const ROOT_NAMESPACE: &str = "culvert-system";
/// Name of the one [`mesh::Settings`] resource.
pub const SETTINGS_NAME: &str = "mesh";
/// Resources of one type that an agent holds, and tells on each reconnect. Control plane and agent must agree: a resume beyond
/// what the server takes would be cut off for ever. 100,000 × (name and version, about 110 B) = 11 MB of a first request.
pub const MAX_RESOURCES: usize = 100_000;
/// Roots in the settings: the signing one, its successor, and some that others brought along. An agent that is told more refuses.
pub const MAX_TRUSTED_ROOTS: usize = 16;
/// Revoked identities in the settings. 4,096 × about 100 B = 400 KiB.
pub const MAX_REVOKED: usize = 4096;
/// Bytes of a discovery request.
pub const MAX_REQUEST_BYTES: usize = 16 << 20;
/// Bytes of names and versions that an agent holds of one type, so that the request that tells them is one that can be taken.
pub const MAX_RESUME_BYTES: usize = MAX_REQUEST_BYTES - (1 << 20);
