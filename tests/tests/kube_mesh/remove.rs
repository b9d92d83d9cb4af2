//! The README's last step, on the cluster that its first ones were run on.

use anyhow::{Result, ensure};
use mesh_tests::kube::Cluster;
use mesh_tests::kube::load::Load;
use mesh_tests::kube::remains::KernelHalf;
use mesh_tests::kube::shop::{MESH, SHOP, before, get, pod, run_readme};

pub fn all(cluster: &mut Cluster) -> Result<()> {
    let halves = KernelHalf::of_all(cluster)?;
    let load = Load::begin(cluster, "client", "http://server/")?;
    let said = run_readme(cluster, "mesh-uninstall");
    let counted = load.end(cluster)?;
    ensure!(said?.contains("successfully rolled out"), "it was not waited for");
    println!(
        "{} connections while the mesh was removed, {} failed",
        counted.made, counted.failed
    );
    counted.none_failed("the removal")?;
    before(cluster)?.expect_as_before(cluster)?;
    halves.iter().try_for_each(KernelHalf::expect_none)?;
    let left = cluster
        .kubectl()
        .run(&["get", "clusterrole,clusterrolebinding,crd,namespace", "-o", "name"])?;
    ensure!(!left.contains("culvert"), "left in the cluster:\n{left}");
    ensure!(!left.contains(MESH), "{left}");
    // Pods start without the plugin, and what it has made ends without it.
    cluster.kubectl().apply(&pod("late", 2, "[sleep, inf]"))?;
    cluster.kubectl().wait_for(SHOP, "Ready", &["pod/late"])?;
    cluster
        .kubectl()
        .run(&["-n", SHOP, "delete", "pod", "early", "--wait=true", "--timeout=60s"])?;
    ensure!(
        get(cluster, "http://server/")?.starts_with("server=server "),
        "it does not work without the mesh"
    );
    Ok(())
}
