//! The kubelet's own probes on a real cluster, under STRICT and a policy that denies everybody.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::binaries;
use mesh_tests::kube::{APP_IMAGE, Cluster, culvert};
use mesh_tests::poll;
use mesh_tests::process::Output;
use mesh_tests::suite;
use serde_json::Value;

const SHOP: &str = "shop";
/// Of a Pod on the host's network.
const OUTSIDE: &str = "outside";
/// How each is asked, and at which port.
const PROBED: [(&str, u16); 3] = [("by-http", 8080), ("by-tcp", 9000), ("by-grpc", 9100)];
/// As the testbed makes it, below the node's root of version 2.
const KUBELET_CGROUP: &str = "system.slice/kubelet.service";
const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    suite::run(
        "kube_probes",
        || {
            let cluster = Cluster::start(1)?;
            match culvert::deploy(&cluster) {
                Ok(()) => Ok(cluster),
                Err(error) => Err(explain(&cluster, error)),
            }
        },
        explain,
        &[
            ("pods_become_ready_by_each_kind_of_probe", become_ready),
            ("they_stay_ready_while_the_kubelet_asks", stay_ready),
            ("who_imitates_the_kubelet_is_refused", imitation),
            ("probes_go_on_after_the_kubelet_has_started_again", kubelet_again),
        ],
    )
}

fn explain(cluster: &Cluster, error: anyhow::Error) -> anyhow::Error {
    culvert::say_logs(cluster);
    println!(
        "{}",
        cluster.kubectl().run(&["-n", SHOP, "describe", "pods"]).unwrap_or_default()
    );
    cluster.with_logs(error)
}

fn pod(name: &str, command: &str, probe: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {SHOP}, labels: {{app: {name}}}}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: app
      image: {APP_IMAGE}
      command: {command}
      ports: [{{name: asked, containerPort: 9000}}]
      readinessProbe: {{{probe}, periodSeconds: 1, failureThreshold: 1}}
      livenessProbe: {{{probe}, periodSeconds: 1, failureThreshold: 30}}
      resources: {{requests: {{cpu: 10m, memory: 8Mi}}, limits: {{memory: 64Mi}}}}
---
"#
    )
}

fn become_ready(cluster: &mut Cluster) -> Result<()> {
    let mesh = culvert::NAMESPACE;
    let rules = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {SHOP}, labels: {{culvert.dev/mesh: enabled}}}}\n---\n\
         apiVersion: v1\nkind: Namespace\nmetadata: {{name: {OUTSIDE}}}\n---\n\
         apiVersion: culvert.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default, namespace: {mesh}}}\n\
         spec: {{mtls: Strict}}\n---\n\
         apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: nobody, namespace: {SHOP}}}\n\
         spec: {{action: Deny, rules: [{{}}]}}\n---\n"
    );
    let serve = r#"[mesh-test-app, serve, probed, "8080", "9000"]"#;
    let host = format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: host, namespace: {OUTSIDE}}}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 1
  containers: [{{name: app, image: {APP_IMAGE}, command: [sleep, inf]}}]
"#
    );
    let pods = pod("by-http", serve, "httpGet: {port: 8080, path: /healthz}")
        + &pod("by-tcp", serve, "tcpSocket: {port: asked}")
        + &pod("by-grpc", r#"[mesh-test-app, health, "9100"]"#, "grpc: {port: 9100}")
        + &host;
    let kubectl = cluster.kubectl();
    kubectl.apply(&rules)?;
    kubectl.apply(&pods)?;
    kubectl.wait_for(
        SHOP,
        "Ready",
        &PROBED.map(|(name, _)| format!("pod/{name}")).each_ref().map(String::as_str),
    )?;
    kubectl.wait_for(OUTSIDE, "Ready", &["pod/host"])?;
    culvert::until_proven(cluster, SHOP, &PROBED.map(|(name, _)| name))?;
    let state = culvert::metrics(cluster, 1)?;
    ensure!(
        state
            .lines()
            .filter(|line| line.starts_with("mesh_kubelet_unknown{"))
            .all(|line| line.ends_with(" 0")),
        "the agent does not know the kubelet: {state}"
    );
    Ok(())
}

fn passed(cluster: &Cluster) -> Result<u64> {
    let metrics = culvert::metrics(cluster, 1)?;
    let line = metrics.lines().find(|line| line.contains(r#"event="passed_probe""#));
    Ok(line
        .and_then(|line| line.rsplit(' ').next())
        .context("no passed_probe")?
        .parse()?)
}

/// Dozens of probes later.
fn stay_ready(cluster: &mut Cluster) -> Result<()> {
    let since = |cluster: &Cluster| -> Result<Vec<Value>> {
        PROBED
            .iter()
            .map(|(name, _)| {
                let pod = cluster.kubectl().get(&["-n", SHOP, "pod", name])?;
                let status = &pod["status"];
                ensure!(
                    status["containerStatuses"][0]["restartCount"] == 0,
                    "{name} was restarted: {status}"
                );
                let conditions = status["conditions"].as_array().context("conditions")?;
                let ready = conditions
                    .iter()
                    .find(|condition| condition["type"] == "Ready")
                    .context("Ready")?;
                ensure!(ready["status"] == "True", "{name} is not ready: {ready}");
                Ok(ready["lastTransitionTime"].clone())
            })
            .collect()
    };
    let (ready_since, first) = (since(cluster)?, passed(cluster)?);
    poll::until_true("the kubelet has asked sixty times more", PATIENCE, || {
        Ok(passed(cluster)? >= first + 60)
    })?;
    ensure!(since(cluster)? == ready_since, "a Pod was not ready in between");
    Ok(())
}

/// Those whose answer this client understands, at the ports where the kubelet asks them: what was reached.
fn reached(cluster: &Cluster, run: impl Fn(&[&str]) -> Result<Output>) -> Result<Vec<&'static str>> {
    let mut reached = Vec::new();
    for (name, port) in PROBED.into_iter().filter(|(name, _)| *name != "by-grpc") {
        let address = format!("{}:{port}", cluster.pod_address(SHOP, name)?);
        let url = format!("http://{address}/healthz");
        let output = match name {
            "by-http" => run(&["get", &url])?,
            _ => run(&["connect", &address])?,
        };
        if output.stdout.contains("server=probed ") || output.stdout.contains("\"ok\":true") {
            reached.push(name);
        }
    }
    Ok(reached)
}

fn imitation(cluster: &mut Cluster) -> Result<()> {
    let program = binaries::path("mesh-test-app")?.display().to_string();
    let in_cgroup = |cgroup: &str| {
        reached(cluster, |command| {
            let script = format!(
                "root=/sys/fs/cgroup; [ ! -d $root/unified ] || root=$root/unified; mkdir -p $root/{cgroup}
                 echo 0 > $root/{cgroup}/cgroup.procs; exec {program} {}",
                command.join(" ")
            );
            cluster.node(1).run(&["/bin/sh", "-ec", &script], poll::SOON)
        })
    };
    // In the kubelet's own cgroup all is let in: it is the cgroup that counts, and this client sees what it is let in to.
    let by_kubelet = in_cgroup(KUBELET_CGROUP)?;
    ensure!(
        by_kubelet == ["by-http", "by-tcp"],
        "in the kubelet's cgroup only {by_kubelet:?} is reached"
    );
    let by_root = in_cgroup("elsewhere")?;
    ensure!(
        by_root.is_empty(),
        "a process of root's on the node imitates the kubelet, and is let in: {by_root:?}"
    );
    let in_host = |command: &[&str]| {
        let command: Vec<&str> = ["mesh-test-app"].into_iter().chain(command.iter().copied()).collect();
        cluster.kubectl().exec(OUTSIDE, "host", &command)
    };
    // It is let in where all of the node are: what it does not reach, it is refused.
    let control = in_host(&["get", &culvert::metrics_url(cluster, 1)])?.ok("the agent's metrics by the host's Pod")?;
    ensure!(
        control.contains("mesh_build_info"),
        "the Pod on the host's network reaches nothing: {control}"
    );
    let by_pod = reached(cluster, in_host)?;
    ensure!(
        by_pod.is_empty(),
        "a Pod on the host's network imitates the kubelet, and is let in: {by_pod:?}"
    );
    Ok(())
}

fn kubelet_again(cluster: &mut Cluster) -> Result<()> {
    let node = cluster.node(1);
    let kubelet = format!("cd /sys/fs/cgroup; [ ! -d unified ] || cd unified; cat {KUBELET_CGROUP}/cgroup.procs");
    let pid = |what: &str| node.run(&["/bin/sh", "-ec", &kubelet], poll::SOON)?.ok(what);
    let first = pid("the kubelet's process")?;
    ensure!(!first.trim().is_empty(), "nobody is in the kubelet's cgroup");
    let kill = format!("kill -9 {}", first.split_whitespace().collect::<Vec<_>>().join(" "));
    node.run(&["/bin/sh", "-ec", &kill], poll::SOON)?.ok("killing the kubelet")?;
    poll::until_true("another kubelet runs", PATIENCE, || {
        let now = pid("the kubelet's process").unwrap_or_default();
        Ok(!now.trim().is_empty() && now != first)
    })?;
    let before = passed(cluster)?;
    poll::until_true("it asks, and is let in", PATIENCE, || Ok(passed(cluster)? >= before + 10))?;
    let pods = PROBED.map(|(name, _)| format!("pod/{name}"));
    cluster
        .kubectl()
        .wait_for(SHOP, "Ready", &pods.each_ref().map(String::as_str))
}
