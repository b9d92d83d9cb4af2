//! What deploy/ grants the control plane, held against what it asks of a real API server.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

#[path = "kube_rights/grants.rs"]
mod grants;
#[path = "kube_rights/scenario.rs"]
mod scenario;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::ApiServer;
use mesh_tests::poll;
use mesh_tests::suite;
use serde_json::Value;
use tokio::runtime::Runtime;

use grants::{Right, denied, granted, unused};
use scenario::PATIENCE;

const NAMESPACE: &str = "culvert-system";
const ACCOUNT: &str = "mesh-control";
const USER: &str = "system:serviceaccount:culvert-system:mesh-control";
const TEMPLATE: &str = "deploy/chart/culvert/templates/control-rbac.yaml";

fn main() -> ExitCode {
    suite::run(
        "kube_rights",
        Bench::set_up,
        |bench, error| error.context(mesh_tests::process::tail(&bench.server.log(), 20)),
        &[
            ("what_is_granted_is_used_and_what_is_used_is_granted", used),
            ("a_right_too_many_and_a_right_too_few_are_found", too_many_and_too_few),
            ("agents_have_no_rights", agents),
            (
                "nobody_else_says_what_an_agent_has_proven",
                scenario::annotations_are_mesh_controls,
            ),
        ],
    )
}

/// What the checks share.
struct Bench {
    server: ApiServer,
    /// The control plane's own: its service account.
    kubeconfig: PathBuf,
    runtime: Runtime,
    /// Every document of deploy/culvert.yaml.
    shipped: Vec<Value>,
}

fn checkout(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(path)
}

impl Bench {
    fn set_up() -> Result<Self> {
        let server = ApiServer::start_audited(USER)?;
        let kubeconfig = server.kubeconfig_of(USER, &["system:serviceaccounts"])?;
        let text = std::fs::read_to_string(checkout("deploy/culvert.yaml"))?;
        let documents = text.split("\n---\n").filter(|document| document.contains("\nkind: "));
        let shipped = documents.map(|document| serde_norway::from_str(document).context("deploy/culvert.yaml"));
        let shipped: Vec<Value> = shipped.collect::<Result<_>>()?;
        let bench = Self {
            server,
            kubeconfig,
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?,
            shipped,
        };
        let kinds = [
            "Namespace",
            "ServiceAccount",
            "ClusterRole",
            "ClusterRoleBinding",
            "Role",
            "RoleBinding",
            "ValidatingAdmissionPolicy",
            "ValidatingAdmissionPolicyBinding",
        ];
        let wanted = |document: &&Value| kinds.iter().any(|kind| document["kind"] == *kind);
        // The definitions first: admission's rules are compiled against them.
        bench.definitions()?;
        let manifests: String = (bench.shipped.iter().filter(wanted))
            .map(|document| format!("---\n{document}\n"))
            .collect();
        bench.server.kubectl().apply(&manifests)?;
        let by_control = bench.server.kubectl().by(bench.kubeconfig.clone());
        // The API server learns of rights a moment later.
        poll::until_true("the control plane has its rights", PATIENCE, || {
            let asked = ["create", "secrets", "-n", NAMESPACE];
            let all = [&["auth", "can-i"][..], &asked].concat();
            Ok(by_control.output(&all)?.status.success())
        })?;
        Ok(bench)
    }

    fn definitions(&self) -> Result<()> {
        for file in std::fs::read_dir(checkout("deploy/crds"))? {
            self.server.kubectl().apply_file(&file?.path())?;
        }
        let wait = ["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"];
        self.server.kubectl().run(&wait).map(drop)
    }

    fn rights(&self) -> Result<Vec<Right>> {
        granted(&self.shipped, NAMESPACE, ACCOUNT)
    }
}

fn used(bench: &mut Bench) -> Result<()> {
    let rights = bench.rights()?;
    ensure!(rights.len() > 20, "{rights:?}");
    let scenario = scenario::run(bench);
    // Also where a step of it fails: a right that is missing is why.
    let refused = denied(&bench.server.audit()?);
    ensure!(
        refused.is_empty(),
        "the control plane asks for what {TEMPLATE} does not grant; grant it there (and `cargo xtask generate`), or do not ask:\n{}",
        refused.join("\n")
    );
    let running = scenario?;
    let left = poll::until_true("every right is used", PATIENCE, || {
        Ok(unused(&rights, &bench.server.audit()?).is_empty())
    });
    drop(running);
    let unused: Vec<String> = unused(&rights, &bench.server.audit()?)
        .iter()
        .map(ToString::to_string)
        .collect();
    ensure!(
        unused.is_empty(),
        "{TEMPLATE} grants what the control plane has not used; take it away there, or, where the control plane does need it, have \
         tests/tests/kube_rights/scenario.rs do what needs it:\n{}",
        unused.join("\n")
    );
    left
}

/// The negative control of the comparison.
fn too_many_and_too_few(bench: &mut Bench) -> Result<()> {
    let mut rights = bench.rights()?;
    let surplus = Right {
        verb: "delete".to_owned(),
        ..rights[0].clone()
    };
    rights.push(surplus.clone());
    let audit = bench.server.audit()?;
    ensure!(unused(&rights, &audit) == [&surplus], "{:?}", unused(&rights, &audit));
    let by_control = bench.server.kubectl().by(bench.kubeconfig.clone());
    let refused = by_control.output(&["-n", NAMESPACE, "delete", "pod", "nobody"])?;
    ensure!(refused.stderr.contains("forbidden"), "{}", refused.stderr);
    poll::until_true("what was refused is found", PATIENCE, || {
        let refused = denied(&bench.server.audit()?);
        Ok(refused.iter().any(|what| what.contains("delete") && what.contains("pods")))
    })
}

fn agents(bench: &mut Bench) -> Result<()> {
    let rights = granted(&bench.shipped, NAMESPACE, "mesh-agent")?;
    ensure!(rights.is_empty(), "{rights:?}");
    Ok(())
}
