//! The test cluster by itself, before any mesh: what the suites on a real Kubernetes stand on.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::{APP_IMAGE, Cluster, Image};
use mesh_tests::poll::{self, SOON};
use mesh_tests::suite;

#[path = "kube/leftovers.rs"]
mod leftovers;

/// A node that crashed is noticed, its Pods are evicted or come back, and programs that had forgotten it learn of it again.
const RECOVERY: Duration = Duration::from_secs(120);
const NODES: u8 = 2;

/// The cluster, until the check that ends it.
type Bed = Option<Cluster>;

fn main() -> ExitCode {
    if std::env::var_os(leftovers::VICTIM).is_some() {
        return leftovers::be_the_victim();
    }
    suite::run(
        "kube",
        || {
            let cluster = Cluster::start(NODES)?;
            match deploy(&cluster) {
                Ok(()) => Ok(Some(cluster)),
                Err(error) => Err(cluster.with_logs(error)),
            }
        },
        |bed, error| match bed {
            Some(cluster) => cluster.with_logs(error),
            None => error,
        },
        &[
            ("two_nodes_with_a_pod_on_each", nodes_and_pods),
            ("a_service_address_works_across_nodes_and_within_one", service_addresses),
            ("a_service_name_works_across_nodes_and_within_one", service_names),
            ("a_nodes_pods_have_cgroups_below_its_own", cgroups),
            ("a_local_program_runs_as_a_daemon_set", daemon_set),
            ("a_node_that_crashed_comes_back_as_it_was", crash),
            ("the_api_server_away_stops_nothing", outage),
            ("a_second_copy_runs_beside_and_is_swept_when_killed", leftovers::killed),
            ("the_cluster_leaves_nothing", leftovers::nothing_is_left),
        ],
    )
}

/// A client on node 1, a server on each node, and a service for each server.
fn deploy(cluster: &Cluster) -> Result<()> {
    let pod = |name: &str, node: u8, command: &str| {
        format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: node-{node}}}
  terminationGracePeriodSeconds: 1
  containers:
    - name: app
      image: {APP_IMAGE}
      command: {command}
      resources: {{requests: {{cpu: 10m, memory: 8Mi}}, limits: {{memory: 64Mi}}}}
---
"#
        )
    };
    let service = |name: &str| {
        format!(
            r#"
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  selector: {{app: {name}}}
  ipFamilyPolicy: RequireDualStack
  ports: [{{name: http, port: 80, targetPort: 8080}}]
---
"#
        )
    };
    let serve = |name: &str| format!(r#"[mesh-test-app, serve, {name}, "8080", "9000"]"#);
    let manifests = pod("client", 1, "[sleep, inf]")
        + &pod("near", 1, &serve("near"))
        + &pod("far", 2, &serve("far"))
        + &service("near")
        + &service("far");
    cluster.kubectl().apply(&manifests)?;
    let pods = ["pod/client", "pod/near", "pod/far"];
    cluster.kubectl().wait_for("default", "Ready", &pods)
}

fn cluster(bed: &mut Bed) -> Result<&mut Cluster> {
    bed.as_mut().context("the cluster was ended by the last check")
}

fn nodes_and_pods(bed: &mut Bed) -> Result<()> {
    let cluster = cluster(bed)?;
    let nodes = cluster.kubectl().get(&["nodes"])?;
    let nodes = nodes["items"].as_array().context("nodes")?;
    ensure!(nodes.len() == usize::from(NODES), "{} nodes", nodes.len());
    for node in nodes {
        let name = node["metadata"]["name"].as_str().context("a name")?;
        ensure!(cluster.is_ready(name)?, "{name} is not ready");
        let version = &node["status"]["nodeInfo"]["kubeletVersion"];
        ensure!(version == "v1.34.4", "{name} has a kubelet {version}");
    }
    for (pod, node) in [("near", "node-1"), ("far", "node-2")] {
        let there = cluster.kubectl().get(&["pod", pod])?;
        ensure!(there["spec"]["nodeName"] == node, "{pod} is on {}", there["spec"]["nodeName"]);
        let said = cluster.kubectl().logs("default", pod)?;
        ensure!(said.starts_with(&format!("{pod} serves\n")), "the logs of {pod}: {said:?}");
    }
    // Not one of this machine's processes for everybody.
    let hostname = cluster.node(2).run(&["hostname"], SOON)?.ok("hostname")?;
    ensure!(hostname.trim() == "node-2", "{hostname}");
    Ok(())
}

/// What the client is answered: the server names itself and the client it saw.
fn get(cluster: &Cluster, url: &str) -> Result<String> {
    let output = cluster.kubectl().exec("default", "client", &["mesh-test-app", "get", url])?;
    output.ok(&format!("GET {url} by the client's Pod"))
}

/// Until it works: a Pod is Ready before every kube-proxy has heard of it. The client is seen by its own address, of the
/// family that it was asked for; of a name's families, the client chooses.
fn expect_answer(cluster: &Cluster, url: &str, server: &str) -> Result<()> {
    let pod = cluster.kubectl().get(&["pod", "client"])?;
    let addresses = pod["status"]["podIPs"].as_array().context("the client's addresses")?;
    let addresses: Vec<IpAddr> = addresses
        .iter()
        .filter_map(|address| address["ip"].as_str()?.parse().ok())
        .collect();
    ensure!(addresses.len() == 2, "the client has the addresses {addresses:?}");
    let host = url.trim_start_matches("http://").trim_end_matches('/');
    let asked: Option<SocketAddr> = host.parse().ok();
    let wanted: Vec<String> = addresses
        .iter()
        .filter(|address| asked.is_none_or(|asked| asked.is_ipv4() == address.is_ipv4()))
        .map(|address| format!("server={server} client={address} "))
        .collect();
    poll::until_true(&format!("{url} is answered by {server}"), RECOVERY, || {
        let answer = get(cluster, url)?;
        let is_good = wanted.iter().any(|wanted| answer.starts_with(wanted));
        ensure!(is_good, "expected one of {wanted:?}, saw {answer:?}");
        Ok(true)
    })
}

fn service_addresses(bed: &mut Bed) -> Result<()> {
    let cluster = cluster(bed)?;
    for server in ["near", "far"] {
        let service = cluster.kubectl().get(&["service", server])?;
        for family in 0..2 {
            let address = service["spec"]["clusterIPs"][family].as_str().context("a cluster address")?;
            let address: IpAddr = address.parse()?;
            let url = format!("http://{}/", SocketAddr::new(address, 80));
            expect_answer(cluster, &url, server)?;
        }
    }
    Ok(())
}

fn service_names(bed: &mut Bed) -> Result<()> {
    let cluster = cluster(bed)?;
    for server in ["near", "far"] {
        for name in [server.to_owned(), format!("{server}.default.svc.cluster.local")] {
            expect_answer(cluster, &format!("http://{name}/"), server)?;
        }
    }
    let output = cluster
        .kubectl()
        .exec("default", "client", &["mesh-test-app", "get", "http://nobody/"])?;
    ensure!(!output.status.success(), "a service that is not there answered: {output:?}");
    Ok(())
}

/// What attaches to a node's cgroup root sees the node's Pods, and no others.
fn cgroups(bed: &mut Bed) -> Result<()> {
    let cluster = cluster(bed)?;
    let uid = |pod: &str| -> Result<String> {
        let pod = cluster.kubectl().get(&["pod", pod])?;
        Ok(pod["metadata"]["uid"].as_str().context("a uid")?.to_owned())
    };
    let (near, far) = (uid("near")?, uid("far")?);
    let seen = |node: usize| -> Result<String> {
        let find = ["find", "/sys/fs/cgroup", "-type", "d", "-name", "pod*"];
        cluster.node(node).run(&find, SOON)?.ok("find")
    };
    let (one, two) = (seen(1)?, seen(2)?);
    ensure!(one.contains(&near) && !one.contains(&far), "node-1 sees {one}");
    ensure!(two.contains(&far) && !two.contains(&near), "node-2 sees {two}");
    Ok(())
}

/// As an agent will be deployed.
fn daemon_set(bed: &mut Bed) -> Result<()> {
    let cluster = cluster(bed)?;
    let program = std::path::Path::new("/usr/bin/env");
    let image = Image::new("culvert.test/local:1")
        .program(program, "/usr/bin/env")?
        .shell(cluster.tools());
    cluster.load_image(&image)?;
    let manifest = r#"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: local}
spec:
  selector: {matchLabels: {app: local}}
  template:
    metadata: {labels: {app: local}}
    spec:
      hostNetwork: true
      terminationGracePeriodSeconds: 1
      tolerations: [{operator: Exists}]
      containers:
        - name: local
          image: culvert.test/local:1
          command: [sh, -c, "/usr/bin/env | grep -q PATH && hostname && ip -4 -o addr && sleep inf"]
          securityContext: {privileged: true}
          volumeMounts: [{name: bpf, mountPath: /sys/fs/bpf, mountPropagation: Bidirectional}]
      volumes: [{name: bpf, hostPath: {path: /sys/fs/bpf}}]
"#;
    cluster.kubectl().apply(manifest)?;
    cluster.kubectl().rolled_out("default", "daemonset/local")?;
    let pods = cluster.pods("default", "app=local")?;
    ensure!(pods.len() == usize::from(NODES), "{} Pods", pods.len());
    for pod in &pods {
        let name = pod["metadata"]["name"].as_str().context("a name")?;
        let node = pod["spec"]["nodeName"].as_str().context("a node")?;
        let address = pod["status"]["hostIP"].as_str().context("an address")?;
        let said = poll::until("the Pod's output", SOON, || {
            let said = cluster.kubectl().logs("default", name)?;
            Ok(said.contains("eth0").then_some(said))
        })?;
        ensure!(said.starts_with(node) && said.contains(address), "{name} on {node}: {said}");
    }
    cluster.kubectl().delete(manifest)?;
    Ok(())
}

fn crash(bed: &mut Bed) -> Result<()> {
    let cluster = cluster(bed)?;
    let before = cluster.node(2).pid()?;
    // What was pinned is not on the disk; what was installed is.
    cluster.node(2).run(&["mkdir", "/sys/fs/bpf/pinned"], SOON)?.ok("mkdir")?;
    cluster.node(2).run(&["touch", "/opt/cni/bin/installed"], SOON)?.ok("touch")?;
    cluster.node_mut(2).kill()?;
    ensure!(
        cluster.node(2).run(&["true"], SOON).is_err(),
        "a node that crashed runs commands"
    );
    let error = get(cluster, "http://far/").err().context("a node that crashed answers")?;
    poll::until_true("node-2 is not Ready", RECOVERY, || Ok(!cluster.is_ready("node-2")?))
        .with_context(|| format!("the client said {error:#}"))?;
    cluster.node_mut(2).boot()?;
    cluster.wait_until_ready("node-2")?;
    ensure!(cluster.node(2).pid()? != before, "it is the same process");
    let folder = cluster.node(2).run(&["ls", "/sys/fs/bpf"], SOON)?.ok("ls")?;
    ensure!(!folder.contains("pinned"), "after a reboot, pinned: {folder}");
    let installed = cluster.node(2).run(&["ls", "/opt/cni/bin"], SOON)?.ok("ls")?;
    ensure!(
        installed.contains("installed\n") && installed.contains("ptp\n"),
        "{installed}"
    );
    // Its Pod runs again, by the same name.
    expect_answer(cluster, "http://far/", "far")
}

fn outage(bed: &mut Bed) -> Result<()> {
    let cluster = cluster(bed)?;
    let service = cluster.kubectl().get(&["service", "far"])?;
    let address = service["spec"]["clusterIP"].as_str().context("a cluster address")?.to_owned();
    cluster.stop_server();
    ensure!(
        cluster
            .kubectl()
            .output(&["get", "nodes", "--request-timeout=2s"])?
            .status
            .code()
            != Some(0),
        "a stopped API server answers"
    );
    // From the node itself: without an API server there is no `kubectl exec`.
    let answer = cluster.node(1).netns().run(|| {
        let address = format!("{address}:80").parse()?;
        mesh_tests::http::request(address, "/")
    })?;
    ensure!(answer.status == 200 && answer.body.starts_with("server=far "), "{answer:?}");
    cluster.resume_server()?;
    cluster.wait_until_ready("node-1")?;
    expect_answer(cluster, "http://near/", "near")
}
