//! Rights as manifests grant them and as an audit log shows them used. Pure.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context as _, Result};
use serde_json::Value;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    pub verb: String,
    pub group: String,
    /// With its subresource: `pods/status`.
    pub resource: String,
    /// `None`: in every namespace, and of cluster-wide kinds.
    pub namespace: Option<String>,
    /// `None`: of any name.
    pub name: Option<String>,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = if self.group.is_empty() { "core" } else { &self.group };
        write!(f, "{} {} ({group})", self.verb, self.resource)?;
        if let Some(name) = &self.name {
            write!(f, " of the name {name}")?;
        }
        match &self.namespace {
            Some(namespace) => write!(f, " in namespace {namespace}"),
            None => f.write_str(" in the whole cluster"),
        }
    }
}

/// What the bindings among these documents give a service account.
pub fn granted(documents: &[Value], namespace: &str, account: &str) -> Result<Vec<Right>> {
    let mut rights = Vec::new();
    for binding in documents {
        let is_cluster_wide = binding["kind"] == "ClusterRoleBinding";
        if !is_cluster_wide && binding["kind"] != "RoleBinding" {
            continue;
        }
        let subjects = texts_of(&binding["subjects"], |subject| Some(subject.clone()));
        let is_its = |subject: &Value| {
            subject["kind"] == "ServiceAccount" && subject["name"] == account && subject["namespace"] == namespace
        };
        if !subjects.iter().any(is_its) {
            continue;
        }
        let role = &binding["roleRef"];
        let role = documents
            .iter()
            .find(|document| document["kind"] == role["kind"] && document["metadata"]["name"] == role["name"])
            .with_context(|| format!("no {role}"))?;
        let scope = (!is_cluster_wide).then(|| binding["metadata"]["namespace"].as_str().unwrap_or_default().to_owned());
        for rule in role["rules"].as_array().context("rules")? {
            let list = |key: &str| texts_of(&rule[key], |text| text.as_str().map(str::to_owned));
            let names = list("resourceNames").into_iter().map(Some).collect::<Vec<_>>();
            let names = if names.is_empty() { vec![None] } else { names };
            for group in list("apiGroups") {
                for resource in list("resources") {
                    for verb in list("verbs") {
                        rights.extend(names.iter().map(|name| Right {
                            verb: verb.clone(),
                            group: group.clone(),
                            resource: resource.clone(),
                            namespace: scope.clone(),
                            name: name.clone(),
                        }));
                    }
                }
            }
        }
    }
    rights.sort();
    rights.dedup();
    Ok(rights)
}

fn texts_of<T>(list: &Value, of: impl Fn(&Value) -> Option<T>) -> Vec<T> {
    list.as_array().into_iter().flatten().filter_map(of).collect()
}

/// Those that no answered request needed.
pub fn unused<'a>(rights: &'a [Right], audit: &[Value]) -> Vec<&'a Right> {
    let used: Vec<Right> = audit.iter().filter(|event| code(event) < 400).filter_map(asked).collect();
    let is_used = |right: &&Right| {
        used.iter().any(|used| {
            (&used.verb, &used.group, &used.resource) == (&right.verb, &right.group, &right.resource)
                && (right.namespace.is_none() || used.namespace == right.namespace)
                && (right.name.is_none() || used.name == right.name)
        })
    };
    rights.iter().filter(|right| !is_used(right)).collect()
}

/// What was asked for without a right to it.
pub fn denied(audit: &[Value]) -> Vec<String> {
    let refused = audit
        .iter()
        .filter(|event| code(event) == 403 && event["annotations"]["authorization.k8s.io/decision"] == "forbid");
    let refused: BTreeSet<String> = refused.filter_map(asked).map(|right| right.to_string()).collect();
    refused.into_iter().collect()
}

fn code(event: &Value) -> u64 {
    event["responseStatus"]["code"].as_u64().unwrap_or(500)
}

/// `None`: of no resource, as `/version`.
fn asked(event: &Value) -> Option<Right> {
    let object = event.get("objectRef")?;
    let text = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
    let some = |text: String| Some(text).filter(|text| !text.is_empty());
    let subresource = text("subresource");
    let resource = text("resource");
    Some(Right {
        verb: event["verb"].as_str()?.to_owned(),
        group: text("apiGroup"),
        resource: if subresource.is_empty() {
            resource
        } else {
            format!("{resource}/{subresource}")
        },
        namespace: some(text("namespace")),
        name: some(text("name")),
    })
}
