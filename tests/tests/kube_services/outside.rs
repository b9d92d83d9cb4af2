//! What comes to Pods of the mesh from outside of it: by the nodes' ports, a load balancer, the nodes' own network, and the kubelet.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::binaries;
use mesh_tests::kube::culvert;
use mesh_tests::poll;
use serde_json::Value;

use crate::world::{PATIENCE, SHOP, World, service};

const CLUSTER_PORT: u16 = 30_080;
const LOCAL_PORT: u16 = 30_081;
/// Of documentation (RFC 5737): nobody else's.
const BALANCER: &str = "203.0.113.7";
const EXTERNAL: &str = "203.0.113.8";
/// Who asks from outside: the machine that the nodes' network hangs on.
const OUTSIDER: &str = "172.30.0.1";

/// Runs a script outside of the cluster; it has `kubectl`, and mesh-test-app as `$APP`.
fn outside(world: &World, script: &str) -> Result<String> {
    let script = format!("APP='{}'; {script}", binaries::path("mesh-test-app")?.display());
    world.kubectl().shell(world.cluster.folder(), &script)?.ok(&script)
}

pub fn kubectl(world: &mut World) -> Result<()> {
    ensure!(world.sh("web-a", "echo $((6*7))")?.trim() == "42", "exec");
    ensure!(world.kubectl().logs(SHOP, "web-a")?.contains("web-a serves"), "logs");
    forward(world)
}

/// It goes by the Pod's own loopback address, which is nobody's but the Pod's.
fn forward(world: &World) -> Result<()> {
    let script = "kubectl -n shop port-forward pod/web-a 18081:8080 > forward.log 2>&1 & forwarder=$!; \
                  n=0; until grep -q Forwarding forward.log || [ $n -gt 100 ]; do n=$((n+1)); sleep 0.2; done; \
                  \"$APP\" get http://127.0.0.1:18081/forwarded || { cat forward.log; kill $forwarder; exit 1; }; kill $forwarder";
    let said = outside(world, script)?;
    ensure!(said.contains("server=web-a") && said.contains("/forwarded"), "{said}");
    Ok(())
}

/// How it is asked for, and who the Pod sees as its client; `None`: a node's address, by translation.
fn ways(world: &World) -> Vec<(String, Option<&'static str>)> {
    let [one, two] = [1, 2].map(|node| world.cluster.node(node).address());
    vec![
        // Both from the node that has the endpoint and from the one that has none.
        (format!("http://{one}:{CLUSTER_PORT}/"), None),
        (format!("http://{two}:{CLUSTER_PORT}/"), None),
        (format!("http://{EXTERNAL}/"), None),
        (format!("http://{two}:{LOCAL_PORT}/"), Some(OUTSIDER)),
        (format!("http://{BALANCER}/"), Some(OUTSIDER)),
    ]
}

/// The body, or what the application said.
fn ask(world: &World, url: &str) -> Result<String> {
    outside(world, &format!("\"$APP\" get {url} 2>&1 || echo refused"))
}

/// Inbound lines at the server of these Services.
fn arrivals(world: &World) -> Result<Vec<Value>> {
    culvert::access_log(&world.cluster, |line| {
        line["destination_workload"] == "far" && line["direction"] == "inbound"
    })
}

pub fn permissive(world: &mut World) -> Result<()> {
    let ports = |port: u16| format!("ports: [{{port: 80, targetPort: 8080, nodePort: {port}}}], selector: {{app: far}}");
    let manifests = service(
        "open",
        &format!("{{type: NodePort, externalIPs: [{EXTERNAL}], {}}}", ports(CLUSTER_PORT)),
    ) + &service(
        "open-local",
        &format!("{{type: LoadBalancer, externalTrafficPolicy: Local, {}}}", ports(LOCAL_PORT)),
    );
    world.kubectl().apply(&manifests)?;
    let status = format!("{{\"status\":{{\"loadBalancer\":{{\"ingress\":[{{\"ip\":\"{BALANCER}\"}}]}}}}}}");
    world.kubectl().run(&[
        "-n",
        SHOP,
        "patch",
        "service",
        "open-local",
        "--subresource=status",
        "--type=merge",
        "-p",
        &status,
    ])?;
    // A load balancer brings it to a node that has the endpoint; the other address is the first node's, which has none.
    let [one, two] = [1, 2].map(|node| world.cluster.node(node).address());
    outside(
        world,
        &format!("ip route add {BALANCER} via {two}; ip route add {EXTERNAL} via {one}"),
    )?;
    for (url, client) in ways(world) {
        let body = poll::until(&format!("{url} is answered"), PATIENCE, || {
            Ok(Some(ask(world, &url)?).filter(|body| body.starts_with("server=far ")))
        })?;
        let seen = body.split("client=").nth(1).and_then(|rest| rest.split(' ').next());
        let seen = seen.context("the client's address")?;
        ensure!(
            client.is_none_or(|client| client == seen),
            "{url}: the application sees {body}"
        );
    }
    // A Pod of the mesh that asks for such an address leaves the mesh by it.
    let by_node = format!("{two}:{CLUSTER_PORT}");
    ensure!(
        world.ask_one("client", &format!("http://{by_node}/"), 1)? == ["far"],
        "a Pod of the mesh, by a node's port"
    );
    world.until_logged("it was let out in clear", |line| {
        line["source_workload"] == "client"
            && line["direction"] == "outbound"
            && line["destination_address"] == by_node
            && line["path"] == "passthrough"
    })?;
    // So is a Pod on the node's own network, through a Service and by the Pod's address.
    let far = world.cluster.pod_address(SHOP, "far")?;
    for url in [format!("http://{far}:8080/"), format!("http://open.{SHOP}/")] {
        ensure!(world.ask_one("host", &url, 1)? == ["far"], "{url} by the host's network");
    }
    poll::until_true("each has arrived in clear, without a principal", PATIENCE, || {
        let lines = arrivals(world)?;
        let in_clear = |line: &&Value| {
            line["path"] == "plaintext" && line["connection_security_policy"] == "none" && line["source_principal"] == ""
        };
        Ok(lines.iter().filter(in_clear).count() >= ways(world).len() + 2)
    })?;
    // Policies ask for the address that is seen; who comes by a translated one is not told from others.
    let deny = format!(
        "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: no-outsider, namespace: {SHOP}}}\n\
         spec: {{selector: {{matchLabels: {{app: far}}}}, action: Deny, rules: [{{from: [{{ipBlocks: [{OUTSIDER}/32]}}]}}]}}\n"
    );
    world.kubectl().apply(&deny)?;
    for (url, client) in ways(world) {
        let refused = client.is_some();
        poll::until_true(&format!("{url} is refused ({refused}) by policy"), PATIENCE, || {
            Ok(ask(world, &url)?.starts_with("server=far ") != refused)
        })?;
    }
    world.until_logged("the policy is named", |line| {
        line["policy"] == format!("{SHOP}/no-outsider") && line["reason"] == "denied_by_policy"
    })?;
    world.kubectl().delete(&deny).map(drop)
}

/// After [`permissive`], whose Services it uses.
pub fn strict(world: &mut World) -> Result<()> {
    if !world
        .kubectl()
        .output(&["-n", SHOP, "get", "service", "open"])?
        .status
        .success()
    {
        permissive(world)?;
    }
    let strict = format!(
        "apiVersion: culvert.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default, namespace: {SHOP}}}\nspec: {{mtls: Strict}}\n"
    );
    world.kubectl().apply(&strict)?;
    for (url, _) in ways(world) {
        poll::until_true(&format!("{url} is refused"), PATIENCE, || {
            Ok(!ask(world, &url)?.starts_with("server=far "))
        })?;
    }
    let far = world.cluster.pod_address(SHOP, "far")?;
    let by_address = format!("http://{far}:8080/");
    ensure!(world.ask_one("host", &by_address, 1)? == ["refused"], "by the host's network");
    for from in [OUTSIDER.to_owned(), world.cluster.node(1).address().to_string()] {
        world.until_logged(&format!("{from} is refused with its reason"), |line| {
            let source = line["source_address"].as_str().unwrap_or_default();
            source.starts_with(&format!("{from}:"))
                && line["reason"] == "plaintext_refused"
                && line["destination_workload"] == "far"
        })?;
    }
    // Not so what is in the mesh, and what goes by the kubelet.
    ensure!(
        world.ask_one("client", "http://web/", 1)?[0].starts_with("web-"),
        "in the mesh"
    );
    ensure!(world.ask_one("client", &by_address, 1)? == ["far"], "in the mesh, by address");
    forward(world)?;
    ensure!(world.sh("web-a", "echo alive")?.trim() == "alive", "exec");
    world.kubectl().delete(&strict)?;
    poll::until_true("taken back", PATIENCE, || {
        Ok(world.ask_one("host", &by_address, 1)? == ["far"])
    })
}
