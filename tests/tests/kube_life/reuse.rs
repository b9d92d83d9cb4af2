//! A Pod's address is given to another Pod of its node, with another identity, at once.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::kube::Cluster;
use mesh_tests::kube::load::Load;
use mesh_tests::kube::shop::{PATIENCE, SHOP, lines_of, pod, until_proven};
use mesh_tests::poll::{self, SOON};

use super::report;

/// Others may be given the address first.
const TRIES: usize = 5;
/// host-local goes on from the one that it gave last.
const LAST: &str = "/run/cni-addresses/test/last_reserved_ip.0";
/// Not the Pod that has the address afterwards.
const ALLOW_ONE: &str = r"
apiVersion: culvert.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: only-one, namespace: shop}
spec:
  selector: {matchLabels: {app: near}}
  action: Allow
  rules: [{from: [{principals: [cluster.local/ns/shop/sa/client, cluster.local/ns/shop/sa/one]}]}]
";

pub fn address(cluster: &mut Cluster) -> Result<()> {
    cluster.kubectl().apply(ALLOW_ONE)?;
    for _ in 0..TRIES {
        if changes_hands(cluster)? {
            cluster.kubectl().delete(ALLOW_ONE)?;
            return Ok(());
        }
    }
    bail!("the address went to somebody else, {TRIES} times")
}

/// False: the address was not given to the second Pod.
fn changes_hands(cluster: &Cluster) -> Result<bool> {
    let kubectl = cluster.kubectl();
    let serve = |name: &str, more: &str| {
        let script = format!("{more} exec mesh-test-app serve {name} 8080 9000");
        pod(name, 2, &format!("[sh, -c, {script:?}]"))
    };
    kubectl.run(&["-n", SHOP, "delete", "pod", "one", "two", "--ignore-not-found", "--wait=true"])?;
    kubectl.apply(&serve("one", ""))?;
    kubectl.wait_for(SHOP, "Ready", &["pod/one"])?;
    until_proven(cluster, &["one"])?;
    let address: Ipv4Addr = cluster.pod_address(SHOP, "one")?.parse()?;
    // The control: the first one is let in.
    poll::until_true("the first Pod may ask", PATIENCE, || {
        Ok(kubectl
            .exec(SHOP, "one", &["mesh-test-app", "get", "http://near/"])?
            .status
            .success())
    })?;
    let load = Load::begin(cluster, "client", &format!("http://{address}:8080/"))?;
    poll::until_true("the first Pod is asked", PATIENCE, || {
        Ok(!lines_of(cluster, "one")?.is_empty())
    })?;
    kubectl.run(&["-n", SHOP, "delete", "pod", "one", "--wait=true"])?;
    let before = Ipv4Addr::from(u32::from(address) - 1);
    let node = cluster.node(2);
    node.run(&["sh", "-c", &format!("printf %s {before} > {LAST}")], SOON)?
        .ok("telling host-local where to go on")?;
    let ask = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do mesh-test-app get http://near/; done; echo asked;";
    kubectl.apply(&serve("two", ask))?;
    kubectl.wait_for(SHOP, "Ready", &["pod/two"])?;
    if cluster.pod_address(SHOP, "two")? != address.to_string() {
        load.end(cluster)?;
        return Ok(false);
    }
    until_proven(cluster, &["two"])?;
    let said = poll::until("the second Pod has asked", PATIENCE, || {
        let said = kubectl.logs(SHOP, "two")?;
        Ok(said.contains("asked").then_some(said))
    })?;
    ensure!(
        !said.contains("server=near"),
        "the second Pod was taken for the first one, which had its address: {said}"
    );
    poll::until_true("the second Pod is asked", PATIENCE, || {
        let second = lines_of(cluster, "two")?;
        Ok(second
            .iter()
            .any(|line| line["source_workload"] == "client" && line["result"] == "ok"))
    })?;
    let counted = load.end(cluster)?;
    report(cluster, "an address that changes hands", &counted);
    // Whoever answered was who both ends took it for.
    for server in ["one", "two"] {
        let answered = counted.answers.matches(&format!("server={server} ")).count();
        ensure!(answered > 0, "{server} never answered");
        let mut seen = Vec::new();
        poll::until_true("the log has every answer", PATIENCE, || {
            let lines = lines_of(cluster, server)?;
            seen = ["outbound", "inbound"]
                .map(|direction| {
                    let of_client = lines.iter().filter(|line| {
                        line["source_workload"] == "client"
                            && line["direction"] == direction
                            && line["result"] == "ok"
                            && line["destination_principal"] == format!("spiffe://cluster.local/ns/{SHOP}/sa/{server}")
                    });
                    of_client.count()
                })
                .to_vec();
            Ok(seen.iter().all(|seen| *seen >= answered))
        })
        .with_context(|| format!("{server} answered {answered} times; carried as its own, outbound and inbound: {seen:?}"))?;
    }
    Ok(true)
}
