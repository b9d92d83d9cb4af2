//! The shipped objects against [`super::lines`], and what docs/DEPLOY.md tells of the agent's rights against what it has.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::documents::{find, id, list, parse};
use super::lines::{EVERY_CONTAINER, EVERY_POD, Is, SHIPPED};
use crate::helm::Helm;
use crate::workspace::Workspace;

const DOCUMENT: &str = "docs/DEPLOY.md";
const RIGHTS: &str = "## What the agent may, and why";
const UNINSTALL: &str = "## Uninstall";
const MONITORS: [(&str, &str); 2] = [
    ("PodMonitor/mesh-agent", "DaemonSet/mesh-agent"),
    ("PodMonitor/mesh-control", "Deployment/mesh-control"),
];

pub fn test(workspace: &Workspace, helm: &Helm) -> Result<()> {
    let shipped = parse(&helm.render(&[])?)?;
    let document = std::fs::read_to_string(workspace.root.join(DOCUMENT))?;
    let mut faults = faults(&shipped)?;
    faults.extend(undocumented(&shipped, &document)?);
    faults.extend(monitors(&shipped, &parse(&helm.render(&["podMonitor.enabled=true"])?)?));
    // Helm would never upgrade them there, and would delete every policy with the release.
    let is_definition = |document: &Value| document["kind"] == "CustomResourceDefinition";
    if shipped.iter().any(is_definition) || workspace.root.join("deploy/chart/culvert/crds").exists() {
        faults.push("the chart has definitions, which belong to deploy/crds".to_owned());
    }
    if faults.is_empty() {
        Ok(())
    } else {
        bail!("deploy/chart:\n{}", faults.join("\n"))
    }
}

/// What differs from the lines, by object and place.
fn faults(documents: &[Value]) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for of in SHIPPED {
        let object = find(documents, of.object).with_context(|| format!("there is no {}", of.object))?;
        let part = object
            .pointer(of.under)
            .with_context(|| format!("{}: no {}", of.object, of.under))?;
        compare(part, &format!("{}: {}", of.object, of.under), of.lines, &mut faults)?;
    }
    for document in documents {
        let Some(pod) = document.pointer("/spec/template/spec") else {
            continue;
        };
        compare(pod, &id(document), EVERY_POD, &mut faults)?;
        for container in list(pod, "/initContainers").iter().chain(list(pod, "/containers")) {
            let place = format!("{}, {}", id(document), container["name"]);
            compare(container, &place, EVERY_CONTAINER, &mut faults)?;
        }
    }
    Ok(faults)
}

fn compare(part: &Value, place: &str, lines: &[(&str, Is)], faults: &mut Vec<String>) -> Result<()> {
    for (pointer, is) in lines {
        let found = part.pointer(pointer);
        let holds = match is {
            Is::Exactly(yaml) => found == Some(&serde_norway::from_str(yaml).with_context(|| (*yaml).to_owned())?),
            Is::There => found.is_some_and(|value| !value.is_null()),
            Is::Absent => found.is_none(),
        };
        if !holds {
            let found = found.map_or_else(|| "nothing".to_owned(), Value::to_string);
            faults.push(format!("{place}{pointer} is to be {is:?}, and is {found}"));
        }
    }
    Ok(())
}

/// Rights that no line of the document explains, and lines about rights that nobody has.
fn undocumented(documents: &[Value], document: &str) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let agent = find(documents, "DaemonSet/mesh-agent").context("the agent")?;
    let uninstall = find(documents, "DaemonSet/mesh-uninstall").context("the uninstallation")?;
    let rights = section(document, RIGHTS)?;
    let explained: BTreeSet<String> = rights
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split_once(" |"))
        .flat_map(|(cell, _)| capabilities_in(cell))
        .collect();
    let mut expect = |who: &str, has: &BTreeSet<String>, explained: &BTreeSet<String>| {
        if has != explained || has.is_empty() {
            faults.push(format!("{who} has {has:?}, and {DOCUMENT} explains {explained:?}"));
        }
    };
    let has = added(agent);
    expect("the agent", &has, &explained);
    // Of those that the agent has: other words in capitals are none.
    let named: BTreeSet<String> = capabilities_in(section(document, UNINSTALL)?)
        .intersection(&has)
        .cloned()
        .collect();
    expect("the uninstallation", &added(uninstall), &named);
    for volume in list(agent, "/spec/template/spec/volumes") {
        let path = volume.pointer("/hostPath/path").and_then(Value::as_str);
        if let Some(path) = path.filter(|path| !rights.contains(&format!("`{path}`"))) {
            faults.push(format!("the agent has {path} of the host, which {DOCUMENT} does not explain"));
        }
    }
    Ok(faults)
}

fn added(workload: &Value) -> BTreeSet<String> {
    let containers = list(workload, "/spec/template/spec/containers").iter();
    let added = containers.flat_map(|container| list(container, "/securityContext/capabilities/add"));
    added.filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

fn section<'d>(document: &'d str, heading: &str) -> Result<&'d str> {
    let found = document.split_once(&format!("\n{heading}\n"));
    let (_, rest) = found.with_context(|| format!("{DOCUMENT} has no {heading:?}"))?;
    Ok(rest.split("\n## ").next().unwrap_or(rest))
}

/// Words as `NET_ADMIN` or `KILL`.
fn capabilities_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|letter: char| !letter.is_ascii_uppercase() && letter != '_');
    words.filter(|word| word.len() > 3).map(str::to_owned).collect()
}

/// PodMonitors are there when they are asked for, and select the Pods that they are named after.
fn monitors(without: &[Value], with: &[Value]) -> Vec<String> {
    let mut faults = Vec::new();
    for (monitor, workload) in MONITORS {
        if find(without, monitor).is_some() {
            faults.push(format!("{monitor} is there although nobody has asked for it"));
        }
        let labels = |id: &str, pointer: &str| {
            let value = find(with, id).and_then(|object| object.pointer(pointer)).cloned();
            serde_json::from_value::<BTreeMap<String, String>>(value.unwrap_or_default()).unwrap_or_default()
        };
        let selected = labels(monitor, "/spec/selector/matchLabels");
        let of_pods = labels(workload, "/spec/template/metadata/labels");
        let selects = selected.iter().all(|(key, value)| of_pods.get(key) == Some(value));
        if selected.is_empty() || !selects {
            faults.push(format!("{monitor} selects {selected:?}, and the Pods have {of_pods:?}"));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_that_is_lost_changed_or_added_is_named() {
        let lines = [("/kept", Is::Exactly("{a: 1}")), ("/some", Is::There), ("/none", Is::Absent)];
        let named = |part: Value| {
            let mut faults = Vec::new();
            compare(&part, "it: ", &lines, &mut faults).expect("lines");
            faults.join("\n")
        };
        assert_eq!(named(json!({"kept": {"a": 1}, "some": 0})), "");
        let all = named(json!({"none": 1}));
        for line in ["it: /kept is to be", "it: /some is to be", "it: /none is to be"] {
            assert!(all.contains(line), "{all}");
        }
        let changed = named(json!({"kept": {"a": 1, "b": 1}, "some": 0}));
        assert!(changed.contains("it: /kept is to be"), "{changed}");
    }

    #[test]
    fn rights_and_their_explanations_are_the_same() {
        let workload = |name: &str, capabilities: &[&str]| {
            json!({"kind": "DaemonSet", "metadata": {"name": name}, "spec": {"template": {"spec": {
                "containers": [{"securityContext": {"capabilities": {"add": capabilities}}}],
                "volumes": [{"hostPath": {"path": "/run/culvert"}}],
            }}}})
        };
        let faults = |agent: &[&str], uninstall: &[&str], document: &str| {
            let all = [workload("mesh-agent", agent), workload("mesh-uninstall", uninstall)];
            undocumented(&all, document).expect("sections").join("\n")
        };
        let document = format!(
            "#\n\n{RIGHTS}\n\n| capability | for |\n| KILL | it |\n| SETUID, SETGID | them |\n| `/run/culvert` | it |\n\n{UNINSTALL}\n\nKILL\n"
        );
        let agent = ["KILL", "SETGID", "SETUID"];
        assert_eq!(faults(&agent, &["KILL"], &document), "");
        let faulty = [
            faults(&["KILL", "SETGID"], &["KILL"], &document),
            faults(&[&agent[..], &["SYS_TIME"]].concat(), &["KILL"], &document),
            faults(&agent, &["SETUID"], &document),
            faults(&agent, &["KILL"], &document.replace("`/run/culvert`", "a folder")),
        ];
        for (fault, says) in faulty
            .iter()
            .zip(["SETUID", "SYS_TIME", "the uninstallation", "/run/culvert"])
        {
            assert!(fault.contains(says), "{says}: {fault:?}");
        }
    }
}
