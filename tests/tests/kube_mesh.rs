//! The mesh as its users run it: what `deploy` has is applied to a real cluster, a namespace is labelled, and it is in the mesh.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::Cluster;
use mesh_tests::kube::load::under_load;
use mesh_tests::kube::shop::{
    MESH, PATIENCE, SHOP, capture, deploy, get, install, is_on_the_wire, lines_of, pod, run_readme, until_enforced,
    until_mutual_tls, until_proven, with_logs,
};
use mesh_tests::{pins, poll, suite};

#[path = "kube_mesh/remove.rs"]
mod remove;

fn main() -> ExitCode {
    suite::run(
        "kube_mesh",
        || {
            let cluster = Cluster::start(2)?;
            match deploy(&cluster).and_then(|()| install(&cluster)) {
                Ok(()) => Ok(cluster),
                Err(error) => Err(with_logs(&cluster, error)),
            }
        },
        with_logs,
        &[
            ("pods_that_run_join_when_their_namespace_is_labelled", join),
            ("services_work_through_the_mesh_across_nodes_and_within_one", services),
            ("a_new_pod_is_in_the_mesh_before_it_starts", new_pod),
            ("a_piece_that_is_taken_away_is_put_back_and_told", repaired),
            ("a_policy_denies_once_it_is_applied", policy),
            ("a_rollout_of_the_agents_fails_no_connection", rollout),
            ("control_planes_restart_and_forget_nothing", restart),
            ("pods_leave_when_the_label_is_removed", leave),
            ("nodes_are_as_they_were_when_the_mesh_is_removed", remove::all),
        ],
    )
}

fn join(cluster: &mut Cluster) -> Result<()> {
    // The negative control: without the label nothing is carried, and the wire between the nodes shows it all.
    ensure!(is_seen(cluster)?, "the recorder does not see what goes in clear");
    ensure!(capture(cluster, "server")?.is_null(), "a Pod of no mesh is called captured");
    ensure!(
        lines_of(cluster, "server")?.is_empty(),
        "a connection outside of the mesh is logged"
    );
    run_readme(cluster, "culvert.dev/mesh=enabled")?;
    for pod in ["client", "near", "server"] {
        ensure!(capture(cluster, pod)? == "proven", "{pod} was waited for and is not proven");
    }
    ensure!(!is_seen(cluster)?, "what the client says can be read between the nodes");
    let said = run_readme(cluster, "mutual_tls")?;
    ensure!(said.contains(&format!("ns/{SHOP}/sa/client")), "{said}");
    Ok(())
}

/// Whether what the client asks the server on the other node for can be read on the wire between them.
fn is_seen(cluster: &Cluster) -> Result<bool> {
    let (is_seen, answer) = is_on_the_wire(cluster, "server")?;
    ensure!(answer?.starts_with("server=server "), "another server answered");
    Ok(is_seen)
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
        until_mutual_tls(cluster, server)?;
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
    until_proven(cluster, &["early"])?;
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

/// As a careless hand on the node does it.
fn repaired(cluster: &mut Cluster) -> Result<()> {
    let pod = cluster.kubectl().get(&["-n", SHOP, "pod", "server"])?;
    let uid = pod["metadata"]["uid"].as_str().context("a uid")?;
    let pins = pins::folder(Path::new("/sys/fs/bpf/culvert"));
    for pin in [pins.join("pods").join(uid), pins.join("links/connect4")] {
        let pin = pin.display().to_string();
        cluster.node(2).run(&["rm", &pin], poll::SOON)?.ok("removing a pin")?;
    }
    for (namespace, name, piece) in [(SHOP, "server", "sk_lookup"), ("default", "node-2", "connect4")] {
        let about = format!("involvedObject.name={name},reason=MeshProtectionRepaired");
        poll::until_true(&format!("who looks after {name} is told"), PATIENCE, || {
            let list = ["-n", namespace, "get", "events", "--field-selector", &about];
            Ok(cluster.kubectl().run(&list)?.contains(piece))
        })?;
    }
    ensure!(
        capture(cluster, "server")? == "proven" && get(cluster, "http://server/")?.starts_with("server=server "),
        "it is not as it was"
    );
    Ok(())
}

fn policy(cluster: &mut Cluster) -> Result<()> {
    run_readme(cluster, "kind: AuthorizationPolicy")?;
    let said = run_readme(cluster, "kubectl apply -f deny.yaml")?;
    ensure!(
        said.contains("authorizationpolicy.culvert.dev/no-client condition met"),
        "{said}"
    );
    ensure!(
        said.lines().any(|line| line.starts_with("NAME ") && line.contains("NODES")),
        "{said}"
    );
    until_enforced(cluster, "no-client", 1)?;
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
    run_readme(cluster, "kubectl delete -f deny.yaml")?;
    poll::until_true("the client is let in again", PATIENCE, || {
        Ok(get(cluster, "http://server/").is_ok())
    })
}

/// Every agent is replaced.
fn rollout(cluster: &mut Cluster) -> Result<()> {
    under_load(cluster, "the rollout", || {
        cluster
            .kubectl()
            .run(&["-n", MESH, "rollout", "restart", "daemonset/mesh-agent"])
            .and_then(|_| cluster.kubectl().rolled_out(MESH, "daemonset/mesh-agent"))
    })?;
    until_proven(cluster, &["client", "near", "server"])
}

fn restart(cluster: &mut Cluster) -> Result<()> {
    let roots = || cluster.kubectl().get(&["-n", MESH, "configmap", "culvert-roots"]);
    let before = roots()?["data"].clone();
    under_load(cluster, "the restart of both control planes", || {
        let pods = [
            "-n",
            MESH,
            "delete",
            "pods",
            "-l",
            "app.kubernetes.io/name=mesh-control",
            "--wait=true",
        ];
        cluster.kubectl().run(&pods)?;
        ensure!(
            get(cluster, "http://server/")?.starts_with("server=server "),
            "while no control plane is ready"
        );
        cluster.kubectl().rolled_out(MESH, "deployment/mesh-control")
    })?;
    ensure!(roots()?["data"] == before, "another root");
    until_proven(cluster, &["client", "near", "server"])?;
    ensure!(
        !is_seen(cluster)?,
        "after the restart what the client says can be read between the nodes"
    );
    Ok(())
}

fn leave(cluster: &mut Cluster) -> Result<()> {
    under_load(cluster, "the label's removal", || {
        run_readme(cluster, "culvert.dev/mesh-")?;
        for pod in ["client", "near", "server", "early"] {
            poll::until_true(&format!("{pod} is out of the mesh"), PATIENCE, || {
                Ok(capture(cluster, pod)?.is_null())
            })?;
        }
        // The annotations go first; then the agents release their Pods.
        poll::until_true("what the client says is in clear on the wire again", PATIENCE, || {
            is_seen(cluster)
        })
    })
}
