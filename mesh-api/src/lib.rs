//! The mesh's own Kubernetes types: their fields, schema and validation. They are the same from a folder of manifests and from
//! an API server, and nothing here knows which it was.

mod authorization_policy;
mod matcher;
mod mesh_config;
mod schema;
mod status;
mod validation;

pub use authorization_policy::{
    AuthorizationPolicy, AuthorizationPolicySpec, Destination, Mode, PolicyAction, Rule, Selector, Source, limits,
};
pub use matcher::StringMatch;
pub use mesh_config::{MeshConfig, MeshConfigScope, MeshConfigSpec, Mtls, ValidMeshConfig};
pub use schema::custom_resource_definitions;
pub use status::{ACCEPTED, Reason, Status, Verdict};
pub use validation::{FieldError, ValidDestination, ValidPolicy, ValidRule, ValidSource, ValidationErrors};

/// API group of every type here.
pub const GROUP: &str = "culvert.dev";
/// `apiVersion` of every type here.
pub const API_VERSION: &str = "culvert.dev/v1alpha1";
