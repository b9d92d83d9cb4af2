//! What is written for a node's services, and the addresses of the cluster. Decides, and does no I/O.
//!
//! ```text
//!   Pod ── veth ── node-1 eth0 ─┐                         ┌─ eth0 node-2 ── veth ── Pod
//!   10.244.1.x     172.30.0.11  └── br0 (control plane) ──┘  172.30.0.12     10.244.2.x
//!   fd00:244:1::x  fd00:172::11         172.30.0.1           fd00:172::12    fd00:244:2::x
//!                                       fd00:172::1
//! ```
//! IPv4 is the first family, as on most clusters.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use serde_json::json;

pub(super) const BRIDGE: &str = "br0";
pub(super) const CONTROL_PLANE: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 1);
pub(super) const CONTROL_PLANE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0, 0, 0, 0, 0, 1);
pub(super) const NODES_PREFIX: u8 = 24;
pub(super) const NODES_PREFIX_V6: u8 = 64;
/// Of all Pods.
pub(super) const CLUSTER_CIDRS: &str = "10.244.0.0/16,fd00:244::/32";
pub(super) const DNS_SERVICE: &str = "10.96.0.10";
pub(super) const PAUSE_IMAGE: &str = "culvert.test/pause:1";
/// Before any that the machine may have.
pub(super) const NETWORK_FILE: &str = "05-culvert-test.conflist";

pub(super) fn node_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 30, 0, 10 + number)
}

pub(super) fn node_address_v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x172, 0, 0, 0, 0, 0, 0x10 + u16::from(number))
}

pub(super) fn pod_cidr(number: u8) -> String {
    format!("10.244.{number}.0/24")
}

pub(super) fn pod_cidr_v6(number: u8) -> String {
    format!("fd00:244:{number}::/64")
}

/// The CNI plugins' configuration: a veth for each Pod, routed.
pub(super) fn network(number: u8) -> String {
    let network = json!({
        "cniVersion": "1.0.0",
        "name": "test",
        "plugins": [{
            "type": "ptp",
            "ipMasq": false,
            "mtu": 1500,
            "ipam": {
                "type": "host-local",
                // Gone after a reboot, as the Pods are.
                "dataDir": "/run/cni-addresses",
                "ranges": [[{"subnet": pod_cidr(number)}], [{"subnet": pod_cidr_v6(number)}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        }],
    });
    format!("{network:#}\n")
}

pub(super) fn containerd(runc: &Path) -> String {
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing",
]

[grpc]
address = "/run/containerd/containerd.sock"

[{cri}]
sandbox_image = "{PAUSE_IMAGE}"
# The machine may not allow less than this process has.
restrict_oom_score_adj = true

[{cri}.cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"

[{cri}.containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"

[{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[{cri}.containerd.runtimes.runc.options]
BinaryName = "{}"
SystemdCgroup = false
"#,
        runc.display()
    )
}

/// JSON, which is YAML.
pub(super) fn kubelet(authority: &Path) -> String {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": authority},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": format!("unix://{}", super::node::CONTAINERD_SOCKET),
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": false,
        "enforceNodeAllocatable": ["none"],
        "failSwapOn": false,
        "clusterDNS": [DNS_SERVICE],
        "clusterDomain": "cluster.local",
        // The machine's disk and memory are not the node's.
        "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "imageMinimumGCAge": "24h",
        // `kubectl logs` shows the last file alone, and an access log has a line for every connection of a test.
        "containerLogMaxSize": "200Mi",
        // A crashed node is noticed soon, with the controllers' own settings.
        "nodeStatusUpdateFrequency": "4s",
        "nodeLeaseDurationSeconds": 16,
        "syncFrequency": "5s",
    })
    .to_string()
}

pub(super) fn kube_proxy(node: &str, kubeconfig: &Path) -> String {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": kubeconfig},
        "mode": "nftables",
        "clusterCIDR": CLUSTER_CIDRS,
        "hostnameOverride": node,
        // As the machine has it: its limits are not a namespace's to set.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_network_is_its_own() {
        let network: serde_json::Value = serde_json::from_str(&network(2)).unwrap();
        let ranges = &network["plugins"][0]["ipam"]["ranges"];
        assert_eq!(ranges[0][0]["subnet"], "10.244.2.0/24");
        assert_eq!(ranges[1][0]["subnet"], "fd00:244:2::/64");
        assert_eq!(node_address_v6(2).to_string(), "fd00:172::12");
    }
}
