//! The downward stream of enrolment: which Pods this node has, and which namespaces are in the mesh. While the control plane is
//! away the last list stands.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_common::limits::{MAX_PODS, MAX_PROBE_PORTS_PER_POD};
use mesh_proto::node::{NodePod, NodePodsRequest, NodePodsState};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::transport::ControlPlane;

const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// Another control plane may not know this service; it is asked again, in case it is replaced.
const UNIMPLEMENTED_RETRY: Duration = Duration::from_secs(300);
/// As the interface says; of more nothing is taken over.
const MAX_ADDRESSES: usize = 16;
const MAX_NAMESPACES: usize = 4096;

/// A Pod of this node, as the control plane knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedPod {
    pub namespace: String,
    pub name: String,
    pub service_account: String,
    /// Empty until it has one.
    pub addresses: Vec<IpAddr>,
    pub is_member: bool,
    /// Why one that asks to be a member cannot be; else empty.
    pub refused: String,
    /// The runtime knows it by another uid.
    pub is_static: bool,
    /// Where the kubelet asks it.
    pub probe_ports: Vec<u16>,
}

/// Everything that the control plane says of this node's enrolments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeList {
    /// By uid.
    pub pods: BTreeMap<Arc<str>, ListedPod>,
    /// Pods are missing for want of room: who is not listed may still be there.
    pub is_cut: bool,
    /// In the mesh → whether its Pods start even where they cannot be enrolled.
    pub namespaces: BTreeMap<String, bool>,
    /// As `is_cut`, of namespaces.
    pub are_namespaces_cut: bool,
}

/// `None` until the control plane has told of it.
pub type NodeLists = watch::Receiver<Option<Arc<NodeList>>>;

/// Follows the list until `stop`; connects again after every loss.
pub async fn run(control: ControlPlane, lists: watch::Sender<Option<Arc<NodeList>>>, stop: CancellationToken) {
    let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    loop {
        let ended = tokio::select! {
            () = stop.cancelled() => return,
            ended = stream(&control, &lists, &mut backoff) => ended,
        };
        let wait = if ended.code() == Code::Unimplemented {
            info!("the control plane does not tell which Pods to enrol");
            UNIMPLEMENTED_RETRY
        } else {
            let wait = backoff.after_failure();
            debug!(reason = %ended.message(), ?wait, "the list of this node's Pods is away; the last one stands");
            wait
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn stream(control: &ControlPlane, lists: &watch::Sender<Option<Arc<NodeList>>>, backoff: &mut Backoff) -> tonic::Status {
    let mut states = match control.node_pods().watch(NodePodsRequest {}).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status,
    };
    loop {
        match states.message().await {
            Ok(Some(state)) => {
                backoff.reset();
                let list = node_list(state);
                debug!(
                    pods = list.pods.len(),
                    namespaces = list.namespaces.len(),
                    "the list of this node's Pods"
                );
                lists.send_if_modified(|current| {
                    let changed = current.as_deref() != Some(&list);
                    if changed {
                        *current = Some(Arc::new(list));
                    }
                    changed
                });
            }
            Ok(None) => return tonic::Status::unavailable("ended by the control plane"),
            Err(status) => return status,
        }
    }
}

fn node_list(state: NodePodsState) -> NodeList {
    let is_cut = state.omitted_pods > 0 || state.pods.len() > MAX_PODS as usize;
    let are_namespaces_cut = state.omitted_namespaces > 0 || state.namespaces.len() > MAX_NAMESPACES;
    NodeList {
        pods: state.pods.into_iter().take(MAX_PODS as usize).map(listed).collect(),
        is_cut,
        namespaces: state
            .namespaces
            .into_iter()
            .take(MAX_NAMESPACES)
            .map(|namespace| (namespace.name, namespace.best_effort))
            .collect(),
        are_namespaces_cut,
    }
}

fn listed(pod: NodePod) -> (Arc<str>, ListedPod) {
    let address = |text: &String| {
        let address = text.parse::<IpAddr>();
        if address.is_err() {
            warn!(uid = pod.uid, address = %text, "an address in the list of Pods is none, and is left out");
        }
        address.ok()
    };
    let port = |number: &u32| {
        let port = u16::try_from(*number).ok().filter(|port| *port != 0);
        if port.is_none() {
            warn!(
                uid = pod.uid,
                port = number,
                "a probe's port in the list of Pods is none, and is left out"
            );
        }
        port
    };
    let listed = ListedPod {
        probe_ports: (pod.probe_ports.iter().take(MAX_PROBE_PORTS_PER_POD))
            .filter_map(port)
            .collect(),
        addresses: pod.addresses.iter().take(MAX_ADDRESSES).filter_map(address).collect(),
        namespace: pod.namespace,
        name: pod.name,
        service_account: pod.service_account,
        is_member: pod.is_member && pod.refused.is_empty(),
        is_static: pod.is_static && !pod.refused.is_empty(),
        refused: pod.refused,
    };
    (pod.uid.into(), listed)
}

/// What the control plane tells of the node: within the bounds whatever it is, and nobody is both refused and a member.
#[cfg(fuzzing)]
pub fn fuzz(bytes: &[u8]) {
    use prost::Message as _;
    let Ok(state) = NodePodsState::decode(bytes) else { return };
    let (pods, namespaces) = (state.pods.len(), state.namespaces.len());
    let list = node_list(state);
    assert!(list.is_cut || pods <= MAX_PODS as usize);
    assert!(list.are_namespaces_cut || namespaces <= MAX_NAMESPACES);
    assert!(list.pods.len() <= pods.min(MAX_PODS as usize) && list.namespaces.len() <= namespaces.min(MAX_NAMESPACES));
    for pod in list.pods.values() {
        assert!(pod.addresses.len() <= MAX_ADDRESSES && pod.probe_ports.len() <= MAX_PROBE_PORTS_PER_POD);
        assert!(!pod.probe_ports.contains(&0) && !(pod.is_member && !pod.refused.is_empty()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(uid: &str, addresses: &[&str], refused: &str) -> NodePod {
        NodePod {
            uid: uid.to_owned(),
            addresses: addresses.iter().map(ToString::to_string).collect(),
            is_member: true,
            refused: refused.to_owned(),
            probe_ports: vec![0, 8080, 65_536],
            ..NodePod::default()
        }
    }

    #[test]
    fn what_cannot_be_used_is_left_out_and_a_refused_pod_is_no_member() {
        let list = node_list(NodePodsState {
            pods: vec![
                wire("a", &["10.0.0.1", "nonsense", "fd00::1"], ""),
                wire("b", &[], "a sidecar"),
            ],
            ..NodePodsState::default()
        });
        assert_eq!(
            list.pods["a"].addresses,
            ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]
        );
        assert!(list.pods["a"].is_member && !list.pods["b"].is_member);
        assert_eq!(list.pods["a"].probe_ports, [8080]);
        assert!(!list.is_cut);
    }

    #[test]
    fn a_list_with_more_than_its_bound_is_cut_and_says_so() {
        let pods = (0..=MAX_PODS).map(|i| wire(&i.to_string(), &[], "")).collect();
        let list = node_list(NodePodsState {
            pods,
            ..NodePodsState::default()
        });
        assert_eq!(list.pods.len(), MAX_PODS as usize);
        assert!(list.is_cut);
        let told = node_list(NodePodsState {
            omitted_pods: 1,
            omitted_namespaces: 1,
            ..NodePodsState::default()
        });
        assert!(told.is_cut && told.are_namespaces_cut);
    }
}
