//! Waiting for the DaemonSet that cleans nodes, for Helm, which waits for Jobs alone.

use std::time::Duration;

use anyhow::bail;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use tokio::time::{Instant, sleep, timeout};

use super::client;
use super::watch::describe;
use crate::config::AwaitUninstallArgs;
use crate::limits::API_TIMEOUT;

const NAME: &str = "mesh-uninstall";
const LABEL: &str = "app.kubernetes.io/name=mesh-uninstall";
const LOOK: Duration = Duration::from_secs(1);
/// Of what a node says; a container's message has at most 4,096 bytes (Kubernetes).
const MAX_SAID: usize = 500;

/// # Errors
/// The time is over, or the cluster cannot be asked.
pub async fn wait(args: &AwaitUninstallArgs) -> anyhow::Result<()> {
    let patience = Duration::from_secs(args.timeout_seconds);
    let until = Instant::now() + patience;
    let missing = match timeout(patience, client::connect()).await {
        Ok(client) => {
            let client = client?;
            let sets: Api<DaemonSet> = Api::namespaced(client.clone(), &args.namespace);
            let pods: Api<Pod> = Api::namespaced(client, &args.namespace);
            loop {
                let missing = match timeout(API_TIMEOUT, look(&sets, &pods)).await {
                    Ok(Ok(None)) => {
                        tracing::info!("every node is clean");
                        return Ok(());
                    }
                    Ok(Ok(Some(missing))) => missing,
                    Ok(Err(error)) => describe(&error),
                    Err(_) => format!("no answer of the API server within {API_TIMEOUT:?}"),
                };
                if Instant::now() >= until {
                    break missing;
                }
                sleep(LOOK).await;
            }
        }
        Err(_) => "the API server does not answer".to_owned(),
    };
    bail!("not every node is clean: {missing}")
}

async fn look(sets: &Api<DaemonSet>, pods: &Api<Pod>) -> Result<Option<String>, kube::Error> {
    let set = sets.get_opt(NAME).await?;
    let pods = pods.list(&ListParams::default().labels(LABEL)).await?.items;
    Ok(missing(set.as_ref(), &pods))
}

/// `None`: nothing. Pure.
fn missing(set: Option<&DaemonSet>, pods: &[Pod]) -> Option<String> {
    let Some(set) = set else {
        return Some(format!("there is no DaemonSet {NAME}"));
    };
    let status = set.status.clone().unwrap_or_default();
    if status.observed_generation.is_none() || status.observed_generation < set.metadata.generation {
        return Some("the cluster has not taken the DaemonSet up yet".to_owned());
    }
    if status.number_ready >= status.desired_number_scheduled {
        return None;
    }
    let nodes: Vec<String> = pods.iter().filter(|pod| !is_ready(pod)).map(what_it_says).collect();
    let (ready, desired) = (status.number_ready, status.desired_number_scheduled);
    Some(format!("{ready} of {desired} are; {}", nodes.join("; ")))
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref());
    let mut ready = conditions
        .unwrap_or_default()
        .iter()
        .filter(|condition| condition.type_ == "Ready");
    ready.any(|condition| condition.status == "True")
}

fn what_it_says(pod: &Pod) -> String {
    let node = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.node_name.as_deref())
        .unwrap_or("(no node)");
    let containers = pod.status.as_ref().and_then(|status| status.container_statuses.as_deref());
    let mut said = containers.unwrap_or_default().iter().flat_map(|container| {
        let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
        let ended = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
        let ended = ended.and_then(|ended| ended.message.clone());
        ended.or_else(|| waiting.and_then(|waiting| waiting.message.clone()))
    });
    match said.next() {
        Some(said) => format!("{node}: {}", said.trim().chars().take(MAX_SAID).collect::<String>()),
        None => node.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
        serde_json::from_value(value).expect("an object")
    }

    fn set(generation: i64, observed: Option<i64>, ready: i32, desired: i32) -> DaemonSet {
        from(serde_json::json!({
            "metadata": {"generation": generation},
            "status": {
                "observedGeneration": observed, "numberReady": ready, "desiredNumberScheduled": desired,
                "currentNumberScheduled": desired, "numberMisscheduled": 0,
            },
        }))
    }

    #[test]
    fn it_is_over_once_every_node_says_so() {
        assert_eq!(missing(Some(&set(1, Some(1), 3, 3)), &[]), None);
        // A cluster without nodes for it.
        assert_eq!(missing(Some(&set(1, Some(1), 0, 0)), &[]), None);
        for early in [set(1, None, 0, 0), set(2, Some(1), 3, 3)] {
            assert!(missing(Some(&early), &[]).is_some_and(|missing| missing.contains("not taken")));
        }
        assert!(missing(None, &[]).is_some());
    }

    #[test]
    fn a_node_that_is_not_clean_is_named_with_its_reason() {
        let pod = |node: &str, ready: &str, message: Option<&str>| -> Pod {
            from(serde_json::json!({
                "spec": {"nodeName": node, "containers": []},
                "status": {
                    "conditions": [{"type": "Ready", "status": ready}],
                    "containerStatuses": [{
                        "name": "mesh-uninstall", "image": "", "imageID": "", "ready": false, "restartCount": 1,
                        "lastState": {"terminated": {"exitCode": 1, "message": message}},
                    }],
                },
            }))
        };
        let pods = [
            pod("one", "True", None),
            pod("two", "False", Some("not everything could be removed: x\n")),
            pod("three", "False", None),
        ];
        assert_eq!(
            missing(Some(&set(1, Some(1), 1, 3)), &pods).as_deref(),
            Some("1 of 3 are; two: not everything could be removed: x; three")
        );
    }
}
