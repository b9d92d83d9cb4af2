//! `MeshConfig`: defaults of the whole mesh and of a namespace.

use std::collections::BTreeSet;

use ipnet::IpNet;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::authorization_policy::limits;
use crate::schema;
use crate::status::Status;
use crate::validation::{Check, ValidationErrors};

/// What a mesh, or a namespace of it, wants of its connections.
///
/// In the root namespace it is for the whole mesh, elsewhere for that namespace, which may only set `mtls`. The one named
/// `default` counts.
#[derive(CustomResource, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq, JsonSchema)]
#[kube(
    group = "culvert.dev",
    version = "v1alpha1",
    kind = "MeshConfig",
    plural = "meshconfigs",
    namespaced,
    category = "culvert",
    status = "Status",
    doc = "Whether Pods of the mesh take connections without mutual TLS, and what is not captured.\n\nIn the root namespace it is for the whole mesh, elsewhere for that namespace, which may only set mtls. Its name must be default.",
    printcolumn = r#"{"name":"mTLS","type":"string","jsonPath":".spec.mtls"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type=='Accepted')].reason"}"#,
    printcolumn = r#"{"name":"Workloads","type":"integer","jsonPath":".status.workloadsSelected","description":"Workloads that it is for"}"#,
    printcolumn = r#"{"name":"Nodes","type":"integer","jsonPath":".status.nodesEnforcing","description":"Nodes that enforce it as it stands"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshConfigSpec {
    /// `Permissive` (the mesh's default) or `Strict`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Mtls")]
    pub mtls: Option<Mtls>,
    /// Destination ports that are not captured, 1-65535. For the whole mesh only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::excluded_ports")]
    pub excluded_ports: Option<Vec<i64>>,
    /// Destination addresses that are not captured, `10.0.0.0/8` or a single address. For the whole mesh only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::excluded_cidrs")]
    pub excluded_cidrs: Option<Vec<String>>,
}

#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema)]
pub enum Mtls {
    /// Connections in clear are taken, too, where policies allow them.
    #[default]
    Permissive,
    /// Only connections that mutual TLS has proven are taken.
    Strict,
}

/// What a `MeshConfig` is for, by its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MeshConfigScope {
    Mesh,
    Namespace,
}

/// A configuration whose every value is known to be good.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ValidMeshConfig {
    pub mtls: Mtls,
    pub excluded_ports: BTreeSet<u16>,
    pub excluded_cidrs: BTreeSet<IpNet>,
}

impl MeshConfigSpec {
    /// Checks every field.
    ///
    /// # Errors
    /// All fields that cannot stand, each with its path.
    pub fn validate(&self, scope: MeshConfigScope) -> Result<ValidMeshConfig, ValidationErrors> {
        let mut check = Check::default();
        if scope == MeshConfigScope::Namespace {
            if self.mtls.is_none() {
                check.fail(
                    "spec.mtls",
                    "is missing; give Permissive or Strict, the one thing that a namespace may set",
                );
            }
            let exclusions = [
                ("spec.excludedPorts", self.excluded_ports.is_some()),
                ("spec.excludedCidrs", self.excluded_cidrs.is_some()),
            ];
            for (path, _) in exclusions.iter().filter(|(_, given)| *given) {
                check.fail(
                    path,
                    "is for the whole mesh only; write it in the root namespace's MeshConfig",
                );
            }
        }
        let excluded_ports = exclusions(&mut check, "spec.excludedPorts", self.excluded_ports.as_deref(), Check::port);
        let excluded_cidrs = exclusions(&mut check, "spec.excludedCidrs", self.excluded_cidrs.as_deref(), |text| {
            Check::ip_block(text)
        });
        if check.errors.is_empty() {
            Ok(ValidMeshConfig {
                mtls: self.mtls.unwrap_or_default(),
                excluded_ports,
                excluded_cidrs,
            })
        } else {
            Err(ValidationErrors(check.errors))
        }
    }
}

fn exclusions<In, Out: Ord>(
    check: &mut Check,
    path: &str,
    given: Option<&[In]>,
    parse: impl Fn(&In) -> Result<Out, String>,
) -> BTreeSet<Out> {
    let given = given.unwrap_or_default();
    if given.len() > limits::MAX_EXCLUSIONS {
        let problem = format!("{} entries, at most {} are allowed", given.len(), limits::MAX_EXCLUSIONS);
        check.fail(path, problem);
    }
    let mut valid = BTreeSet::new();
    for (i, value) in given.iter().enumerate().take(limits::MAX_EXCLUSIONS) {
        match parse(value) {
            Ok(value) => {
                valid.insert(value);
            }
            Err(problem) => check.fail(&format!("{path}[{i}]"), problem),
        }
    }
    valid
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn validate(yaml: &str, scope: MeshConfigScope) -> Result<ValidMeshConfig, Vec<String>> {
        let value: Value = serde_norway::from_str(yaml).expect("YAML");
        let spec: MeshConfigSpec = serde_json::from_value(value).expect("spec");
        spec.validate(scope)
            .map_err(|errors| errors.0.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_mesh_sets_all_and_a_namespace_only_mtls() {
        let all = "{mtls: Strict, excludedPorts: [9100, 22, 22], excludedCidrs: [169.254.169.254, 'fd00::/8']}";
        let mesh = validate(all, MeshConfigScope::Mesh).expect("valid");
        assert_eq!(mesh.mtls, Mtls::Strict);
        assert_eq!(mesh.excluded_ports.into_iter().collect::<Vec<_>>(), [22, 9100]);
        let cidrs: Vec<String> = mesh.excluded_cidrs.iter().map(ToString::to_string).collect();
        assert_eq!(cidrs, ["169.254.169.254/32", "fd00::/8"]);
        assert_eq!(validate("{}", MeshConfigScope::Mesh).expect("valid").mtls, Mtls::Permissive);

        let namespace = validate("{mtls: Strict}", MeshConfigScope::Namespace).expect("valid");
        assert_eq!(namespace.mtls, Mtls::Strict);
        assert_eq!(
            validate("{excludedPorts: [1], excludedCidrs: []}", MeshConfigScope::Namespace).expect_err("refused"),
            [
                "spec.mtls: is missing; give Permissive or Strict, the one thing that a namespace may set",
                "spec.excludedPorts: is for the whole mesh only; write it in the root namespace's MeshConfig",
                "spec.excludedCidrs: is for the whole mesh only; write it in the root namespace's MeshConfig",
            ]
        );
    }

    #[test]
    fn each_error_names_its_field_and_the_fix() {
        for (yaml, expected) in [
            (
                "{excludedPorts: [80, 0]}",
                "spec.excludedPorts[1]: 0 is no port; give 1-65535",
            ),
            (
                "{excludedPorts: [65536]}",
                "spec.excludedPorts[0]: 65536 is no port; give 1-65535",
            ),
            (
                "{excludedCidrs: [10.1.2.3/8]}",
                "spec.excludedCidrs[0]: \"10.1.2.3/8\" has bits beyond its prefix; write 10.0.0.0/8",
            ),
            (
                "{excludedCidrs: ['::ffff:10.0.0.0/104']}",
                "spec.excludedCidrs[0]: \"::ffff:10.0.0.0/104\" is IPv4 written as IPv6, which no connection matches; write 10.0.0.0/8",
            ),
        ] {
            assert_eq!(validate(yaml, MeshConfigScope::Mesh).expect_err("refused"), [expected]);
        }
        let many = (1..=limits::MAX_EXCLUSIONS + 1)
            .map(|n| n.to_string())
            .collect::<Vec<_>>()
            .join(",");
        let found = validate(&format!("{{excludedPorts: [{many}]}}"), MeshConfigScope::Mesh).expect_err("refused");
        assert_eq!(found, ["spec.excludedPorts: 65 entries, at most 64 are allowed"]);
        for bad in ["{mtls: strict}", "{mtls: Disable}", "{excludePorts: [1]}"] {
            let value: Value = serde_norway::from_str(bad).expect("YAML");
            assert!(serde_json::from_value::<MeshConfigSpec>(value).is_err(), "{bad}");
        }
    }
}
