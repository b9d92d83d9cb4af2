//! Pods leave and join under traffic, and the mesh leaves the cluster.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::dashboards::checkout;
use mesh_tests::kube::load::Load;
use mesh_tests::kube::remains::KernelHalf;
use mesh_tests::kube::shop::{MESH, PATIENCE, SHOP, before, capture, get, is_on_the_wire, pod, until_proven};
use mesh_tests::kube::{Cluster, culvert, helm};
use mesh_tests::poll;

use super::{expect_mesh, join, report};

/// For connections of before that are still under way, and some of after.
const SETTLE: Duration = Duration::from_secs(3);

pub fn leave_and_join(cluster: &mut Cluster) -> Result<()> {
    let (far, near) = loads(cluster)?;
    cluster.kubectl().run(&["label", "namespace", SHOP, "culvert.dev/mesh-"])?;
    for pod in ["client", "near", "server"] {
        poll::until_true(&format!("{pod} is out of the mesh"), PATIENCE, || {
            Ok(capture(cluster, pod)?.is_null())
        })?;
    }
    // What the agents have last said, that the Pods which they let go are lost, must not count when these come back.
    for node in 1..=cluster.nodes().len() {
        poll::until_true(&format!("the Pods of node {node} are let go"), PATIENCE, || {
            let metrics = culvert::metrics(cluster, node)?;
            let mut pods = metrics.lines().filter(|line| line.starts_with("mesh_pods{"));
            Ok(pods.clone().count() > 0 && pods.all(|line| line.ends_with("} 0")))
        })?;
    }
    std::thread::sleep(SETTLE);
    none_failed(cluster, "the label removed", far, near)?;
    ensure!(
        get(cluster, "http://server/")?.starts_with("server=server "),
        "it does not work without the mesh"
    );
    let (far, near) = loads(cluster)?;
    join(cluster)?;
    std::thread::sleep(SETTLE);
    none_failed(cluster, "the label set", far, near)?;
    until_proven(cluster, &["client", "near", "server"])
}

fn loads(cluster: &Cluster) -> Result<(Load, Load)> {
    let far = Load::begin(cluster, "client", "http://server/")?;
    Ok((far, Load::begin(cluster, "client", "http://near/")?))
}

fn none_failed(cluster: &Cluster, during: &str, far: Load, near: Load) -> Result<()> {
    let counted = [
        ("to the other node", far.end(cluster)?),
        ("within the node", near.end(cluster)?),
    ];
    for (where_to, counted) in counted {
        let what = format!("{during}, {where_to}");
        report(cluster, &what, &counted);
        counted.none_failed(&what)?;
    }
    Ok(())
}

/// With Pods that are in the mesh until the last moment.
pub fn uninstall(cluster: &mut Cluster) -> Result<()> {
    expect_mesh(cluster)?;
    let halves = KernelHalf::of_all(cluster)?;
    let (far, near) = loads(cluster)?;
    let done = helm::run(
        cluster,
        &format!("uninstall culvert --namespace {MESH} --wait --timeout 140s"),
    );
    std::thread::sleep(SETTLE);
    let (far, near) = (far.end(cluster)?, near.end(cluster)?);
    report(cluster, "the mesh uninstalled under Pods of it, to the other node", &far);
    report(cluster, "the mesh uninstalled under Pods of it, within the node", &near);
    println!("helm said: {}", done?.trim());
    near.none_failed("the uninstallation")?;
    // Its Pod has been in another network namespace since its node lost its power.
    before(cluster)?.without("server").expect_as_before(cluster)?;
    halves.iter().try_for_each(KernelHalf::expect_none)?;
    let (is_seen, answer) = is_on_the_wire(cluster, "server")?;
    ensure!(answer?.starts_with("server=server "), "it does not work without the mesh");
    ensure!(is_seen, "something still hides what the client says");
    let after = Load::begin(cluster, "client", "http://server/")?;
    std::thread::sleep(SETTLE);
    after.end(cluster)?.none_failed("the time after the uninstallation")?;
    // Pods start without the plugin, and what it has made ends without it.
    cluster.kubectl().apply(&pod("late", 2, "[sleep, inf]"))?;
    cluster.kubectl().wait_for(SHOP, "Ready", &["pod/late"])?;
    cluster.kubectl().run(&[
        "-n",
        SHOP,
        "delete",
        "pod",
        "two",
        "--ignore-not-found",
        "--wait=true",
        "--timeout=60s",
    ])?;
    forget_what_was_said(cluster)?;
    let left = cluster
        .kubectl()
        .run(&["-n", MESH, "get", "all,role,rolebinding,serviceaccount", "-o", "name"])?;
    ensure!(!left.contains("mesh-"), "left in {MESH}:\n{left}");
    Ok(())
}

/// By the command of docs/DEPLOY.md.
fn forget_what_was_said(cluster: &Cluster) -> Result<()> {
    ensure!(
        capture(cluster, "client")? == "proven",
        "nothing stays on Pods, and docs/DEPLOY.md says that it does"
    );
    let text = std::fs::read_to_string(checkout("docs/DEPLOY.md"))?;
    let command = text.lines().find(|line| line.starts_with("kubectl annotate pods"));
    let command = command.context("docs/DEPLOY.md has no such command")?;
    cluster.kubectl().shell(cluster.folder(), command)?.ok(command)?;
    let pods = cluster.kubectl().run(&["get", "pods", "-A", "-o", "yaml"])?;
    ensure!(!pods.contains("culvert.dev/"), "left on Pods:\n{pods}");
    Ok(())
}
