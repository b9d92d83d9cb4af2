//! `AuthorizationPolicy`: who may connect to which Pods, on which ports.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema;
use crate::status::Status;

/// Bounds of a policy, in its schema and in its validation alike. They keep any single list readable and quick to evaluate, and
/// the schema within what the API server spends on an expression: it reckons with 64 × 16 × 128 = 131,072 values of a kind,
/// and allows 10,000,000 for all of them together, which leaves 76 for the most expensive check of one value (an address range:
/// 38). A policy at every bound would be 64 MiB, so what limits one policy in practice is the size of an object: 1.5 MiB at
/// etcd, 1 MiB for a manifest in the registry's folder.
pub mod limits {
    pub const MAX_RULES: usize = 64;
    /// Sources, and destinations, of a rule.
    pub const MAX_ALTERNATIVES: usize = 16;
    /// Values of a kind in a source or a destination.
    pub const MAX_VALUES: usize = 128;
    /// Labels in a selector.
    pub const MAX_LABELS: usize = 32;
    /// Bytes of a label's key: prefix (253) + "/" + name (63).
    pub const MAX_LABEL_KEY: usize = 253 + 1 + 63;
    /// Bytes of a label's value, and of its name.
    pub const MAX_LABEL: usize = 63;
    /// Bytes of a principal: trust domain (255) + "/ns/" + namespace (63) + "/sa/" + service account (253).
    pub const MAX_PRINCIPAL: usize = 255 + 4 + 63 + 4 + 253;
    /// Bytes of a namespace's name (RFC 1123 label).
    pub const MAX_NAMESPACE: usize = 63;
    /// Ports, and address ranges, that a `MeshConfig` excludes from capture: each is a comparison for every new connection.
    pub const MAX_EXCLUSIONS: usize = 64;
    /// Characters of an address range: six groups of IPv6, an IPv4 address as its last two, "/128". No longer one can be read.
    pub const MAX_IP_BLOCK: usize = 6 * 5 + 15 + 4;
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
    category = "culvert",
    status = "Status",
    doc = "Who may connect to which Pods of the mesh, on which ports.\n\nA connection that any Deny policy matches is refused. If no Allow policy selects the destination it is allowed; otherwise one of them must match. In the root namespace a policy is for the whole mesh.",
    printcolumn = r#"{"name":"Action","type":"string","jsonPath":".spec.action"}"#,
    printcolumn = r#"{"name":"Mode","type":"string","jsonPath":".spec.mode"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type=='Accepted')].reason"}"#,
    printcolumn = r#"{"name":"Workloads","type":"integer","jsonPath":".status.workloadsSelected","description":"Workloads that it selects"}"#,
    printcolumn = r#"{"name":"Nodes","type":"integer","jsonPath":".status.nodesEnforcing","description":"Nodes that enforce it as it stands"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = schema::policy_rules()))]
pub struct AuthorizationPolicySpec {
    /// The Pods it applies to; without it, all Pods of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Selector")]
    pub selector: Option<Selector>,
    /// `Allow` or `Deny` what the rules match.
    pub action: PolicyAction,
    /// Any of them may match. An `Allow` policy without rules allows nothing; a rule `{}` matches everything.
    #[serde(default)]
    #[schemars(length(max = limits::MAX_RULES))]
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
    #[schemars(schema_with = "schema::labels")]
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
    /// Where the connection comes from; one of them must match. Without it: from anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Vec<Source>", length(min = 1, max = limits::MAX_ALTERNATIVES))]
    pub from: Option<Vec<Source>>,
    /// What the connection goes to; one of them must match. Without it: to any port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Vec<Destination>", length(min = 1, max = limits::MAX_ALTERNATIVES))]
    pub to: Option<Vec<Destination>>,
}

/// All the kinds that are given must match; of a kind's values, one (for `not…`: none).
///
/// `*` alone is any proven value, `*` as first or last character any beginning or end.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = schema::source_rules()))]
pub struct Source {
    /// Identities, `<trust domain>/ns/<namespace>/sa/<service account>`, as mutual TLS proved them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::principals")]
    pub principals: Option<Vec<String>>,
    /// Identities that it must not be. A connection without a proven identity is none of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::principals")]
    pub not_principals: Option<Vec<String>>,
    /// Namespaces of proven identities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::namespaces")]
    pub namespaces: Option<Vec<String>>,
    /// Namespaces that the proven identity must not be of. A connection without one is of none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::namespaces")]
    pub not_namespaces: Option<Vec<String>>,
    /// Client addresses, `10.0.0.0/8` or a single address. IPv4 is written as IPv4, never as `::ffff:…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::ip_blocks")]
    pub ip_blocks: Option<Vec<String>>,
    /// Client addresses that it must not be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::ip_blocks")]
    pub not_ip_blocks: Option<Vec<String>>,
}

/// Ports; of both kinds, all that are given must match.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = schema::destination_rules()))]
pub struct Destination {
    /// Ports of the Pod (not of a Service), 1-65535.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::ports")]
    pub ports: Option<Vec<i64>>,
    /// Ports of the Pod that it must not be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::ports")]
    pub not_ports: Option<Vec<i64>>,
}
