//! The registry over the API server: it follows Kubernetes objects, and compiles them as those of a folder are.
//!
//! `watch` (lists and watches) → `world` (pure: last good forms, what is complete) → `registry::decision` → `control_plane`; and
//! back: `captures` writes what agents have proven on their Pods, `accounts` keeps deleted service accounts; `notice_writer` writes what
//! people are told, which `pod_notices` and `event_queue` (pure) decide; `leases` tells the other
//! replicas what agents enforce and chooses one of them, whose `status_writer` writes what `statuses` (pure) finds. Beside it, whom to believe:
//! `reviews` asks whose a token is, `root_secret` follows the root of trust.

mod accounts;
mod allowance;
mod answers;
mod captures;
pub mod client;
mod election;
pub mod event_queue;
mod events;
mod feed;
mod leases;
pub mod notice_writer;
pub mod pod_notices;
pub mod review_cache;
mod review_lanes;
pub mod reviews;
pub mod root;
pub mod root_secret;
mod status_writer;
mod statuses;
pub mod uninstall;
mod watch;
pub mod wishes;
pub mod world;

use std::sync::Arc;

use kube::Client;
use tokio::task::JoinSet;

pub use accounts::deleted_accounts;

use crate::control_plane::{ControlPlane, Shared};

/// Follows the cluster until it is dropped or stopped.
pub struct Following {
    tasks: JoinSet<()>,
    leases: Arc<leases::Leases>,
}

impl Following {
    /// Begins; nothing is published before every kind was listed once. `namespace`: the mesh's own.
    #[must_use]
    pub fn start(client: &Client, namespace: &str, control: &Arc<ControlPlane>, shared: &Arc<Shared>) -> Self {
        let mut tasks = JoinSet::new();
        let feed = Arc::new(feed::Feed::new(Arc::clone(control)));
        watch::all(client, &feed, &mut tasks);
        tasks.spawn(feed::publish(Arc::clone(&feed)));
        let leases = Arc::new(leases::Leases::new(client, namespace, Arc::clone(control)));
        tasks.spawn(Arc::clone(&leases).share());
        tasks.spawn(Arc::clone(&leases).elect());
        tasks.spawn(status_writer::write(client.clone(), feed, Arc::clone(&leases)));
        tasks.spawn(captures::write(client.clone(), Arc::clone(control), Arc::clone(shared)));
        tasks.spawn(Arc::clone(control).look_at_network_policies());
        tasks.spawn(Arc::clone(control).tell_as_writer());
        tasks.spawn(notice_writer::events(client.clone(), Arc::clone(control), Arc::clone(shared)));
        tasks.spawn(notice_writer::problems(
            client.clone(),
            Arc::clone(control),
            Arc::clone(shared),
        ));
        tasks.spawn(accounts::keep(
            client.clone(),
            namespace.to_owned(),
            Arc::clone(control),
            Arc::clone(shared),
        ));
        Self { tasks, leases }
    }

    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
        self.leases.release().await;
    }
}
