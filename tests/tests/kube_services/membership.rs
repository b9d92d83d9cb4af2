//! Which Pods are in the mesh, and from when on.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::{APP_IMAGE, culvert, manifests};
use mesh_tests::poll;
use mesh_tests::suite;
use serde_json::Value;

use crate::world::{PATIENCE, SHOP, World, pod};

/// Its containers ask before the application is there.
pub fn first_containers(world: &mut World) -> Result<()> {
    let container = |name: &str, more: &str| {
        format!("    - {{name: {name}, image: '{APP_IMAGE}', command: [sh, -c, \"mesh-test-app get http://web/{name}{more}\"]")
    };
    let spec = format!(
        "  initContainers:\n{}}}\n{}, restartPolicy: Always}}\n{}}}",
        container("first", ""),
        container("beside", " && sleep inf"),
        container("last", ""),
    );
    let layered = pod(
        "layered",
        1,
        "app: layered",
        "[sh, -c, \"mesh-test-app get http://web/application && sleep inf\"]",
        &spec,
    );
    world.kubectl().apply(&layered)?;
    world.kubectl().wait_for(SHOP, "Ready", &["pod/layered"])?;
    for container in ["first", "beside", "last", "app"] {
        let said = poll::until("the container's answer", PATIENCE, || {
            let said = world.kubectl().run(&["-n", SHOP, "logs", "layered", "-c", container])?;
            Ok((!said.is_empty()).then_some(said))
        })?;
        let lines: Vec<&str> = said.lines().collect();
        ensure!(lines.len() == 1 && lines[0].starts_with("server=web-"), "{container}: {said}");
    }
    let of_it = poll::until("the lines of all four, from both ends", PATIENCE, || {
        let lines = world.lines_from("layered")?;
        Ok((lines.len() >= 8).then_some(lines))
    })?;
    for line in of_it {
        ensure!(line["connection_security_policy"] == "mutual_tls", "not by the mesh: {line}");
    }
    let pod = world.kubectl().get(&["-n", SHOP, "pod", "layered"])?;
    let statuses = [&pod["status"]["initContainerStatuses"], &pod["status"]["containerStatuses"]];
    for status in statuses.iter().filter_map(|list| list.as_array()).flatten() {
        ensure!(status["restartCount"] == 0, "a first attempt has failed: {status}");
    }
    world
        .kubectl()
        .run(&["-n", SHOP, "delete", "pod", "layered", "--wait=false"])
        .map(drop)
}

pub fn asks_out(world: &mut World) -> Result<()> {
    let out = pod("out", 2, "app: out, culvert.dev/mesh: disabled", "[sleep, inf]", "");
    world.kubectl().apply(&out)?;
    world.kubectl().wait_for(SHOP, "Ready", &["pod/out"])?;
    ensure!(
        world.ask_one("out", "http://web/", 1)?[0].starts_with("web-"),
        "it reaches nobody"
    );
    let line = world.until_logged("what it sent arrives in clear", |line| {
        line["direction"] == "inbound" && line["source_workload"] == "out"
    })?;
    ensure!(line["path"] == "plaintext" && line["source_principal"] == "", "{line}");
    ensure!(culvert::capture(&world.cluster, SHOP, "out")?.is_null(), "it is captured");
    // The label is the Pod's own wish, also while it runs.
    world
        .kubectl()
        .run(&["-n", SHOP, "label", "pod", "out", "culvert.dev/mesh-"])?;
    world.until_proven(&["out"])?;
    world
        .kubectl()
        .run(&["-n", SHOP, "label", "pod", "out", "culvert.dev/mesh=disabled"])?;
    poll::until_true("it is out again", PATIENCE, || {
        let is_enrolled = world.metric(2, "mesh_pod_protected", &["pod=\"out\""])?.is_some();
        Ok(culvert::capture(&world.cluster, SHOP, "out")?.is_null() && !is_enrolled)
    })?;
    ensure!(
        world.ask_one("out", "http://web/", 1)?[0].starts_with("web-"),
        "once it has left it reaches nobody"
    );
    world
        .kubectl()
        .run(&["-n", SHOP, "delete", "pod", "out", "--wait=false"])
        .map(drop)
}

/// The namespace's label and its Pods come at the same time: whichever is first, they are in the mesh in the end.
pub fn race(world: &mut World) -> Result<()> {
    const SPACE: &str = "race";
    let kubectl = world.kubectl();
    let pods = |names: &[String]| -> String {
        let of = |(n, name): (usize, &String)| {
            pod(name, 1 + u8::try_from(n % 2).unwrap_or(0), "app: race", "[sleep, inf]", "")
                .replace(&format!("namespace: {SHOP}"), &format!("namespace: {SPACE}"))
        };
        names.iter().enumerate().map(of).collect()
    };
    let names: Vec<String> = (0..6).map(|n| format!("racer-{n}")).collect();
    kubectl.run(&["create", "namespace", SPACE])?;
    kubectl.apply(&pods(&names[..3]))?;
    kubectl.run(&["label", "namespace", SPACE, "culvert.dev/mesh=enabled"])?;
    kubectl.apply(&pods(&names[3..]))?;
    let all: Vec<String> = names.iter().map(|name| format!("pod/{name}")).collect();
    kubectl.wait_for(SPACE, "Ready", &all.iter().map(String::as_str).collect::<Vec<_>>())?;
    for name in &names {
        poll::until_true(&format!("{name} is proven"), PATIENCE, || {
            Ok(culvert::capture(&world.cluster, SPACE, name)? == "proven")
        })?;
    }
    kubectl.run(&["delete", "namespace", SPACE, "--wait=false"]).map(drop)
}

/// Each of them runs, is left alone by the agents, and is named with the reason.
pub fn refused(world: &mut World) -> Result<()> {
    let class = "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: kata-qemu}\nhandler: runc\n---\n";
    let sleeps = "[sleep, inf]";
    let with_sidecar = format!(
        "[sleep, inf]\n    - {{name: istio-proxy, image: '{APP_IMAGE}', command: [sleep, inf]}}\n    - name: third\n      image: {APP_IMAGE}\n      command: [sleep, inf]"
    );
    let captured = pod("captured", 1, "app: refused", sleeps, "").replace(
        "labels: {app: refused}",
        "labels: {app: refused}, annotations: {ambient.istio.io/redirection: enabled}",
    );
    let manifests = class.to_owned()
        + &pod("machine", 1, "app: refused", sleeps, "  runtimeClassName: kata-qemu")
        + &pod("sidecar", 1, "app: refused", &with_sidecar, "")
        + &captured;
    world.kubectl().apply(&manifests)?;
    world
        .kubectl()
        .wait_for(SHOP, "Ready", &["pod/machine", "pod/sidecar", "pod/captured"])?;
    for (pod, why) in [
        ("machine", "its runtime class runs it in a machine of its own"),
        ("sidecar", "it has another mesh's sidecar (istio-proxy)"),
        ("captured", "another mesh captures it"),
    ] {
        // By the control plane, in its log and its /status; by the agent, in its own.
        let said = format!("Pod {SHOP}/{pod} is not in the mesh: {why}");
        poll::until_true(&format!("the control plane's log says: {said}"), PATIENCE, || {
            let logs = world.kubectl().run(&[
                "-n",
                culvert::NAMESPACE,
                "logs",
                "deployment/mesh-control",
                "--all-pods=true",
                "--since=5m",
            ])?;
            Ok(logs.contains(&said))
        })?;
        ensure!(culvert::capture(&world.cluster, SHOP, pod)?.is_null(), "{pod} is captured");
        let name = format!("pod=\"{pod}\"");
        ensure!(
            world.metric(1, "mesh_pod_protected", &[&name])?.is_none(),
            "{pod} is enrolled half-way"
        );
    }
    poll::until_true("the agent counts them", PATIENCE, || {
        Ok(world.metric(1, "mesh_following_pods", &["state=\"refused\""])? == Some(3.0))
    })?;
    // As though there were no mesh.
    for pod in ["machine", "sidecar"] {
        ensure!(
            world.ask_one(pod, "http://web/", 1)?[0].starts_with("web-"),
            "{pod} reaches nobody"
        );
    }
    world
        .kubectl()
        .run(&["-n", SHOP, "delete", "pods", "-l", "app=refused", "--wait=false"])
        .map(drop)
}

const CONTROLS: &str = "app.kubernetes.io/name=mesh-control";
/// DNS and the control plane would wait for each other.
const KEPT_OUT: [&str; 2] = ["kube-system", culvert::NAMESPACE];

/// Their label is ignored, which is told, and what they are made of starts as ever.
pub fn kept_out(world: &mut World) -> Result<()> {
    let kubectl = world.kubectl();
    let bystander = manifests::pod(culvert::NAMESPACE, "bystander", 1, "app: bystander", "[sleep, inf]", "");
    let tried = while_labelled(world, &bystander);
    let unlabelled = KEPT_OUT
        .into_iter()
        .try_for_each(|namespace| kubectl.run(&["label", "namespace", namespace, "culvert.dev/mesh-"]).map(drop));
    let gone = kubectl.delete(&bystander).map(drop);
    tried.and(unlabelled).and(gone)
}

fn while_labelled(world: &World, bystander: &str) -> Result<()> {
    let kubectl = world.kubectl();
    for namespace in KEPT_OUT {
        kubectl.run(&["label", "namespace", namespace, "culvert.dev/mesh=enabled"])?;
    }
    for namespace in KEPT_OUT {
        let about = format!("involvedObject.kind=Namespace,involvedObject.name={namespace},reason=MeshLabelIgnored");
        let event = poll::until(
            &format!("it is told that the label of {namespace} is ignored"),
            PATIENCE,
            || {
                let list = kubectl.get(&["-n", "default", "events", "--field-selector", &about])?;
                Ok(list["items"].as_array().and_then(|events| events.first().cloned()))
            },
        )?;
        let message = event["message"].as_str().unwrap_or_default();
        ensure!(event["type"] == "Warning" && message.contains("is ignored"), "{event}");
    }
    kubectl.run(&["-n", "kube-system", "rollout", "restart", "deployment/coredns"])?;
    kubectl.rolled_out("kube-system", "deployment/coredns")?;
    let controls = world.cluster.pods(culvert::NAMESPACE, CONTROLS)?;
    let one = controls.first().context("a control plane")?;
    let one = one["metadata"]["name"].as_str().context("a name")?;
    kubectl.run(&["-n", culvert::NAMESPACE, "delete", "pod", one, "--wait=true"])?;
    kubectl.rolled_out(culvert::NAMESPACE, "deployment/mesh-control")?;
    kubectl.wait_for(culvert::NAMESPACE, "Ready", &["pod", "-l", CONTROLS])?;
    // mesh-control's Pods ask out for themselves; this one does not.
    kubectl.apply(bystander)?;
    kubectl.wait_for(culvert::NAMESPACE, "Ready", &["pod/bystander"])?;
    for namespace in KEPT_OUT {
        let list = kubectl.get(&["-n", namespace, "pods"])?;
        let all = list["items"].as_array().context("Pods")?;
        ensure!(!all.is_empty(), "nobody is in {namespace}");
        for one in all {
            let metadata = &one["metadata"];
            ensure!(
                metadata["annotations"]["culvert.dev/capture"].is_null(),
                "captured: {metadata}"
            );
        }
    }
    ensure!(
        world.metric(1, "mesh_pod_protected", &["pod=\"bystander\""])?.is_none(),
        "a Pod beside the control plane is enrolled"
    );
    let list = world
        .cluster
        .node(1)
        .run(&["cat", "/etc/cni/net.d/culvert-namespaces"], poll::SOON)?;
    let list = list.ok("the plugin's list of namespaces")?;
    ensure!(
        list.contains(SHOP) && !KEPT_OUT.iter().any(|namespace| list.contains(namespace)),
        "the plugin would hold their Pods back: {list}"
    );
    poll::until_true("names are found", PATIENCE, || {
        Ok(world.ask_one("client", "http://web/", 1)?[0].starts_with("web-"))
    })
}

/// Where the node's runtime can make one.
pub fn user_namespace(world: &mut World) -> Result<()> {
    let mapped = pod(
        "mapped",
        1,
        "app: mapped",
        "[sh, -c, \"cat /proc/self/uid_map; mesh-test-app get http://web/mapped; sleep inf\"]",
        "  hostUsers: false",
    );
    world.kubectl().apply(&mapped)?;
    let outcome = poll::until("it is Ready, or cannot be", PATIENCE, || {
        let pod = world.kubectl().get(&["-n", SHOP, "pod", "mapped"])?;
        let conditions = pod["status"]["conditions"].as_array();
        let ready = conditions
            .into_iter()
            .flatten()
            .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
        if ready {
            return Ok(Some(Ok(())));
        }
        let events = world
            .kubectl()
            .get(&["-n", SHOP, "events", "--field-selector=involvedObject.name=mapped"])?;
        let failed = events["items"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|event| event["reason"].as_str().is_some_and(|reason| reason.starts_with("Failed")));
        Ok(failed.map(|event| Err(event["message"].clone())))
    })?;
    if let Err(message) = outcome {
        world
            .kubectl()
            .run(&["-n", SHOP, "delete", "pod", "mapped", "--wait=false"])?;
        // Debian 12's container runtime has none; that the mesh captures such a Pod is shown without one, in mesh-agent's suite
        // `capture`. What is shown here is that it is not the mesh that keeps it from starting.
        let message = message.as_str().unwrap_or_default().to_owned();
        ensure!(
            message.contains("user namespace") && !message.contains("mesh"),
            "something else keeps it from starting: {message}"
        );
        suite::say(&format!("the nodes' container runtime has no user namespaces: {message}"));
        return Ok(());
    }
    world.until_proven(&["mapped"])?;
    let said = poll::until("its first connection", PATIENCE, || {
        let said = world.kubectl().logs(SHOP, "mapped")?;
        Ok(said.contains("server=").then_some(said))
    })?;
    let first = said.lines().next().context("its user map")?;
    let on_host: Vec<&str> = first.split_whitespace().collect();
    ensure!(on_host.len() == 3 && on_host[1] != "0", "it has the node's users: {first}");
    let line: Value = world.until_logged("its connection", |line| line["source_workload"] == "mapped")?;
    ensure!(line["connection_security_policy"] == "mutual_tls", "{line}");
    world
        .kubectl()
        .run(&["-n", SHOP, "delete", "pod", "mapped", "--wait=false"])
        .map(drop)
}
