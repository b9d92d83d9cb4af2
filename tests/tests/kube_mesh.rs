//! The mesh as its users run it: what `deploy` has is applied to a real cluster, a namespace is labelled, and it is in the mesh.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::kube::{Cluster, culvert, manifests};
use mesh_tests::poll;
use mesh_tests::readme;
use mesh_tests::suite;
use mesh_tests::wire::Recorder;
use serde_json::Value;

const MESH: &str = culvert::NAMESPACE;
const SHOP: &str = "shop";
/// Images are started, certificates signed, captures proven, and written to the API server.
const PATIENCE: Duration = Duration::from_secs(120);
/// An agent's change is reported at once, and then only with the next one, or after half a minute.
const REPORTED: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    suite::run(
        "kube_mesh",
        || {
            let cluster = Cluster::start(2)?;
            match install(&cluster).and_then(|()| deploy(&cluster)) {
                Ok(()) => Ok(cluster),
                Err(error) => Err(with_logs(&cluster, error)),
            }
        },
        with_logs,
        &[
            ("pods_that_run_join_when_their_namespace_is_labelled", join),
            ("services_work_through_the_mesh_across_nodes_and_within_one", services),
            ("a_new_pod_is_in_the_mesh_before_it_starts", new_pod),
            ("a_policy_denies_once_it_is_applied", policy),
            ("a_rollout_of_the_agents_fails_no_connection", rollout),
            ("control_planes_restart_and_forget_nothing", restart),
            ("pods_leave_when_the_label_is_removed", leave),
            ("pods_that_left_join_again_and_no_connection_fails", join_again),
        ],
    )
}

fn with_logs(cluster: &Cluster, error: anyhow::Error) -> anyhow::Error {
    culvert::say_logs(cluster);
    let pods = cluster.kubectl().run(&["-n", SHOP, "describe", "pods"]);
    println!("{}", pods.unwrap_or_default());
    cluster.with_logs(error)
}

/// As docs/DEPLOY.md says, with the images that were just built.
fn install(cluster: &Cluster) -> Result<()> {
    culvert::prepare(cluster)?;
    let said = readme(cluster, "rollout status daemonset")?;
    ensure!(said.contains("successfully rolled out"), "{said}");
    Ok(())
}

/// Runs the block of the README that has this in it, and answers what it printed.
fn readme(cluster: &Cluster, with: &str) -> Result<String> {
    let blocks = readme::run_by("kube_mesh")?;
    let mut chosen = blocks.iter().filter(|block| block.text.contains(with));
    let (Some(block), None) = (chosen.next(), chosen.next()) else {
        bail!("not one block of the README that kube_mesh runs has {with:?}");
    };
    if block.language == "yaml" {
        std::fs::write(culvert::folder(cluster).join("deny.yaml"), &block.text)?;
        return Ok(String::new());
    }
    cluster
        .kubectl()
        .shell(&culvert::folder(cluster), &block.text)?
        .ok(&block.text)
}

fn pod(name: &str, node: u8, command: &str) -> String {
    manifests::pod(SHOP, name, node, &format!("app: {name}"), command, "")
}

fn server(name: &str, node: u8) -> String {
    let command = format!(r#"[mesh-test-app, serve, {name}, "8080", "9000"]"#);
    pod(name, node, &command)
        + &format!(
            r#"
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {SHOP}}}
spec:
  selector: {{app: {name}}}
  ipFamilyPolicy: RequireDualStack
  ports: [{{name: http, port: 80, targetPort: 8080}}]
---
"#
        )
}

/// Before anybody asks for the mesh.
fn deploy(cluster: &Cluster) -> Result<()> {
    let namespace = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {SHOP}}}\n---\n");
    let manifests = namespace + &pod("client", 1, "[sleep, inf]") + &server("near", 1) + &server("server", 2);
    cluster.kubectl().apply(&manifests)?;
    let pods = ["pod/client", "pod/near", "pod/server"];
    cluster.kubectl().wait_for(SHOP, "Ready", &pods)
}

/// What the client is answered.
fn get(cluster: &Cluster, url: &str) -> Result<String> {
    let output = cluster.kubectl().exec(SHOP, "client", &["mesh-test-app", "get", url])?;
    output.ok(&format!("GET {url} by the client's Pod"))
}

/// The access-log lines of both agents, of a connection to this Pod.
fn lines_of(cluster: &Cluster, pod: &str) -> Result<Vec<Value>> {
    culvert::access_log(cluster, |line| line["destination_workload"] == pod)
}

fn join(cluster: &mut Cluster) -> Result<()> {
    // The negative control: without the label nothing is carried, and the wire between the nodes shows it all.
    ensure!(
        is_on_the_wire(cluster, "before")?,
        "the recorder does not see what goes in clear"
    );
    ensure!(
        culvert::capture(cluster, SHOP, "server")?.is_null(),
        "a Pod of no mesh is called captured"
    );
    ensure!(
        lines_of(cluster, "server")?.is_empty(),
        "a connection outside of the mesh is logged"
    );
    readme(cluster, "culvert.dev/mesh=enabled")?;
    for pod in ["client", "near", "server"] {
        ensure!(
            culvert::capture(cluster, SHOP, pod)? == "proven",
            "{pod} was waited for and is not proven"
        );
    }
    ensure!(
        !is_on_the_wire(cluster, "after")?,
        "what the client says can be read between the nodes"
    );
    let said = readme(cluster, "mutual_tls")?;
    ensure!(said.contains(&format!("ns/{SHOP}/sa/client")), "{said}");
    Ok(())
}

/// Whether what the client asks the server on the other node for can be read on the wire between them.
fn is_on_the_wire(cluster: &Cluster, word: &str) -> Result<bool> {
    let marker = format!("marker-{word}-{:016x}", rand::random::<u64>());
    let recorder = Recorder::start(cluster.node(1).netns(), "eth0")?;
    let answer = get(cluster, &format!("http://server/{marker}"));
    let recording = recorder.finish()?;
    ensure!(answer?.starts_with("server=server "), "another server answered");
    ensure!(recording.frames > 0, "nothing was recorded");
    Ok(recording.contains(marker.as_bytes()))
}

fn services(cluster: &mut Cluster) -> Result<()> {
    let client = cluster.kubectl().get(&["-n", SHOP, "pod", "client"])?;
    let client = client["status"]["podIP"].as_str().context("an address")?.to_owned();
    for server in ["near", "server"] {
        let service = cluster.kubectl().get(&["-n", SHOP, "service", server])?;
        let address = service["spec"]["clusterIP"].as_str().context("a cluster address")?;
        for url in [
            format!("http://{address}/"),
            format!("http://{server}.{SHOP}.svc.cluster.local/"),
        ] {
            poll::until_true(&format!("{url} is answered by {server}"), PATIENCE, || {
                Ok(get(cluster, &url)?.starts_with(&format!("server={server} ")))
            })?;
        }
        let answer = get(cluster, &format!("http://{address}/"))?;
        ensure!(
            answer.contains(&format!("client={client} ")),
            "the application does not see {client}: {answer}"
        );
        // Both ends say that it was mutual TLS, and between whom.
        for direction in ["outbound", "inbound"] {
            poll::until_true(&format!("{direction} to {server} by mutual TLS"), PATIENCE, || {
                Ok(lines_of(cluster, server)?.iter().any(|line| {
                    line["direction"] == direction
                        && line["result"] == "ok"
                        && line["connection_security_policy"] == "mutual_tls"
                        && line["source_principal"] == format!("spiffe://cluster.local/ns/{SHOP}/sa/client")
                        && line["destination_principal"] == format!("spiffe://cluster.local/ns/{SHOP}/sa/{server}")
                }))
            })?;
        }
    }
    Ok(())
}

/// The plugin holds it back until the agent has it; its first connection is carried.
fn new_pod(cluster: &mut Cluster) -> Result<()> {
    let early = pod(
        "early",
        2,
        "[sh, -c, \"mesh-test-app get http://near/ && mesh-test-app get http://server/ && echo both && sleep inf\"]",
    );
    cluster.kubectl().apply(&early)?;
    cluster.kubectl().wait_for(SHOP, "Ready", &["pod/early"])?;
    culvert::until_proven(cluster, SHOP, &["early"])?;
    let said = poll::until("its first connections", PATIENCE, || {
        let said = cluster.kubectl().logs(SHOP, "early")?;
        Ok(said.contains("both").then_some(said))
    })?;
    ensure!(said.contains("server=near ") && said.contains("server=server "), "{said}");
    let restarts = cluster.kubectl().get(&["-n", SHOP, "pod", "early"])?;
    ensure!(
        restarts["status"]["containerStatuses"][0]["restartCount"] == 0,
        "its first attempts failed: {restarts}"
    );
    // What the plugin decides by while no agent runs, where it outlives the node's reboot.
    let list = ["cat", "/etc/cni/net.d/culvert-namespaces"];
    let list = cluster.node(2).run(&list, poll::SOON)?.ok("the namespace list")?;
    ensure!(list.contains(SHOP), "the plugin's list of namespaces: {list}");
    for server in ["near", "server"] {
        poll::until_true(&format!("what it sent to {server} was by mutual TLS"), PATIENCE, || {
            let of_early = lines_of(cluster, server)?;
            let mut of_early = of_early
                .iter()
                .filter(|line| line["source_workload"] == "early" && line["direction"] == "inbound");
            let first = of_early.next();
            Ok(first.is_some_and(|line| line["connection_security_policy"] == "mutual_tls"))
        })?;
    }
    Ok(())
}

fn policy(cluster: &mut Cluster) -> Result<()> {
    readme(cluster, "kind: AuthorizationPolicy")?;
    let said = readme(cluster, "kubectl apply -f deny.yaml")?;
    ensure!(
        said.contains("authorizationpolicy.culvert.dev/no-client condition met"),
        "{said}"
    );
    ensure!(
        said.lines().any(|line| line.starts_with("NAME ") && line.contains("NODES")),
        "{said}"
    );
    poll::until_true("both nodes enforce it", PATIENCE, || {
        let policy = cluster.kubectl().get(&["-n", SHOP, "authorizationpolicy", "no-client"])?;
        let status = &policy["status"];
        Ok(status["nodesEnforcing"] == 2 && status["workloadsSelected"] == 1 && status["observedGeneration"] == 1)
    })?;
    ensure!(
        get(cluster, "http://server/").is_err(),
        "the client is let in by a policy that every node is said to enforce"
    );
    poll::until_true("the client is denied", PATIENCE, || {
        Ok(get(cluster, "http://server/").is_err())
    })?;
    ensure!(
        get(cluster, "http://near/")?.starts_with("server=near "),
        "another server is denied"
    );
    poll::until_true("the log names the policy", PATIENCE, || {
        Ok(lines_of(cluster, "server")?
            .iter()
            .any(|line| line["policy"] == format!("{SHOP}/no-client") && line["result"] == "refused"))
    })?;
    readme(cluster, "kubectl delete -f deny.yaml")?;
    poll::until_true("the client is let in again", PATIENCE, || {
        Ok(get(cluster, "http://server/").is_ok())
    })
}

/// New connections, one after another, while something is done: none fails.
fn under_load(cluster: &Cluster, what: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let load = "n=0; f=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); mesh-test-app get http://server/ >/dev/null 2>>/tmp/errors || f=$((f+1)); done; echo \"$n $f\" > /tmp/done";
    let begin = format!("rm -f /tmp/stop /tmp/done /tmp/errors; ({load}) >/dev/null 2>&1 &");
    let shell = |script: &str| cluster.kubectl().exec(SHOP, "client", &["sh", "-c", script]);
    shell(&begin)?.ok("the load")?;
    let worked = work();
    shell("touch /tmp/stop")?.ok("its end")?;
    worked?;
    let done = poll::until("the load's count", PATIENCE, || {
        let output = shell("cat /tmp/done 2>/dev/null; true")?;
        let text = output.ok("the count")?;
        Ok((!text.trim().is_empty()).then_some(text))
    })?;
    let (made, failed) = done.trim().split_once(' ').context("two numbers")?;
    println!("{made} connections during {what}, {failed} failed");
    let errors = shell("head -c 2000 /tmp/errors 2>/dev/null; true")?.ok("errors")?;
    ensure!(made.parse::<u32>()? > 20, "only {made} connections");
    ensure!(failed == "0", "{failed} of {made} failed: {errors}");
    Ok(())
}

/// Every agent is replaced.
fn rollout(cluster: &mut Cluster) -> Result<()> {
    under_load(cluster, "the rollout", || {
        cluster
            .kubectl()
            .run(&["-n", MESH, "rollout", "restart", "daemonset/mesh-agent"])
            .and_then(|_| cluster.kubectl().rolled_out(MESH, "daemonset/mesh-agent"))
    })?;
    culvert::until_proven(cluster, SHOP, &["client", "near", "server"])
}

fn restart(cluster: &mut Cluster) -> Result<()> {
    let roots = || cluster.kubectl().get(&["-n", MESH, "configmap", "culvert-roots"]);
    let before = roots()?["data"].clone();
    cluster.kubectl().run(&[
        "-n",
        MESH,
        "delete",
        "pods",
        "-l",
        "app.kubernetes.io/name=mesh-control",
        "--wait=true",
    ])?;
    ensure!(
        get(cluster, "http://server/")?.starts_with("server=server "),
        "while no control plane is ready"
    );
    cluster.kubectl().rolled_out(MESH, "deployment/mesh-control")?;
    ensure!(roots()?["data"] == before, "another root");
    culvert::until_proven(cluster, SHOP, &["client", "near", "server"])?;
    ensure!(
        !is_on_the_wire(cluster, "restarted")?,
        "after the restart what the client says can be read between the nodes"
    );
    Ok(())
}

fn leave(cluster: &mut Cluster) -> Result<()> {
    under_load(cluster, "the label's removal", || {
        readme(cluster, "culvert.dev/mesh-")?;
        for pod in ["client", "near", "server", "early"] {
            poll::until_true(&format!("{pod} is out of the mesh"), PATIENCE, || {
                Ok(culvert::capture(cluster, SHOP, pod)?.is_null())
            })?;
        }
        // The annotations go first; then the agents release their Pods.
        poll::until_true("what the client says is in clear on the wire again", PATIENCE, || {
            is_on_the_wire(cluster, "left")
        })
    })
}

/// What the agents have last said, that the Pods which they let go are lost, must not count.
fn join_again(cluster: &mut Cluster) -> Result<()> {
    for node in 1..=2 {
        poll::until_true(&format!("the Pods of node {node} are let go"), PATIENCE, || {
            let metrics = culvert::metrics(cluster, node)?;
            let pods = metrics.lines().filter(|line| line.starts_with("mesh_pods{"));
            Ok(pods.clone().count() > 0 && pods.into_iter().all(|line| line.ends_with("} 0")))
        })?;
    }
    std::thread::sleep(REPORTED);
    under_load(cluster, "the label's return", || {
        let label = ["label", "--overwrite", "namespace", SHOP, "culvert.dev/mesh=enabled"];
        cluster.kubectl().run(&label)?;
        culvert::until_proven(cluster, SHOP, &["client", "near", "server", "early"])?;
        poll::until_true("what the client says is hidden on the wire again", PATIENCE, || {
            Ok(!is_on_the_wire(cluster, "joined")?)
        })
    })
}
