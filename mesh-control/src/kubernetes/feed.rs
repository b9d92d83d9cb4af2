//! Between the watches and the control plane: changes gather here for a moment, and are compiled together.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

use super::world::{ClusterWorld, Mark};
use crate::control_plane::ControlPlane;
use crate::limits::CLUSTER_DEBOUNCE;
use crate::objects::Kind;

pub struct Feed {
    pub control: Arc<ControlPlane>,
    world: Mutex<ClusterWorld>,
    changed: Notify,
    complete: watch::Sender<BTreeSet<Kind>>,
    problem: Mutex<Option<String>>,
    marks: watch::Sender<Arc<Vec<Mark>>>,
    /// Of which it was said that they cannot be followed.
    advice_failing: Mutex<BTreeSet<Kind>>,
}

impl Feed {
    #[must_use]
    pub fn new(control: Arc<ControlPlane>) -> Self {
        Self {
            control,
            world: Mutex::default(),
            changed: Notify::new(),
            complete: watch::Sender::new(BTreeSet::new()),
            problem: Mutex::default(),
            marks: watch::Sender::new(Arc::default()),
            advice_failing: Mutex::default(),
        }
    }

    /// Changes what is known. No I/O in it.
    pub fn change<T>(&self, change: impl FnOnce(&mut ClusterWorld) -> T) -> T {
        let done = change(&mut self.world.lock());
        self.changed.notify_one();
        done
    }

    /// What gets a status; of what is published.
    #[must_use]
    pub fn marks(&self) -> Arc<Vec<Mark>> {
        Arc::clone(&self.marks.borrow())
    }

    #[must_use]
    pub fn left_out(&self, kind: Kind) -> usize {
        self.world.lock().left_out(kind)
    }

    /// A kind was listed to its end.
    pub fn listed(&self, kind: Kind) {
        self.control.metrics.lists.with_label_values(&[kind.as_str()]).inc();
        let (complete, left_out) = {
            let world = self.world.lock();
            (world.complete(), world.left_out(kind))
        };
        self.control
            .metrics
            .objects_left_out
            .with_label_values(&[kind.as_str()])
            .set(i64::try_from(left_out).unwrap_or(i64::MAX));
        self.complete.send_replace(complete);
        self.works(kind);
    }

    /// Done once the kind was listed.
    pub async fn until_listed(&self, kind: Kind) {
        let mut complete = self.complete.subscribe();
        drop(complete.wait_for(|complete| complete.contains(&kind)).await);
    }

    pub fn works(&self, kind: Kind) {
        self.advice_failing.lock().remove(&kind);
        self.control.metrics.watches.with_label_values(&[kind.as_str()]).set(1);
        self.say(kind, None);
    }

    pub fn failed(&self, kind: Kind, problem: String) {
        self.control.metrics.watches.with_label_values(&[kind.as_str()]).set(0);
        self.control.metrics.watch_failures.with_label_values(&[kind.as_str()]).inc();
        tracing::debug!(kind = kind.as_str(), problem, "the API server");
        if kind.is_advice() && self.advice_failing.lock().insert(kind) {
            tracing::warn!(
                "{} cannot be followed, and what they would tell is missing: {problem}",
                kind.as_str()
            );
        }
        self.say(kind, Some(problem));
    }

    fn say(&self, kind: Kind, problem: Option<String>) {
        // Held over both, so that an older finding does not come after a newer one.
        let mut said = self.problem.lock();
        let text = {
            let mut world = self.world.lock();
            world.set_problem(kind, problem);
            world.problem()
        };
        if *said != text {
            self.control.set_registry_problem(text.clone());
            *said = text;
        }
    }
}

/// Publishes what has changed, a moment later, and not more often than compiling it allows.
pub async fn publish(feed: Arc<Feed>) {
    loop {
        feed.changed.notified().await;
        sleep_until((Instant::now() + CLUSTER_DEBOUNCE).max(feed.control.publish_after())).await;
        let feed = Arc::clone(&feed);
        let published = tokio::task::spawn_blocking(move || {
            let (news, marks) = {
                let mut known = feed.world.lock();
                if !known.is_complete() {
                    return;
                }
                let is_new = known.decide() || !feed.control.is_ready();
                let news = is_new.then(|| (known.world(), known.rejections().to_vec()));
                (news, known.marks())
            };
            if let Some((world, rejections)) = news {
                feed.control.set_objects(world, &rejections, 0);
            }
            feed.marks.send_replace(marks);
        });
        drop(published.await);
    }
}
