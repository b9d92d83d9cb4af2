//! Writes the statuses of policies and MeshConfigs, where this replica is the one to do so.
//!
//! Nothing waits in a queue: what differs is found anew each time, from the world as it is then. Each write is for the version of the
//! object that it was made from, so that two replicas never write over each other, nor over what a user has just applied.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::{Api, Client, Error};
use mesh_api::{AuthorizationPolicy, MeshConfig, Status};
use tokio::time::{Instant, sleep, timeout};

use super::feed::Feed;
use super::leases::{Leases, Shares};
use super::statuses::{Change, Found, Tally, Tried, changes};
use super::watch::{Backoff, describe};
use crate::compile::selection::selected;
use crate::limits::{SHARE_PACE, STATUS_PACE, STATUS_REFUSED_PAUSE, STATUS_TIMEOUT, STATUS_WRITES};
use crate::objects::{Kind, ObjectId};

/// For ever.
pub async fn write(client: Client, feed: Arc<Feed>, leases: Arc<Leases>) {
    let mut writer = Writer {
        client,
        feed,
        leases,
        shares: Shares::default(),
        tried: Tried::default(),
        last: None,
    };
    let mut backoff = Backoff::default();
    let mut read_at: Option<Instant> = None;
    loop {
        sleep(STATUS_PACE).await;
        if !writer.leases.is_writer() || !writer.feed.control.is_ready() {
            read_at = None;
            writer.feed.control.metrics.status_writes_waiting.set(0);
            continue;
        }
        if read_at.is_none_or(|at| at.elapsed() >= SHARE_PACE) {
            if let Err(problem) = writer.leases.read(&mut writer.shares).await {
                tracing::warn!("what other replicas tell of their agents cannot be read: {problem}");
                sleep(backoff.next()).await;
                continue;
            }
            read_at = Some(Instant::now());
        }
        if writer.round().await {
            backoff = Backoff::default();
        } else {
            sleep(backoff.next()).await;
        }
    }
}

struct Writer {
    client: Client,
    feed: Arc<Feed>,
    leases: Arc<Leases>,
    shares: Shares,
    tried: Tried,
    /// The last object that was written: the next time goes on behind it.
    last: Option<ObjectId>,
}

impl Writer {
    /// False: the API server does not take any just now.
    async fn round(&mut self) -> bool {
        let control = Arc::clone(&self.feed.control);
        // In this order: an object that was published since is not told by an older state.
        let marks = self.feed.marks();
        let (world, snapshot) = (control.world(), control.snapshot());
        self.tried.keep(&marks);
        let tally = Tally::new(&world, snapshot.forms.values().copied(), self.shares.each());
        let found = Found {
            forms: &snapshot.forms,
            selected: &selected(&world),
            tally: &tally,
        };
        let now = Time(Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default());
        let mut due = changes(&marks, &found, self.last.as_ref(), &now);
        due.retain(|change| self.tried.may(change, Instant::now()));
        let waiting = due.len().saturating_sub(STATUS_WRITES);
        control
            .metrics
            .status_writes_waiting
            .set(i64::try_from(waiting).unwrap_or(i64::MAX));
        for change in due.into_iter().take(STATUS_WRITES) {
            if !self.leases.is_writer() {
                return true;
            }
            if !self.write(&change).await {
                return false;
            }
            self.last = Some(change.id);
        }
        true
    }

    /// False: the API server does not take any just now.
    async fn write(&mut self, change: &Change) -> bool {
        let metrics = &self.feed.control.metrics;
        let resource = match change.id.kind {
            Kind::MeshConfig => ApiResource::erase::<MeshConfig>(&()),
            _ => ApiResource::erase::<AuthorizationPolicy>(&()),
        };
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &change.id.namespace, &resource);
        let patch = Patch::Merge(patch(change));
        let params = PatchParams::default();
        let (reason, problem) = match timeout(STATUS_TIMEOUT, api.patch_status(&change.id.name, &params, &patch)).await {
            Ok(Ok(_)) => {
                metrics.status_writes.inc();
                self.tried.wait_for_next(change);
                return true;
            }
            Ok(Err(Error::Api(status))) => {
                let reason = match status.code {
                    404 => "gone",
                    409 => "conflict",
                    429 => "too_many_requests",
                    401 | 403 => "forbidden",
                    _ => "refused",
                };
                (reason, describe(&Error::Api(status)))
            }
            Ok(Err(error)) => ("connection", describe(&error)),
            Err(_) => ("timeout", format!("no answer within {STATUS_TIMEOUT:?}")),
        };
        metrics.status_writes_failed.with_label_values(&[reason]).inc();
        match reason {
            // The watch tells what has become of it.
            "gone" | "conflict" => {
                self.tried.wait_for_next(change);
                tracing::debug!(object = %change.id, reason, "status not written: {problem}");
                return true;
            }
            "refused" => self.tried.wait_until(change, Instant::now() + STATUS_REFUSED_PAUSE),
            _ => {}
        }
        tracing::warn!(object = %change.id, reason, "status not written: {problem}");
        reason == "refused"
    }
}

/// What is no longer said is taken away.
fn patch(change: &Change) -> serde_json::Value {
    let Status {
        conditions,
        observed_generation,
        workloads_selected,
        nodes_enforcing,
    } = &change.status;
    serde_json::json!({
        "metadata": {"resourceVersion": change.resource_version},
        "status": {
            "conditions": conditions,
            "observedGeneration": observed_generation,
            "workloadsSelected": workloads_selected,
            "nodesEnforcing": nodes_enforcing,
        },
    })
}
