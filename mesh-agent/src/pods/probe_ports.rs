//! The kernel is told where the kubelet asks the Pods of this node, as the control plane's list has it.

use std::sync::Arc;
use std::time::Duration;

use super::Pods;
use crate::discovery::node_pods::NodeLists;

const RETRY: Duration = Duration::from_secs(1);

/// For ever. Before the list was told, and while the control plane is away, what was told last stands.
pub async fn follow(pods: Arc<Pods>, mut lists: NodeLists) {
    loop {
        let list = lists.borrow_and_update().clone();
        let told = match list {
            Some(list) => {
                let of_pod =
                    |(uid, pod): (&Arc<str>, &crate::discovery::node_pods::ListedPod)| (uid.clone(), pod.probe_ports.clone());
                pods.capture.set_probe_ports(list.pods.iter().map(of_pod).collect()).await
            }
            None => Ok(()),
        };
        if let Err(error) = told {
            tracing::error!(%error, "the kernel does not know where the kubelet asks a Pod; it is told again");
            tokio::time::sleep(RETRY).await;
        } else if lists.changed().await.is_err() {
            return;
        }
    }
}
