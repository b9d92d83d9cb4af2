//! On a real cluster from one build to another with another eBPF ABI version, and back, under connections; with agents and control plane
//! a version apart, either way. The other build is xtask/src/other_build.rs.

#[path = "kube_upgrade/rollouts.rs"]
mod rollouts;
#[path = "kube_upgrade/skew.rs"]
mod skew;
#[path = "kube_upgrade/traffic.rs"]
mod traffic;

use std::process::ExitCode;

use anyhow::Result;
use mesh_tests::binaries::Build;
use mesh_tests::kube::shop::{SHOP, deploy, until_proven, with_logs};
use mesh_tests::kube::{Cluster, culvert, helm};
use mesh_tests::suite;

/// Longer than the suite: what is open outlives each rollout (docs/DEPLOY.md).
const LONG_DRAIN: &str = "--set agent.handoverDrainSeconds=1800";

fn main() -> ExitCode {
    suite::run(
        "kube_upgrade",
        || {
            helm::program()?;
            // Before the cluster is brought up in vain.
            Build::Other.path("mesh-agent")?;
            let cluster = Cluster::start(2)?;
            match prepare(&cluster) {
                Ok(()) => Ok(cluster),
                Err(error) => Err(with_logs(&cluster, error)),
            }
        },
        with_logs,
        &[
            (
                "connections_stay_open_and_none_fails_over_an_upgrade_and_a_rollback",
                rollouts::there_and_back,
            ),
            (
                "agents_work_under_a_control_plane_of_the_next_version",
                skew::control_plane_ahead,
            ),
        ],
    )
}

/// This build, with both images on the nodes, and Pods in the mesh.
fn prepare(cluster: &Cluster) -> Result<()> {
    deploy(cluster)?;
    helm::install(cluster, &[LONG_DRAIN])?;
    culvert::load_images(cluster, Build::Other)?;
    cluster
        .kubectl()
        .run(&["label", "namespace", SHOP, "culvert.dev/mesh=enabled"])?;
    until_proven(cluster, &["client", "near", "server"])
}
