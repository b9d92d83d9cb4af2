//! What a Pod is called in metrics: its owner, and its application.

use crate::objects::{Labels, Pod};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub kind: OwnerKind,
    pub name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerKind {
    Deployment,
    CronJob,
    Job,
    Pod,
}

/// The workload that made the Pod. A ReplicaSet stands for its Deployment, a Job of a CronJob for that.
pub(super) fn owner(pod_name: &str, pod: &Pod) -> Owner {
    let (kind, name) = match &pod.owner {
        Some((kind, name)) if kind == "ReplicaSet" => {
            let suffix = pod.labels.get("pod-template-hash").map(|hash| format!("-{hash}"));
            let deployment = suffix.and_then(|suffix| name.strip_suffix(&suffix).map(str::to_owned));
            (OwnerKind::Deployment, deployment.unwrap_or_else(|| name.clone()))
        }
        Some((kind, name)) if kind == "Deployment" => (OwnerKind::Deployment, name.clone()),
        Some((kind, name)) if kind == "Job" => match name.rsplit_once('-') {
            // A CronJob names its Jobs by the scheduled minute since 1970: 8 digits at present.
            Some((cron_job, minute)) if minute.len() >= 8 && minute.bytes().all(|b| b.is_ascii_digit()) => {
                (OwnerKind::CronJob, cron_job.to_owned())
            }
            _ => (OwnerKind::Job, name.clone()),
        },
        // The wire knows no word for StatefulSets and DaemonSets; their name is still the useful one.
        Some((_, name)) => (OwnerKind::Pod, name.clone()),
        None => (OwnerKind::Pod, pod_name.to_owned()),
    };
    Owner { kind, name }
}

pub(super) fn canonical_name(labels: &Labels, workload: &str) -> String {
    first(labels, &["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]).unwrap_or_else(|| workload.to_owned())
}

pub(super) fn canonical_revision(labels: &Labels) -> String {
    first(
        labels,
        &["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"],
    )
    .unwrap_or_else(|| "latest".to_owned())
}

fn first(labels: &Labels, keys: &[&str]) -> Option<String> {
    keys.iter()
        .find_map(|key| labels.get(*key).filter(|value| !value.is_empty()).cloned())
}
