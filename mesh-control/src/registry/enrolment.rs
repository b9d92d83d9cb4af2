//! What a manifest tells of how its Pods are enrolled, beside labels. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as core;

/// On a Namespace, as label or annotation.
const ENROLMENT: &str = "culvert.dev/enrolment";
const BEST_EFFORT: &str = "best-effort";

/// Containers by which the proxies of other meshes are known.
const SIDECAR_CONTAINERS: [&str; 6] = [
    "istio-proxy",
    "linkerd-proxy",
    "consul-dataplane",
    "envoy-sidecar",
    "kuma-sidecar",
    "osm-envoy",
];
/// What their injectors write on a Pod.
const SIDECAR_ANNOTATIONS: [&str; 4] = [
    "sidecar.istio.io/status",
    "linkerd.io/proxy-version",
    "consul.hashicorp.com/connect-inject-status",
    "kuma.io/sidecar-injected",
];

pub fn asks_best_effort(of_namespace: &BTreeMap<String, String>) -> bool {
    of_namespace.get(ENROLMENT).is_some_and(|value| value == BEST_EFFORT)
}

/// The container or annotation that shows another mesh's sidecar.
pub fn sidecar(spec: &core::PodSpec, annotations: &BTreeMap<String, String>) -> Option<&'static str> {
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let names: Vec<&str> = containers.map(|container| container.name.as_str()).collect();
    let by_name = SIDECAR_CONTAINERS.into_iter().find(|name| names.contains(name));
    by_name.or_else(|| {
        SIDECAR_ANNOTATIONS
            .into_iter()
            .find(|key| annotations.get(*key).is_some_and(|value| value != "false"))
    })
}
