//! What must hold of `deploy/chart`: Helm's own rules, that bad values are refused with their name, that what can be turned off and on
//! is, and that deploy/culvert.yaml and deploy/uninstall.yaml are what it renders.

mod documents;
mod lines;
mod monitoring;
mod shipped;

use anyhow::{Result, bail};

use crate::generate;
use crate::helm::Helm;
use crate::workspace::Workspace;

/// Values that no installation can mean, and what the refusal names.
const REFUSED: [(&str, &str); 12] = [
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
    ("dashboards.labels.grafana_dashboard=null", "/dashboards/labels"),
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
        "dashboards.enabled=true,dashboards.namespace=grafana",
        "namespace: grafana\n  labels:",
        "kind: PrometheusRule",
    ),
    (
        "dashboards.enabled=true,dashboards.annotations.grafana_folder=Culvert",
        "  annotations:\n    grafana_folder: Culvert\ndata:",
        "kind: PrometheusRule",
    ),
    (
        "prometheusRule.enabled=true,prometheusRule.labels.release=prometheus",
        "    release: prometheus\nspec:",
        "grafana_dashboard",
    ),
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
    match helm.template(&[], &["--namespace", "elsewhere"]) {
        Ok(_) => bail!("it can be installed in a namespace that is not the mesh's own"),
        Err(error) if error.to_string().contains("--namespace culvert-system") => {}
        Err(error) => bail!("another namespace is refused without the mend: {error}"),
    }
    for (value, there, absent) in RENDERED {
        let rendered = helm.render(&[value])?;
        if !rendered.contains(there) || rendered.contains(absent) {
            bail!("with {value}: {there:?} must be rendered, and {absent:?} must not");
        }
    }
    shipped::test(workspace, helm)?;
    monitoring::test(workspace, helm)?;
    let stale = generate::manifests(workspace, helm, true)?;
    if stale.is_empty() {
        Ok(())
    } else {
        bail!("{} is stale: cargo xtask generate", stale.join(", "))
    }
}
