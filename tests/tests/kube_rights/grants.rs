//! Rights as manifests grant them and as an audit log shows them used. Pure.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context as _, Result, ensure};
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
            .with_context(|| format!("no {role}: what a role of others grants cannot be read here"))?;
        let scope = (!is_cluster_wide).then(|| binding["metadata"]["namespace"].as_str().unwrap_or_default().to_owned());
        for rule in role["rules"].as_array().context("rules")? {
            ensure!(
                rule.get("nonResourceURLs").is_none(),
                "{rule}: no resource, which nobody looks at here"
            );
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

/// Whom the bindings among these documents give something.
pub fn granted_to(documents: &[Value]) -> BTreeSet<String> {
    let bindings = documents
        .iter()
        .filter(|document| document["kind"] == "ClusterRoleBinding" || document["kind"] == "RoleBinding");
    let subjects = bindings.flat_map(|binding| texts_of(&binding["subjects"], |subject| Some(subject.clone())));
    let text = |subject: &Value, key: &str| subject[key].as_str().unwrap_or_default().to_owned();
    subjects
        .map(|subject| ["kind", "namespace", "name"].map(|key| text(&subject, key)).join(" "))
        .collect()
}

fn texts_of<T>(list: &Value, of: impl Fn(&Value) -> Option<T>) -> Vec<T> {
    list.as_array().into_iter().flatten().filter_map(of).collect()
}

/// Those that no request needed which was let through: also to look for what is not there, a right is needed. What is granted in the
/// whole cluster, and used in the mesh's own namespace alone, could be granted there alone.
pub fn unused<'a>(rights: &'a [Right], audit: &[Value], own_namespace: &str) -> Vec<&'a Right> {
    let used = decided(audit, "allow");
    let is_used = |right: &&Right| {
        used.iter().any(|used| {
            let needs_its_scope = match &right.namespace {
                Some(namespace) => used.namespace.as_ref() == Some(namespace),
                None => used.namespace.as_deref() != Some(own_namespace),
            };
            (&used.verb, &used.group, &used.resource) == (&right.verb, &right.group, &right.resource)
                && needs_its_scope
                && (right.name.is_none() || used.name == right.name)
        })
    };
    rights.iter().filter(|right| !is_used(right)).collect()
}

/// What was asked for without a right to it.
pub fn denied(audit: &[Value]) -> Vec<String> {
    decided(audit, "forbid").iter().map(ToString::to_string).collect()
}

/// By the authorizers; what admission refuses, they had let through.
fn decided(audit: &[Value], decision: &str) -> BTreeSet<Right> {
    let events = audit
        .iter()
        .filter(|event| event["annotations"]["authorization.k8s.io/decision"] == decision);
    events.filter_map(asked).collect()
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
