//! An Event as Kubernetes has it, `events.k8s.io/v1`.

use std::time::SystemTime;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::{Event, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;

use super::event_queue::EventWrite;

const CONTROLLER: &str = "culvert.dev/mesh-control";

/// `instance`: the replica.
#[must_use]
pub fn object(event: &EventWrite, instance: &str) -> Event {
    let (telling, subject) = (&event.telling, &event.telling.subject);
    let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    Event {
        metadata: ObjectMeta {
            name: Some(event.name.clone()),
            namespace: some(subject.event_namespace()),
            ..ObjectMeta::default()
        },
        event_time: Some(micro_time(event.at)),
        regarding: Some(ObjectReference {
            api_version: some(subject.api_version),
            kind: some(subject.kind),
            namespace: some(&subject.namespace),
            name: some(&subject.name),
            uid: some(&subject.uid),
            ..ObjectReference::default()
        }),
        reason: some(telling.reason.as_str()),
        note: some(&telling.note),
        type_: some(if telling.reason.is_warning() { "Warning" } else { "Normal" }),
        action: some("Protect"),
        reporting_controller: some(CONTROLLER),
        reporting_instance: some(instance),
        series: (event.count > 1).then(|| series(event)),
        ..Event::default()
    }
}

#[must_use]
pub fn series(event: &EventWrite) -> EventSeries {
    EventSeries {
        count: event.count,
        last_observed_time: micro_time(event.at),
    }
}

fn micro_time(at: SystemTime) -> MicroTime {
    MicroTime(Timestamp::try_from(at).unwrap_or(Timestamp::UNIX_EPOCH))
}
