//! The mesh on a cluster by its chart.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use super::Cluster;
use super::culvert::{IMAGE_PREFIX, NAMESPACE, UNIFIED, has_sys_resource, has_version_1, image_tag, load_images, shipped};
use crate::binaries::Build;
use crate::suite;

/// Where `cargo xtask test kube` says Helm is.
const VARIABLE: &str = "CULVERT_HELM";
const AGENT_CAPABILITIES: &str = "\"SYS_PTRACE\" \"SYS_RESOURCE\"";

/// By docs/DEPLOY.md, with the images that were just built, and these flags more.
///
/// # Errors
/// It does not come up.
pub fn install(cluster: &Cluster, flags: &[&str]) -> Result<()> {
    load_images(cluster, Build::This)?;
    let shipped = shipped()?;
    write_chart(cluster)?;
    let crds = shipped.join("crds");
    cluster
        .kubectl()
        .run(&["apply", "--server-side", "-f", crds.to_str().context("a path")?])?;
    let flags = [&["--create-namespace"], flags].concat();
    run(cluster, &command("install", &flags, &[], has_version_1(cluster)?))?;
    cluster.kubectl().rolled_out(NAMESPACE, "deployment/mesh-control")?;
    cluster.kubectl().rolled_out(NAMESPACE, "daemonset/mesh-agent")
}

/// `helm upgrade` with these values beside those of the installation.
///
/// # Errors
/// As Helm says.
pub fn upgrade(cluster: &Cluster, values: &[&str]) -> Result<String> {
    run(
        cluster,
        &command("upgrade", &["--reset-then-reuse-values"], values, has_version_1(cluster)?),
    )
}

/// # Errors
/// There is none: a skip.
pub fn program() -> Result<OsString> {
    std::env::var_os(VARIABLE).ok_or_else(|| {
        suite::skip(&format!(
            "{VARIABLE} is not set (`cargo xtask test kube` sets it, where there is a Helm)"
        ))
    })
}

/// Helm's command line, in the folder with the chart.
///
/// # Errors
/// As Helm says.
pub fn run(cluster: &Cluster, arguments: &str) -> Result<String> {
    let program = program()?;
    let command = format!(
        "HELM_NO_PLUGINS=1 HELM_CACHE_HOME=./helm HELM_CONFIG_HOME=./helm HELM_DATA_HOME=./helm '{}' {arguments}",
        program.display()
    );
    cluster.kubectl().shell(cluster.folder(), &command)?.ok(&command)
}

fn command(verb: &str, flags: &[&str], values: &[&str], has_version_1: bool) -> String {
    let tag = image_tag(Build::This);
    let mut command =
        format!("{verb} culvert ./chart --namespace {NAMESPACE} --set image.prefix={IMAGE_PREFIX} --set-string image.tag={tag}");
    for flag in flags {
        command += &format!(" {flag}");
    }
    if has_version_1 {
        command += &format!(" --set agent.cgroupRoot={UNIFIED}");
    }
    for value in values {
        // Helm has these after all of --set, whatever the order.
        command += &format!(" --set-string {value}");
    }
    command
}

/// A copy of the chart, for what this machine has and has not.
fn write_chart(cluster: &Cluster) -> Result<()> {
    let shipped = shipped()?.join("chart/culvert");
    let chart: PathBuf = cluster.folder().join("chart");
    for folder in ["", "templates"] {
        std::fs::create_dir_all(chart.join(folder))?;
        for file in std::fs::read_dir(shipped.join(folder))? {
            let file = file?;
            if std::fs::metadata(file.path())?.is_file() {
                std::fs::copy(file.path(), chart.join(folder).join(file.file_name()))?;
            }
        }
    }
    if !has_sys_resource()? {
        // A runtime gives nobody what it does not have itself. Without it the agent has the descriptors that its hard limit allows.
        let file = chart.join("templates/agent.yaml");
        let text = std::fs::read_to_string(&file)?;
        ensure!(
            text.contains(AGENT_CAPABILITIES),
            "the chart's capabilities have another form"
        );
        std::fs::write(&file, text.replace(" \"SYS_RESOURCE\"", ""))?;
    }
    Ok(())
}
