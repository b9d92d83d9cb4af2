//! Pods that end: Jobs, and Pods that terminate with work left.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::APP_IMAGE;
use mesh_tests::poll::{self, SOON};

use crate::world::{PATIENCE, SHOP, World, pod, service};

/// Network namespaces of Pods on a node.
fn namespaces(world: &World, node: usize) -> Result<BTreeSet<String>> {
    let listed = world.cluster.node(node).run(&["ls", "/var/run/netns"], SOON)?.ok("ls")?;
    Ok(listed.lines().map(str::to_owned).collect())
}

pub fn job(world: &mut World) -> Result<()> {
    let before = namespaces(world, 1)?;
    let job = format!(
        r#"
apiVersion: batch/v1
kind: Job
metadata: {{name: once, namespace: {SHOP}}}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      nodeSelector: {{kubernetes.io/hostname: node-1}}
      containers:
        - name: app
          image: {APP_IMAGE}
          command: [mesh-test-app, get, "http://web/from-a-job"]
"#
    );
    world.kubectl().apply(&job)?;
    world.kubectl().wait_for(SHOP, "Complete", &["job/once"])?;
    let said = world.kubectl().logs(SHOP, "job/once")?;
    ensure!(said.contains("server=web-"), "{said}");
    let pods = world.cluster.pods(SHOP, "job-name=once")?;
    let (pod, phase) = (&pods[0]["metadata"]["name"], &pods[0]["status"]["phase"]);
    ensure!(phase == "Succeeded", "{phase}");
    let line = world.until_logged("the job's connection", |line| {
        // Its Pod's name, where it was there before discovery knew whose it is.
        let source = line["source_workload"].as_str().unwrap_or_default();
        source.starts_with("once") && line["direction"] == "outbound"
    })?;
    ensure!(
        line["connection_security_policy"] == "mutual_tls" && line["result"] == "ok",
        "{line}"
    );
    // Its Pod object is still there; nothing of ours is.
    poll::until_true("the Job's network namespace is gone", PATIENCE, || {
        Ok(namespaces(world, 1)?.is_subset(&before))
    })?;
    let name = format!("pod=\"{}\"", pod.as_str().context("a name")?);
    poll::until_true("the agent has forgotten it", PATIENCE, || {
        Ok(world.metric(1, "mesh_pod_protected", &[&name])?.is_none()
            && world.metric(1, "mesh_following_pods", &["state=\"failing\""])? == Some(0.0))
    })?;
    world.kubectl().run(&["-n", SHOP, "delete", "job", "once"]).map(drop)
}

/// It has an application that calls others while it terminates, and a connection that somebody still uses.
pub fn terminating(world: &mut World) -> Result<()> {
    let command = |name: &str| {
        format!(
            r#"[sh, -c, "trap 'exit 0' TERM; mesh-test-app serve {name} 8080 9000 & wait"]
      lifecycle: {{preStop: {{exec: {{command: [sh, -c, "until [ -e /tmp/go ]; do mesh-test-app get http://far-any/last-words; sleep 0.3; done"]}}}}}}"#
        )
    };
    let patient = "  terminationGracePeriodSeconds: 300";
    let manifests = [("leaving", 2), ("staying", 1)]
        .map(|(name, node)| pod(name, node, "app: leaves", &command(name), patient))
        .map(|text| text.replacen("  terminationGracePeriodSeconds: 1\n", "", 1));
    let services = service("leaves", "{selector: {app: leaves}, ports: [{port: 80, targetPort: 8080}]}")
        + &service("far-any", "{selector: {app: far}, ports: [{port: 80, targetPort: 8080}]}");
    world.kubectl().apply(&(manifests.concat() + &services))?;
    world.kubectl().wait_for(SHOP, "Ready", &["pod/leaving", "pod/staying"])?;
    world.until_proven(&["leaving", "staying"])?;
    poll::until_true("both take connections", PATIENCE, || {
        let answers = world.ask_one("client", "http://leaves/", 10)?;
        let servers: BTreeSet<&str> = answers.iter().map(String::as_str).collect();
        Ok(servers == BTreeSet::from(["leaving", "staying"]))
    })?;
    let address = world.cluster.pod_address(SHOP, "leaving")?;
    let chat = format!(
        "(n=0; while [ ! -e /tmp/enough ]; do n=$((n+1)); echo line-$n; sleep 0.2; done; sleep 60) | \
         mesh-test-app chat {address}:9000 > /tmp/chat 2>&1 & sleep 1"
    );
    world.sh("client", &format!("rm -f /tmp/enough; ({chat}) > /dev/null 2>&1 &"))?;
    let lines = || -> Result<usize> {
        let said = world.sh("client", "cat /tmp/chat")?;
        ensure!(
            !said.contains("error") && !said.contains("\"ok\""),
            "the stream has ended: {said}"
        );
        Ok(said.matches("line-").count())
    };
    poll::until_true("the stream lives", PATIENCE, || Ok(lines()? > 0))?;

    world
        .kubectl()
        .run(&["-n", SHOP, "delete", "pod", "leaving", "--wait=false"])?;
    poll::until_true("it takes no new connections", PATIENCE, || {
        let answers = world.ask_one("client", "http://leaves/", 20)?;
        Ok(answers.iter().all(|server| server == "staying"))
    })?;
    let heard = || -> Result<usize> { Ok(world.kubectl().logs(SHOP, "far")?.matches("/last-words").count()) };
    let (calls, live) = (heard()?, lines()?);
    poll::until_true("it still calls others, and its live connection goes on", PATIENCE, || {
        Ok(heard()? >= calls + 3 && lines()? >= live + 3)
    })?;
    // By its own address it can be reached as long as it is there.
    ensure!(
        world.ask_one("client", &format!("http://{address}:8080/"), 1)? == ["leaving"],
        "by its address"
    );
    for line in world.lines_from("leaving")? {
        ensure!(
            line["result"] == "ok" && line["connection_security_policy"] == "mutual_tls",
            "of what it called while it terminated: {line}"
        );
    }
    let complaints = || world.metric(2, "mesh_following_failures_total", &["reason=\"no_process\""]);
    let before = complaints()?;
    world.sh("leaving", "touch /tmp/go")?;
    world
        .kubectl()
        .run(&["-n", SHOP, "wait", "--for=delete", "pod/leaving", "--timeout=60s"])?;
    ensure!(complaints()? == before, "the agent misses a Pod whose end it was told of");
    let ended = poll::until("the stream's end", PATIENCE, || {
        let said = world.sh("client", "cat /tmp/chat")?;
        Ok((said.contains("\"ok\"") || said.contains("error")).then_some(said))
    })?;
    ensure!(ended.matches("line-").count() >= live, "{ended}");
    world.sh("client", "touch /tmp/enough")?;
    world.sh("staying", "touch /tmp/go")?;
    world
        .kubectl()
        .run(&["-n", SHOP, "delete", "pod", "staying", "--wait=false"])
        .map(drop)
}
