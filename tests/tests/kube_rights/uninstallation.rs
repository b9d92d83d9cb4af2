//! What Helm runs before it deletes waits for the DaemonSet that cleans nodes, which it may read.

use std::process::Command;

use anyhow::{Result, ensure};
use mesh_tests::dashboards::{checkout, read};
use mesh_tests::kube::helm;
use serde_json::Value;

use crate::grants::granted;
use crate::{Bench, NAMESPACE, WAITER, documents};

const TEMPLATE: &str = "templates/uninstall-wait.yaml";

/// deploy/ has it in the chart alone: without Helm, a person waits.
pub fn hook() -> Result<Vec<Value>> {
    let output = Command::new(helm::program()?)
        .args(["template", "culvert", "--namespace", NAMESPACE, "--kube-version", "1.32.0"])
        .args(["--show-only", TEMPLATE])
        .arg(checkout("deploy/chart/culvert"))
        .env("HELM_NO_PLUGINS", "1")
        .output()?;
    ensure!(
        output.status.success(),
        "helm template: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    documents(&String::from_utf8(output.stdout)?)
}

pub fn used(bench: &mut Bench) -> Result<()> {
    let hook = hook()?;
    bench.grant(&hook)?;
    bench.until_may(WAITER, &["list", "pods"])?;
    let rights = granted(&hook, NAMESPACE, WAITER)?;
    ensure!(!rights.is_empty(), "it is granted nothing");
    bench.compare(WAITER, &rights, &format!("deploy/chart/culvert/{TEMPLATE}"), wait(bench))
}

/// There are no nodes and no controllers here: the DaemonSet is ready because its status says so.
fn wait(bench: &Bench) -> Result<()> {
    let kubectl = bench.server.kubectl();
    kubectl.apply(&read(&checkout("deploy/uninstall.yaml"))?)?;
    let status = serde_json::json!({"status": {
        "observedGeneration": 1, "desiredNumberScheduled": 1, "currentNumberScheduled": 1, "numberReady": 1, "numberMisscheduled": 0,
    }});
    let patch = [
        "-n",
        NAMESPACE,
        "patch",
        "daemonset",
        "mesh-uninstall",
        "--subresource=status",
        "--type=merge",
        "-p",
    ];
    kubectl.run(&[&patch[..], &[&status.to_string()]].concat())?;
    bench.mesh_control(WAITER, "await-uninstall")
}
