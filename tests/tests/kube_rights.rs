//! What `deploy` grants, held against what is asked of a real API server: each right is used, and what is asked is granted.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

#[path = "kube_rights/control.rs"]
mod control;
#[path = "kube_rights/grants.rs"]
mod grants;
#[path = "kube_rights/uninstallation.rs"]
mod uninstallation;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::dashboards::{checkout, read};
use mesh_tests::kube::{ApiServer, Kubectl};
use mesh_tests::{binaries, poll, process, suite};
use serde::Deserialize as _;
use serde_json::Value;
use tokio::runtime::Runtime;

use grants::{Right, denied, granted, granted_to, unused};

const NAMESPACE: &str = "culvert-system";
const CONTROL: &str = "mesh-control";
const WAITER: &str = "mesh-uninstall-wait";
/// What is not used within it is not used: the slowest waits until another replica's Lease has run out (30 s).
const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    suite::run(
        "kube_rights",
        Bench::set_up,
        |bench, error| {
            let logs = [bench.server.log(), bench.control_log()];
            error.context(logs.map(|log| process::tail(&log, 20)).join("\n"))
        },
        &[
            (
                "the_control_plane_uses_what_it_is_granted_and_asks_for_no_more",
                control::used,
            ),
            (
                "the_uninstallation_uses_what_it_is_granted_and_asks_for_no_more",
                uninstallation::used,
            ),
            ("nobody_else_is_granted_anything", nobody_else),
            // Last: what is refused here would be found by the others.
            ("a_right_too_many_and_a_right_too_few_are_found", too_many_and_too_few),
        ],
    )
}

/// What the checks share.
struct Bench {
    server: ApiServer,
    runtime: Runtime,
    /// Every document of deploy/culvert.yaml.
    shipped: Vec<Value>,
}

impl Bench {
    fn set_up() -> Result<Self> {
        let bench = Self {
            server: ApiServer::start_audited(&[&user(CONTROL), &user(WAITER)])?,
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?,
            shipped: documents(&read(&checkout("deploy/culvert.yaml"))?)?,
        };
        bench.grant(&bench.shipped)?;
        bench.until_may(CONTROL, &["create", "secrets"])?;
        Ok(bench)
    }

    /// Those of the documents that are about rights.
    fn grant(&self, documents: &[Value]) -> Result<()> {
        let kinds = [
            "Namespace",
            "ServiceAccount",
            "ClusterRole",
            "ClusterRoleBinding",
            "Role",
            "RoleBinding",
        ];
        let wanted = documents
            .iter()
            .filter(|document| kinds.iter().any(|kind| document["kind"] == *kind));
        let manifests: String = wanted.map(|document| format!("---\n{document}\n")).collect();
        self.server.kubectl().apply(&manifests).map(drop)
    }

    /// The API server learns of rights a moment after they are granted.
    fn until_may(&self, account: &str, what: &[&str]) -> Result<()> {
        let asked = [&["-n", NAMESPACE, "auth", "can-i"], what].concat();
        let by_account = self.by(account)?;
        poll::until_true(&format!("{account} has its rights"), PATIENCE, || {
            Ok(by_account.output(&asked)?.status.success())
        })
    }

    /// With no more than a service account's rights.
    fn by(&self, account: &str) -> Result<Kubectl> {
        Ok(self.server.kubectl().by(self.server.kubeconfig_of(&user(account), &[])?))
    }

    /// A command of the program mesh-control, as this service account.
    fn mesh_control(&self, account: &str, arguments: &str) -> Result<()> {
        let program = binaries::path("mesh-control")?;
        let command = format!("'{}' {arguments}", program.display());
        let output = self.by(account)?.shell(self.server.folder(), &command)?;
        output.ok(&format!("mesh-control {arguments}")).map(drop)
    }

    fn control_log(&self) -> PathBuf {
        self.server.folder().join("mesh-control.log")
    }

    /// Compares once `done` is done, whether that worked or not: a right that is missing is why it did not.
    fn compare<T>(&self, account: &str, rights: &[Right], template: &str, done: Result<T>) -> Result<()> {
        let user = user(account);
        let refused = denied(&self.server.audit(&user)?);
        ensure!(
            refused.is_empty(),
            "{account} asks for what {template} does not grant; grant it there (and `cargo xtask generate`), or do not ask:\n{}",
            refused.join("\n")
        );
        // What it holds runs on while the last rights are waited for.
        let running = done?;
        let mut left: Vec<String> = Vec::new();
        let all = poll::until_true("every right is used", PATIENCE, || {
            let audit = self.server.audit(&user)?;
            left = unused(rights, &audit, NAMESPACE).iter().map(ToString::to_string).collect();
            Ok(left.is_empty())
        });
        drop(running);
        all.with_context(|| {
            format!(
                "{template} grants what {account} has not used; take it away there, or, where it is needed, have tests/tests/kube_rights \
                 do what needs it:\n{}",
                left.join("\n")
            )
        })
    }
}

fn user(account: &str) -> String {
    format!("system:serviceaccount:{NAMESPACE}:{account}")
}

fn documents(text: &str) -> Result<Vec<Value>> {
    let all = serde_norway::Deserializer::from_str(text).map(Value::deserialize);
    let all: Vec<Value> = all.collect::<Result<_, _>>()?;
    Ok(all.into_iter().filter(|document| !document.is_null()).collect())
}

/// The agents least of all, whose node may be anybody's.
fn nobody_else(bench: &mut Bench) -> Result<()> {
    let by_deploy = [documents(&read(&checkout("deploy/uninstall.yaml"))?)?, bench.shipped.clone()].concat();
    let is = granted_to(&by_deploy);
    let only = |account: &str| BTreeSet::from([format!("ServiceAccount {NAMESPACE} {account}")]);
    ensure!(is == only(CONTROL), "{is:?} are granted something");
    let is = granted_to(&uninstallation::hook()?);
    ensure!(
        is == only(WAITER),
        "{is:?} are granted something while the mesh is uninstalled"
    );
    Ok(())
}

/// The negative control of the comparison.
fn too_many_and_too_few(bench: &mut Bench) -> Result<()> {
    let leases = |verb: &str, namespace: Option<&str>| Right {
        verb: verb.to_owned(),
        group: "coordination.k8s.io".to_owned(),
        resource: "leases".to_owned(),
        namespace: namespace.map(str::to_owned),
        name: None,
    };
    let used = leases("list", Some(NAMESPACE));
    let surplus = [
        leases("update", Some(NAMESPACE)),
        leases("list", Some("default")),
        leases("list", None),
        Right {
            name: Some("another".to_owned()),
            ..used.clone()
        },
    ];
    let by_control = bench.by(CONTROL)?;
    by_control.run(&["-n", NAMESPACE, "get", "leases"])?;
    let refused = by_control.output(&["-n", NAMESPACE, "delete", "pod", "nobody"])?;
    ensure!(refused.stderr.contains("forbidden"), "{}", refused.stderr);
    let audit = bench.server.audit(&user(CONTROL))?;
    let refused = denied(&audit);
    ensure!(
        refused == ["delete pods (core) of the name nobody in namespace culvert-system"],
        "{refused:?}"
    );
    let all = [&surplus[..], &[used]].concat();
    let found = unused(&all, &audit, NAMESPACE);
    ensure!(found == surplus.iter().collect::<Vec<_>>(), "{found:?}");
    // And the grants are read: of all of them, none is used by somebody who has asked for nothing.
    let rights = granted(&bench.shipped, NAMESPACE, CONTROL)?;
    ensure!(
        rights.len() > 20 && unused(&rights, &[], NAMESPACE).len() == rights.len(),
        "{rights:?}"
    );
    Ok(())
}
