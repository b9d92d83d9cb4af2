//! Writes what agents have proven on their Pods, for the other replicas and for the one that comes after this.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, Error};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::watch::{Backoff, describe, retry_after};
use super::wishes::Write;
use crate::control_plane::{ControlPlane, Shared};
use crate::limits::{API_TIMEOUT, CAPTURE_ECHO, CAPTURE_WRITE_PACE, CAPTURE_WRITES_AT_ONCE};
use crate::registry::convert::{CAPTURE_ANNOTATION, CAPTURE_UID_ANNOTATION};

/// For ever. A few at a time, and not faster than [`CAPTURE_WRITE_PACE`].
pub async fn write(client: Client, control: Arc<ControlPlane>, shared: Arc<Shared>) {
    let places = Arc::new(Semaphore::new(CAPTURE_WRITES_AT_ONCE));
    let failing = Arc::new(Mutex::new(Backoff::default()));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let next = loop {
            match shared.take(Instant::now()) {
                Ok(write) => break write,
                Err(None) => shared.wished().await,
                Err(Some(due)) => {
                    tokio::select! {
                        () = sleep_until(due) => {}
                        () = shared.wished() => {}
                    }
                }
            }
        };
        let (client, control, shared) = (client.clone(), Arc::clone(&control), Arc::clone(&shared));
        let failing = Arc::clone(&failing);
        tokio::spawn(async move {
            let _place = place;
            let failed = patch(&client, &control, &shared, next).await;
            let waiting = i64::try_from(shared.waiting()).unwrap_or(i64::MAX);
            control.metrics.capture_writes_waiting.set(waiting);
            // Its place stays taken: what waits does not come in its stead to an API server that is in trouble.
            let pause = match failed {
                Ok(()) => {
                    *failing.lock() = Backoff::default();
                    return;
                }
                Err(asked) => failing.lock().after(asked),
            };
            sleep(pause).await;
        });
        sleep(CAPTURE_WRITE_PACE).await;
    }
}

/// `Err`: the API server could not take it, and asks for so long a pause.
async fn patch(client: &Client, control: &Arc<ControlPlane>, shared: &Arc<Shared>, write: Write) -> Result<(), Duration> {
    let value = write.value.map(|state| state.as_str());
    let of = value.map(|_| &write.pod.uid);
    // With the uid: another Pod of that name has proven nothing. Beside the state as well: it says nothing on a Pod to which it was copied.
    let change = serde_json::json!({
        "metadata": {
            "uid": write.pod.uid,
            "annotations": {CAPTURE_ANNOTATION: value, CAPTURE_UID_ANNOTATION: of},
        }
    });
    let api: Api<Pod> = Api::namespaced(client.clone(), &write.pod.namespace);
    // Only metadata comes back.
    let (params, change) = (PatchParams::default(), Patch::Merge(change));
    let done = timeout(API_TIMEOUT, api.patch_metadata(&write.pod.name, &params, &change)).await;
    let failed = |reason: &str, problem: String| {
        control.metrics.capture_writes_failed.with_label_values(&[reason]).inc();
        tracing::warn!(pod = %format!("{}/{}", write.pod.namespace, write.pod.name), reason, "capture state not written: {problem}");
    };
    match done {
        Ok(Ok(_)) => {
            let (control, uid) = (Arc::clone(control), write.pod.uid.clone());
            let written = Arc::clone(&control);
            drop(tokio::task::spawn_blocking(move || written.capture_written(&write)).await);
            // What was read until now may have been older than the write. At most 100 a second of these, for 10 s.
            tokio::spawn(async move {
                sleep(CAPTURE_ECHO).await;
                drop(tokio::task::spawn_blocking(move || control.look_at_capture(&uid)).await);
            });
        }
        Ok(Err(Error::Api(status))) if matches!(status.code, 404 | 409) => {
            failed("gone", describe(&Error::Api(status)));
            shared.gone(&write);
        }
        Ok(Err(error)) => {
            let reason = match &error {
                Error::Api(status) if status.code == 429 => "too_many_requests",
                Error::Api(status) if matches!(status.code, 401 | 403) => "forbidden",
                Error::Api(_) => "refused",
                _ => "connection",
            };
            failed(reason, describe(&error));
            shared.failed(&write);
            // What is refused of one Pod need not be of the next.
            if reason != "refused" || matches!(&error, Error::Api(status) if status.code >= 500) {
                return Err(retry_after(&error).unwrap_or_default());
            }
        }
        Err(_) => {
            failed("timeout", format!("no answer within {API_TIMEOUT:?}"));
            shared.failed(&write);
            return Err(Duration::ZERO);
        }
    }
    Ok(())
}
