//! One life of a control plane in which it does everything that it needs rights for.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use mesh_agent::discovery::DiscoveryStatus;
use mesh_agent::discovery::report::{self, PodStatus, Proof};
use mesh_tests::dashboards::checkout;
use mesh_tests::http;
use mesh_tests::kube::ControlProgram;
use mesh_tests::kube::agent_client::AgentClient;
use mesh_tests::poll;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::grants::granted;
use crate::{Bench, CONTROL, NAMESPACE, PATIENCE};

const TEMPLATE: &str = "deploy/chart/culvert/templates/control-rbac.yaml";

const WORLD: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: node-a}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: idle, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: node-a, serviceAccountName: web, containers: [{name: c, image: 'nowhere.test/a:1'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: culvert-system}
spec: {nodeName: node-a, serviceAccountName: mesh-agent, containers: [{name: c, image: 'nowhere.test/a:1'}]}
"#;

const POLICIES: &str = r#"
apiVersion: culvert.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: shop}
spec: {selector: {matchLabels: {app: web}}, action: Deny, rules: [{to: [{ports: [9]}]}]}
---
apiVersion: culvert.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: shop}
spec: {mtls: Permissive}
"#;

/// As a replica leaves it that was killed.
const LEFT_LEASE: &str = r#"
apiVersion: coordination.k8s.io/v1
kind: Lease
metadata: {name: culvert-replica-killed, namespace: culvert-system, labels: {culvert.dev/replica: 'true'}}
spec: {holderIdentity: killed, leaseDurationSeconds: 30, renewTime: '2026-01-01T00:00:00.000000Z'}
"#;

/// What it does that needs rights, named.
type Step = (&'static str, fn(&Life<'_>) -> Result<()>);

/// In this order. For a further right: a further step that has it do what needs it.
const STEPS: &[Step] = &[
    ("the mesh's kinds are installed later", kinds),
    ("an agent has a certificate", certificate),
    ("an agent's proof is kept", proof),
    ("what befalls a Pod is told", events),
    ("a policy and a MeshConfig have a status", statuses),
    ("a killed replica is forgotten", killed_replica),
    ("the root is replaced", root),
    ("deleted accounts are kept", accounts),
];

pub fn used(bench: &mut Bench) -> Result<()> {
    let rights = granted(&bench.shipped, NAMESPACE, CONTROL)?;
    bench.compare(CONTROL, &rights, TEMPLATE, live(bench))
}

fn live(bench: &Bench) -> Result<Life<'_>> {
    let life = Life::start(bench)?;
    for (what, step) in STEPS {
        step(&life).with_context(|| (*what).to_owned())?;
    }
    Ok(life)
}

/// The program, and an agent's side of it.
struct Life<'b> {
    bench: &'b Bench,
    control: ControlProgram,
    pods: watch::Sender<Arc<Vec<PodStatus>>>,
    /// Nothing is said by it; who reports ends with it.
    _discovery: watch::Sender<DiscoveryStatus>,
    reported: (watch::Receiver<Arc<Vec<PodStatus>>>, watch::Receiver<DiscoveryStatus>),
    stop: CancellationToken,
}

impl Drop for Life<'_> {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl<'b> Life<'b> {
    fn start(bench: &'b Bench) -> Result<Self> {
        bench.server.kubectl().apply(WORLD)?;
        let status = serde_json::json!({"status": {"phase": "Running", "podIP": "10.244.9.1", "podIPs": [{"ip": "10.244.9.1"}]}});
        let patch = [
            "-n",
            "shop",
            "patch",
            "pod",
            "web",
            "--subresource=status",
            "--type=merge",
            "-p",
        ];
        let kubectl = bench.server.kubectl();
        kubectl.run(&[&patch[..], &[&status.to_string()]].concat())?;
        let kubeconfig = bench.by(CONTROL)?.kubeconfig().to_owned();
        let (pods, of_pods) = watch::channel(Arc::default());
        let (discovery, of_discovery) = watch::channel(DiscoveryStatus::default());
        let mut life = Self {
            bench,
            control: ControlProgram::start("mesh-control", &kubeconfig, bench.control_log())?,
            pods,
            _discovery: discovery,
            reported: (of_pods, of_discovery),
            stop: CancellationToken::new(),
        };
        let admin = life.control.admin;
        poll::until_true("the control plane is ready", PATIENCE, || {
            life.control.process.check_running()?;
            Ok(http::request(admin, "/healthz/ready").is_ok_and(|response| response.status == 200))
        })?;
        Ok(life)
    }

    fn get(&self, what: &[&str]) -> Result<Value> {
        self.bench.server.kubectl().get(what)
    }

    /// `null` where there is none.
    fn get_own(&self, what: &[&str]) -> Result<Value> {
        let all = [&["-n", NAMESPACE, "get", "--ignore-not-found", "-o", "json"], what].concat();
        Ok(serde_json::from_str(&self.bench.server.kubectl().run(&all)?).unwrap_or_default())
    }

    /// The agent of `node-a`, by its Pod's token.
    fn agent(&self) -> Result<AgentClient> {
        let folder = self.bench.server.folder();
        let (token, roots) = (folder.join("token"), folder.join("roots.pem"));
        std::fs::write(
            &token,
            self.bench.server.token(NAMESPACE, "mesh-agent", "culvert", Some("agent"))?,
        )?;
        let published = poll::until("the roots are published", PATIENCE, || {
            let map = self.get_own(&["configmap", "culvert-roots"])?;
            Ok(map["data"]["roots.pem"].as_str().map(str::to_owned))
        })?;
        std::fs::write(&roots, published)?;
        AgentClient::new(&token, &roots, &self.control.listen.to_string(), self.bench.runtime.handle())
    }
}

/// Until then it asks whether they are there.
fn kinds(life: &Life<'_>) -> Result<()> {
    let kubectl = life.bench.server.kubectl();
    kubectl.apply_file(&checkout("deploy/crds"))?;
    kubectl
        .run(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"])
        .map(drop)
}

fn certificate(life: &Life<'_>) -> Result<()> {
    let agent = life.agent()?;
    // Its Pod, and whose it may ask for, are known by watches.
    poll::until_true("the certificate is signed", PATIENCE, || Ok(agent.ask("web")?.is_ok()))
}

fn proof(life: &Life<'_>) -> Result<()> {
    let agent = life.agent()?;
    let (pods, discovery) = life.reported.clone();
    agent.runtime.spawn(report::run(
        agent.control.clone(),
        pods,
        discovery,
        Arc::default(),
        life.stop.clone(),
    ));
    say(life, Proof::Proven, "")?;
    poll::until_true("it is written on the Pod", PATIENCE, || {
        let pod = life.get(&["-n", "shop", "pod", "web"])?;
        Ok(pod["metadata"]["annotations"]["culvert.dev/capture"] == "proven")
    })
}

/// What the agent says of the Pod.
fn say(life: &Life<'_>, proof: Proof, problem: &'static str) -> Result<()> {
    let pod = life.get(&["-n", "shop", "pod", "web"])?;
    let word = PodStatus {
        uid: pod["metadata"]["uid"].as_str().context("a uid")?.into(),
        namespace: "shop".into(),
        name: "web".into(),
        netns_cookie: 1,
        proof,
        reason: String::new(),
        problem,
    };
    life.pods.send_replace(Arc::new(vec![word]));
    Ok(())
}

/// The same for the second time is counted in the first one's Event.
fn events(life: &Life<'_>) -> Result<()> {
    for count in 1..=2 {
        say(life, Proof::Lost, "inbound_not_captured")?;
        until_told(life, "MeshProtectionLost", count)?;
        say(life, Proof::Proven, "")?;
        until_told(life, "MeshProtected", count)?;
    }
    Ok(())
}

fn until_told(life: &Life<'_>, reason: &str, count: u64) -> Result<()> {
    poll::until_true(&format!("{reason} is told, {count}"), PATIENCE, || {
        let events = life.get(&["-n", "shop", "events.events.k8s.io"])?;
        let events = events["items"].as_array().context("a list")?;
        let mut told = events.iter().filter(|event| event["reason"] == reason);
        Ok(told.any(|event| event["series"]["count"].as_u64().unwrap_or(1) == count))
    })
}

fn statuses(life: &Life<'_>) -> Result<()> {
    life.bench.server.kubectl().apply(POLICIES)?;
    for object in ["authorizationpolicy/deny", "meshconfig/default"] {
        poll::until_true(&format!("{object} has a status"), PATIENCE, || {
            Ok(life.get(&["-n", "shop", object])?["status"]["observedGeneration"] == 1)
        })?;
    }
    Ok(())
}

fn killed_replica(life: &Life<'_>) -> Result<()> {
    life.bench.server.kubectl().apply(LEFT_LEASE)?;
    poll::until_true("its Lease is removed", PATIENCE, || {
        Ok(life.get_own(&["lease", "culvert-replica-killed"])?.is_null())
    })
}

fn root(life: &Life<'_>) -> Result<()> {
    life.bench.mesh_control(CONTROL, "rotate-root prepare --kubernetes")
}

/// The first makes the ConfigMap, the second changes it.
fn accounts(life: &Life<'_>) -> Result<()> {
    for account in ["idle", "web"] {
        let kubectl = life.bench.server.kubectl();
        kubectl.run(&["-n", "shop", "delete", "serviceaccount", account])?;
        poll::until_true(&format!("{account} is kept"), PATIENCE, || {
            let kept = life.get_own(&["configmap", "culvert-deleted-accounts"])?;
            Ok(kept["data"].to_string().contains(account))
        })?;
    }
    Ok(())
}
