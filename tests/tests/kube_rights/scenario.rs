//! One life of a control plane in which it does everything that it needs rights for. To extend it: add the step that does it.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser as _;
use mesh_agent::config::{Command, Credentials};
use mesh_agent::discovery::transport::ControlPlane;
use mesh_agent::identity::Identity;
use mesh_agent::identity::certificate::KeyAndRequest;
use mesh_agent::identity::renewal::Authority as _;
use mesh_control::app::{self, Running, Source};
use mesh_control::capture_states::Proof;
use mesh_control::kubernetes::root_secret::RootSecret;
use mesh_control::limits::Bounds;
use mesh_control::metrics::Metrics;
use mesh_control::proto::PodWord;
use mesh_control::roots::Step;
use mesh_control::trust::Trust;
use mesh_tests::kube::client;
use mesh_tests::poll;
use serde_json::Value;

use crate::{Bench, NAMESPACE};

pub const PATIENCE: Duration = Duration::from_secs(60);

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

/// Ends what runs.
pub struct Life {
    running: Option<Running>,
    runtime: tokio::runtime::Handle,
    folder: tempfile::TempDir,
}

impl Drop for Life {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            self.runtime.block_on(running.stop());
        }
    }
}

impl Life {
    fn running(&self) -> &Running {
        self.running.as_ref().unwrap()
    }

    fn start(bench: &Bench) -> Result<Self> {
        let flags = [
            "--kubernetes",
            "--namespace",
            NAMESPACE,
            "--listen",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
        ];
        let args = std::iter::once("mesh-control").chain(flags);
        let args = mesh_control::config::Cli::try_parse_from(args)?.serve;
        let running = bench.runtime.block_on(async {
            let client = client(&bench.kubeconfig).await?;
            let metrics = std::sync::Arc::new(Metrics::new()?);
            let bounds = Bounds::default();
            let trust = Trust::of_cluster(&args, &client, NAMESPACE, &metrics, &bounds).await?;
            app::start_with(&args, Source::Cluster(client), trust, metrics, bounds).await
        })?;
        let life = Self {
            running: Some(running),
            runtime: bench.runtime.handle().clone(),
            folder: tempfile::tempdir()?,
        };
        poll::until_true("the control plane is ready", PATIENCE, || {
            Ok(life.running().control.is_ready())
        })?;
        Ok(life)
    }

    fn says(&self, bench: &Bench, proof: Proof) -> Result<()> {
        let pod = bench.server.kubectl().get(&["-n", "shop", "pod", "web"])?;
        let word = PodWord {
            uid: pod["metadata"]["uid"].as_str().context("a uid")?.to_owned(),
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            proof,
            reason: "somebody else answers".to_owned(),
            repaired: vec![],
        };
        self.running().control.set_report("node-a", vec![word]);
        Ok(())
    }

    /// As an agent asks for a certificate, with a token of its Pod.
    fn certificate(&self, bench: &Bench) -> Result<()> {
        let (token, roots) = (self.folder.path().join("token"), self.folder.path().join("roots.pem"));
        std::fs::write(&token, bench.server.token(NAMESPACE, "mesh-agent", "culvert", Some("agent"))?)?;
        let published = poll::until("the roots are published", PATIENCE, || {
            let map = [
                "-n",
                NAMESPACE,
                "get",
                "configmap",
                "culvert-roots",
                "--ignore-not-found",
                "-o",
                "json",
            ];
            let text = bench.server.kubectl().run(&map)?;
            let map: Value = serde_json::from_str(&text).unwrap_or_default();
            Ok(map["data"]["roots.pem"].as_str().map(str::to_owned))
        })?;
        std::fs::write(&roots, published)?;
        let listen = self.running().listen.to_string();
        let args = ["mesh-agent", "run", "--node", "node-a", "--control", &listen];
        let files = [("--service-account-token", &token), ("--control-roots", &roots)];
        let files = files.iter().flat_map(|(flag, file)| [*flag, file.to_str().unwrap()]);
        let Command::Run(args) = mesh_agent::config::Cli::try_parse_from(args.into_iter().chain(files))?.command else {
            bail!("not run");
        };
        let _runtime = self.runtime.enter();
        let control = ControlPlane::new(&Credentials::read(&args)?)?;
        let identity = Identity::new("cluster.local", "shop", "web");
        let request = KeyAndRequest::new(&identity)?;
        self.runtime.block_on(async {
            let signed = control.sign(&identity, request.csr_pem.clone());
            tokio::time::timeout(PATIENCE, signed).await?.context("a certificate")
        })?;
        Ok(())
    }
}

fn events(bench: &Bench, reason: &str) -> Result<Vec<Value>> {
    let found = bench.server.kubectl().get(&["-n", "shop", "events.events.k8s.io"])?;
    let found = found["items"].as_array().cloned().unwrap_or_default();
    Ok(found.into_iter().filter(|event| event["reason"] == reason).collect())
}

fn capture(bench: &Bench) -> Result<Value> {
    let pod = bench.server.kubectl().get(&["-n", "shop", "pod", "web"])?;
    Ok(pod["metadata"]["annotations"]["culvert.dev/capture"].clone())
}

pub fn run(bench: &Bench) -> Result<Life> {
    let kubectl = bench.server.kubectl();
    // A cluster that does not have the mesh's kinds yet: whether they are there is asked for.
    kubectl.run(&["delete", "crd", "--all", "--wait"])?;
    let life = Life::start(bench)?;
    bench.definitions()?;
    kubectl.apply(WORLD)?;
    let status = serde_json::json!({"status": {"phase": "Running", "podIP": "10.244.9.1", "podIPs": [{"ip": "10.244.9.1"}]}});
    let status = status.to_string();
    kubectl.run(&[
        "-n",
        "shop",
        "patch",
        "pod",
        "web",
        "--subresource=status",
        "--type=merge",
        "-p",
        &status,
    ])?;
    poll::until_true("the Pod is a member", PATIENCE, || {
        Ok(life.running().control.status()["pods"]["shop/web"] == "pending")
    })?;
    life.certificate(bench)?;

    life.says(bench, Proof::Proven)?;
    poll::until_true("the proof is written", PATIENCE, || Ok(capture(bench)? == "proven"))?;
    // Twice the same is one Event that is counted up.
    for _ in 0..2 {
        life.says(bench, Proof::Lost)?;
        poll::until_true("the loss is written", PATIENCE, || Ok(capture(bench)? == "lost"))?;
        poll::until_true("and told", PATIENCE, || Ok(!events(bench, "MeshProtectionLost")?.is_empty()))?;
        life.says(bench, Proof::Proven)?;
        poll::until_true("and its end", PATIENCE, || Ok(capture(bench)? == "proven"))?;
        poll::until_true("and told", PATIENCE, || Ok(!events(bench, "MeshProtected")?.is_empty()))?;
    }
    poll::until_true("the Event is counted up", PATIENCE, || {
        let events = events(bench, "MeshProtectionLost")?;
        ensure!(events.len() == 1, "{events:?}");
        Ok(events[0]["series"]["count"] == 2)
    })?;

    let secret = bench.runtime.block_on(async {
        let client = client(&bench.kubeconfig).await?;
        anyhow::Ok(RootSecret::new(client, NAMESPACE, "cluster.local"))
    })?;
    let now = time::OffsetDateTime::now_utc();
    bench.runtime.block_on(secret.rotate(Step::Prepare, now))?;

    // The first makes the ConfigMap, the second changes it.
    for account in ["idle", "web"] {
        kubectl.run(&["-n", "shop", "delete", "serviceaccount", account])?;
        poll::until_true("the deleted account is kept", PATIENCE, || {
            let kept = ["-n", NAMESPACE, "get", "configmap", "culvert-deleted-accounts", "-o", "json"];
            Ok(kubectl.output(&kept)?.stdout.contains(account))
        })?;
    }
    Ok(life)
}

/// Whoever may patch a Pod may not say that it is captured, nor that it is not.
pub fn annotations_are_mesh_controls(bench: &mut Bench) -> Result<()> {
    let rights = r#"
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: owner, namespace: shop}
rules: [{apiGroups: [""], resources: [pods], verbs: [get, list, patch, update]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: owner, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: owner}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: owner}]
"#;
    let kubectl = bench.server.kubectl();
    kubectl.apply(rights)?;
    let owner = kubectl.by(bench.server.kubeconfig_of("owner", &[])?);
    poll::until_true("the owner may patch", PATIENCE, || {
        Ok(owner
            .output(&["-n", "shop", "auth", "can-i", "patch", "pods"])?
            .status
            .success())
    })?;
    ensure!(capture(bench)? == "proven", "{}", capture(bench)?);
    owner.run(&["-n", "shop", "annotate", "pod", "web", "mine=yes", "culvert.dev/problem=none"])?;
    let attempts = [
        "culvert.dev/capture-",
        "culvert.dev/capture-uid-",
        "culvert.dev/capture=lost",
        "culvert.dev/capture-uid=another",
    ];
    for attempt in attempts {
        let output = owner.output(&["-n", "shop", "annotate", "--overwrite", "pod", "web", attempt])?;
        ensure!(
            output.stderr.contains("mesh-control's alone"),
            "the owner's {attempt} is let through: {}{}",
            output.stdout,
            output.stderr
        );
    }
    // By way of the status as well, which takes metadata along.
    kubectl.apply(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {name: status-writer}\n\
         rules: [{apiGroups: [\"\"], resources: [pods/status], verbs: [patch]}]\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {name: status-writer}\n\
         roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: status-writer}\n\
         subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: owner}]\n",
    )?;
    let patch = r#"{"metadata": {"annotations": {"culvert.dev/capture": "lost"}}}"#;
    poll::until_true("the status is no way around it", PATIENCE, || {
        let by_status = [
            "-n",
            "shop",
            "patch",
            "pod",
            "web",
            "--subresource=status",
            "--type=merge",
            "-p",
            patch,
        ];
        let output = owner.output(&by_status)?;
        ensure!(!output.status.success(), "the owner's patch of the status is let through");
        Ok(output.stderr.contains("mesh-control's alone"))
    })?;
    ensure!(capture(bench)? == "proven", "{}", capture(bench)?);
    Ok(())
}
