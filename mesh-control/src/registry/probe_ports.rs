//! Where a Pod says that the kubelet asks it: its probes and hooks of HTTP, TCP and gRPC. Pure.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::convert::port;

/// Of one container, in the manifest's list `list`.
///
/// # Errors
/// A number that is no port.
pub(super) fn add(ports: &mut BTreeSet<u16>, path: &str, container: &core::Container) -> Result<(), String> {
    for (name, probe) in [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ] {
        let Some(probe) = probe else { continue };
        let path = format!("{path}.{name}");
        if let Some(http) = &probe.http_get {
            ports.extend(of_pod(
                &format!("{path}.httpGet"),
                http.host.as_deref(),
                &http.port,
                container,
            )?);
        }
        if let Some(tcp) = &probe.tcp_socket {
            ports.extend(of_pod(
                &format!("{path}.tcpSocket"),
                tcp.host.as_deref(),
                &tcp.port,
                container,
            )?);
        }
        if let Some(grpc) = &probe.grpc {
            ports.insert(port(&format!("{path}.grpc.port"), grpc.port)?);
        }
    }
    let hooks = container.lifecycle.as_ref();
    for (name, hook) in [
        ("postStart", hooks.and_then(|hooks| hooks.post_start.as_ref())),
        ("preStop", hooks.and_then(|hooks| hooks.pre_stop.as_ref())),
    ] {
        // The kubelet asks by HTTP alone.
        if let Some(http) = hook.and_then(|hook| hook.http_get.as_ref()) {
            let path = format!("{path}.lifecycle.{name}.httpGet");
            ports.extend(of_pod(&path, http.host.as_deref(), &http.port, container)?);
        }
    }
    Ok(())
}

/// `None`: another host is asked, or a port that nobody has named, with which the kubelet fails by itself.
fn of_pod(path: &str, host: Option<&str>, given: &IntOrString, container: &core::Container) -> Result<Option<u16>, String> {
    if host.is_some_and(|host| !host.is_empty()) {
        return Ok(None);
    }
    let path = format!("{path}.port");
    let named = |name: &str| {
        let ports = container.ports.as_deref().unwrap_or_default();
        ports.iter().find(|port| port.name.as_deref() == Some(name))
    };
    match given {
        IntOrString::Int(number) => port(&path, *number).map(Some),
        // As the kubelet does it: a name of this container's own ports, whatever their protocol; or else a number in quotes.
        IntOrString::String(name) => match (named(name), name.parse()) {
            (Some(named), _) => port(&path, named.container_port).map(Some),
            (None, Ok(number)) => port(&path, number).map(Some),
            (None, Err(_)) => Ok(None),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(container: serde_json::Value) -> Result<Vec<u16>, String> {
        let mut ports = BTreeSet::new();
        add(&mut ports, "spec.containers[0]", &serde_json::from_value(container).unwrap())?;
        Ok(ports.into_iter().collect())
    }

    #[test]
    fn every_way_in_which_the_kubelet_asks() {
        let container = serde_json::json!({
            "name": "app",
            "ports": [{"name": "web", "containerPort": 8081}, {"name": "odd", "containerPort": 8082, "protocol": "UDP"}],
            "livenessProbe": {"httpGet": {"port": "web"}},
            "readinessProbe": {"grpc": {"port": 9000}},
            "startupProbe": {"tcpSocket": {"port": "odd"}},
            "lifecycle": {"postStart": {"httpGet": {"port": "8083"}}, "preStop": {"httpGet": {"port": 8084}}},
        });
        assert_eq!(ports(container), Ok(vec![8081, 8082, 8083, 8084, 9000]));
    }

    #[test]
    fn what_does_not_go_to_the_pod_is_not_declared() {
        for probe in [
            serde_json::json!({"httpGet": {"port": 80, "host": "10.0.0.9"}}),
            serde_json::json!({"tcpSocket": {"port": 80, "host": "db.example"}}),
            serde_json::json!({"httpGet": {"port": "nobodys"}}),
            serde_json::json!({"exec": {"command": ["true"]}}),
        ] {
            let container = serde_json::json!({"name": "app", "livenessProbe": probe});
            assert_eq!(ports(container.clone()), Ok(vec![]), "{container}");
        }
    }

    #[test]
    fn a_number_that_is_no_port_is_named() {
        let container = serde_json::json!({"name": "app", "livenessProbe": {"grpc": {"port": 70_000}}});
        let error = ports(container).unwrap_err();
        assert!(
            error.starts_with("spec.containers[0].livenessProbe.grpc.port: 70000 is no port"),
            "{error}"
        );
    }
}
