//! Who is let in by the API server's word, and the root of trust in its Secret: a control plane in this process with no more rights
//! than it needs, the agent's own client, and a real API server.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

#[path = "kube_identity/callers.rs"]
mod callers;
#[path = "kube_identity/roots.rs"]
mod roots;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser as _;
use mesh_agent::identity::store::CertifiedKeyPair;
use mesh_control::app::{self, Running, Source};
use mesh_control::config::ServeArgs;
use mesh_control::limits::Bounds;
use mesh_control::metrics::Metrics;
use mesh_control::state_dir::StateDir;
use mesh_control::trust::Trust;
use mesh_tests::kube::agent_client::{AgentClient, Answer};
use mesh_tests::kube::{ApiServer, client};
use mesh_tests::poll::{self, SOON};
use mesh_tests::suite;
use tokio::runtime::Runtime;

const NAMESPACE: &str = "culvert-system";

/// What the control plane may, and nothing else.
const RIGHTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: culvert-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: culvert-identity}
rules:
- {apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: culvert-identity}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-identity}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: mesh-control}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: culvert-identity, namespace: culvert-system}
rules:
- {apiGroups: [""], resources: [secrets, configmaps], verbs: [create]}
- {apiGroups: [""], resources: [secrets], resourceNames: [culvert-root], verbs: [get, list, watch, update]}
- {apiGroups: [""], resources: [configmaps], resourceNames: [culvert-roots], verbs: [patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-identity, namespace: culvert-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: culvert-identity}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: mesh-control}]
"#;

/// The mesh as the control plane knows it: scheduled Pods that have no address yet.
const MESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: uid-web}
spec: {nodeName: node-a, serviceAccountName: web}
---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, uid: uid-api}
spec: {nodeName: node-b, serviceAccountName: api}
"#;

fn main() -> ExitCode {
    suite::run(
        "kube_identity",
        Bench::set_up,
        |bench, error| error.context(mesh_tests::process::tail(&bench.server.log(), 20)),
        &[
            ("an_agents_token_is_let_in", callers::right),
            ("an_identity_of_a_pod_on_another_node", callers::identity_of_another_node),
            ("a_token_for_another_audience", callers::other_audience),
            ("a_token_of_another_service_account", callers::other_account),
            ("a_token_that_is_bound_to_no_pod_on_a_node", callers::unbound),
            ("a_token_of_a_deleted_pod", callers::deleted_pod),
            ("a_token_that_is_replaced_on_disk", callers::rotated),
            ("the_same_bad_token_is_asked_about_once", callers::flood),
            ("an_api_server_that_is_away", callers::away),
            ("two_replicas_at_once_make_one_root", roots::race),
            ("a_root_is_replaced_in_three_steps", roots::rotation),
            ("a_broken_secret_leaves_the_last_good_root", roots::broken),
            ("an_intermediate_of_cert_manager_signs", roots::intermediate),
        ],
    )
}

/// What the checks share.
struct Bench {
    server: ApiServer,
    /// The control plane's own.
    kubeconfig: PathBuf,
    runtime: Runtime,
}

impl Bench {
    fn set_up() -> Result<Self> {
        let server = ApiServer::start()?;
        let kubeconfig = server.kubeconfig_of("mesh-control", &[])?;
        server.kubectl().apply(RIGHTS)?;
        let by_control = server.kubectl().by(kubeconfig.clone());
        // The API server learns of rights a moment later.
        poll::until_true("the control plane may make its root", SOON, || {
            Ok(by_control
                .output(&["-n", NAMESPACE, "auth", "can-i", "create", "secrets"])?
                .status
                .success())
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let bench = Self {
            server,
            kubeconfig,
            runtime,
        };
        for name in ["mesh-agent", "another"] {
            bench.account(NAMESPACE, name)?;
        }
        for node in ["node-a", "node-b"] {
            let node = format!("{{apiVersion: v1, kind: Node, metadata: {{name: {node}}}}}");
            bench.server.kubectl().apply(&node)?;
        }
        Ok(bench)
    }

    fn account(&self, namespace: &str, name: &str) -> Result<()> {
        let account = format!("{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: {name}, namespace: {namespace}}}}}");
        self.server.kubectl().apply(&account).map(drop)
    }

    /// A Pod as the scheduler leaves it; without a node, as before that.
    fn pod(&self, name: &str, account: &str, node: Option<&str>) -> Result<()> {
        let node = node.map(|node| format!("nodeName: {node}, ")).unwrap_or_default();
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\n\
             spec: {{{node}serviceAccountName: {account}, containers: [{{name: c, image: 'nowhere.test/agent:1'}}]}}\n"
        );
        self.server.kubectl().apply(&pod).map(drop)
    }

    fn delete_pod(&self, name: &str) -> Result<()> {
        let delete = ["-n", NAMESPACE, "delete", "pod", name, "--grace-period=0", "--force"];
        self.server.kubectl().run(&delete).map(drop)
    }

    /// Starts a control plane; what it trusts is published when this returns.
    fn control(&self, bounds: Bounds) -> Result<Control> {
        Control::start(self, bounds)
    }

    /// What is published for the agents.
    fn published(&self) -> Result<String> {
        let map = self.server.kubectl().get(&["-n", NAMESPACE, "configmap", "culvert-roots"])?;
        Ok(map["data"]["roots.pem"].as_str().context("roots.pem")?.to_owned())
    }

    fn certificates_published(&self) -> Result<usize> {
        Ok(self.published()?.matches("BEGIN CERTIFICATE").count())
    }
}

/// A control plane with its folder; it ends with this.
struct Control {
    running: Option<Running>,
    folder: tempfile::TempDir,
    runtime: tokio::runtime::Handle,
    metrics: Arc<Metrics>,
}

impl Control {
    fn start(bench: &Bench, bounds: Bounds) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let registry = folder.path().join("registry");
        std::fs::create_dir(&registry)?;
        std::fs::write(registry.join("mesh.yaml"), MESH)?;
        let args = serve_args(folder.path(), &registry)?;
        let metrics = Arc::new(Metrics::new()?);
        let running = bench.runtime.block_on(async {
            let client = client(&bench.kubeconfig).await?;
            let trust = Trust::of_cluster(&args, &client, NAMESPACE, &metrics, &bounds).await?;
            let state = StateDir::open(&folder.path().join("state"))?;
            let source = Source::Folder(registry, state);
            app::start_with(&args, source, trust, Arc::clone(&metrics), bounds).await
        })?;
        let control = Self {
            running: Some(running),
            folder,
            runtime: bench.runtime.handle().clone(),
            metrics,
        };
        poll::until_true("the folder is read", SOON, || Ok(control.running().control.is_ready()))?;
        poll::until_true("the roots are published", SOON, || {
            let trusted = control.running().control.trust_bundle().concat();
            Ok(bench.published().is_ok_and(|published| published == trusted))
        })?;
        std::fs::write(control.roots_file(), bench.published()?)?;
        Ok(control)
    }

    fn running(&self) -> &Running {
        self.running.as_ref().unwrap()
    }

    /// As the kubelet would mount the ConfigMap.
    fn roots_file(&self) -> PathBuf {
        self.folder.path().join("roots.pem")
    }

    fn refused(&self, reason: &str) -> u64 {
        self.metrics.authentication_failed.with_label_values(&[reason]).get()
    }

    fn reviews(&self) -> u64 {
        let count = |result| self.metrics.token_reviews.with_label_values(&[result]).get();
        count("accepted") + count("refused") + count("failed")
    }

    /// An agent's client whose token is in `file`.
    fn agent(&self, file: &Path) -> Result<AgentClient> {
        AgentClient::new(file, &self.roots_file(), &self.running().listen.to_string(), &self.runtime)
    }

    /// An agent's client with this token.
    fn agent_with(&self, token: &str) -> Result<AgentClient> {
        let file = self.folder.path().join("token");
        std::fs::write(&file, token)?;
        self.agent(&file)
    }

    /// The same beside another agent, whose token stays where it is.
    fn agent_with_other_file(&self, token: &str) -> Result<AgentClient> {
        let file = self.folder.path().join("other-token");
        std::fs::write(&file, token)?;
        self.agent(&file)
    }

    /// What an agent with this token is told that asks for the certificate of the Pod on node-a.
    fn try_with(&self, token: &str) -> Result<Answer> {
        self.agent_with(token)?.ask("web")
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            self.runtime.block_on(running.stop());
        }
    }
}

fn serve_args(folder: &Path, registry: &Path) -> Result<ServeArgs> {
    let state = folder.join("state");
    let paths = [registry, &state].map(|path| path.to_str().unwrap().to_owned());
    let args = ["mesh-control", "--registry", &paths[0], "--state-dir", &paths[1]]
        .into_iter()
        .chain(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
    Ok(mesh_control::config::Cli::try_parse_from(args)?.serve)
}

/// Fails with the attack's success, or where it was refused as something else.
fn refused(what: &str, answer: &Answer, code: tonic::Code) -> Result<()> {
    match answer {
        Ok(_) => bail!("{what} was given a certificate"),
        Err(status) => {
            ensure!(status.code() == code, "{what}: {status:?}");
            Ok(())
        }
    }
}

fn taken(what: &str, answer: Answer) -> Result<CertifiedKeyPair> {
    answer.with_context(|| format!("{what} was refused"))
}

/// Bounds under which a word of the API server is repeated for a moment only.
fn short_reviews() -> Bounds {
    Bounds {
        review_life: Duration::from_millis(200),
        token_recheck: Duration::from_millis(100),
        ..Bounds::default()
    }
}
