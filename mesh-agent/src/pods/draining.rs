//! The end of an agent's Pods: they take no new connections, those that are open go on for a while, and a Pod that another agent
//! releases meanwhile is cut. Of each it is told once nothing is carried any more: whoever releases it waits for that.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use crate::capture::LEAVING_LOOK;
use crate::proxy::PodProxyHandle;

const POLL: Duration = Duration::from_millis(50);

/// A Pod that is served; the tests have one that ends slowly.
pub(super) trait Served {
    fn stop_accepting(&self);
    fn is_drained(&self) -> bool;
    async fn shutdown(self);
}

impl Served for PodProxyHandle {
    fn stop_accepting(&self) {
        PodProxyHandle::stop_accepting(self);
    }

    fn is_drained(&self) -> bool {
        PodProxyHandle::is_drained(self)
    }

    async fn shutdown(self) {
        PodProxyHandle::shutdown(self).await;
    }
}

/// Until no connection is left, or `patience` is over; then all that is left is cut.
pub(super) async fn drain<S: Served>(
    mut pods: Vec<(Arc<str>, S)>,
    patience: Duration,
    connections: impl Fn() -> usize,
    is_kept: impl Fn(&str) -> bool,
    has_cut: impl Fn(&str),
) {
    for (_, pod) in &pods {
        pod.stop_accepting();
    }
    // All at once: one that ends slowly keeps no other open, and the next look is in time.
    let mut cutting = FuturesUnordered::new();
    let drained = async {
        let mut looked = Instant::now();
        // Peers close their tunnels when they are told of the end, and those without a connection at once.
        while connections() > 0 || !pods.iter().all(|(_, pod)| pod.is_drained()) {
            tokio::select! {
                () = sleep(POLL) => {}
                Some(()) = cutting.next() => {}
            }
            if looked.elapsed() < LEAVING_LOOK {
                continue;
            }
            looked = Instant::now();
            for (uid, pod) in pods.extract_if(.., |(uid, _)| !is_kept(uid)) {
                info!(%uid, "a Pod was released while this agent drains: its connections are cut");
                cutting.push(cut(uid, pod, &has_cut));
            }
        }
    };
    if timeout(patience, drained).await.is_err() {
        warn!(
            connections = connections(),
            "the drain is over; remaining connections are reset"
        );
    }
    cutting.extend(pods.into_iter().map(|(uid, pod)| cut(uid, pod, &has_cut)));
    while cutting.next().await.is_some() {}
}

async fn cut(uid: Arc<str>, pod: impl Served, has_cut: &impl Fn(&str)) {
    pod.shutdown().await;
    has_cut(&uid);
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::capture::CUT_PATIENCE;
    use crate::proxy::limits::SHUTDOWN_PATIENCE;

    /// How long its end takes.
    struct Slow(Duration);

    impl Served for Slow {
        fn stop_accepting(&self) {}

        fn is_drained(&self) -> bool {
            false
        }

        async fn shutdown(self) {
            sleep(self.0).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_ends_slowly_holds_up_no_other_that_leaves() {
        const LATER: Duration = Duration::from_secs(2);
        let began = Instant::now();
        let ends = [
            ("a-slow", SHUTDOWN_PATIENCE),
            ("b", Duration::ZERO),
            ("later", Duration::ZERO),
        ];
        let mut pods: Vec<_> = ends.map(|(uid, ends)| (Arc::<str>::from(uid), Slow(ends))).into();
        pods.push(("stays".into(), Slow(Duration::ZERO)));
        let is_kept = |uid: &str| uid == "stays" || (uid == "later" && began.elapsed() < LATER);
        let cut = Mutex::new(Vec::new());
        let has_cut = |uid: &str| cut.lock().push((uid.to_owned(), began.elapsed()));
        let patience = Duration::from_secs(10);
        drain(pods, patience, || 1, is_kept, has_cut).await;
        let cut = cut.into_inner();
        let uids: Vec<&str> = cut.iter().map(|(uid, _)| uid.as_str()).collect();
        assert_eq!(uids, ["b", "later", "a-slow", "stays"], "{cut:?}");
        let look = LEAVING_LOOK + 2 * POLL;
        assert!(cut[0].1 <= look, "{cut:?}");
        assert!((LATER..=LATER + look).contains(&cut[1].1), "{cut:?}");
        assert!(cut[2].1 <= look + SHUTDOWN_PATIENCE, "{cut:?}");
        assert!(cut[3].1 >= patience, "{cut:?}");
    }

    /// Who releases a Pod waits as long as a draining agent may take.
    #[test]
    fn an_agent_that_drains_cuts_in_time() {
        assert!(LEAVING_LOOK + 2 * POLL + SHUTDOWN_PATIENCE < CUT_PATIENCE);
        assert!(
            CUT_PATIENCE < mesh_cni::plugin::AT_THE_END.answer,
            "the plugin gives up before"
        );
    }
}
