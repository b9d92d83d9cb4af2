//! Writes what people are told: Events, and the annotation that tells why a Pod is not protected.

use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::api::events::v1::{Event, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Error};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::event_queue::EventWrite;
use super::pod_notices::ProblemWrite;
use super::watch::describe;
use crate::control_plane::{ControlPlane, Notice, Shared};
use crate::limits::{API_TIMEOUT, NOTICE_WRITE_PACE, NOTICE_WRITES_AT_ONCE};
use crate::registry::convert::PROBLEM_ANNOTATION;

const CONTROLLER: &str = "culvert.dev/mesh-control";
/// Of what belongs to no namespace.
const NAMESPACE_OF_THE_REST: &str = "default";
/// As Kubernetes bounds it.
const MAX_INSTANCE_BYTES: usize = 128;

enum Outcome {
    Done,
    /// Of what is gone nobody needs to hear.
    Gone,
    Failed(String),
}

/// For ever. A few at a time, and not faster than [`NOTICE_WRITE_PACE`].
pub async fn write(client: Client, control: Arc<ControlPlane>, shared: Arc<Shared>) {
    let places = Arc::new(Semaphore::new(NOTICE_WRITES_AT_ONCE));
    let instance = instance();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let next = loop {
            match shared.take_notice(Instant::now(), SystemTime::now(), &control.metrics) {
                Ok(notice) => break notice,
                Err(None) => shared.noticed().await,
                Err(Some(due)) => {
                    tokio::select! {
                        () = sleep_until(due) => {}
                        () = shared.noticed() => {}
                    }
                }
            }
        };
        let (client, control, shared, instance) = (client.clone(), Arc::clone(&control), Arc::clone(&shared), instance.clone());
        tokio::spawn(async move {
            let _place = place;
            match next {
                Notice::Event(event) => say(&client, &control, &shared, event, &instance).await,
                Notice::Problem(problem) => annotate(&client, &control, &problem).await,
            }
        });
        sleep(NOTICE_WRITE_PACE).await;
    }
}

/// The Pod's name, in a cluster.
fn instance() -> String {
    let name = std::env::var("HOSTNAME").ok().filter(|name| !name.is_empty());
    let name = name.unwrap_or_else(|| "mesh-control".to_owned());
    name[..name.floor_char_boundary(MAX_INSTANCE_BYTES)].to_owned()
}

async fn say(client: &Client, control: &ControlPlane, shared: &Shared, event: EventWrite, instance: &str) {
    let namespace = if event.subject.namespace.is_empty() {
        NAMESPACE_OF_THE_REST
    } else {
        &event.subject.namespace
    };
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    let mut outcome = if event.count > 1 {
        count_up(&api, &event).await
    } else {
        create(&api, &event, namespace, instance).await
    };
    // Events end after an hour; the first one of this name may have been another replica's.
    outcome = match outcome {
        Ok(()) => Ok(()),
        Err(Error::Api(status)) if status.code == 404 && event.count > 1 => create(&api, &event, namespace, instance).await,
        Err(Error::Api(status)) if status.code == 409 => count_up(&api, &event).await,
        Err(error) => Err(error),
    };
    match outcome_of(outcome) {
        Outcome::Done => control.metrics.events_written.inc(),
        Outcome::Gone => {}
        Outcome::Failed(problem) => {
            tracing::warn!(event = event.name, namespace, "an Event is not written: {problem}");
            if let Err(dropped) = shared.say_again(event, Instant::now()) {
                control.metrics.event_dropped(dropped);
            }
        }
    }
}

async fn create(api: &Api<Event>, event: &EventWrite, namespace: &str, instance: &str) -> Result<(), Error> {
    let subject = &event.subject;
    let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    let object = Event {
        metadata: ObjectMeta {
            name: Some(event.name.clone()),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        event_time: micro_time(event.at),
        regarding: Some(ObjectReference {
            api_version: some(subject.api_version),
            kind: some(subject.kind),
            namespace: some(&subject.namespace),
            name: some(&subject.name),
            uid: some(&subject.uid),
            ..ObjectReference::default()
        }),
        reason: some(event.reason.as_str()),
        note: some(&event.note),
        type_: some(if event.reason.is_warning() { "Warning" } else { "Normal" }),
        action: some("Protect"),
        reporting_controller: some(CONTROLLER),
        reporting_instance: some(instance),
        series: (event.count > 1).then(|| series(event)),
        ..Event::default()
    };
    in_time(api.create(&PostParams::default(), &object)).await
}

/// Everything but the series of an Event stands as it was written.
async fn count_up(api: &Api<Event>, event: &EventWrite) -> Result<(), Error> {
    let change = Patch::Merge(serde_json::json!({"series": series(event)}));
    in_time(api.patch(&event.name, &PatchParams::default(), &change)).await
}

fn series(event: &EventWrite) -> EventSeries {
    EventSeries {
        // Kubernetes takes no series of one.
        count: event.count.max(2),
        last_observed_time: micro_time(event.at).unwrap_or(MicroTime(Timestamp::UNIX_EPOCH)),
    }
}

fn micro_time(at: SystemTime) -> Option<MicroTime> {
    Timestamp::try_from(at).ok().map(MicroTime)
}

async fn annotate(client: &Client, control: &ControlPlane, problem: &ProblemWrite) {
    let change = serde_json::json!({
        "metadata": {"uid": problem.pod.uid, "annotations": {PROBLEM_ANNOTATION: problem.text}}
    });
    let api: Api<Pod> = Api::namespaced(client.clone(), &problem.pod.namespace);
    let (params, change) = (PatchParams::default(), Patch::Merge(change));
    let done = in_time(api.patch_metadata(&problem.pod.name, &params, &change)).await;
    if let Outcome::Failed(why) = outcome_of(done) {
        // The agent's next report brings it again.
        control.metrics.problems_failed.inc();
        let pod = format!("{}/{}", problem.pod.namespace, problem.pod.name);
        tracing::warn!(pod, "the annotation {PROBLEM_ANNOTATION} is not written: {why}");
    }
}

async fn in_time<T>(request: impl Future<Output = Result<T, Error>>) -> Result<(), Error> {
    match timeout(API_TIMEOUT, request).await {
        Ok(done) => done.map(drop),
        Err(_) => Err(Error::Service("no answer in time".into())),
    }
}

fn outcome_of(done: Result<(), Error>) -> Outcome {
    match done {
        Ok(()) => Outcome::Done,
        // Also in a namespace that ends.
        Err(Error::Api(status)) if matches!(status.code, 404 | 409) || status.message.contains("being terminated") => {
            Outcome::Gone
        }
        Err(error) => Outcome::Failed(describe(&error)),
    }
}
