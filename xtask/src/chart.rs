//! What must hold of `deploy/chart`: Helm's own rules, that bad values are refused with their name, that what can be turned off and on
//! is, and that deploy/culvert.yaml and deploy/uninstall.yaml are what it renders.

use std::fs;

use anyhow::{Context as _, Result, bail};

use crate::generate;
use crate::helm::Helm;
use crate::workspace::Workspace;

/// Values that no installation can mean, and what the refusal names.
const REFUSED: [(&str, &str); 9] = [
    ("agent.metric=0.0.0.0:1", "metric"),
    ("agent.metrics=15020", "/agent/metrics"),
    ("agent.drainSeconds=5s", "/agent/drainSeconds"),
    ("agent.cgroupRoot=cgroup", "/agent/cgroupRoot"),
    ("agent.kubeletCgroup=/", "/agent/kubeletCgroup"),
    ("uninstall.timeoutSeconds=0", "/uninstall/timeoutSeconds"),
    ("control.replicas=0", "/control/replicas"),
    ("mesh.trustDomain=Cluster.Local", "/mesh/trustDomain"),
    ("image.prefix=example.org", "/image/prefix"),
    ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
    ("dashboards.namespace=No_Such", "/dashboards/namespace"),
];

/// Values, what is rendered with them, and what is not.
const RENDERED: [(&str, &str, &str); 13] = [
    (
        "agent.kubeletCgroup=/system.slice/k3s.service",
        "- --kubelet-cgroup=/system.slice/k3s.service",
        "kind: Namespace",
    ),
    ("agent.kubeletCgroup=", "kind: DaemonSet", "--kubelet-cgroup"),
    ("cni.enabled=true", "name: install-cni", "name: no-such-thing"),
    ("cni.enabled=false", "name: mesh-agent", "install-cni"),
    ("namespace.create=false", "kind: DaemonSet", "kind: Namespace"),
    ("uninstall.onDelete=false", "name: mesh-agent", "mesh-uninstall"),
    ("podMonitor.enabled=true", "replacement: \"$1:15020\"", "kind: Namespace"),
    (
        "networkPolicy.enabled=false",
        "kind: PodDisruptionBudget",
        "kind: NetworkPolicy",
    ),
    (
        "admissionPolicy.enabled=false",
        "kind: DaemonSet",
        "kind: ValidatingAdmissionPolicy",
    ),
    ("podMonitor.enabled=true", "name: mesh-control", "kind: PrometheusRule"),
    (
        "prometheusRule.enabled=true",
        "alert: MeshPodUnprotected",
        "grafana_dashboard",
    ),
    ("dashboards.enabled=true", "grafana_dashboard: \"1\"", "kind: PrometheusRule"),
    (
        "image.prefix=example.test/mesh/",
        "image: example.test/mesh/mesh-agent:",
        "image: mesh-",
    ),
];

pub fn test(workspace: &Workspace, helm: &Helm) -> Result<()> {
    helm.lint()?;
    for (value, names) in REFUSED {
        match helm.render(&[value]) {
            Ok(_) => bail!("{value} is accepted"),
            Err(error) if error.to_string().contains(names) => {}
            Err(error) => bail!("{value} is refused without {names}: {error}"),
        }
    }
    for (value, there, absent) in RENDERED {
        let rendered = helm.render(&[value])?;
        if !rendered.contains(there) || rendered.contains(absent) {
            bail!("with {value}: {there:?} must be rendered, and {absent:?} must not");
        }
    }
    dashboards(workspace, helm)?;
    let stale = generate::manifests(workspace, helm, true)?;
    if stale.is_empty() {
        Ok(())
    } else {
        bail!("{} is stale: cargo xtask generate", stale.join(", "))
    }
}

/// Each dashboard arrives whole, and so do the rules: as JSON and YAML that say what the files say.
fn dashboards(workspace: &Workspace, helm: &Helm) -> Result<()> {
    let rendered = helm.render(&["dashboards.enabled=true", "prometheusRule.enabled=true"])?;
    let mut files = 0;
    for entry in fs::read_dir(workspace.root.join("deploy/dashboards"))? {
        let path = entry?.path();
        let name = path.file_name().context("a name")?.to_string_lossy().into_owned();
        arrives(&rendered, &fs::read_to_string(&path)?, 4).with_context(|| name.clone())?;
        if !rendered.contains(&format!("  {name}: |\n")) {
            bail!("{name} is in no ConfigMap under its name");
        }
        files += 1;
    }
    if files == 0 {
        bail!("deploy/dashboards has no dashboards");
    }
    let rules = fs::read_to_string(workspace.root.join("deploy/alerts/culvert-rules.yaml"))?;
    arrives(&rendered, &rules, 2).context("the rules")
}

/// The text is there, each line moved in by so much.
fn arrives(rendered: &str, text: &str, indent: usize) -> Result<()> {
    let moved: Vec<String> = text
        .trim_end()
        .lines()
        .map(|line| format!("{}{line}", " ".repeat(indent)))
        .collect();
    if rendered.contains(&moved.join("\n")) {
        Ok(())
    } else {
        bail!("it is not rendered as it is")
    }
}
