//! What is written back of policies and MeshConfigs: two mesh-control processes over a real API server, with the rights that `deploy`
//! gives them, and the agent's own discovery and reports of two nodes.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

#[path = "kube_status/agents.rs"]
mod agents;
#[path = "kube_status/disturbances.rs"]
mod disturbances;
#[path = "kube_status/verdicts.rs"]
mod verdicts;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::kube::{ApiServer, ControlProgram};
use mesh_tests::process::tail;
use mesh_tests::{exposition, http, poll, suite};
use serde_json::Value;
use tokio::runtime::Runtime;

const NAMESPACE: &str = "culvert-system";
const SHOP: &str = "shop";
const NODES: [&str; 2] = ["node-a", "node-b"];
/// A Lease runs out, agents are let in, and what they say goes round by two throttles.
const PATIENCE: Duration = Duration::from_secs(90);
/// Everything is told and compared several times in it.
const ROUNDS: Duration = Duration::from_secs(6);

fn main() -> ExitCode {
    suite::run(
        "kube_status",
        Bench::set_up,
        |bench, error| {
            let control = bench.controls.iter().flatten();
            let logs = control.map(|Control(program)| format!("{}:\n{}", program.process.name(), tail(&program.log, 15)));
            error.context(logs.collect::<Vec<_>>().join("\n"))
        },
        &[
            (
                "a_policy_is_accepted_with_what_it_selects_and_where_it_is_in_force",
                verdicts::accepted,
            ),
            ("a_policy_that_selects_nothing_says_so", verdicts::selects_nothing),
            ("a_mesh_config_has_a_status", verdicts::mesh_config),
            (
                "a_generation_counts_where_it_is_enforced_and_not_before",
                verdicts::generations,
            ),
            ("a_changed_selector_counts_where_the_workloads_have_it", verdicts::selectors),
            ("a_node_that_rejects_a_policy_is_named_and_does_not_count", verdicts::rejected),
            ("a_policy_that_passed_admission_and_is_broken_says_why", verdicts::broken),
            ("conditions_of_others_stay", verdicts::others),
            ("a_node_that_is_gone_counts_no_longer", disturbances::node_gone),
            ("an_api_server_that_is_away_takes_nothing_back", disturbances::away),
            (
                "a_killed_replica_that_does_not_write_changes_nothing",
                disturbances::killed_reader,
            ),
            ("a_killed_writer_is_followed_by_the_other_replica", disturbances::killed),
        ],
    )
}

/// What the checks share.
struct Bench {
    server: ApiServer,
    /// The control plane's own.
    kubeconfig: PathBuf,
    controls: [Option<Control>; 2],
    /// One for each of [`NODES`], each with another replica.
    agents: Vec<agents::Agent>,
    runtime: Runtime,
}

/// A replica of the control plane.
struct Control(ControlProgram);

impl Control {
    fn start(server: &ApiServer, kubeconfig: &Path, name: &str) -> Result<Self> {
        let log = server.folder().join(format!("{name}.log"));
        let mut program = ControlProgram::start(name, kubeconfig, log)?;
        let admin = program.admin;
        poll::until_true(&format!("{name} is ready"), PATIENCE, || {
            program.process.check_running()?;
            Ok(http::request(admin, "/healthz/ready").is_ok_and(|response| response.status == 200))
        })?;
        Ok(Self(program))
    }

    /// A metric's value; with a label, of the series that has it.
    fn metric(&self, name: &str, label: &str) -> Result<f64> {
        let page = http::request(self.0.admin, "/metrics")?.body;
        ensure!(exposition::parse(&page).is_ok(), "{page}");
        let mut lines = page.lines().filter(|line| line.starts_with(name) && line.contains(label));
        let line = lines.next().with_context(|| format!("{name} is not there"))?;
        line.rsplit_once(' ').context("a value")?.1.parse().context("a number")
    }

    fn is_writer(&self) -> Result<bool> {
        Ok(self.metric("mesh_control_status_writer", "")? > 0.5)
    }
}

impl Bench {
    fn set_up() -> Result<Self> {
        let server = ApiServer::start()?;
        let kubectl = server.kubectl();
        kubectl.apply(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {NAMESPACE}}}}}"
        ))?;
        kubectl.apply(&rights()?)?;
        let account = format!("system:serviceaccount:{NAMESPACE}:mesh-control");
        let kubeconfig = server.kubeconfig_of(&account, &[])?;
        install_definitions(&server)?;
        kubectl.apply(&world())?;
        // With addresses: what is told with workloads is told of those that have one.
        for (pod, ip) in [("web", "10.7.0.1"), ("db", "10.7.0.2")] {
            let status = serde_json::json!({"status": {
                "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True"}],
            }});
            let patch = ["-n", SHOP, "patch", "pod", pod, "--subresource=status", "--type=merge", "-p"];
            kubectl.run(&[&patch[..], &[&status.to_string()]].concat())?;
        }
        let by_control = kubectl.by(kubeconfig.clone());
        poll::until_true("the control plane may what it needs", PATIENCE, || {
            let may = ["-n", NAMESPACE, "auth", "can-i", "create", "leases"];
            Ok(by_control.output(&may)?.status.success())
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let first = Control::start(&server, &kubeconfig, "mesh-control-1")?;
        let second = Control::start(&server, &kubeconfig, "mesh-control-2")?;
        let mut bench = Self {
            server,
            kubeconfig,
            controls: [Some(first), Some(second)],
            agents: Vec::new(),
            runtime,
        };
        poll::until_true("the roots are published", PATIENCE, || {
            let map = ["-n", NAMESPACE, "get", "configmap", "culvert-roots"];
            Ok(bench.server.kubectl().output(&map)?.status.success())
        })?;
        for place in 0..NODES.len() {
            let agent = bench.agent(place, place)?;
            bench.agents.push(agent);
        }
        Ok(bench)
    }

    fn control(&self, place: usize) -> Result<&Control> {
        self.controls[place].as_ref().context("that replica is gone")
    }

    fn apply(&self, manifests: &str) -> Result<()> {
        self.server.kubectl().apply(manifests).map(drop)
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        self.server.kubectl().run(arguments)
    }

    /// What is written of a policy of `shop`.
    fn status(&self, name: &str) -> Result<Said> {
        self.said(&["-n", SHOP, "authorizationpolicy", name])
    }

    fn said(&self, what: &[&str]) -> Result<Said> {
        let object = self.server.kubectl().get(what)?;
        let status = &object["status"];
        let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
        let accepted = conditions.iter().find(|condition| condition["type"] == "Accepted");
        let text = |field: &str| {
            accepted
                .and_then(|condition| condition[field].as_str())
                .unwrap_or_default()
                .to_owned()
        };
        Ok(Said {
            generation: object["metadata"]["generation"].as_i64().unwrap_or_default(),
            observed: status["observedGeneration"].as_i64(),
            accepted: text("status"),
            reason: text("reason"),
            message: text("message"),
            since: text("lastTransitionTime"),
            workloads: status["workloadsSelected"].as_i64(),
            nodes: status["nodesEnforcing"].as_i64(),
        })
    }

    /// Waits until a policy's status is so, and is of its newest generation.
    fn until(&self, what: &str, name: &str, is: impl Fn(&Said) -> bool) -> Result<Said> {
        let mut last = None;
        let found = poll::until(what, PATIENCE, || {
            let said = self.status(name)?;
            let is = said.observed == Some(said.generation) && is(&said);
            last = Some(said.clone());
            Ok(is.then_some(said))
        });
        found.with_context(|| format!("the last status: {last:?}"))
    }
}

/// A status, as a user reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    generation: i64,
    observed: Option<i64>,
    accepted: String,
    reason: String,
    message: String,
    since: String,
    workloads: Option<i64>,
    nodes: Option<i64>,
}

/// What `deploy` lets mesh-control do.
fn rights() -> Result<String> {
    let shipped = std::fs::read_to_string(checkout().join("deploy/culvert.yaml"))?;
    let documents: Vec<&str> = shipped
        .split("\n---\n")
        .filter(|document| {
            let of_kind = |kind: &str| document.lines().any(|line| line == format!("kind: {kind}"));
            ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"]
                .into_iter()
                .any(of_kind)
        })
        .collect();
    ensure!(documents.len() >= 6, "{} documents of rights", documents.len());
    Ok(documents.join("\n---\n"))
}

fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn install_definitions(server: &ApiServer) -> Result<()> {
    for file in std::fs::read_dir(checkout().join("deploy/crds"))? {
        server.kubectl().apply(&std::fs::read_to_string(file?.path())?)?;
    }
    server
        .kubectl()
        .run(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"])
        .map(drop)
}

/// Two nodes, a namespace in the mesh with two Pods, and one outside of it.
fn world() -> String {
    let nodes = NODES
        .map(|node| format!("{{apiVersion: v1, kind: Node, metadata: {{name: {node}}}}}\n---\n"))
        .concat();
    let pod = |name: &str, node: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {SHOP}, labels: {{app: {name}}}}}\n\
             spec: {{nodeName: {node}, serviceAccountName: web, containers: [{{name: c, image: 'nowhere.test/a:1'}}]}}\n---\n"
        )
    };
    format!(
        "{nodes}apiVersion: v1\nkind: Namespace\nmetadata: {{name: {SHOP}, labels: {{culvert.dev/mesh: enabled}}}}\n---\n\
         apiVersion: v1\nkind: Namespace\nmetadata: {{name: outside}}\n---\n\
         apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: web, namespace: {SHOP}}}\n---\n{}{}",
        pod("web", NODES[0]),
        pod("db", NODES[1]),
    )
}

/// Denies a port, to the Pods of `app`.
fn policy(name: &str, app: &str, port: &str) -> String {
    format!(
        "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {SHOP}}}\n\
         spec: {{selector: {{matchLabels: {{app: {app}}}}}, action: Deny, rules: [{{to: [{{ports: [{port}]}}]}}]}}\n"
    )
}

fn condition(said: &Said) -> (&str, &str) {
    (&said.accepted, &said.reason)
}

/// Both replicas' numbers of statuses written.
fn writes(bench: &Bench) -> Result<f64> {
    let mut all = 0.0;
    for control in bench.controls.iter().flatten() {
        all += control.metric("mesh_control_status_writes_total", "")?;
    }
    Ok(all)
}

/// Which of the replicas writes.
fn writer(bench: &Bench) -> Result<usize> {
    let mut found = Vec::new();
    for (place, control) in bench.controls.iter().enumerate() {
        if let Some(control) = control
            && control.is_writer()?
        {
            found.push(place);
        }
    }
    match found[..] {
        [one] => Ok(one),
        _ => bail!("{} replicas write", found.len()),
    }
}

fn lease(bench: &Bench) -> Result<Value> {
    bench
        .server
        .kubectl()
        .get(&["-n", NAMESPACE, "lease", "culvert-status-writer"])
}
