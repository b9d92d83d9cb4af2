//! An API server alone: that it is a real one, and as the tests of a control plane need it.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::ApiServer;
use mesh_tests::poll::{self, SOON};
use mesh_tests::suite;
use serde_json::Value;

const AUDIENCE: &str = "culvert";

/// An agent's Pod, as a DaemonSet and the scheduler would have made it.
const AGENT: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: culvert-system}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: mesh-agent, namespace: culvert-system}
---
apiVersion: v1
kind: Node
metadata: {name: node-1}
---
apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: culvert-system}
spec:
  nodeName: node-1
  serviceAccountName: mesh-agent
  containers: [{name: agent, image: "nowhere.test/agent:1"}]
"#;

fn main() -> ExitCode {
    suite::run(
        "kube_api_server",
        ApiServer::start,
        |server, error| error.context(mesh_tests::process::tail(&server.log(), 20)),
        &[
            ("it_is_the_version_that_was_asked_for", version),
            ("a_pods_token_tells_its_node", token_of_a_pod),
            ("a_user_may_only_what_is_granted", users),
            ("what_is_stored_outlives_the_server", outage),
            ("a_second_one_shares_nothing", second),
        ],
    )
}

fn version(server: &mut ApiServer) -> Result<()> {
    let version = server.kubectl().run(&["get", "--raw", "/version"])?;
    let version: Value = serde_json::from_str(&version)?;
    ensure!(version["gitVersion"] == "v1.34.4" && version["minor"] == "34", "{version}");
    Ok(())
}

fn token_of_a_pod(server: &mut ApiServer) -> Result<()> {
    server.kubectl().apply(AGENT)?;
    let token = server.token("culvert-system", "mesh-agent", AUDIENCE, Some("agent"))?;
    let status = review(server, &token, AUDIENCE)?;
    ensure!(status["authenticated"] == true, "{status}");
    let user = &status["user"];
    ensure!(
        user["username"] == "system:serviceaccount:culvert-system:mesh-agent",
        "{status}"
    );
    let node = &user["extra"]["authentication.kubernetes.io/node-name"][0];
    ensure!(node == "node-1", "the node in {status}");
    let status = review(server, &token, "another")?;
    ensure!(status["authenticated"] != true, "for another audience: {status}");
    // A Pod that is gone takes its tokens along.
    server.kubectl().run(&[
        "-n",
        "culvert-system",
        "delete",
        "pod",
        "agent",
        "--grace-period=0",
        "--force",
    ])?;
    poll::until_true("the deleted Pod's token is refused", SOON, || {
        Ok(review(server, &token, AUDIENCE)?["authenticated"] != true)
    })
}

/// The status of a TokenReview.
fn review(server: &ApiServer, token: &str, audience: &str) -> Result<Value> {
    let file = server.folder().join("review.json");
    let review = serde_json::json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token, "audiences": [audience]},
    });
    std::fs::write(&file, review.to_string())?;
    let answer = server
        .kubectl()
        .run(&["create", "-o", "json", "-f", file.to_str().context("a path")?])?;
    Ok(serde_json::from_str::<Value>(&answer)?["status"].take())
}

fn users(server: &mut ApiServer) -> Result<()> {
    let stranger = server.kubectl().by(server.kubeconfig_of("stranger", &[])?);
    let output = stranger.output(&["get", "namespaces"])?;
    ensure!(
        !output.status.success() && output.stderr.contains("User \"stranger\" cannot list resource"),
        "{output:?}"
    );
    let role = ["create", "clusterrole", "look", "--verb=list", "--resource=namespaces"];
    server.kubectl().run(&role)?;
    let binding = [
        "create",
        "clusterrolebinding",
        "stranger",
        "--clusterrole=look",
        "--user=stranger",
    ];
    server.kubectl().run(&binding)?;
    poll::until_true("the stranger may look", SOON, || {
        Ok(stranger.output(&["get", "namespaces"])?.status.success())
    })?;
    let output = stranger.output(&["create", "namespace", "other"])?;
    ensure!(
        !output.status.success(),
        "somebody who may view has made a namespace: {output:?}"
    );
    Ok(())
}

fn outage(server: &mut ApiServer) -> Result<()> {
    let kept = ["create", "configmap", "kept", "--from-literal=a=b"];
    server.kubectl().run(&kept)?;
    server.stop();
    let output = server
        .kubectl()
        .output(&["get", "configmap", "kept", "--request-timeout=2s"])?;
    ensure!(!output.status.success(), "a stopped API server answered: {output:?}");
    server.resume()?;
    let kept = server.kubectl().get(&["configmap", "kept"])?;
    ensure!(kept["data"]["a"] == "b", "{kept}");
    Ok(())
}

fn second(server: &mut ApiServer) -> Result<()> {
    server.kubectl().run(&["create", "namespace", "of-the-first"])?;
    let second = ApiServer::start()?;
    ensure!(second.url() != server.url(), "both are at {}", second.url());
    let output = second.kubectl().output(&["get", "namespace", "of-the-first"])?;
    ensure!(output.stderr.contains("NotFound"), "{output:?}");
    let (folder, url) = (second.folder().to_owned(), second.url());
    drop(second);
    ensure!(!folder.exists(), "{} was left behind", folder.display());
    let address = url.trim_start_matches("https://").parse()?;
    let answer = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1));
    ensure!(answer.is_err(), "something still listens at {url}");
    Ok(())
}
