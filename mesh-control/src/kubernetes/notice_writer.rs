//! Writes what people are told: Events, and the annotation that tells why a Pod is not protected. One write of each at a time.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Error};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::event_queue::{Dropped, EventWrite};
use super::events::{object, series};
use super::pod_notices::ProblemWrite;
use super::watch::{Backoff, describe, retry_after};
use crate::control_plane::{ControlPlane, Shared};
use crate::limits::{FAILURE_LOG_INTERVAL, NOTICE_WRITE_PACE, STATUS_TIMEOUT};
use crate::metrics::{Metrics, NoticeKind};
use crate::registry::convert::PROBLEM_ANNOTATION;

/// Why something was not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// The Pod, or its namespace: nobody needs to be told any more.
    Gone,
    /// There is one already, or the Pod of that name is another one by now.
    Conflict,
    /// It is not taken as it is.
    Refused,
    /// For want of a right, or by a quota, which are a namespace's own: others do not wait for it.
    Forbidden,
    /// The API server takes nothing just now; with the pause that it asks for.
    Busy(Duration),
    Connection,
    Timeout,
}

impl Failed {
    pub const REASONS: [&'static str; 7] = ["gone", "conflict", "refused", "forbidden", "busy", "connection", "timeout"];

    fn of(error: &Error) -> Self {
        let Error::Api(status) = error else { return Self::Connection };
        match status.code {
            404 => Self::Gone,
            409 => Self::Conflict,
            // In a namespace that ends nothing is made, which is told as forbidden.
            403 if status.message.contains("being terminated") => Self::Gone,
            403 => Self::Forbidden,
            401 | 429 | 500.. => Self::Busy(retry_after(error).unwrap_or_default()),
            _ => Self::Refused,
        }
    }

    /// Metric label.
    fn reason(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Conflict => "conflict",
            Self::Refused => "refused",
            Self::Forbidden => "forbidden",
            Self::Busy(_) => "busy",
            Self::Connection => "connection",
            Self::Timeout => "timeout",
        }
    }

    /// Whether the same may be taken later, and the pause that the API server asks for.
    fn retry(self) -> Option<Duration> {
        match self {
            Self::Gone | Self::Conflict | Self::Refused | Self::Forbidden => None,
            Self::Busy(asked) => Some(asked),
            Self::Connection | Self::Timeout => Some(Duration::ZERO),
        }
    }
}

/// What follows a write: ever longer pauses while the API server takes nothing, and a log line now and then.
struct Outcomes {
    kind: NoticeKind,
    metrics: Arc<Metrics>,
    backoff: Backoff,
    said: Option<Instant>,
}

impl Outcomes {
    fn new(kind: NoticeKind, metrics: &Arc<Metrics>) -> Self {
        Self {
            kind,
            metrics: Arc::clone(metrics),
            backoff: Backoff::default(),
            said: None,
        }
    }

    /// Counts it. The pause until the next write.
    fn took(&mut self, about: &str, done: Result<(), (Failed, String)>) -> Duration {
        let Err((failed, problem)) = done else {
            self.backoff = Backoff::default();
            return NOTICE_WRITE_PACE;
        };
        self.metrics.notice_failed(self.kind, failed.reason());
        let now = Instant::now();
        if failed != Failed::Gone && self.said.is_none_or(|said| now >= said + FAILURE_LOG_INTERVAL) {
            self.said = Some(now);
            tracing::warn!(
                about,
                reason = failed.reason(),
                "not written ({}): {problem}",
                self.kind.as_str()
            );
        }
        match failed.retry() {
            None => NOTICE_WRITE_PACE,
            Some(asked) => self.backoff.after(asked).max(NOTICE_WRITE_PACE),
        }
    }
}

/// Events, for ever.
pub async fn events(client: Client, control: Arc<ControlPlane>, shared: Arc<Shared>) {
    let mut outcomes = Outcomes::new(NoticeKind::Event, &control.metrics);
    let notices = &shared.notices;
    loop {
        let event = loop {
            match notices.take_event(&control, Instant::now(), SystemTime::now()) {
                Ok(event) => break event,
                Err(due) => until(due, notices.more_events()).await,
            }
        };
        let done = write_event(&client, &event, notices.instance()).await;
        let about = event.name.clone();
        let dropped = match &done {
            Ok(()) => {
                control.metrics.events_written.inc();
                None
            }
            Err((Failed::Gone, _)) => None,
            Err((failed, _)) if failed.retry().is_some() => notices.event_again(event, Instant::now()).err(),
            Err(_) => Some(Dropped::Refused),
        };
        if let Some(dropped) = dropped {
            control.metrics.event_dropped(dropped);
        }
        sleep(outcomes.took(&about, done)).await;
    }
}

/// Annotations, for ever.
pub async fn problems(client: Client, control: Arc<ControlPlane>, shared: Arc<Shared>) {
    let mut outcomes = Outcomes::new(NoticeKind::Annotation, &control.metrics);
    let notices = &shared.notices;
    loop {
        let problem = loop {
            match notices.take_problem(&control, Instant::now()) {
                Ok(problem) => break problem,
                Err(due) => until(due, notices.more_problems()).await,
            }
        };
        let done = write_problem(&client, &problem).await;
        let about = format!("{}/{}", problem.pod.namespace, problem.pod.name);
        // What is refused the agent's next report brings again.
        if done.as_ref().is_err_and(|(failed, _)| failed.retry().is_some()) {
            notices.problem_again(problem, Instant::now());
        }
        sleep(outcomes.took(&about, done)).await;
    }
}

async fn until(due: Option<Instant>, more: impl Future<Output = ()>) {
    match due {
        None => more.await,
        Some(due) => tokio::select! {
            () = sleep_until(due) => {}
            () = more => {}
        },
    }
}

async fn write_event(client: &Client, event: &EventWrite, instance: &str) -> Result<(), (Failed, String)> {
    let api: Api<Event> = Api::namespaced(client.clone(), event.telling.subject.event_namespace());
    if event.count > 1 {
        // All of an Event but its series stands as it was written.
        let change = Patch::Merge(serde_json::json!({"series": series(event)}));
        match in_time(api.patch(&event.name, &PatchParams::default(), &change)).await {
            // Kubernetes forgets Events after an hour.
            Err((Failed::Gone, _)) => {}
            done => return done,
        }
    }
    let created = in_time(api.create(&PostParams::default(), &object(event, instance))).await;
    match created {
        // It is there: by another replica, or by a write of this one whose answer was lost.
        Err((Failed::Conflict, _)) => Ok(()),
        done => done,
    }
}

async fn write_problem(client: &Client, problem: &ProblemWrite) -> Result<(), (Failed, String)> {
    // With the uid: of another Pod of that name nothing is known.
    let change = serde_json::json!({
        "metadata": {"uid": problem.pod.uid, "annotations": {PROBLEM_ANNOTATION: problem.text}}
    });
    let api: Api<Pod> = Api::namespaced(client.clone(), &problem.pod.namespace);
    let (params, change) = (PatchParams::default(), Patch::Merge(change));
    in_time(api.patch_metadata(&problem.pod.name, &params, &change)).await
}

async fn in_time<T>(request: impl Future<Output = Result<T, Error>>) -> Result<(), (Failed, String)> {
    match timeout(STATUS_TIMEOUT, request).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err((Failed::of(&error), describe(&error))),
        Err(_) => Err((Failed::Timeout, format!("no answer within {STATUS_TIMEOUT:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::WATCH_RETRY_MOST;

    fn failed(code: u16, seconds: u32, message: &str) -> Failed {
        let status = serde_json::json!({
            "status": "Failure", "code": code, "reason": "So", "message": message, "details": {"retryAfterSeconds": seconds},
        });
        let status: kube::core::Status = serde_json::from_value(status).expect("a status");
        Failed::of(&Error::Api(status.boxed()))
    }

    #[test]
    fn what_is_worth_another_try_is_told_from_what_is_not() {
        let pause = Duration::from_secs(3);
        for (code, message, expected, retry) in [
            (404, "", Failed::Gone, None),
            (409, "", Failed::Conflict, None),
            (403, "the namespace is being terminated", Failed::Gone, None),
            (403, "exceeded quota", Failed::Forbidden, None),
            (401, "", Failed::Busy(pause), Some(pause)),
            (422, "", Failed::Refused, None),
            (429, "", Failed::Busy(pause), Some(pause)),
            (503, "", Failed::Busy(pause), Some(pause)),
        ] {
            let failed = failed(code, 3, message);
            assert_eq!((failed, failed.retry()), (expected, retry), "{code} {message}");
            assert!(Failed::REASONS.contains(&failed.reason()));
        }
    }

    #[tokio::test]
    async fn pauses_grow_within_a_bound_while_nothing_is_taken_and_failures_are_counted() {
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let mut outcomes = Outcomes::new(NoticeKind::Event, &metrics);
        let busy = || Err((Failed::Busy(Duration::ZERO), String::new()));
        let pauses: Vec<Duration> = (0..20).map(|_| outcomes.took("x", busy())).collect();
        assert!(pauses[19] > pauses[0] && pauses[19] >= WATCH_RETRY_MOST / 2, "{pauses:?}");
        assert!(pauses.iter().all(|pause| *pause <= WATCH_RETRY_MOST), "{pauses:?}");
        let asked = Duration::from_secs(40);
        assert!(outcomes.took("x", Err((Failed::Busy(asked), String::new()))) >= asked);
        // What is wrong with one Event is no reason to keep others waiting.
        assert_eq!(outcomes.took("x", Err((Failed::Refused, String::new()))), NOTICE_WRITE_PACE);
        assert_eq!(outcomes.took("x", Ok(())), NOTICE_WRITE_PACE);
        assert!(outcomes.took("x", busy()) < pauses[19]);
        let text = metrics.text().expect("a text");
        assert!(
            text.contains(r#"mesh_control_notice_writes_failed_total{kind="event",reason="busy"} 22"#),
            "{text}"
        );
    }
}
