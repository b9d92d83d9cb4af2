//! The optional dashboards and alerts: off unless asked for, and then whole, also in a chart that was packed.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::documents;
use crate::helm::Helm;
use crate::workspace::Workspace;

const ON: [&str; 2] = ["dashboards.enabled=true", "prometheusRule.enabled=true"];
const DASHBOARDS: &str = "deploy/dashboards";
const RULES: &str = "deploy/alerts/culvert-rules.yaml";

pub fn test(workspace: &Workspace, helm: &Helm) -> Result<()> {
    let without = documents::parse(&helm.render(&[])?)?;
    if !dashboards(&without)?.is_empty() || rules(&without).is_some() {
        bail!("dashboards or rules are rendered although nobody has asked for them");
    }
    let packed = helm.packed(&workspace.target.join("chart"))?;
    for (helm, of) in [(helm, "the chart"), (&packed, "the packed chart")] {
        let with = documents::parse(&helm.render(&ON)?)?;
        let shipped = files(workspace)?;
        if dashboards(&with)? != shipped || shipped.is_empty() {
            bail!("{of}: the ConfigMaps are not what {DASHBOARDS} has");
        }
        let shipped: Value = serde_norway::from_str(&fs::read_to_string(workspace.root.join(RULES))?).context(RULES)?;
        if rules(&with) != Some(&shipped) {
            bail!("{of}: the PrometheusRule is not what {RULES} has");
        }
    }
    Ok(())
}

fn files(workspace: &Workspace) -> Result<BTreeMap<String, String>> {
    let entries = fs::read_dir(workspace.root.join(DASHBOARDS))?.map(|entry| {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        Ok((name, fs::read_to_string(entry.path())?))
    });
    entries.collect()
}

/// What a sidecar finds by its usual label.
fn dashboards(documents: &[Value]) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for document in documents {
        if document["kind"] == "ConfigMap" && document["metadata"]["labels"]["grafana_dashboard"] == "1" {
            let data: BTreeMap<String, String> = serde_json::from_value(document["data"].clone()).context("data")?;
            found.extend(data);
        }
    }
    Ok(found)
}

fn rules(documents: &[Value]) -> Option<&Value> {
    documents::find(documents, "PrometheusRule/culvert").map(|rule| &rule["spec"])
}
