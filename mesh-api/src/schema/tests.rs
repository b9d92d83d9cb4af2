use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;

use super::*;
use crate::{AuthorizationPolicySpec, MeshConfigScope, MeshConfigSpec};

/// Of admission.yaml.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    what: String,
    kind: String,
    #[serde(default)]
    scope: Option<String>,
    spec: Value,
    says: String,
    by: By,
    names: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
enum By {
    #[serde(rename = "schema")]
    Schema,
    #[serde(rename = "CEL")]
    Cel,
    #[serde(rename = "policy")]
    Policy,
}

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = serde_norway::from_str(include_str!("../../admission.yaml")).expect("admission.yaml");
    cases.iter_mut().for_each(|case| repeat(&mut case.spec));
    cases
}

/// `{repeat: X, times: N}` is a list.
fn repeat(value: &mut Value) {
    if let (Some(item), Some(times)) = (value.get("repeat"), value.get("times").and_then(Value::as_u64)) {
        *value = (0..times).map(|_| item.clone()).collect();
    }
    match value {
        Value::Array(items) => items.iter_mut().for_each(repeat),
        Value::Object(fields) => fields.values_mut().for_each(repeat),
        _ => {}
    }
}

fn refusals(case: &Case) -> Vec<String> {
    let errors = if case.kind == "MeshConfig" {
        let scope = case
            .scope
            .as_ref()
            .map_or(MeshConfigScope::Mesh, |_| MeshConfigScope::Namespace);
        let spec: MeshConfigSpec = serde_json::from_value(case.spec.clone()).expect(&case.what);
        spec.validate(scope).expect_err(&case.what)
    } else {
        let spec: AuthorizationPolicySpec = serde_json::from_value(case.spec.clone()).expect(&case.what);
        spec.validate().expect_err(&case.what)
    };
    errors.0.iter().map(ToString::to_string).collect()
}

#[test]
fn every_refusal_of_validation_has_its_place_at_admission() {
    let cases = cases();
    for case in &cases {
        let found = refusals(case);
        assert!(
            matches!(&found[..], [one] if one.starts_with(&case.says)),
            "{}: {found:?}",
            case.what
        );
        assert!(!case.names.is_empty());
        // CEL of a definition does not see the namespace; nothing else needs a policy of its own.
        assert_eq!(case.by == By::Policy, case.scope.is_some(), "{}", case.what);
    }
    // Where a text is made that refuses; two of them hand on what a value's check said.
    let sources = [include_str!("../validation.rs"), include_str!("../mesh_config.rs")];
    let places = |word: &str| -> usize {
        let code = sources
            .iter()
            .map(|text| text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default());
        code.map(|text| text.matches(word).count()).sum()
    };
    let handed_on = 2;
    // "Is empty" of sources and of destinations is one place, and so is "at most" of four lists.
    let doubled = 1 + 3;
    let refusals = places(".fail(") + places("Err(format!(") + places("ok_or_else(|| format!(") - handed_on;
    let distinct = cases.len() - doubled;
    assert_eq!(
        refusals, distinct,
        "a refusal was added or taken away: admission.yaml has an object for each, and the schema refuses it, too"
    );
    let names: BTreeSet<&str> = cases.iter().map(|case| case.what.as_str()).collect();
    assert_eq!(names.len(), cases.len());
}

/// What it means for the definition that it names a bound: a bound of `limits` that is not in it would be refused by validation alone.
#[test]
fn every_bound_is_in_the_schema() {
    let text = serde_norway::to_string(&custom_resource_definitions()).expect("YAML");
    for (keyword, bound) in [
        ("maxItems", limits::MAX_RULES),
        ("maxItems", limits::MAX_ALTERNATIVES),
        ("maxItems", limits::MAX_VALUES),
        ("maxItems", limits::MAX_EXCLUSIONS),
        ("maxProperties", limits::MAX_LABELS),
        ("maxLength", limits::MAX_LABEL),
        ("maxLength", limits::MAX_PRINCIPAL),
        ("maxLength", limits::MAX_NAMESPACE),
        ("maxLength", limits::MAX_IP_BLOCK),
        ("size(key) <=", limits::MAX_LABEL_KEY),
    ] {
        let sep = if keyword.starts_with("max") { ": " } else { " " };
        assert!(text.contains(&format!("{keyword}{sep}{bound}")), "{keyword} {bound}");
    }
}

/// Every string, list and map has a bound, and every field a description: `kubectl explain` shows them.
#[test]
fn the_schema_is_bounded_and_explained() {
    fn walk(path: &str, schema: &JSONSchemaProps, faults: &mut Vec<String>) {
        use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{JSONSchemaPropsOrArray, JSONSchemaPropsOrBool};
        let is_bounded = match schema.type_.as_deref() {
            Some("string") => schema.max_length.is_some() || schema.enum_.is_some() || schema.format.is_some(),
            Some("array") => schema.max_items.is_some(),
            Some("integer") => schema.minimum.is_some(),
            Some("object") => schema.properties.is_some() || schema.max_properties.is_some(),
            _ => false,
        };
        if !is_bounded {
            faults.push(format!("{path} has no bound"));
        }
        if schema.nullable == Some(true) {
            faults.push(format!("{path} may be null"));
        }
        for (name, property) in schema.properties.iter().flatten() {
            let path = format!("{path}.{name}");
            if property.description.as_deref().unwrap_or_default().is_empty() {
                faults.push(format!("{path} has no description"));
            }
            if property.description.as_deref().unwrap_or_default().contains('`') {
                faults.push(format!("{path}: Markdown is not for kubectl"));
            }
            walk(&path, property, faults);
        }
        if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
            walk(&format!("{path}[]"), items, faults);
        }
        if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
            walk(&format!("{path}{{}}"), values, faults);
        }
    }
    let mut faults = Vec::new();
    for mut definition in custom_resource_definitions() {
        let name = definition.spec.names.kind.clone();
        walk(&name, root(&mut definition), &mut faults);
    }
    assert_eq!(faults, [""; 0]);
}

/// `cargo xtask generate` writes what this compares.
#[test]
fn the_definitions_of_the_repository_are_those_of_the_types() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
    for definition in custom_resource_definitions() {
        let name = definition.metadata.name.clone().expect("a name");
        let file = folder.join(format!("{name}.yaml"));
        let committed = std::fs::read_to_string(&file).unwrap_or_default();
        let committed: Value = serde_norway::from_str(&committed).expect("YAML");
        let generated = serde_json::to_value(&definition).expect("JSON");
        assert!(
            committed == generated,
            "deploy/crds/{name}.yaml is stale: cargo xtask generate"
        );
    }
}
