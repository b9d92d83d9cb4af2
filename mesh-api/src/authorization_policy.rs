//! `AuthorizationPolicy`: who may connect to which Pods, on which ports.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Bounds of a policy. A policy at every bound compiles to about 64 × 64 × 128 × 512 B = 256 MiB, so the registry's bound on a
/// file's size (1 MiB) is what limits one policy in practice; these keep any single list readable and quick to evaluate.
pub mod limits {
    pub const MAX_RULES: usize = 64;
    pub const MAX_ALTERNATIVES: usize = 64;
    pub const MAX_VALUES: usize = 128;
    /// Labels in a selector.
    pub const MAX_LABELS: usize = 32;
    /// Bytes of a principal: trust domain (255) + "/ns/" + namespace (63) + "/sa/" + service account (253).
    pub const MAX_PRINCIPAL: usize = 255 + 4 + 63 + 4 + 253;
    /// Bytes of a namespace's name (RFC 1123 label).
    pub const MAX_NAMESPACE: usize = 63;
    /// Ports, and address ranges, that a `MeshConfig` excludes from capture: each is a comparison for every new connection.
    pub const MAX_EXCLUSIONS: usize = 64;
    /// Errors told at once.
    pub const MAX_ERRORS: usize = 16;
}

/// Allows or denies connections to Pods of its namespace (of the whole mesh when it is in the root namespace).
///
/// A connection that any `Deny` policy matches is refused. If no `Allow` policy selects the destination it is allowed;
/// otherwise one of them must match.
#[derive(CustomResource, Serialize, Deserialize, Clone, Debug, PartialEq, Eq, JsonSchema)]
#[kube(
    group = "culvert.dev",
    version = "v1alpha1",
    kind = "AuthorizationPolicy",
    plural = "authorizationpolicies",
    namespaced,
    doc = "Who may connect to which Pods of the mesh, on which ports.",
    printcolumn = r#"{"name":"Action","type":"string","jsonPath":".spec.action"}"#,
    printcolumn = r#"{"name":"Mode","type":"string","jsonPath":".spec.mode"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationPolicySpec {
    /// The Pods it applies to; without it, all Pods of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<Selector>,
    pub action: PolicyAction,
    /// Any of them may match. An `Allow` policy without rules allows nothing; a rule `{}` matches everything.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// `DryRun` counts what it would have decided and decides nothing.
    #[serde(default)]
    pub mode: Mode,
}

/// Pods by their labels.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// All of them must be on the Pod.
    pub match_labels: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema)]
pub enum PolicyAction {
    Allow,
    Deny,
}

#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema)]
pub enum Mode {
    #[default]
    Enforce,
    DryRun,
}

/// Matches a connection when one of `from` and one of `to` does.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// Without it: from anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Vec<Source>>,
    /// Without it: to any port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Vec<Destination>>,
}

/// All the kinds that are given must match; of a kind's values, one (for `not…`: none).
///
/// `*` alone is any proven value, `*` as first or last character any beginning or end.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Source {
    /// Identities, `<trust domain>/ns/<namespace>/sa/<service account>`, as mutual TLS proved them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub principals: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_principals: Option<Vec<String>>,
    /// Namespaces of proven identities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_namespaces: Option<Vec<String>>,
    /// Client addresses, `10.0.0.0/8` or a single address. IPv4 is written as IPv4, never as `::ffff:…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip_blocks: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_ip_blocks: Option<Vec<String>>,
}

#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Destination {
    /// Ports of the Pod (not of a Service), 1-65535.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<i64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_ports: Option<Vec<i64>>,
}
