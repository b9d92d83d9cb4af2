//! Which build the agents and the control plane on a cluster are, and changing it.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Cluster;
use super::culvert::{self, NAMESPACE, image_name};
use super::shop::PATIENCE;
use crate::binaries::Build;
use crate::mesh::sum_of_series;
use crate::{pins, poll};

/// Where the chart has agents pin.
const PIN_PATH: &str = "sys/fs/bpf/culvert";
/// What the programs of the other build alone count.
const SIGN: (&str, &str) = ("mesh_capture_events_total", "redirected_by_the_other");

/// Gives the agents' DaemonSet that build, and waits for its rollout.
///
/// # Errors
/// It is not rolled out, or one is still of another build.
pub fn agents_of(cluster: &Cluster, build: Build) -> Result<()> {
    let image = image_name("mesh-agent", build);
    let images = [format!("install-cni={image}"), format!("mesh-agent={image}")];
    let kubectl = cluster.kubectl();
    kubectl.run(&[
        "-n",
        NAMESPACE,
        "set",
        "image",
        "daemonset/mesh-agent",
        &images[0],
        &images[1],
    ])?;
    expect_agents(cluster, build)
}

/// The same of the control plane.
///
/// # Errors
/// As [`agents_of`].
pub fn control_of(cluster: &Cluster, build: Build) -> Result<()> {
    let image = format!("mesh-control={}", image_name("mesh-control", build));
    let kubectl = cluster.kubectl();
    kubectl.run(&["-n", NAMESPACE, "set", "image", "deployment/mesh-control", &image])?;
    expect_control(cluster, build)
}

/// Waits for the agents' rollout, and asks the kernel of each node: which version's maps are there. `kubectl rollout status` would not
/// do: it counts the oldest Pod of each node, also one that ends, and an agent that drains is that for as long as a connection is open.
///
/// # Errors
/// It is not rolled out, or one is still of another build.
pub fn expect_agents(cluster: &Cluster, build: Build) -> Result<()> {
    let image = image_name("mesh-agent", build);
    let is_good = |pod: &Value| {
        let status = &pod["status"]["containerStatuses"][0];
        pod["spec"]["containers"][0]["image"] == image && status["ready"] == true
    };
    poll::until_true(&format!("every node has one agent, ready and of {build:?}"), PATIENCE, || {
        let mut agents = cluster.pods(NAMESPACE, "app.kubernetes.io/name=mesh-agent")?;
        agents.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        Ok(agents.len() == cluster.nodes().len() && agents.iter().all(is_good))
    })?;
    for node in cluster.nodes() {
        pins::until_alone(&node.root()?.join(PIN_PATH), build, PATIENCE)
            .with_context(|| format!("{} has an agent of {build:?}", node.name()))?;
    }
    Ok(())
}

/// Waits until programs of this build redirect what the Pods of node 1 open, and for the other build's: those of no other.
///
/// # Errors
/// Not in time.
pub fn expect_programs(cluster: &Cluster, build: Build) -> Result<()> {
    let redirected = || -> Result<f64> {
        let page = culvert::metrics(cluster, 1)?;
        Ok(sum_of_series(&page, SIGN.0, &[("event", SIGN.1)]))
    };
    match build {
        Build::Other => poll::until_true("the other build's programs redirect connections", PATIENCE, || {
            Ok(redirected()? > 0.0)
        }),
        Build::This => {
            let by_the_other = redirected()?;
            ensure!(
                by_the_other == 0.0,
                "the other build's programs have redirected {by_the_other}"
            );
            Ok(())
        }
    }
}

/// Waits for the control plane's rollout, until no process of it is of another build: by its program, byte for byte.
///
/// # Errors
/// One still is.
pub fn expect_control(cluster: &Cluster, build: Build) -> Result<()> {
    cluster.kubectl().rolled_out(NAMESPACE, "deployment/mesh-control")?;
    // As the image has it.
    let program = cluster.folder().join(format!("mesh-control-{build:?}"));
    let built = build.path("mesh-control")?;
    let output = Command::new("strip").arg("-o").arg(&program).arg(&built).output()?;
    ensure!(output.status.success(), "strip {}: {output:?}", built.display());
    // An `exe` is not there any more when its process has ended meanwhile.
    let script = format!(
        "for exe in /proc/[0-9]*/exe; do [ \"$(readlink $exe)\" != /mesh-control ] || \
         if cmp -s $exe {}; then echo same; elif [ -e $exe ]; then echo other; fi; done",
        program.display()
    );
    let mut last = String::new();
    poll::until_true("every mesh-control is of that build", PATIENCE, || {
        last.clear();
        for node in cluster.nodes() {
            last += &node
                .run(&["sh", "-c", &script], poll::SOON)?
                .ok("what runs as mesh-control")?;
        }
        Ok(last.contains("same") && !last.contains("other"))
    })
    .with_context(|| format!("compared with {build:?}: {last:?}"))
}
