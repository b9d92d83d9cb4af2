//! Writes the statuses of policies and MeshConfigs, where this replica is the one to do so.
//!
//! Nothing waits in a queue: what differs is found anew each time, from the state as it is then. Each write is for the version of the
//! object that it was made from, so that two replicas never write over each other, nor over what a user has just applied.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::{Api, Client, Error};
use mesh_api::{AuthorizationPolicy, MeshConfig, Status};
use tokio::time::{Instant, sleep, timeout};

use super::feed::Feed;
use super::leases::{Leases, Shares};
use super::statuses::{Change, Tally, Tried, Turns, changes};
use super::watch::{Backoff, describe, retry_after};
use crate::limits::{FAILURE_LOG_INTERVAL, SHARE_PACE, STATUS_PACE, STATUS_REFUSED_PAUSE, STATUS_TIMEOUT, WATCH_RETRY};
use crate::objects::Kind;

/// For ever.
pub async fn write(client: Client, feed: Arc<Feed>, leases: Arc<Leases>) {
    let mut writer = Writer {
        client,
        feed,
        leases,
        shares: Arc::default(),
        tried: Tried::default(),
        turns: Turns::default(),
        said: None,
    };
    let (mut backoff, mut reading) = (Backoff::default(), Backoff::default());
    let mut read_next: Option<Instant> = None;
    loop {
        sleep(STATUS_PACE).await;
        if !writer.leases.is_writer() || !writer.feed.control.is_ready() {
            read_next = None;
            writer.forget_who_is_alive();
            writer.feed.control.metrics.status_writes_waiting.set(0);
            continue;
        }
        if read_next.is_none_or(|next| Instant::now() >= next) {
            let pause = match writer.leases.read(Arc::make_mut(&mut writer.shares)).await {
                Ok(()) => {
                    reading = Backoff::default();
                    SHARE_PACE
                }
                Err(asked) => reading.after(asked).max(SHARE_PACE),
            };
            read_next = Some(Instant::now() + pause);
        }
        match writer.round().await {
            Ok(()) => backoff = Backoff::default(),
            Err(asked) => {
                let pause = backoff.after(asked);
                if pause > SHARE_PACE * 2 {
                    read_next = None;
                    writer.forget_who_is_alive();
                }
                sleep(pause).await;
            }
        }
    }
}

struct Writer {
    client: Client,
    feed: Arc<Feed>,
    leases: Arc<Leases>,
    shares: Arc<Shares>,
    tried: Tried,
    turns: Turns,
    /// When a failure was last logged as a warning.
    said: Option<Instant>,
}

impl Writer {
    /// While nothing is read, nobody can show that he is there: what was told stands until it is read again.
    fn forget_who_is_alive(&mut self) {
        if self.shares.is_read() {
            Arc::make_mut(&mut self.shares).unread();
        }
    }

    /// `Err`: the API server does not take any just now, and asks for so long a pause.
    async fn round(&mut self) -> Result<(), Duration> {
        let control = Arc::clone(&self.feed.control);
        // In this order: an object that was published since is not told by an older state.
        let marks = self.feed.marks();
        let snapshot = control.snapshot();
        self.tried.keep(&marks);
        let shares = Arc::clone(&self.shares);
        let now = Time(Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default());
        // Of tens of thousands of policies that takes longer than others may wait for.
        let found = tokio::task::spawn_blocking(move || {
            let forms = snapshot.forms.iter().map(|(_, form)| form);
            let tally = (shares.is_read()).then(|| Tally::new(&snapshot.nodes, forms, shares.each()));
            changes(&marks, &snapshot, tally.as_ref(), &now)
        });
        let Ok(mut due) = found.await else { return Ok(()) };
        let now = Instant::now();
        let held_back = due.iter().filter(|change| self.tried.is_held_back(change, now)).count();
        due.retain(|change| self.tried.may(change, now));
        let waiting = due.len() + held_back;
        let mut done = 0;
        let written = self.write_in_turn(due, &mut done).await;
        let waiting = i64::try_from(waiting - done).unwrap_or(i64::MAX);
        control.metrics.status_writes_waiting.set(waiting);
        written
    }

    /// As [`Self::round`]. `done`: those that need not be tried again.
    async fn write_in_turn(&mut self, due: Vec<Change>, done: &mut usize) -> Result<(), Duration> {
        // One namespace's objects, or webhooks, may be at fault by themselves; where another one's fail as well, the API server is.
        let mut failing: Option<String> = None;
        for change in self.turns.next(due) {
            if !self.leases.is_writer() {
                return Ok(());
            }
            if failing.as_ref() == Some(&change.id.namespace) {
                continue;
            }
            // Whatever becomes of it, others are next.
            self.turns.took(&change);
            match self.write(&change).await {
                Ok(()) => *done += 1,
                Err(asked) if !asked.is_zero() || failing.is_some() => return Err(asked),
                Err(_) => failing = Some(change.id.namespace.clone()),
            }
        }
        if failing.is_some() && *done == 0 {
            Err(Duration::ZERO)
        } else {
            Ok(())
        }
    }

    /// As [`Self::round`].
    async fn write(&mut self, change: &Change) -> Result<(), Duration> {
        let metrics = &self.feed.control.metrics;
        let resource = match change.id.kind {
            Kind::MeshConfig => ApiResource::erase::<MeshConfig>(&()),
            _ => ApiResource::erase::<AuthorizationPolicy>(&()),
        };
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &change.id.namespace, &resource);
        let patch = Patch::Merge(patch(change));
        let params = PatchParams::default();
        let done = timeout(STATUS_TIMEOUT, api.patch_status(&change.id.name, &params, &patch)).await;
        let now = Instant::now();
        let (failed, problem) = match done {
            Ok(Ok(_)) => {
                metrics.status_writes.inc();
                self.tried.wait_for_next(change, now);
                return Ok(());
            }
            Ok(Err(error)) => (Failed::of(&error), describe(&error)),
            Err(_) => (Failed::Timeout, format!("no answer within {STATUS_TIMEOUT:?}")),
        };
        let reason = failed.reason();
        metrics.status_writes_failed.with_label_values(&[reason]).inc();
        match failed {
            // The watch tells what has become of it.
            Failed::Gone | Failed::Conflict => {
                self.tried.wait_for_next(change, now);
                tracing::debug!(object = %change.id, reason, "status not written: {problem}");
                return Ok(());
            }
            // It may be of this object: an admission webhook has its reasons, or does not answer, or the object is too large.
            Failed::Refused | Failed::Forbidden | Failed::Timeout | Failed::Trouble => {
                self.tried.wait_until(change, now, now + STATUS_REFUSED_PAUSE);
            }
            Failed::Busy(_) | Failed::Connection => {}
        }
        if self.said.is_none_or(|said| now >= said + FAILURE_LOG_INTERVAL) {
            self.said = Some(now);
            tracing::warn!(object = %change.id, reason, "status not written: {problem}");
        }
        match failed {
            Failed::Busy(asked) => Err(asked),
            Failed::Connection | Failed::Timeout | Failed::Trouble | Failed::Forbidden => Err(Duration::ZERO),
            _ => Ok(()),
        }
    }
}

/// Why a status was not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failed {
    Gone,
    Conflict,
    /// The API server has too much to do: with the pause that it asks for.
    Busy(Duration),
    /// It is in trouble, or a webhook of the object's is.
    Trouble,
    Forbidden,
    Refused,
    Connection,
    Timeout,
}

impl Failed {
    fn of(error: &Error) -> Self {
        let Error::Api(status) = error else { return Self::Connection };
        match status.code {
            404 => Self::Gone,
            409 => Self::Conflict,
            429 | 500.. => match retry_after(error) {
                Some(asked) => Self::Busy(asked),
                None if status.code == 429 => Self::Busy(WATCH_RETRY),
                None => Self::Trouble,
            },
            401 | 403 => Self::Forbidden,
            _ => Self::Refused,
        }
    }

    /// In the metric.
    fn reason(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Conflict => "conflict",
            Self::Busy(_) => "busy",
            Self::Trouble => "trouble",
            Self::Forbidden => "forbidden",
            Self::Refused => "refused",
            Self::Connection => "connection",
            Self::Timeout => "timeout",
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_objects_fault_is_told_from_what_is_the_api_servers() {
        let api = |code: u16, seconds: u32| {
            let status = serde_json::json!({
                "status": "Failure", "code": code, "reason": "So", "message": "so", "details": {"retryAfterSeconds": seconds},
            });
            let status: kube::core::Status = serde_json::from_value(status).expect("a status");
            Failed::of(&Error::Api(status.boxed()))
        };
        let pause = Duration::from_secs(3);
        for (code, failed) in [
            (404, Failed::Gone),
            (409, Failed::Conflict),
            (403, Failed::Forbidden),
            (422, Failed::Refused),
            (429, Failed::Busy(pause)),
            (500, Failed::Busy(pause)),
            (504, Failed::Busy(pause)),
        ] {
            assert_eq!(api(code, 3), failed, "{code}");
        }
        assert_eq!(api(503, 0), Failed::Trouble);
        assert_eq!(api(429, 0), Failed::Busy(WATCH_RETRY));
    }
}
