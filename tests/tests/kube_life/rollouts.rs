//! Rollouts of the agents that do not end.

use anyhow::{Result, ensure};
use mesh_tests::kube::load::Load;
use mesh_tests::kube::shop::{MESH, PATIENCE, get, until_proven};
use mesh_tests::kube::{Cluster, helm};
use mesh_tests::poll;
use serde_json::Value;

use super::{expect_mesh, report};

pub const AGENT: &str = "daemonset/mesh-agent";
pub const AGENTS: &str = "app.kubernetes.io/name=mesh-agent";

/// An image that nobody has, and an option that no agent takes: the agents of before go on, and a rollback is the end of it.
pub fn fail_before_they_serve(cluster: &mut Cluster) -> Result<()> {
    for (what, value, sign) in [
        ("an image that nobody has", "image.tag=none", "Pull"),
        ("a bad option", "agent.log=mesh_agent=nonsense", "CrashLoopBackOff"),
    ] {
        let load = Load::begin(cluster, "client", "http://server/")?;
        let tried = roll_and_back(cluster, value, sign);
        let counted = load.end(cluster)?;
        report(cluster, &format!("a rollout with {what}, and back"), &counted);
        tried?;
        counted.none_failed(what)?;
    }
    until_proven(cluster, &["client", "near", "server"])?;
    expect_mesh(cluster)
}

fn roll_and_back(cluster: &Cluster, value: &str, sign: &str) -> Result<()> {
    helm::upgrade(cluster, &[value])?;
    poll::until_true(&format!("an agent of the rollout is in {sign}"), PATIENCE, || {
        Ok(cluster.pods(MESH, AGENTS)?.iter().any(|pod| waits_for(pod, sign)))
    })?;
    let set = cluster.kubectl().get(&["-n", MESH, "daemonset", "mesh-agent"])?;
    ensure!(
        set["status"]["numberAvailable"] == 2,
        "agents of before are gone: {}",
        set["status"]
    );
    helm::run(cluster, &format!("rollback culvert --namespace {MESH}"))?;
    cluster.kubectl().rolled_out(MESH, AGENT)?;
    cluster.kubectl().rolled_out(MESH, "deployment/mesh-control")
}

fn waits_for(pod: &Value, sign: &str) -> bool {
    let of = |kind: &str| pod["status"][kind].as_array().cloned().unwrap_or_default();
    let all = of("initContainerStatuses").into_iter().chain(of("containerStatuses"));
    let mut reasons = all.map(|status| status["state"]["waiting"]["reason"].as_str().unwrap_or_default().to_owned());
    reasons.any(|reason| reason.contains(sign))
}

/// Worse: the next agent takes over, and then is killed again and again, since it is never found to have started. Who was taken over from
/// waits for its end, and has given everything up.
pub fn fail_once_they_serve(cluster: &mut Cluster) -> Result<()> {
    const NEVER: &str = r#"[{"op":"replace","path":"/spec/template/spec/containers/0/startupProbe","value":
        {"exec":{"command":["/mesh-agent","ready","--ready-socket=/none"]},"periodSeconds":1,"failureThreshold":8}}]"#;
    let load = Load::begin(cluster, "client", "http://server/")?;
    let tried = (|| {
        cluster
            .kubectl()
            .run(&["-n", MESH, "patch", AGENT, "--type=json", "--patch", NEVER])?;
        poll::until_true("an agent of the rollout took over, and was killed", PATIENCE, || {
            Ok(cluster.pods(MESH, AGENTS)?.iter().any(|pod| {
                let status = &pod["status"]["containerStatuses"][0];
                status["restartCount"].as_u64().unwrap_or_default() >= 1 && status["started"] == false
            }))
        })?;
        poll::until_true("who was taken over from serves again", PATIENCE, || {
            let mut agents = cluster.pods(MESH, AGENTS)?.into_iter();
            let is_back = |pod: &Value| -> Result<bool> {
                let name = pod["metadata"]["name"].as_str().unwrap_or_default();
                let said = cluster.kubectl().logs(MESH, name).unwrap_or_default();
                Ok(pod["metadata"]["deletionTimestamp"].is_null() && said.contains("this one starts again"))
            };
            agents.try_fold(false, |found, pod| Ok(found || is_back(&pod)?))
        })?;
        cluster.kubectl().run(&["-n", MESH, "rollout", "undo", AGENT])?;
        cluster.kubectl().rolled_out(MESH, AGENT)
    })();
    let counted = load.end(cluster)?;
    report(cluster, "a rollout whose agents take over and are killed, and back", &counted);
    tried?;
    poll::until_true("the client is answered again", PATIENCE, || {
        Ok(get(cluster, "http://server/").is_ok())
    })?;
    let after = Load::begin(cluster, "client", "http://server/")?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    let after = after.end(cluster)?;
    report(cluster, "after that", &after);
    after.none_failed("the time after the rollback")?;
    until_proven(cluster, &["client", "near", "server"])?;
    expect_mesh(cluster)
}
