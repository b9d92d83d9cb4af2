//! Lists and watches one kind each, for ever: paged lists, watches that go on where they ended, and what fails is tried again with
//! growing pauses. Only what the mesh reads of an object is kept.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ApiResource, DynamicObject, ListParams, WatchEvent, WatchParams};
use kube::{Api, Client, CustomResourceExt, Error, Resource};
use mesh_api::{AuthorizationPolicy, MeshConfig};
use rand::Rng as _;
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_stream::StreamExt as _;

use super::answers::is_too_large;
use super::feed::Feed;
use super::world::{Meta, Written};
use crate::limits::{
    ABSENT_KIND_CHECK, LIST_PAGE, RETRY_AFTER_MOST, WATCH_FAILURES, WATCH_REFUSALS, WATCH_RETRY, WATCH_RETRY_MOST, WATCH_STANDS,
};
use crate::objects::{Kind, Object, ObjectId};
use crate::registry::convert::{self, Convert};

/// What every watched type can do.
trait Watched: Clone + Debug + DeserializeOwned + Send + 'static {
    fn metadata(&self) -> &ObjectMeta;
    /// # Errors
    /// The field that cannot stand.
    fn object(self, id: &ObjectId) -> Result<Object, String>;
    /// Of kinds that get a status.
    fn written(&self) -> Option<Written> {
        None
    }
}

impl<K> Watched for K
where
    K: Convert + Resource<DynamicType = ()> + Clone + Debug + Send + 'static,
{
    fn metadata(&self) -> &ObjectMeta {
        self.meta()
    }

    fn object(self, _id: &ObjectId) -> Result<Object, String> {
        self.convert()
    }
}

/// Follows every kind.
pub fn all(client: &Client, feed: &Arc<Feed>, tasks: &mut JoinSet<()>) {
    fn core_kind<K>(client: &Client, feed: &Arc<Feed>) -> Watch<K>
    where
        K: Convert + Resource<DynamicType = ()> + Clone + Debug + Send + 'static,
    {
        Watch {
            api: Api::all(client.clone()),
            kind: K::KIND,
            definition: None,
            feed: Arc::clone(feed),
        }
    }
    tasks.spawn(core_kind::<core::Namespace>(client, feed).run());
    tasks.spawn(core_kind::<core::Node>(client, feed).run());
    tasks.spawn(core_kind::<core::Pod>(client, feed).run());
    tasks.spawn(core_kind::<core::Service>(client, feed).run());
    tasks.spawn(core_kind::<EndpointSlice>(client, feed).run());
    tasks.spawn(core_kind::<NetworkPolicy>(client, feed).run());
    let accounts = core_kind::<core::ServiceAccount>(client, feed);
    tasks.spawn(async move {
        // After the Pods: a Pod whose account is not in the newer list names one that was deleted.
        accounts.feed.until_listed(Kind::Pod).await;
        accounts.run().await;
    });
    for (kind, resource, crd) in [
        (
            Kind::AuthorizationPolicy,
            ApiResource::erase::<AuthorizationPolicy>(&()),
            AuthorizationPolicy::crd_name(),
        ),
        (
            Kind::MeshConfig,
            ApiResource::erase::<MeshConfig>(&()),
            MeshConfig::crd_name(),
        ),
    ] {
        let watch = Watch {
            api: Api::<DynamicObject>::all_with(client.clone(), &resource),
            kind,
            definition: Some((Api::all(client.clone()), crd)),
            feed: Arc::clone(feed),
        };
        tasks.spawn(watch.run());
    }
}

/// Of the mesh's own kinds: read as whatever JSON they are, so that one that is no policy spoils no list.
impl Watched for DynamicObject {
    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn object(mut self, id: &ObjectId) -> Result<Object, String> {
        // Whatever stands there says nothing of whether the rest can.
        if let Some(fields) = self.data.as_object_mut() {
            fields.remove("status");
        }
        let value = serde_json::to_value(&self).map_err(|error| error.to_string())?;
        convert::parse(id, &value)
    }

    fn written(&self) -> Option<Written> {
        let status = self.data.get("status").cloned();
        Some(Written {
            generation: self.metadata.generation.unwrap_or_default(),
            resource_version: self.metadata.resource_version.clone().unwrap_or_default(),
            status: status.and_then(|status| serde_json::from_value(status).ok()),
        })
    }
}

struct Watch<K> {
    api: Api<K>,
    kind: Kind,
    /// Of a kind that may be missing: where to look for it, and its name.
    definition: Option<(Api<CustomResourceDefinition>, &'static str)>,
    feed: Arc<Feed>,
}

/// Why a list was not read to its end.
enum ListEnd {
    Failed(String, Option<Duration>),
    /// The cluster does not have this kind.
    Absent,
}

/// How a watch has ended.
enum WatchEnd {
    Over,
    /// From that version on nothing can be told any longer.
    Gone(String),
    Failed(String, Duration),
    /// As `Failed`; so often in a row, and the list is read again.
    Refused(String, Duration, u32),
}

impl WatchEnd {
    fn of(error: &Error) -> Self {
        let (problem, after) = (format!("watch: {}", describe(error)), retry_after(error).unwrap_or_default());
        match error {
            Error::Api(status) if status.code == 410 => Self::Gone(problem),
            // Who has too much to do is not helped by being asked for a list.
            Error::Api(status) if status.code == 429 => Self::Failed(problem, after),
            Error::Api(status) if status.code < 500 => Self::Refused(problem, after, WATCH_REFUSALS),
            // Nor is who is in trouble; but it may be that version which troubles it.
            Error::Api(_) | Error::SerdeError(_) => Self::Refused(problem, after, WATCH_FAILURES),
            _ => Self::Failed(problem, after),
        }
    }
}

fn no_answer(timeout: Duration) -> String {
    format!("no answer within {timeout:?}")
}

impl<K: Watched> Watch<K> {
    async fn run(self) {
        let mut backoff = Backoff::default();
        loop {
            let began = Instant::now();
            match self.list().await {
                Ok(version) => {
                    self.feed.listed(self.kind);
                    self.watch(version).await;
                    if began.elapsed() >= WATCH_RETRY_MOST {
                        backoff = Backoff::default();
                    }
                    sleep(backoff.next()).await;
                }
                Err(ListEnd::Absent) => {
                    self.feed.change(|world| world.absent(self.kind));
                    self.feed.listed(self.kind);
                    sleep(ABSENT_KIND_CHECK).await;
                }
                Err(ListEnd::Failed(problem, after)) => {
                    self.feed.failed(self.kind, format!("list: {problem}"));
                    sleep(backoff.after(after.unwrap_or_default())).await;
                }
            }
        }
    }

    /// Reads everything, page by page, and says from which version to go on. A page that is too large to read is asked for again with
    /// half as many objects, down to one, which is never too large: nobody who may make objects can keep a list from being read.
    async fn list(&self) -> Result<String, ListEnd> {
        self.feed.change(|world| world.begin_list(self.kind));
        let mut limit = LIST_PAGE;
        let mut params = ListParams::default().limit(limit);
        let patience = self.feed.control.bounds.api_timeout;
        loop {
            let page = match timeout(patience, self.api.list(&params)).await {
                Ok(Ok(page)) => page,
                Ok(Err(Error::Api(status))) if status.code == 404 && self.is_absent().await? => return Err(ListEnd::Absent),
                Ok(Err(error)) if limit > 1 && is_too_large(&error) => {
                    limit /= 2;
                    params = params.limit(limit);
                    tracing::info!(
                        kind = self.kind.as_str(),
                        limit,
                        "a page of large objects is read in smaller ones"
                    );
                    continue;
                }
                // Also a page of a list that is too old to go on with (410): it begins anew.
                Ok(Err(error)) => return Err(ListEnd::Failed(describe(&error), retry_after(&error))),
                Err(_) => return Err(ListEnd::Failed(no_answer(patience), None)),
            };
            let (version, next) = (page.metadata.resource_version, page.metadata.continue_);
            self.feed.change(|world| {
                for item in page.items {
                    world.apply(self.kind, meta(&item), |id| item.object(id));
                }
            });
            match next.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => {
                    self.feed.change(|world| world.end_list(self.kind));
                    return Ok(version.unwrap_or_default());
                }
            }
        }
    }

    /// A kind that answers 404 may be missing, or not be served yet by an API server that has just begun: only its definition tells.
    async fn is_absent(&self) -> Result<bool, ListEnd> {
        let Some((definitions, name)) = &self.definition else {
            return Ok(false);
        };
        let patience = self.feed.control.bounds.api_timeout;
        match timeout(patience, definitions.get_opt(name)).await {
            Ok(Ok(found)) => Ok(found.is_none()),
            Ok(Err(error)) => Err(ListEnd::Failed(describe(&error), retry_after(&error))),
            Err(_) => Err(ListEnd::Failed(no_answer(patience), None)),
        }
    }

    /// Follows changes since `version`, until the list must be read again.
    async fn watch(&self, mut version: String) {
        let mut backoff = Backoff::default();
        let mut refusals = 0;
        loop {
            let (began, before) = (Instant::now(), version.clone());
            let after = match self.watch_once(&mut version).await {
                WatchEnd::Over => {
                    refusals = 0;
                    Duration::ZERO
                }
                WatchEnd::Gone(problem) => {
                    tracing::info!(
                        kind = self.kind.as_str(),
                        problem,
                        "what was last read is too old to go on with; the list is read again"
                    );
                    return;
                }
                WatchEnd::Failed(problem, after) => {
                    self.feed.failed(self.kind, problem);
                    after
                }
                WatchEnd::Refused(problem, after, most) => {
                    self.feed.failed(self.kind, problem);
                    refusals += 1;
                    if refusals >= most {
                        return;
                    }
                    after
                }
            };
            if version != before {
                refusals = 0;
            }
            if self.feed.left_out(self.kind) > 0 {
                // There may be room by now, of which no event tells.
                return;
            }
            if began.elapsed() >= WATCH_RETRY_MOST {
                backoff = Backoff::default();
            }
            sleep(backoff.after(after)).await;
        }
    }

    /// One watch, from `version` on, which is carried along.
    async fn watch_once(&self, version: &mut String) -> WatchEnd {
        let bounds = &self.feed.control.bounds;
        let seconds = rand::rng().random_range(bounds.watch_seconds / 2..=bounds.watch_seconds);
        let params = WatchParams::default().timeout(seconds.max(1));
        let events = match timeout(bounds.api_timeout, self.api.watch(&params, version)).await {
            Ok(Ok(events)) => events,
            Ok(Err(error)) => return WatchEnd::of(&error),
            Err(_) => return WatchEnd::Failed(no_answer(bounds.api_timeout), Duration::ZERO),
        };
        tokio::pin!(events);
        // By then the API server has ended it, or it is not there any longer.
        let over = Instant::now() + Duration::from_secs(seconds.into()) + bounds.watch_grace;
        // One that is refused after all is so at once.
        let mut stands = false;
        loop {
            let until = if stands {
                over
            } else {
                over.min(Instant::now() + WATCH_STANDS)
            };
            let event = match timeout_at(until, events.next()).await {
                Ok(Some(Ok(event))) => event,
                Ok(Some(Err(error))) => return WatchEnd::of(&error),
                // Its time is up, or the connection is gone: the next one will tell.
                Ok(None) if stands => return WatchEnd::Over,
                Ok(None) => return WatchEnd::Failed("watch: it ended as it began".to_owned(), Duration::ZERO),
                Err(_) if stands => {
                    // Not even its end: that version may be one that the API server does not know yet, or again.
                    return WatchEnd::Refused("watch: nothing is heard of it".to_owned(), Duration::ZERO, WATCH_REFUSALS);
                }
                Err(_) => {
                    stands = true;
                    self.feed.works(self.kind);
                    continue;
                }
            };
            if let WatchEvent::Error(status) = event {
                return WatchEnd::of(&Error::Api(status));
            }
            self.take(event, version);
            if !stands {
                stands = true;
                self.feed.works(self.kind);
            }
        }
    }

    fn take(&self, event: WatchEvent<K>, version: &mut String) {
        let (item, is_there) = match event {
            WatchEvent::Added(item) | WatchEvent::Modified(item) => (item, true),
            WatchEvent::Deleted(item) => (item, false),
            WatchEvent::Bookmark(bookmark) => {
                *version = bookmark.metadata.resource_version;
                return;
            }
            WatchEvent::Error(_) => return,
        };
        let meta = meta(&item);
        if let Some(newer) = &item.metadata().resource_version {
            version.clone_from(newer);
        }
        self.feed.change(|world| {
            if is_there {
                world.apply(self.kind, meta, |id| item.object(id));
            } else {
                world.delete(self.kind, meta);
            }
        });
    }
}

fn meta(item: &impl Watched) -> Meta {
    let metadata = item.metadata();
    let created = metadata.creation_timestamp.as_ref().map(|time| time.0.as_second());
    Meta {
        name: metadata.name.clone().unwrap_or_default(),
        namespace: metadata.namespace.clone(),
        uid: metadata.uid.clone().unwrap_or_default(),
        created: created.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or_default(),
        written: item.written(),
    }
}

/// What the API server asks a client to wait, when it has too much to do.
pub(super) fn retry_after(error: &Error) -> Option<Duration> {
    let Error::Api(status) = error else { return None };
    let seconds = status.details.as_ref()?.retry_after_seconds;
    (seconds > 0).then(|| Duration::from_secs(seconds.into()).min(RETRY_AFTER_MOST))
}

/// With its causes; the client's own text has them twice, or not at all.
#[must_use]
pub fn describe(error: &Error) -> String {
    if let Error::Api(status) = error {
        return format!("{} {}: {}", status.code, status.reason, status.message);
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

/// Ever longer pauses, each drawn between half of it and all, so that those who failed together do not come back together.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    pub fn next(&mut self) -> Duration {
        let most = WATCH_RETRY.saturating_mul(1 << self.failures.min(16)).min(WATCH_RETRY_MOST);
        self.failures = self.failures.saturating_add(1);
        most.mul_f64(rand::rng().random_range(0.5..1.0))
    }

    /// Not before the API server has asked for, and then not all at once.
    pub fn after(&mut self, asked: Duration) -> Duration {
        self.next().max(asked.mul_f64(rand::rng().random_range(1.0..1.5)))
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn pauses_grow_to_their_bound_and_are_not_the_same_for_everybody() {
        let pauses = || {
            let mut backoff = Backoff::default();
            (0..40).map(|_| backoff.next()).collect::<Vec<_>>()
        };
        let (one, other) = (pauses(), pauses());
        assert_ne!(one, other);
        assert!(one[0] <= WATCH_RETRY && one[0] >= WATCH_RETRY / 2, "{:?}", one[0]);
        assert!(one.iter().all(|pause| *pause <= WATCH_RETRY_MOST));
        assert!(one[39] >= WATCH_RETRY_MOST / 2, "{:?}", one[39]);
    }

    #[test]
    fn an_api_server_that_asks_for_a_pause_gets_it_within_bounds() {
        let busy = |seconds: u32| {
            let status = serde_json::json!({
                "status": "Failure", "code": 429, "reason": "TooManyRequests", "message": "busy",
                "details": {"retryAfterSeconds": seconds},
            });
            let status: Status = serde_json::from_value(status).expect("a status");
            Error::Api(status.boxed())
        };
        assert_eq!(retry_after(&busy(3)), Some(Duration::from_secs(3)));
        assert_eq!(retry_after(&busy(3600)), Some(RETRY_AFTER_MOST));
        assert_eq!(retry_after(&busy(0)), None);
        assert_eq!(describe(&busy(3)), "429 TooManyRequests: busy");
    }
}
