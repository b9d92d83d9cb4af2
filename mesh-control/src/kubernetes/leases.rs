//! The Leases of a replica, in the mesh's own namespace: one by which one of all is chosen to write statuses, and one of its own that
//! tells the others what its agents enforce. A replica's Lease that is not renewed counts no longer, and is removed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, ObjectList, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, Error};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout};

use super::election::{Election, Step};
use super::watch::{Backoff, describe, retry_after};
use crate::control_plane::ControlPlane;
use crate::enforcement::share::Share;
use crate::limits::{ELECTION_LIFE, ELECTION_PACE, MAX_REPLICAS, SHARE_LIFE, SHARE_PACE, SHARE_RENEWAL, STATUS_TIMEOUT};

/// The Lease of who writes statuses.
const ELECTION: &str = "culvert-status-writer";
/// On the Leases of replicas.
const REPLICA_LABEL: &str = "culvert.dev/replica";
const ENFORCED_ANNOTATION: &str = "culvert.dev/enforced";

/// Why a request about a Lease has failed.
enum Failure {
    Api(Box<Error>),
    Timeout,
    /// More replicas than [`MAX_REPLICAS`]: some of them do not count.
    TooMany,
}

impl Failure {
    /// The pause that the API server asks for.
    fn asked(&self) -> Duration {
        match self {
            Self::Api(error) => retry_after(error).unwrap_or_default(),
            Self::Timeout | Self::TooMany => Duration::ZERO,
        }
    }

    fn is(&self, code: u16) -> bool {
        matches!(self, Self::Api(error) if matches!(error.as_ref(), Error::Api(status) if status.code == code))
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Api(error) => f.write_str(&describe(error)),
            Self::Timeout => write!(f, "no answer within {STATUS_TIMEOUT:?}"),
            Self::TooMany => write!(
                f,
                "more than {MAX_REPLICAS} Leases of replicas: what some of them tell does not count"
            ),
        }
    }
}

async fn answered<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
    match timeout(STATUS_TIMEOUT, request).await {
        Ok(done) => done.map_err(|error| Failure::Api(Box::new(error))),
        Err(_) => Err(Failure::Timeout),
    }
}

/// One of them a process.
pub struct Leases {
    api: Api<Lease>,
    control: Arc<ControlPlane>,
    election: Mutex<Election>,
}

impl Leases {
    #[must_use]
    pub fn new(client: &Client, namespace: &str, control: Arc<ControlPlane>) -> Self {
        Self {
            api: Api::namespaced(client.clone(), namespace),
            control,
            election: Mutex::new(Election::new(identity())),
        }
    }

    /// Whether this replica is the one that writes statuses.
    #[must_use]
    pub fn is_writer(&self) -> bool {
        self.election.lock().is_held(Instant::now())
    }

    /// Gets and keeps the Lease of who writes, for ever. Who does not know the cluster yet leaves it to others.
    pub async fn elect(self: Arc<Self>) {
        let (mut failing, mut backoff) = (false, Backoff::default());
        loop {
            let before = self.is_writer();
            let mut pause = ELECTION_PACE;
            if self.control.is_ready() {
                let done = self.step().await;
                pause = pause.max(pause_after(&mut backoff, &done));
                self.said("election", &mut failing, &done);
            }
            let is_writer = self.is_writer();
            self.control.metrics.status_writer.set(i64::from(is_writer));
            self.control.set_writer(is_writer);
            if before != is_writer {
                tracing::info!(is_writer, identity = self.identity(), "the Lease of who writes statuses");
            }
            sleep(pause).await;
        }
    }

    async fn step(&self) -> Result<(), Failure> {
        let lease = answered(self.api.get_opt(ELECTION)).await?;
        let step = self.election.lock().read(lease.as_ref(), Instant::now());
        let now = MicroTime(Timestamp::now());
        let sent = Instant::now();
        let spec = LeaseSpec {
            holder_identity: Some(self.identity()),
            lease_duration_seconds: i32::try_from(ELECTION_LIFE.as_secs()).ok(),
            renew_time: Some(now.clone()),
            ..LeaseSpec::default()
        };
        let written = match step {
            Step::Wait => return Ok(()),
            Step::Create => {
                let lease = Lease {
                    metadata: ObjectMeta {
                        name: Some(ELECTION.to_owned()),
                        ..ObjectMeta::default()
                    },
                    spec: Some(LeaseSpec {
                        acquire_time: Some(now),
                        lease_transitions: Some(0),
                        ..spec
                    }),
                };
                answered(self.api.create(&PostParams::default(), &lease)).await
            }
            Step::Renew { resource_version } => self.write(resource_version, spec).await,
            Step::Take {
                resource_version,
                transitions,
            } => {
                let spec = LeaseSpec {
                    acquire_time: Some(now),
                    lease_transitions: Some(transitions),
                    ..spec
                };
                self.write(resource_version, spec).await
            }
        };
        match written {
            Ok(_) => self.election.lock().written(sent),
            // Another one was quicker; that is no failure.
            Err(failure) if failure.is(409) => self.election.lock().lost(),
            Err(failure) => return Err(failure),
        }
        Ok(())
    }

    /// Only as it was read.
    async fn write(&self, resource_version: String, spec: LeaseSpec) -> Result<Lease, Failure> {
        let change = serde_json::json!({"metadata": {"resourceVersion": resource_version}, "spec": spec});
        answered(self.api.patch(ELECTION, &PatchParams::default(), &Patch::Merge(change))).await
    }

    /// Lets another one write at once, instead of once the Lease has run out. What cannot be done is left to that.
    pub async fn release(&self) {
        if !self.is_writer() {
            return;
        }
        self.election.lock().lost();
        self.control.metrics.status_writer.set(0);
        self.control.set_writer(false);
        let Ok(Some(lease)) = answered(self.api.get_opt(ELECTION)).await else {
            return;
        };
        let holder = lease.spec.and_then(|spec| spec.holder_identity);
        if holder != Some(self.identity()) {
            return;
        }
        let spec = LeaseSpec {
            holder_identity: Some(String::new()),
            ..LeaseSpec::default()
        };
        drop(self.write(lease.metadata.resource_version.unwrap_or_default(), spec).await);
    }

    /// Tells the other replicas what this one's agents enforce, for ever.
    pub async fn share(self: Arc<Self>) {
        let name = format!("culvert-replica-{}", self.identity());
        let mut told: Option<(Share, Instant)> = None;
        let (mut failing, mut backoff) = (false, Backoff::default());
        loop {
            let mut pause = SHARE_PACE;
            if self.control.is_ready() {
                let control = Arc::clone(&self.control);
                let Ok(share) = tokio::task::spawn_blocking(move || control.share()).await else {
                    return;
                };
                let is_due = told
                    .as_ref()
                    .is_none_or(|(before, at)| *before != share || at.elapsed() >= SHARE_RENEWAL);
                if is_due {
                    let now = Instant::now();
                    let done = self.tell(&name, &share).await;
                    if done.is_ok() {
                        told = Some((share, now));
                    }
                    pause = pause.max(pause_after(&mut backoff, &done));
                    self.said("share", &mut failing, &done);
                }
            }
            sleep(pause).await;
        }
    }

    async fn tell(&self, name: &str, share: &Share) -> Result<(), Failure> {
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                labels: Some(BTreeMap::from([(REPLICA_LABEL.to_owned(), "true".to_owned())])),
                annotations: Some(BTreeMap::from([(ENFORCED_ANNOTATION.to_owned(), share.text().to_owned())])),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity()),
                lease_duration_seconds: i32::try_from(SHARE_LIFE.as_secs()).ok(),
                renew_time: Some(MicroTime(Timestamp::now())),
                ..LeaseSpec::default()
            }),
        };
        let change = Patch::Merge(&lease);
        match answered(self.api.patch(name, &PatchParams::default(), &change)).await {
            Err(failure) if failure.is(404) => answered(self.api.create(&PostParams::default(), &lease)).await.map(drop),
            done => done.map(drop),
        }
    }

    /// Reads what every replica has told last.
    ///
    /// # Errors
    /// It could not be read, or not all of it: the pause that the API server asks for.
    pub async fn read(&self, shares: &mut Shares) -> Result<(), Duration> {
        let params = ListParams::default()
            .labels(&format!("{REPLICA_LABEL}=true"))
            .limit(MAX_REPLICAS);
        let (read, done) = match answered(self.api.list(&params)).await {
            Ok(list) => {
                let all = is_all(&list);
                (Some(list.items), all)
            }
            Err(failure) => (None, Err(failure)),
        };
        let mut failing = shares.is_failing;
        self.said("read", &mut failing, &done);
        shares.is_failing = failing;
        let Some(read) = read else {
            shares.unread();
            return done.map_err(|failure| failure.asked());
        };
        for (gone, resource_version) in shares.read(&read, Instant::now()) {
            // Only as it was read: its replica may be there after all. What fails is found again.
            let params = DeleteParams {
                preconditions: Some(Preconditions {
                    resource_version: Some(resource_version),
                    uid: None,
                }),
                ..DeleteParams::default()
            };
            drop(answered(self.api.delete(&gone, &params)).await);
        }
        Ok(())
    }

    fn identity(&self) -> String {
        self.election.lock().identity().to_owned()
    }

    fn said(&self, lease: &str, failing: &mut bool, done: &Result<(), Failure>) {
        if let Err(failure) = done {
            self.control.metrics.lease_failures.with_label_values(&[lease]).inc();
            if !*failing {
                tracing::warn!(lease, "statuses may fall behind: {failure}");
            }
        } else if *failing {
            tracing::info!(lease, "the Lease can be written again");
        }
        *failing = done.is_err();
    }
}

fn pause_after(backoff: &mut Backoff, done: &Result<(), Failure>) -> Duration {
    match done {
        Ok(()) => {
            *backoff = Backoff::default();
            Duration::ZERO
        }
        Err(failure) => backoff.after(failure.asked()),
    }
}

/// Whether the list has every Lease.
fn is_all(list: &ObjectList<Lease>) -> Result<(), Failure> {
    let has_more = list.metadata.continue_.as_ref().is_some_and(|more| !more.is_empty());
    if has_more { Err(Failure::TooMany) } else { Ok(()) }
}

/// What every replica has told, and since when nothing new was heard of it.
#[derive(Clone, Default)]
pub struct Shares {
    /// By the Lease's name; at most [`MAX_REPLICAS`].
    replicas: BTreeMap<String, Told>,
    is_read: bool,
    is_failing: bool,
}

#[derive(Clone)]
struct Told {
    resource_version: String,
    since: Instant,
    share: Arc<Share>,
}

impl Shares {
    /// Names and versions of Leases that have run out.
    fn read(&mut self, leases: &[Lease], now: Instant) -> Vec<(String, String)> {
        let mut next = BTreeMap::new();
        let mut gone = Vec::new();
        for lease in leases {
            let name = lease.metadata.name.clone().unwrap_or_default();
            let resource_version = lease.metadata.resource_version.clone().unwrap_or_default();
            let told = match self.replicas.remove(&name) {
                Some(told) if told.resource_version == resource_version => Told {
                    // While nothing could be read, nobody could tell anything either.
                    since: if self.is_read { told.since } else { now },
                    ..told
                },
                _ => {
                    let text = lease
                        .metadata
                        .annotations
                        .as_ref()
                        .and_then(|all| all.get(ENFORCED_ANNOTATION));
                    Told {
                        resource_version,
                        since: now,
                        share: text.and_then(|text| Share::parse(text)).unwrap_or_default().into(),
                    }
                }
            };
            if now >= told.since + SHARE_LIFE {
                gone.push((name, told.resource_version));
            } else {
                next.insert(name, told);
            }
        }
        self.replicas = next;
        self.is_read = true;
        gone
    }

    /// What was told stands, and who tells it is seen anew at the next reading.
    pub fn unread(&mut self) {
        self.is_read = false;
    }

    /// Whether that was possible the last time.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.is_read
    }

    pub fn each(&self) -> impl Iterator<Item = &Share> + Clone {
        self.replicas.values().map(|told| &*told.share)
    }
}

/// Another one for each process: the host's name, which is the Pod's, and something drawn.
fn identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host
        .trim()
        .chars()
        .map(|letter| {
            if letter.is_ascii_alphanumeric() {
                letter.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .take(MAX_HOST)
        .collect();
    let host = host.trim_matches('-');
    let drawn: u32 = rand::random();
    if host.is_empty() {
        format!("{drawn:08x}")
    } else {
        format!("{host}-{drawn:08x}")
    }
}

/// Characters of the host's name in it: a Pod's name may have 253, and so may a Lease's.
const MAX_HOST: usize = 200;

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta;

    use super::*;
    use crate::compile::forms::ShortHash;
    use crate::enforcement::share::Group;

    fn lease(name: &str, version: &str, text: &str) -> Lease {
        Lease {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                resource_version: Some(version.to_owned()),
                annotations: Some(BTreeMap::from([(ENFORCED_ANNOTATION.to_owned(), text.to_owned())])),
                ..ObjectMeta::default()
            },
            spec: None,
        }
    }

    fn text() -> String {
        let form = ShortHash::of(&[b"form"]);
        let group = Group {
            nodes: vec![ShortHash::of(&[b"node"])],
            enforces: [form].into(),
            rejects: [].into(),
        };
        Share::of([form].into(), std::iter::once(group)).0.text().to_owned()
    }

    #[test]
    fn a_replica_that_renews_nothing_counts_no_longer() {
        let (mut shares, start) = (Shares::default(), Instant::now());
        assert!(
            shares
                .read(&[lease("a", "1", &text()), lease("b", "1", "no share")], start)
                .is_empty()
        );
        assert_eq!(shares.each().map(|share| share.groups.len()).collect::<Vec<_>>(), [1, 0]);
        let later = start + SHARE_LIFE;
        let gone = shares.read(&[lease("a", "2", &text()), lease("b", "1", "no share")], later);
        assert_eq!(gone, [("b".to_owned(), "1".to_owned())]);
        assert_eq!(shares.each().count(), 1);
        // Removed by hand, or by another replica.
        assert!(shares.read(&[], later).is_empty());
        assert_eq!(shares.each().count(), 0);
    }

    #[test]
    fn what_could_not_be_read_is_not_taken_for_dead() {
        let (mut shares, start) = (Shares::default(), Instant::now());
        shares.read(&[lease("a", "1", &text())], start);
        shares.unread();
        assert_eq!(shares.each().count(), 1, "what was told stands");
        let back = start + SHARE_LIFE * 10;
        assert!(shares.read(&[lease("a", "1", &text())], back).is_empty());
        let gone = shares.read(&[lease("a", "1", &text())], back + SHARE_LIFE);
        assert_eq!(gone, [("a".to_owned(), "1".to_owned())]);
    }

    #[test]
    fn more_leases_than_are_read_are_said() {
        let list = |more: &str| ObjectList {
            metadata: ListMeta {
                continue_: Some(more.to_owned()),
                ..ListMeta::default()
            },
            items: vec![lease("a", "1", "")],
            types: kube::core::TypeMeta::default(),
        };
        assert!(is_all(&list("")).is_ok());
        let said = is_all(&list("token")).expect_err("there are more").to_string();
        assert!(said.contains(&MAX_REPLICAS.to_string()), "{said}");
    }

    #[test]
    fn an_identity_is_a_name_and_another_one_each_time() {
        let (one, other) = (identity(), identity());
        assert_ne!(one, other);
        assert!(crate::registry::is_name(&format!("culvert-replica-{one}")), "{one}");
    }
}
