//! Prometheus's alerts, their tests, and their sections in docs/ALERTS.md.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::promql;

pub const RULES: &str = "deploy/alerts/culvert-rules.yaml";
pub const RULE_TESTS: &str = "deploy/alerts/tests";
const SEVERITIES: [&str; 3] = ["critical", "warning", "info"];

#[derive(Deserialize)]
struct File {
    groups: Vec<Group>,
}

#[derive(Deserialize)]
struct Group {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    pub alert: String,
    pub expr: String,
    #[serde(default, rename = "for")]
    pub pending: Option<String>,
    pub labels: Labels,
    pub annotations: Annotations,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Labels {
    pub severity: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Annotations {
    pub summary: String,
    pub description: String,
    pub runbook_url: String,
}

/// # Errors
/// It is not as such a file is.
pub fn parse(yaml: &str) -> Result<Vec<Rule>> {
    let file: File = serde_norway::from_str(yaml).context("the rules")?;
    Ok(file.groups.into_iter().flat_map(|group| group.rules).collect())
}

/// # Errors
/// The file of the checkout cannot be read.
pub fn load() -> Result<Vec<Rule>> {
    parse(&super::read(&super::checkout(RULES))?)
}

#[derive(Deserialize)]
struct TestFile {
    tests: Vec<Test>,
}

#[derive(Deserialize)]
struct Test {
    alert_rule_test: Vec<Expectation>,
}

#[derive(Deserialize)]
struct Expectation {
    alertname: String,
    exp_alerts: Vec<serde_norway::Value>,
}

/// What the tests of promtool expect: of which alert, and whether it fires.
///
/// # Errors
/// It is not as such a file is.
pub fn expectations(yaml: &str) -> Result<BTreeSet<(String, bool)>> {
    let file: TestFile = serde_norway::from_str(yaml).context("the rules' tests")?;
    let all = file.tests.into_iter().flat_map(|test| test.alert_rule_test);
    Ok(all
        .map(|expected| (expected.alertname, !expected.exp_alerts.is_empty()))
        .collect())
}

/// What is missing beside the rules: sections of the document, tests, metrics; and what is there without a rule.
#[must_use]
pub fn faults(rules: &[Rule], document: &str, tested: &BTreeSet<(String, bool)>, metrics: &BTreeSet<String>) -> Vec<String> {
    let mut faults = Vec::new();
    let sections: BTreeSet<&str> = document.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    let mut names = BTreeSet::new();
    for rule in rules {
        let name = rule.alert.as_str();
        let mut need = |holds: bool, what: &str| {
            if !holds {
                faults.push(format!("{name}: {what}"));
            }
        };
        need(names.insert(name), "is there twice");
        need(sections.contains(name), "docs/ALERTS.md has no section of it");
        let link = format!("docs/ALERTS.md#{}", name.to_lowercase());
        need(
            rule.annotations.runbook_url == link,
            "runbook_url does not lead to its section",
        );
        need(
            SEVERITIES.contains(&rule.labels.severity.as_str()),
            "severity is none of the known ones",
        );
        need(!rule.annotations.summary.is_empty(), "has no summary");
        need(!rule.annotations.description.is_empty(), "has no description");
        for (fires, what) in [(true, "no test lets it fire"), (false, "no test keeps it quiet")] {
            need(tested.contains(&(name.to_owned(), fires)), what);
        }
        for selector in promql::selectors(&rule.expr) {
            need(
                metrics.contains(&selector.metric),
                &format!("docs/METRICS.md has no {}", selector.metric),
            );
        }
    }
    let stray = sections.iter().filter(|section| !names.contains(*section));
    faults.extend(stray.map(|section| format!("docs/ALERTS.md: {section} is no alert")));
    faults
}
