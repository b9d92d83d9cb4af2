//! Names that are meant to break out of a line of a log, a label of a metric or a string of JSON.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::binaries;
use mesh_tests::manifests::MESHED;
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::Output;
use mesh_tests::topology::NodeName;
use serde_json::Value;

use super::{Shared, expect_words, since, size};

const NODE: NodeName = NodeName::Two;
const FORGED: &str = "2026-01-01T00:00:00Z ERROR forged";

/// As an argument and as a string of JSON, which YAML can read.
fn hostile_names() -> Vec<String> {
    vec![
        format!("a\n{FORGED}"),
        format!("a\r{FORGED}"),
        "a\"} 1\nforged_total{x=\"".to_owned(),
        "a\u{1b}[2K\u{7}b".to_owned(),
        "a\\n\\\"b".to_owned(),
        "../../etc".to_owned(),
        "a\u{2028}b".to_owned(),
        "a".repeat(254),
    ]
}

fn enroll(mesh: &Mesh, uid: &str, namespace: &str, name: &str, pod: &str) -> Result<Output> {
    let (place, pod) = (mesh.topology.node(NODE), mesh.pod(pod));
    let run_dir = place.run_dir().display().to_string();
    let (netns, cgroup) = (
        pod.netns.path().display().to_string(),
        pod.cgroup.path().display().to_string(),
    );
    let (v4, v6) = (pod.v4.to_string(), pod.v6.to_string());
    let arguments = [
        ["enroll", "--run-dir", &run_dir].as_slice(),
        &[
            "--uid",
            uid,
            "--namespace",
            namespace,
            "--name",
            name,
            "--service-account",
            "web",
        ],
        &["--netns", &netns, "--cgroup", &cgroup, "--address", &v4, "--address", &v6],
    ]
    .concat();
    place
        .agent_place()
        .run(&binaries::path("mesh-agent")?, &arguments, super::PATIENTLY)
}

fn pod_manifest(uid: &str, namespace: &str, name: &str, address: &str) -> String {
    let text = |text: &str| Value::from(text).to_string();
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {}, namespace: {}, uid: {} }}\n\
         spec: {{ nodeName: {}, serviceAccountName: web }}\n\
         status: {{ phase: Running, podIP: \"{address}\", podIPs: [{{ ip: \"{address}\" }}], conditions: [{{ type: Ready, status: \"True\" }}] }}\n",
        text(name),
        text(namespace),
        text(uid),
        NODE.as_str(),
    )
}

/// Each line begins as lines of that log do, and none as the forged one; no control character went through.
fn expect_whole_lines(text: &str) -> Result<()> {
    for line in text.lines() {
        ensure!(
            line.starts_with("20") && line.contains('Z') && !line.starts_with(FORGED),
            "this begins in the middle of something: {line:?}"
        );
        ensure!(!line.contains(char::is_control), "control characters: {line:?}");
    }
    Ok(())
}

fn expect_whole_metrics(page: &str) -> Result<()> {
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').with_context(|| format!("no value: {line:?}"))?;
        ensure!(
            series.starts_with("mesh") && value.parse::<f64>().is_ok() && !line.contains(char::is_control),
            "no series: {line:?}"
        );
    }
    Ok(())
}

pub fn hostile(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let agent_log = mesh.topology.node(NODE).folder.join("mesh-agent.log");
    let control_log = mesh.topology.folder().join("mesh-control.log");
    let (of_agent, of_control) = (size(&agent_log)?, size(&control_log)?);

    // By the local socket, of a Pod that is there and not in the mesh.
    mesh.topology.add_pod("stray", NODE, 60)?;
    for name in hostile_names() {
        for (field, namespace, name) in [("name", MESHED, name.as_str()), ("namespace", name.as_str(), "web")] {
            let refused = enroll(mesh, "uid-stray", namespace, name, "stray")?;
            ensure!(!refused.status.success(), "{field} {name:?} was taken: {}", refused.stdout);
            expect_words(&refused.stderr, &[field, "is not a Kubernetes name"])?;
            ensure!(
                refused.stderr.lines().count() == 1,
                "expected one line, saw {:?}",
                refused.stderr
            );
        }
    }
    ensure!(mesh.listed("stray")?.is_none(), "it is listed all the same");

    // By the control plane's manifests.
    for (number, name) in hostile_names().iter().enumerate() {
        let address = format!("10.61.2.{}", 200 + number);
        let documents = [
            pod_manifest("uid-hostile", MESHED, name, &address),
            pod_manifest("uid-hostile", name, "web", &address),
        ];
        mesh.registry
            .write(&format!("hostile-{number}.yaml"), &documents.join("---\n"))?;
    }
    let status = || -> Result<Value> { Ok(serde_json::from_str(&mesh.control_page("/status")?.body)?) };
    let rejected = poll::until("every hostile manifest is rejected", SOON, || {
        let status = status()?;
        let rejections = status["rejected_manifests"].as_array().context("rejected_manifests")?;
        let of_file = |number: usize| {
            let file = format!("hostile-{number}.yaml");
            rejections
                .iter()
                .filter(|rejection| rejection["file"] == file.as_str())
                .count()
        };
        Ok((0..hostile_names().len())
            .all(|number| of_file(number) == 2)
            .then_some(status))
    })?;
    ensure!(
        !rejected["pods"].to_string().contains("forged"),
        "a Pod of such a name is known: {rejected}"
    );
    for page in [mesh.control_page("/metrics")?.body, mesh.metrics(NODE)?] {
        expect_whole_metrics(&page)?;
    }
    for (log, position) in [(&agent_log, of_agent), (&control_log, of_control)] {
        let said = since(log, position)?;
        ensure!(said.lines().count() >= hostile_names().len(), "expected refusals, saw {said}");
        expect_whole_lines(&said).with_context(|| log.display().to_string())?;
    }
    for number in 0..hostile_names().len() {
        mesh.registry.remove(&format!("hostile-{number}.yaml"))?;
    }
    mesh.topology.remove_pod("stray");
    mesh.wait_for_tunnel("client", "server")
}

pub fn longest(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let name = format!("{}.z", "a".repeat(251));
    mesh.topology.add_pod("long", NODE, 61)?;
    mesh.start_server("long")?;
    let addresses = mesh.pod("long").addresses();
    let manifest = pod_manifest("uid-long", MESHED, &name, &addresses[0].to_string()).replace(
        &format!("podIPs: [{{ ip: \"{}\" }}]", addresses[0]),
        &format!("podIPs: [{{ ip: \"{}\" }}, {{ ip: \"{}\" }}]", addresses[0], addresses[1]),
    );
    mesh.registry.write("long.yaml", &manifest)?;
    let enrolled = enroll(mesh, "uid-long", MESHED, &name, "long")?;
    enrolled.ok("enrolling the Pod of the longest name")?;
    let list = mesh.agent_command(NODE, "list", &[])?;
    ensure!(
        list.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()) && list.contains(&format!("\"name\":\"{name}\"")),
        "expected the whole name, saw {list}"
    );
    let before = mesh.access_log(NODE).position();
    mesh.wait_for_tunnel("client", "long")?;
    let fields = [("direction", "inbound"), ("destination_workload", name.as_str())];
    mesh.access_log(NODE).wait_for(before, &fields, SOON)?;
    let page = mesh.metrics(NODE)?;
    expect_whole_metrics(&page)?;
    ensure!(
        page.contains(&format!("destination_workload=\"{name}\"")),
        "no series has the whole name"
    );
    mesh.agent_command(NODE, "release", &["--uid", "uid-long"])?;
    mesh.registry.remove("long.yaml")?;
    mesh.stop_server("long");
    mesh.topology.remove_pod("long");
    Ok(())
}
