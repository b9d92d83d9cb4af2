//! Which endpoints a Service has.

use anyhow::{Result, ensure};
use mesh_control::control_plane::ControlPlane;
use mesh_proto::workload::address::Type;
use mesh_proto::workload::{Address, Workload, WorkloadStatus};
use mesh_tests::poll::{self, SOON};
use prost::Message as _;

use crate::{ADDRESSES, Bench, resource};

/// Of address, Pod and readiness.
pub fn slice(namespace: &str, name: &str, service: &str, family: &str, endpoints: &[(&str, Option<&str>, bool)]) -> String {
    let endpoints: Vec<serde_json::Value> = endpoints
        .iter()
        .map(|(ip, pod, ready)| {
            let target = pod.map(|pod| serde_json::json!({"kind": "Pod", "namespace": namespace, "name": pod}));
            serde_json::json!({"addresses": [ip], "conditions": {"ready": ready}, "targetRef": target})
        })
        .collect();
    serde_json::json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "raw", "port": 9001, "protocol": "TCP"}],
        "endpoints": endpoints,
    })
    .to_string()
}

fn workload(control: &ControlPlane, name: &str) -> Option<Workload> {
    let bytes = resource(control, ADDRESSES, name)?;
    match Address::decode(bytes.as_slice()).ok()?.r#type {
        Some(Type::Workload(workload)) => Some(workload),
        _ => None,
    }
}

/// Whether a new connection to the Service may go there.
fn is_chosen(control: &ControlPlane, workload_name: &str, service: &str) -> bool {
    workload(control, workload_name).is_some_and(|workload| {
        workload.status() == WorkloadStatus::Healthy && workload.services.contains_key(&format!("{service}.svc.cluster.local"))
    })
}

const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: NS}\nspec: {selector: {app: a}, ports: [{name: http, port: 80, targetPort: http}]}\n";

pub fn unready(bench: &mut Bench) -> Result<()> {
    bench.namespace("unready")?;
    bench.pod("unready", "a", &["10.244.2.1"])?;
    bench.apply(&SERVICE.replace("NS", "unready"))?;
    let replica = bench.replica()?;
    let chosen = || is_chosen(&replica.control, "Kubernetes//Pod/unready/a", "unready/web.unready");
    ensure!(
        !chosen(),
        "the selector alone makes no endpoint where the cluster says who is one"
    );
    let listed = |ready| slice("unready", "web-1", "web", "IPv4", &[("10.244.2.1", Some("a"), ready)]);
    bench.apply(&listed(true))?;
    poll::until_true("a ready endpoint is chosen", SOON, || Ok(chosen()))?;
    bench.apply(&listed(false))?;
    poll::until_true("what the slice says is not ready is not chosen", SOON, || Ok(!chosen()))?;
    bench.apply(&listed(true))?;
    poll::until_true("it is again", SOON, || Ok(chosen()))?;
    bench.set_ready("unready", "a", &["10.244.2.1"], false)?;
    poll::until_true("nor is one that says so itself", SOON, || Ok(!chosen()))?;
    bench.set_ready("unready", "a", &["10.244.2.1"], true)?;
    poll::until_true("and again", SOON, || Ok(chosen()))?;
    // Without a kubelet it stays, terminating.
    bench.run(&["-n", "unready", "delete", "pod", "a", "--wait=false"])?;
    poll::until_true("a terminating Pod is not chosen", SOON, || Ok(!chosen()))?;
    ensure!(
        workload(&replica.control, "Kubernetes//Pod/unready/a").is_some(),
        "it lives, and may be spoken to"
    );
    Ok(())
}

pub fn by_hand(bench: &mut Bench) -> Result<()> {
    bench.namespace("by-hand")?;
    bench.pod("by-hand", "a", &["10.244.2.9"])?;
    bench.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: by-hand}\nspec: {ports: [{name: http, port: 80}]}\n",
    )?;
    bench.apply(&slice(
        "by-hand",
        "db-1",
        "db",
        "IPv4",
        &[("10.244.2.9", None, true), ("192.0.2.77", None, true)],
    ))?;
    bench.apply("apiVersion: v1\nkind: Service\nmetadata: {name: elsewhere, namespace: by-hand}\nspec: {type: ExternalName, externalName: example.com}\n")?;
    let replica = bench.replica()?;
    let control = &replica.control;
    poll::until_true("a Pod is found by its address", SOON, || {
        Ok(is_chosen(control, "Kubernetes//Pod/by-hand/a", "by-hand/db.by-hand"))
    })?;
    let outside = "Kubernetes/discovery.k8s.io/EndpointSlice/by-hand/db/192.0.2.77";
    ensure!(
        is_chosen(control, outside, "by-hand/db.by-hand"),
        "an endpoint that is no Pod"
    );
    // The API server itself, by which Pods of the mesh reach it.
    let snapshot = control.snapshot();
    let names = snapshot.types[ADDRESSES].resources.keys();
    ensure!(
        names
            .clone()
            .any(|name| name.starts_with("Kubernetes/discovery.k8s.io/EndpointSlice/default/kubernetes/")),
        "{:?}",
        names.collect::<Vec<_>>()
    );
    ensure!(resource(control, ADDRESSES, "by-hand/elsewhere.by-hand.svc.cluster.local").is_none());
    Ok(())
}
