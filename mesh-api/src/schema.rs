//! What the API server refuses at admission, before anything here sees it: the same as [`crate::validation`] refuses, as far as a
//! schema can tell (`tests.rs` has the table). Types, bounds, enumerations and patterns are the schema's; CEL has what those
//! cannot say, and what they would say in a form that nobody understands.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, ValidationRule,
};
use kube::CustomResourceExt as _;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use crate::authorization_policy::{AuthorizationPolicy, limits};
use crate::mesh_config::MeshConfig;

#[cfg(test)]
mod tests;

/// The name of the one `MeshConfig` of a namespace that counts.
const MESH_CONFIG_NAME: &str = "default";

/// RFC 1123 label, subdomain (two dots in a row are let pass, as in `validation`), and a label's name: patterns without anchors.
const LABEL: &str = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?";
const SUBDOMAIN: &str = "[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?";
const LABEL_NAME: &str = "[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?";
/// Printable ASCII without `*`, and also without `/`.
const TEXT: &str = "[!-)+-~]";
const TEXT_NO_SLASH: &str = "[!-)+-.0-~]";

/// The definitions to install in a cluster.
///
/// # Panics
/// Never: what kube derives has one version with a schema, as a test sees.
#[must_use]
pub fn custom_resource_definitions() -> Vec<CustomResourceDefinition> {
    let mut mesh_config = MeshConfig::crd();
    root(&mut mesh_config).x_kubernetes_validations = Some(vec![ValidationRule {
        rule: format!("self.metadata.name == '{MESH_CONFIG_NAME}'"),
        message: Some(format!(
            "metadata.name must be {MESH_CONFIG_NAME}: a namespace has one MeshConfig, and another one would count for nothing"
        )),
        ..ValidationRule::default()
    }]);
    let mut definitions = vec![AuthorizationPolicy::crd(), mesh_config];
    for definition in &mut definitions {
        plain(root(definition));
    }
    definitions
}

fn root(definition: &mut CustomResourceDefinition) -> &mut JSONSchemaProps {
    let version = definition.spec.versions.first_mut().expect("kube derives one version");
    let schema = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut());
    schema.expect("kube derives a schema")
}

/// `kubectl explain` shows descriptions as they are: without the marks of Markdown. And nothing may be null: the API server then
/// takes a null for a field that is not there, as serde does.
fn plain(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    if let Some(description) = &mut schema.description {
        *description = description.replace('`', "");
    }
    for property in schema.properties.iter_mut().flat_map(|properties| properties.values_mut()) {
        plain(property);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        plain(items);
    }
}

/// An error of the expression is shown beside the field's path, as a text that says how to mend it.
fn rule(rule: &str, message: &str) -> Value {
    json!({"rule": rule, "message": message})
}

pub(crate) fn policy_rules() -> Value {
    json!([{
        "rule": "self.action != 'Deny' || size(self.rules) > 0",
        "message": "a Deny policy without rules denies nothing; write `- {}` to deny everything",
        "fieldPath": ".rules",
    }])
}

pub(crate) fn source_rules() -> Value {
    let kinds = [
        "principals",
        "notPrincipals",
        "namespaces",
        "notNamespaces",
        "ipBlocks",
        "notIpBlocks",
    ];
    json!([rule(
        &any_given(&kinds),
        "is empty; name a source, or leave `from` out to mean any"
    )])
}

pub(crate) fn destination_rules() -> Value {
    json!([rule(
        &any_given(&["ports", "notPorts"]),
        "is empty; name ports, or leave `to` out to mean any"
    )])
}

fn any_given(fields: &[&str]) -> String {
    fields
        .iter()
        .map(|field| format!("has(self.{field})"))
        .collect::<Vec<_>>()
        .join(" || ")
}

pub(crate) fn labels(_: &mut SchemaGenerator) -> Schema {
    // Patterns of keys are CEL's: a structural schema cannot bound them.
    let key = format!("^({SUBDOMAIN}/)?{LABEL_NAME}$");
    json_schema!({
        "type": "object",
        "minProperties": 1,
        "maxProperties": limits::MAX_LABELS,
        "additionalProperties": {
            "type": "string",
            "maxLength": limits::MAX_LABEL,
            "pattern": format!("^({LABEL_NAME})?$"),
        },
        "x-kubernetes-validations": [rule(
            &format!("self.all(key, size(key) <= {} && key.matches('{key}'))", limits::MAX_LABEL_KEY),
            "has a key that is no label's name; give [prefix/]name as on the Pods",
        )],
    })
}

pub(crate) fn principals(_: &mut SchemaGenerator) -> Schema {
    let exact = format!("{TEXT_NO_SLASH}+/ns/{LABEL}/sa/{SUBDOMAIN}");
    values(
        limits::MAX_VALUES,
        1,
        &json!({
            "type": "string",
            "minLength": 1,
            "maxLength": limits::MAX_PRINCIPAL,
            "pattern": pattern(&exact),
            "x-kubernetes-validations": [rule(
                "!self.startsWith('spiffe://')",
                "has a scheme; write <trust domain>/ns/<namespace>/sa/<service account>, without spiffe://",
            )],
        }),
    )
}

pub(crate) fn namespaces(_: &mut SchemaGenerator) -> Schema {
    values(
        limits::MAX_VALUES,
        1,
        &json!({
            "type": "string",
            "minLength": 1,
            "maxLength": limits::MAX_NAMESPACE,
            "pattern": pattern(LABEL),
        }),
    )
}

/// That form, or text with one `*` at one end.
fn pattern(exact: &str) -> String {
    format!(r"^(\*{TEXT}*|{TEXT}+\*|{exact})$")
}

pub(crate) fn ip_blocks(_: &mut SchemaGenerator) -> Schema {
    values(limits::MAX_VALUES, 1, &ip_block())
}

pub(crate) fn excluded_cidrs(_: &mut SchemaGenerator) -> Schema {
    values(limits::MAX_EXCLUSIONS, 0, &ip_block())
}

pub(crate) fn ports(_: &mut SchemaGenerator) -> Schema {
    values(limits::MAX_VALUES, 1, &port())
}

pub(crate) fn excluded_ports(_: &mut SchemaGenerator) -> Schema {
    values(limits::MAX_EXCLUSIONS, 0, &port())
}

fn ip_block() -> Value {
    json!({
        "type": "string",
        "minLength": 1,
        "maxLength": limits::MAX_IP_BLOCK,
        "x-kubernetes-validations": [
            rule(
                "isIP(self) || isCIDR(self)",
                "is no address range; give one like 10.1.0.0/16, 2001:db8::/64 or a single address, IPv4 never as ::ffff:...",
            ),
            rule(
                "!isCIDR(self) || cidr(self) == cidr(self).masked()",
                "has bits beyond its prefix; write the range's first address, as in 10.0.0.0/8",
            ),
        ],
    })
}

fn port() -> Value {
    json!({"type": "integer", "format": "int32", "minimum": 1, "maximum": u16::MAX})
}

fn values(most: usize, fewest: usize, of: &Value) -> Schema {
    json_schema!({"type": "array", "minItems": fewest, "maxItems": most, "items": of})
}

/// Conditions of a status, those of others with them.
pub(crate) const MAX_CONDITIONS: usize = 8;

/// As the API conventions have them; a list by type, so that several writers may each apply their own.
pub(crate) fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": MAX_CONDITIONS,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "description": "One thing that is so or not, and why.",
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
            "properties": {
                "type": {"type": "string", "maxLength": 316, "description": "What is so or not, as in Accepted."},
                "status": {"type": "string", "enum": ["True", "False", "Unknown"], "description": "Whether it is so."},
                "reason": {"type": "string", "minLength": 1, "maxLength": 1024, "description": "Why, in one word for programs."},
                "message": {"type": "string", "maxLength": 32768, "description": "Why, and what to do, for people."},
                "lastTransitionTime": {"type": "string", "format": "date-time", "description": "Since when it is so or not."},
                "observedGeneration": {
                    "type": "integer",
                    "format": "int64",
                    "minimum": 0,
                    "description": "The metadata.generation that this is said of.",
                },
            },
        },
    })
}

pub(crate) fn count(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "integer", "format": "int64", "minimum": 0})
}
