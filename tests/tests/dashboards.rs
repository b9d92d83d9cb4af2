//! The shipped dashboards and alerts against a live mesh, by a real Prometheus: every query of every panel has an answer, and every
//! rule is evaluated on metrics that are there.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::app::{CLOSED_PORT, ECHO_PORT};
use mesh_tests::dashboards::grafana::{self, Choices, Dashboard, Query};
use mesh_tests::dashboards::prometheus::{self, Prometheus, promtool};
use mesh_tests::dashboards::rules::{self, RULE_TESTS, RULES};
use mesh_tests::dashboards::{checkout, files, promql, read};
use mesh_tests::demo::PODS;
use mesh_tests::manifests::{MESHED, SERVICE_PORT, mesh_config, policy, principal, service};
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::tail;
use mesh_tests::suite;
use mesh_tests::topology::NodeName;
use serde_json::Value;
use tempfile::TempDir;

/// Some seconds of scrapes, one a second, and what happens between two looks of the agent at a tunnel's socket.
const RATE_INTERVAL: &str = "30s";
const RANGE: &str = "5m";
/// An answer needs two scrapes after the traffic that it tells of.
const ANSWERED: Duration = Duration::from_secs(60);
const POOL: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 96, 0, 10), Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0x10));

/// A value for each variable.
type Values = BTreeMap<String, String>;

struct Shared {
    // Ends before the namespaces that it runs in.
    prometheus: Option<Prometheus>,
    mesh: Mesh,
}

fn main() -> ExitCode {
    suite::run(
        "dashboards",
        set_up,
        |shared: &Shared, error| match &shared.prometheus {
            Some(prometheus) => {
                let log = tail(prometheus.log(), 25);
                shared
                    .mesh
                    .with_logs(error.context(format!("--- the end of Prometheus's log:\n{log}")))
            }
            None => error,
        },
        &[
            ("every_program_is_scraped_with_its_labels", scraped),
            ("the_rules_pass_promtools_own_tests", rule_tests),
            ("every_query_of_every_panel_has_an_answer", panels),
            ("every_rule_is_evaluated_on_metrics_that_are_there", evaluated),
            ("what_is_misspelt_is_noticed", misspelt),
            (
                "an_alert_waits_while_the_control_plane_is_away_and_goes_when_it_is_back",
                waiting,
            ),
        ],
    )
}

/// What happens once: a Service, a policy that refuses, one that is only tried, and what STRICT refuses.
fn set_up() -> Result<Shared> {
    let mut mesh = Mesh::start(&PODS, &mut |_| {})?;
    let explained = |mesh: &Mesh, error| mesh.with_logs(error);
    match prepare(&mut mesh) {
        Ok(prometheus) => Ok(Shared { prometheus, mesh }),
        Err(error) => Err(explained(&mesh, error)),
    }
}

fn prepare(mesh: &mut Mesh) -> Result<Option<Prometheus>> {
    if prometheus::program("prometheus").is_err() || prometheus::program("promtool").is_err() {
        return Ok(None);
    }
    // Prometheus goes to the second node by IPv6, which agents serve only when told to.
    mesh.kill_agent(NodeName::Two);
    mesh.launch_agent_with(NodeName::Two, &["--metrics", "[::]:15020"])?;
    mesh.wait_until_ready(NodeName::Two)?;
    let server: IpAddr = mesh.pod("server").v4.into();
    mesh.add_service(NodeName::One, "pool", &service("pool", POOL.0, POOL.1, "app: server"))?;
    let from = |who: &str| format!("[{{ from: [{{ principals: [{}] }}] }}]", principal(who));
    mesh.registry
        .write("no-local.yaml", &policy("no-local", "server", "Deny", &from("local")))?;
    let trial = policy("trial", "server", "Deny", &from("client")) + "  mode: DryRun\n";
    mesh.registry.write("trial.yaml", &trial)?;
    mesh.wait_for_outcome("local", server, ECHO_PORT, false)?;
    mesh.registry.write("strict.yaml", &mesh_config(MESHED, "{ mtls: Strict }"))?;
    mesh.wait_for_outcome("outsider", server, ECHO_PORT, false)?;
    mesh.registry.remove("strict.yaml")?;
    mesh.wait_for_outcome("outsider", server, ECHO_PORT, true)?;
    drive(mesh)?;
    Prometheus::start(mesh, &checkout(RULES)).map(Some)
}

/// A round of what goes on in a mesh: through tunnels both ways and on one node, by a service, in and out in clear, refused, and not
/// reached.
fn drive(mesh: &Mesh) -> Result<()> {
    let connects = |from: &str, to: IpAddr, port| mesh.app.connect(&mesh.pod(from).place(), to, port);
    let address = |pod: &str| IpAddr::from(mesh.pod(pod).v4);
    for (from, to) in [
        ("client", "server"),
        ("server", "client"),
        ("client", "local"),
        ("client", "outsider"),
        ("outsider", "server"),
        ("outsider", "local"),
    ] {
        connects(from, address(to), ECHO_PORT)?
            .expect_ok()
            .context(format!("{from} → {to}"))?;
    }
    connects("client", POOL.0.into(), SERVICE_PORT)?
        .expect_ok()
        .context("the service")?;
    ensure!(
        !connects("client", address("server"), CLOSED_PORT)?.ok(),
        "the closed port is open"
    );
    ensure!(
        !connects("server", address("local"), CLOSED_PORT)?.ok(),
        "the closed port is open"
    );
    ensure!(
        !connects("local", address("server"), ECHO_PORT)?.ok(),
        "the policy does not refuse"
    );
    Ok(())
}

impl Shared {
    fn prometheus(&self) -> Result<&Prometheus> {
        self.prometheus
            .as_ref()
            .ok_or_else(|| suite::skip("missing prometheus and promtool (Debian's package prometheus)"))
    }

    /// Why a query, with these values of its variables, is not answered as its panel needs it; `None`: it is.
    fn unanswered(&self, query: &Query, values: &Values) -> Result<Option<String>> {
        let expression = grafana::substitute(&query.expression, values)?;
        let place = &query.place;
        let series = match self.prometheus()?.query(self.mesh.topology.world(), &expression) {
            Ok(series) => series,
            Err(error) => return Ok(Some(format!("{place}: {error:#}: {expression}"))),
        };
        if !series.iter().any(|series| !series.value.is_nan()) {
            return Ok(Some(format!("{place}: no data: {expression}")));
        }
        let has = |label: &String| {
            series
                .iter()
                .any(|series| series.labels.get(label).is_some_and(|value| !value.is_empty()))
        };
        let missing: Vec<&String> = query.shown.iter().filter(|label| !has(label)).collect();
        Ok((!missing.is_empty()).then(|| format!("{place}: shows {missing:?}, which no series has: {expression}")))
    }

    /// For some choice at least, the panel has data; and no choice breaks it.
    fn unanswered_by_all(&self, query: &Query, choices: &[Values]) -> Result<Option<String>> {
        let mut last = None;
        for values in choices {
            last = self.unanswered(query, values)?;
            if last.is_none() {
                return Ok(None);
            }
        }
        Ok(last)
    }

    /// Asks again, with traffic going on, until there is an answer.
    fn expect_answer(&self, query: &Query, choices: &[Values]) -> Result<()> {
        let mut last = None;
        let answered = poll::until_true("the query has an answer", ANSWERED, || {
            last = self.unanswered_by_all(query, choices)?;
            if last.is_some() {
                drive(&self.mesh)?;
            }
            Ok(last.is_none())
        });
        answered.map_err(|error| error.context(last.unwrap_or_default()))
    }

    /// What a dashboard's variables are at first, and every combination of what they can be.
    fn choices(&self, dashboard: &Dashboard) -> Result<(Values, Vec<Values>)> {
        let fixed = [("__rate_interval", RATE_INTERVAL), ("__range", RANGE)];
        let mut first: Values = fixed.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let mut all = vec![first.clone()];
        for (name, choices) in dashboard.variables()? {
            let (default, options) = match choices {
                Choices::Listed(options) => (options.first().cloned(), options),
                Choices::Label { metric, label, all } => {
                    let what = format!("{}: variable {name} has something to choose", dashboard.file);
                    let options = poll::until(&what, SOON, || {
                        let options = self.prometheus()?.label_values(self.mesh.topology.world(), &metric, &label)?;
                        Ok(Some(options).filter(|options| !options.is_empty()))
                    })?;
                    (Some(all), options)
                }
            };
            first.insert(name.clone(), default.context("a default")?);
            let with = |values: &Values, option: &String| {
                let mut values = values.clone();
                values.insert(name.clone(), option.clone());
                values
            };
            all = all
                .iter()
                .flat_map(|values| options.iter().map(move |option| with(values, option)))
                .collect();
        }
        Ok((first, all))
    }
}

fn scraped(shared: &mut Shared) -> Result<()> {
    let (prometheus, world) = (shared.prometheus()?, shared.mesh.topology.world());
    let mut last = Vec::new();
    let all = poll::until_true("both agents and mesh-control are scraped", SOON, || {
        let up = prometheus.query(world, "up == 1")?;
        last = up
            .iter()
            .map(|series| ["job", "node"].map(|label| series.labels.get(label).cloned().unwrap_or_default()))
            .collect();
        last.sort();
        Ok(last == [["mesh-agent", "node-1"], ["mesh-agent", "node-2"], ["mesh-control", ""]])
    });
    all.with_context(|| format!("up are {last:?}"))?;
    // The Pod's own labels, and not the scraped program's.
    let pods = poll::until("the Pods are known", SOON, || {
        let pods = prometheus.query(world, "mesh_pod_protected == 1")?;
        Ok(Some(pods).filter(|pods| pods.len() == 3))
    })?;
    let mut names: Vec<String> = pods
        .iter()
        .map(|pod| format!("{} {} {}", pod.labels["node"], pod.labels["namespace"], pod.labels["pod"]))
        .collect();
    names.sort();
    ensure!(
        names == ["node-1 shop client", "node-1 shop local", "node-2 shop server"],
        "{names:?}"
    );
    Ok(())
}

fn rule_tests(shared: &mut Shared) -> Result<()> {
    shared.prometheus()?;
    let tests = files(&checkout(RULE_TESTS), "yaml")?;
    for (arguments, files) in [
        (["check", "rules"], vec![checkout(RULES)]),
        (["test", "rules"], tests.clone()),
    ] {
        let (good, said) = promtool(&arguments, &files)?;
        ensure!(good, "promtool {arguments:?}:\n{said}");
    }
    // The tests know the difference: with a metric of each expression misspelt, each alert's test fails.
    let folder = TempDir::new()?;
    let mut broken = read(&checkout(RULES))?;
    let rules = rules::load()?;
    for rule in &rules {
        let metric = promql::selectors(&rule.expr).remove(0).metric;
        let (before, after) = broken.split_once(&format!("alert: {}\n", rule.alert)).context("the alert")?;
        broken = format!(
            "{before}alert: {}\n{}",
            rule.alert,
            after.replacen(&metric, &format!("{metric}x"), 1)
        );
    }
    std::fs::write(folder.path().join("culvert-rules.yaml"), broken)?;
    let copies = folder.path().join("tests");
    std::fs::create_dir(&copies)?;
    let mut copied = Vec::new();
    for test in tests {
        copied.push(copies.join(test.file_name().context("a name")?));
        std::fs::copy(&test, copies.join(test.file_name().context("a name")?))?;
    }
    let (good, said) = promtool(&["test", "rules"], &copied)?;
    ensure!(!good, "all metrics are misspelt, and the tests pass:\n{said}");
    for rule in &rules {
        let failed = format!("alertname: {},", rule.alert);
        ensure!(
            said.contains(&failed),
            "the test of {} passes with its metric misspelt",
            rule.alert
        );
    }
    Ok(())
}

fn panels(shared: &mut Shared) -> Result<()> {
    shared.prometheus()?;
    let mut queries = 0;
    for dashboard in grafana::load(&checkout("deploy/dashboards"))? {
        let (first, all) = shared.choices(&dashboard)?;
        for query in dashboard.queries() {
            shared.expect_answer(&query, std::slice::from_ref(&first))?;
            shared.expect_answer(&query, &all)?;
            queries += 1;
        }
    }
    suite::say(&format!("{queries} queries of panels answered"));
    Ok(())
}

fn evaluated(shared: &mut Shared) -> Result<()> {
    let prometheus = shared.prometheus()?;
    let world = shared.mesh.topology.world();
    let rules = rules::load()?;
    for rule in &rules {
        for selector in promql::selectors(&rule.expr) {
            let query = Query {
                place: rule.alert.clone(),
                expression: selector.text,
                shown: [].into(),
            };
            shared.expect_answer(&query, &[Values::new()])?;
        }
    }
    poll::until_true("every rule was evaluated", SOON, || {
        let known = prometheus.ask(world, "/api/v1/rules")?;
        let known: Vec<&Value> = known["groups"]
            .as_array()
            .context("groups")?
            .iter()
            .flat_map(|group| group["rules"].as_array().into_iter().flatten())
            .collect();
        ensure!(known.len() == rules.len(), "{} rules are known", known.len());
        if let Some(broken) = known.iter().find(|rule| rule["health"] == "err") {
            bail!("{broken}");
        }
        Ok(known.iter().all(|rule| rule["health"] == "ok"))
    })
}

/// What the checks above would say of a misspelt metric, matcher, label of a legend, and expression.
fn misspelt(shared: &mut Shared) -> Result<()> {
    shared.prometheus()?;
    let query = |expression: &str, shown: &str| Query {
        place: "a panel".to_owned(),
        expression: expression.to_owned(),
        shown: [shown.to_owned()].into(),
    };
    let values = Values::from([("node".to_owned(), ".*".to_owned())]);
    let good = query("sum by (node) (mesh_pod_protected{node=~\"$node\"})", "node");
    shared.expect_answer(&good, std::slice::from_ref(&values))?;
    for (expression, shown, wanted) in [
        ("sum by (node) (mesh_pod_protekted{node=~\"$node\"})", "node", "no data"),
        ("sum by (node) (mesh_pod_protected{nodes=~\"$node.+\"})", "node", "no data"),
        (
            "sum by (nodes) (mesh_pod_protected{node=~\"$node\"})",
            "nodes",
            "which no series has",
        ),
        ("sum by (node (mesh_pod_protected{node=~\"$node\"})", "node", "parse error"),
    ] {
        let said = shared.unanswered(&query(expression, shown), &values)?;
        ensure!(
            said.as_ref().is_some_and(|said| said.contains(wanted)),
            "{expression}: {said:?}"
        );
    }
    let unknown = shared.unanswered(&query("sum(mesh_pods{node=~\"$nodes\"})", "node"), &values);
    ensure!(unknown.is_err(), "an unknown variable: {unknown:?}");
    Ok(())
}

/// The nodes for which an alert is pending or fires.
fn alerted(shared: &Shared, alert: &str) -> Result<Vec<String>> {
    let expression = format!("ALERTS{{alertname=\"{alert}\"}}");
    let series = shared.prometheus()?.query(shared.mesh.topology.world(), &expression)?;
    let mut nodes: Vec<String> = series
        .into_iter()
        .map(|series| series.labels.get("node").cloned().unwrap_or_default())
        .collect();
    nodes.sort();
    Ok(nodes)
}

fn waiting(shared: &mut Shared) -> Result<()> {
    const ALERT: &str = "MeshAgentNotConnected";
    shared.prometheus()?;
    for alert in [ALERT, "MeshPodUnprotected", "MeshAgentDown", "MeshControlDown"] {
        poll::until_true(&format!("{alert} is quiet"), SOON, || Ok(alerted(shared, alert)?.is_empty()))?;
    }
    shared.mesh.kill_control();
    poll::until_true("both agents are told of", SOON, || {
        Ok(alerted(shared, ALERT)? == NodeName::ALL.map(NodeName::as_str))
    })?;
    poll::until_true("so is the control plane", SOON, || {
        Ok(alerted(shared, "MeshControlDown")?.len() == 1)
    })?;
    shared.mesh.start_control()?;
    for alert in [ALERT, "MeshControlDown"] {
        // The agents come back when their pause is over.
        poll::until_true(&format!("{alert} is quiet again"), ANSWERED, || {
            Ok(alerted(shared, alert)?.is_empty())
        })?;
    }
    Ok(())
}
