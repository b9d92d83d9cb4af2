//! The upgrade and its rollback, as an administrator does them with Helm.

use anyhow::{Context as _, Result};
use mesh_tests::binaries::Build;
use mesh_tests::kube::builds::{control_of, expect_agents, expect_control, expect_programs};
use mesh_tests::kube::open::Open;
use mesh_tests::kube::shop::{MESH, until_proven};
use mesh_tests::kube::{Cluster, culvert, helm};
use mesh_tests::suite;

use super::skew::whole;
use super::traffic::under_traffic;

pub fn there_and_back(cluster: &mut Cluster) -> Result<()> {
    expect_agents(cluster, Build::This)?;
    expect_control(cluster, Build::This)?;
    let mut open = Open::between(cluster, "client", "server").context("under agents of This")?;
    under_traffic(cluster, &open, "the upgrade", || {
        let tag = format!("image.tag={}", culvert::image_tag(Build::Other));
        helm::upgrade(cluster, &[&tag])?;
        expect_agents(cluster, Build::Other)?;
        expect_control(cluster, Build::Other)
    })?;
    // Not only its maps: what is new goes through its programs.
    expect_programs(cluster, Build::Other)?;
    // Those of before are with the agents of before; these are with the next ones.
    open.more(cluster, "client", "server").context("under agents of Other")?;

    control_of(cluster, Build::This)?;
    whole(cluster, "agents-ahead").context("agents of Other under a control plane of This")?;

    under_traffic(cluster, &open, "the rollback", || {
        helm::run(cluster, &format!("rollback culvert --namespace {MESH}"))?;
        expect_agents(cluster, Build::This)?;
        expect_control(cluster, Build::This)
    })?;
    expect_programs(cluster, Build::This)?;
    until_proven(cluster, &["client", "near", "server"])?;
    let answered = open.finish()?;
    suite::say(&format!("words of the open connections that came back: {answered:?}"));
    Ok(())
}
