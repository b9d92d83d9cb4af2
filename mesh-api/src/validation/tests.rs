use serde_json::Value;

use super::*;
use crate::{AuthorizationPolicy, Source, custom_resource_definitions};

fn spec(yaml: &str) -> AuthorizationPolicySpec {
    let value: Value = serde_norway::from_str(yaml).expect("YAML");
    serde_json::from_value(value).expect("spec")
}

fn errors(yaml: &str) -> Vec<String> {
    spec(yaml)
        .validate()
        .expect_err("has to be refused")
        .0
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn a_full_policy_is_read() {
    let yaml = r#"
apiVersion: culvert.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: shop, namespace: store}
spec:
  selector: {matchLabels: {app.kubernetes.io/name: shop}}
  action: Allow
  mode: DryRun
  rules:
  - from:
    - principals: [cluster.local/ns/web/sa/front, "cluster.local/ns/ops/*", "*/sa/admin", "*"]
      notNamespaces: [dev-*]
    - ipBlocks: [10.0.0.0/8, "2001:db8::1"]
    to:
    - ports: [80, 443]
  - {}
"#;
    let value: Value = serde_norway::from_str(yaml).expect("YAML");
    let policy: AuthorizationPolicy = serde_json::from_value(value).expect("policy");
    let valid = policy.spec.validate().expect("valid");
    assert_eq!(valid.mode, Mode::DryRun);
    assert_eq!(
        valid.rules[0].from[0].principals,
        [
            StringMatch::Exact("cluster.local/ns/web/sa/front".into()),
            StringMatch::Prefix("cluster.local/ns/ops/".into()),
            StringMatch::Suffix("/sa/admin".into()),
            StringMatch::Present,
        ]
    );
    assert_eq!(valid.rules[0].from[0].not_namespaces, [StringMatch::Prefix("dev-".into())]);
    assert_eq!(valid.rules[0].from[1].ip_blocks[1].to_string(), "2001:db8::1/128");
    assert_eq!(valid.rules[0].to[0].ports, [80, 443]);
    assert_eq!(
        valid.rules[1],
        ValidRule {
            from: vec![],
            to: vec![]
        }
    );
}

#[test]
fn each_error_names_its_field_and_the_fix() {
    let cases = [
        (
            "to: [{ports: [80, 0]}]",
            "spec.rules[0].to[0].ports[1]: 0 is no port; give 1-65535",
        ),
        (
            "to: [{notPorts: [65536]}]",
            "spec.rules[0].to[0].notPorts[0]: 65536 is no port; give 1-65535",
        ),
        (
            "to: [{}]",
            "spec.rules[0].to[0]: is empty; name ports, or leave `to` out to mean any",
        ),
        (
            "to: []",
            "spec.rules[0].to: is empty; name a destination, or leave the field out to mean any",
        ),
        (
            "from: [{}]",
            "spec.rules[0].from[0]: is empty; name a source, or leave `from` out to mean any",
        ),
        (
            "from: [{principals: []}]",
            "spec.rules[0].from[0].principals: is empty; give a value, or leave the field out",
        ),
        (
            "from: [{principals: ['spiffe://cluster.local/ns/a/sa/b']}]",
            "spec.rules[0].from[0].principals[0]: \"spiffe://cluster.local/ns/a/sa/b\" has a scheme; write \"cluster.local/ns/a/sa/b\"",
        ),
        (
            "from: [{namespaces: ['a*b']}]",
            "spec.rules[0].from[0].namespaces[0]: \"a*b\": one `*` is allowed, as the first or the last character",
        ),
        (
            "from: [{ipBlocks: [10.1.2.3/8]}]",
            "spec.rules[0].from[0].ipBlocks[0]: \"10.1.2.3/8\" has bits beyond its prefix; write 10.0.0.0/8",
        ),
        (
            "from: [{ipBlocks: ['::ffff:10.0.0.0/104']}]",
            "spec.rules[0].from[0].ipBlocks[0]: \"::ffff:10.0.0.0/104\" is IPv4 written as IPv6, which no connection matches; write 10.0.0.0/8",
        ),
        (
            "from: [{notIpBlocks: ['::ffff:10.1.2.3']}]",
            "spec.rules[0].from[0].notIpBlocks[0]: \"::ffff:10.1.2.3\" is IPv4 written as IPv6, which no connection matches; write 10.1.2.3/32",
        ),
    ];
    for (rule, expected) in cases {
        assert_eq!(errors(&format!("{{action: Allow, rules: [{{{rule}}}]}}")), [expected]);
    }
    for bad in [
        "''",
        "' '",
        "a/b",
        "cluster.local/ns/a/sa/",
        "cluster.local/ns//sa/b",
        "cluster.local/ns/A/sa/b",
        "'**'",
    ] {
        let found = errors(&format!("{{action: Allow, rules: [{{from: [{{principals: [{bad}]}}]}}]}}"));
        assert!(
            found[0].starts_with("spec.rules[0].from[0].principals[0]: "),
            "{bad}: {found:?}"
        );
    }
    for bad in [
        "10.0.0.0/33",
        "10.0.0",
        "''",
        "host",
        "010.0.0.0/8",
        "10.0.0.0/08",
        "10.0.0.0/+8",
        "'fe80::1%eth0'",
    ] {
        let found = errors(&format!("{{action: Allow, rules: [{{from: [{{ipBlocks: [{bad}]}}]}}]}}"));
        assert!(found[0].contains("is no address range; give one like"), "{bad}: {found:?}");
    }
}

#[test]
fn rules_may_be_left_out_only_where_that_means_something() {
    assert!(spec("{action: Allow}").validate().is_ok(), "allows nothing");
    assert!(errors("{action: Deny, rules: []}")[0].starts_with("spec.rules: a Deny policy without rules denies nothing"));
    assert!(errors("{action: Allow, selector: {matchLabels: {}}}")[0].starts_with("spec.selector.matchLabels: is empty"));
    assert!(errors("{action: Allow, selector: {matchLabels: {a: 'b c'}}}")[0].contains("is no label value"));
}

#[test]
fn all_errors_are_told_within_a_bound() {
    let ports = vec!["0"; limits::MAX_ERRORS + 5].join(",");
    assert_eq!(
        errors(&format!("{{action: Allow, rules: [{{to: [{{ports: [{ports}]}}]}}]}}")).len(),
        limits::MAX_ERRORS
    );
    let many = vec!["80"; limits::MAX_VALUES + 1].join(",");
    assert!(errors(&format!("{{action: Allow, rules: [{{to: [{{ports: [{many}]}}]}}]}}"))[0].contains("at most 128"));
}

#[test]
fn unknown_fields_and_words_are_refused() {
    for bad in [
        "{action: Allow, rule: []}",
        "{action: Permit}",
        "{action: Allow, mode: dry}",
        "{action: Allow, rules: [{from: [{principal: [a]}]}]}",
        "{action: Allow, rules: [{to: [{hosts: [a]}]}]}",
        "{action: Allow, selector: {matchExpressions: []}}",
    ] {
        let value: Value = serde_norway::from_str(bad).expect("YAML");
        assert!(serde_json::from_value::<AuthorizationPolicySpec>(value).is_err(), "{bad}");
    }
    assert_eq!(Source::default(), serde_json::from_str("{}").expect("source"));
}

#[test]
fn the_definition_names_group_and_version() {
    let crds = custom_resource_definitions();
    assert_eq!(crds[0].metadata.name.as_deref(), Some("authorizationpolicies.culvert.dev"));
    assert_eq!(crds[0].spec.versions[0].name, "v1alpha1");
    assert_eq!(crds[0].spec.scope, "Namespaced");
    assert_eq!(crds[1].metadata.name.as_deref(), Some("meshconfigs.culvert.dev"));
    assert_eq!(crds[1].spec.scope, "Namespaced");
}
