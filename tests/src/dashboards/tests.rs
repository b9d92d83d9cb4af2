use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::grafana::{self, Dashboard};
use super::{checkout, documented_metrics, files, read, rules};

fn shipped() -> Vec<Dashboard> {
    grafana::load(&checkout("deploy/dashboards")).unwrap()
}

fn tested() -> BTreeSet<(String, bool)> {
    let paths = files(&checkout(rules::RULE_TESTS), "yaml").unwrap();
    let expected = paths.iter().map(|path| rules::expectations(&read(path).unwrap()).unwrap());
    expected.flatten().collect()
}

fn document() -> String {
    read(&checkout("docs/ALERTS.md")).unwrap()
}

#[test]
fn the_shipped_dashboards_are_tidy_and_ask_for_documented_metrics() {
    let (dashboards, metrics) = (shipped(), documented_metrics().unwrap());
    assert_eq!(dashboards.len(), 5);
    let faults: Vec<String> = dashboards.iter().flat_map(|dashboard| dashboard.faults(&metrics)).collect();
    assert!(faults.is_empty(), "{faults:#?}");
    let uids: BTreeSet<String> = dashboards.iter().map(|dashboard| dashboard.json["uid"].to_string()).collect();
    assert_eq!(uids.len(), dashboards.len(), "{uids:?}");
}

#[test]
fn the_shipped_alerts_have_their_sections_tests_and_documented_metrics() {
    let rules = rules::load().unwrap();
    assert!(rules.len() > 30, "{}", rules.len());
    let faults = rules::faults(&rules, &document(), &tested(), &documented_metrics().unwrap());
    assert!(faults.is_empty(), "{faults:#?}");
}

/// Each documented metric is of use to somebody who watches: what no dashboard and no alert asks for is forgotten.
#[test]
fn every_documented_metric_is_on_a_dashboard() {
    let mut asked = BTreeSet::new();
    for query in shipped().iter().flat_map(Dashboard::queries) {
        asked.extend(
            super::promql::selectors(&query.expression)
                .into_iter()
                .map(|selector| selector.metric),
        );
    }
    let documented = documented_metrics().unwrap();
    let forgotten: Vec<&String> = documented
        .iter()
        // Quantiles need the buckets alone.
        .filter(|name| !name.ends_with("_sum") && !name.ends_with("_count"))
        .filter(|name| !asked.contains(*name))
        .collect();
    assert!(forgotten.is_empty(), "{forgotten:?}");
}

#[test]
fn what_is_untidy_in_a_dashboard_is_found() {
    let metrics = documented_metrics().unwrap();
    let first = shipped().remove(0);
    let query = "/panels/1/targets/0/expr";
    for (pointer, value, wanted) in [
        ("/uid", json!("mine"), "uid"),
        ("/title", json!(""), "/title"),
        ("/schemaVersion", json!(16), "schemaVersion"),
        ("/refresh", json!(null), "a null"),
        ("/panels/1/id", json!(7), "ids are not"),
        ("/panels/1/gridPos/x", json!(23), "beside the grid"),
        ("/panels/2/gridPos/x", json!(0), "over another"),
        ("/panels/1/title", json!(""), "no title"),
        ("/panels/1/description", json!(""), "no description"),
        ("/panels/1/fieldConfig/defaults/unit", json!(""), "no unit"),
        ("/panels/1/datasource/uid", json!("PBFA97CFB590B2093"), "data source"),
        ("/panels/1/targets", json!([]), "no queries"),
        (
            query,
            json!("sum(mesh_misspelt_total{node=~\"$node\"})"),
            "no mesh_misspelt_total",
        ),
        (query, json!("sum(up{node=~\"$nodes\"})"), "declared are"),
        ("/templating/list/1/type", json!("textbox"), "unknown type"),
    ] {
        let mut changed = first.clone();
        *changed.json.pointer_mut(pointer).unwrap() = value;
        let faults = changed.faults(&metrics);
        assert!(faults.iter().any(|fault| fault.contains(wanted)), "{pointer}: {faults:?}");
    }
    let mut exported = first;
    exported.json["version"] = json!(3);
    assert!(exported.faults(&metrics)[0].contains("every export"));
}

#[test]
fn what_an_alert_lacks_is_found() {
    let (shipped, document, tested) = (rules::load().unwrap(), document(), tested());
    let metrics = documented_metrics().unwrap();
    let alert = shipped[0].alert.clone();
    let with = |change: &dyn Fn(&mut rules::Rule)| {
        let mut changed = shipped.clone();
        change(&mut changed[0]);
        rules::faults(&changed, &document, &tested, &metrics).join("; ")
    };
    assert!(with(&|rule| rule.expr = "mesh_pod_protekted == 0".to_owned()).contains("no mesh_pod_protekted"));
    assert!(with(&|rule| rule.labels.severity = "page".to_owned()).contains("severity"));
    assert!(with(&|rule| rule.annotations.summary.clear()).contains("no summary"));
    assert!(with(&|rule| rule.annotations.runbook_url.push('x')).contains("runbook_url"));
    let renamed = with(&|rule| rule.alert = "MeshNew".to_owned());
    for wanted in [
        "no section",
        "lets it fire",
        "keeps it quiet",
        &format!("{alert} is no alert"),
    ] {
        assert!(renamed.contains(wanted), "{renamed}");
    }
    assert!(with(&|rule| rule.alert.clone_from(&shipped[1].alert)).contains("twice"));
}

#[test]
fn variables_are_put_in() {
    let values = BTreeMap::from([
        ("node".to_owned(), "node-1".to_owned()),
        ("__rate_interval".to_owned(), "30s".to_owned()),
    ]);
    let put_in = |expression| grafana::substitute(expression, &values);
    assert_eq!(
        put_in("rate(a{n=~\"$node/.*\"}[$__rate_interval])").unwrap(),
        "rate(a{n=~\"node-1/.*\"}[30s])"
    );
    assert!(put_in("a{n=\"$nodes\"}").unwrap_err().to_string().contains("$nodes"));
}
