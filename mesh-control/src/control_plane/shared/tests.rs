use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::compile::{EndpointSource, Parameters};
use crate::limits::{Bounds, CAPTURE_ECHO};
use crate::proto::PodWord;
use crate::registry::{Registry, Scan};
use crate::troubles::{Problem, Repaired};

/// A replica, and an API server that has one Pod: what is written to it is on its annotation.
struct Bench {
    control: Arc<ControlPlane>,
    shared: Arc<Shared>,
    annotation: Option<CaptureState>,
    /// The uid beside it.
    of: &'static str,
    enabled: bool,
}

impl Bench {
    fn new(annotation: Option<CaptureState>) -> Self {
        let parameters = Parameters {
            trust_domain: "cluster.local".into(),
            cluster: "Kubernetes".into(),
            pod_ranges: vec![],
            trust_bundle: vec![],
            revoked: std::collections::BTreeSet::new(),
            endpoints: EndpointSource::Slices,
        };
        let bounds = Bounds {
            publish_interval: Duration::ZERO,
            ..Bounds::default()
        };
        let shared = Arc::new(Shared::default());
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let control = ControlPlane::shared(parameters, Accounts::default(), Arc::clone(&shared), metrics, bounds);
        let bench = Self {
            control: Arc::new(control),
            shared,
            annotation,
            of: "u",
            enabled: true,
        };
        bench.read();
        bench
    }

    /// The watch tells what stands there.
    fn read(&self) {
        let annotations = self.annotation.map_or_else(String::new, |state| {
            format!(
                ", annotations: {{culvert.dev/capture: {}, culvert.dev/capture-uid: {}}}",
                state.as_str(),
                self.of
            )
        });
        let label = if self.enabled { "enabled" } else { "disabled" };
        let text = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{culvert.dev/mesh: {label}}}}}\n---\n\
             apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: default, namespace: shop}}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: shop, uid: u{annotations}}}\nspec: {{nodeName: n}}\n\
             status: {{podIPs: [{{ip: 10.0.0.1}}]}}\n"
        );
        let mut registry = Registry::default();
        registry.apply(&Scan::from([("a.yaml".to_owned(), Ok(Arc::from(text)))]));
        assert!(registry.rejections().is_empty(), "{:?}", registry.rejections());
        self.control.set_world(&registry);
    }

    fn say(&self, proof: Proof) {
        let word = PodWord {
            uid: "u".into(),
            namespace: "shop".into(),
            name: "web".into(),
            proof,
            problem: Problem::Other,
            repaired: Repaired::default(),
        };
        self.control.set_report("n", vec![word]);
    }

    /// Makes the writes that are due; how many there were.
    fn write(&mut self) -> usize {
        let mut writes = 0;
        while let Ok(write) = self.shared.take(Instant::now()) {
            self.annotation = write.value;
            self.control.capture_written(&write);
            writes += 1;
        }
        writes
    }

    fn state(&self) -> String {
        self.control.status()["pods"]["shop/web"]
            .as_str()
            .unwrap_or("no member")
            .to_owned()
    }
}

const PROVEN: Option<CaptureState> = Some(CaptureState::Proven);
const LOST: Option<CaptureState> = Some(CaptureState::Lost);

#[tokio::test]
async fn proven_counts_once_it_is_written_and_lost_at_once() {
    let mut bench = Bench::new(None);
    bench.say(Proof::Proven);
    assert_eq!(bench.state(), "pending", "a crash now would forget it");
    bench.read();
    assert_eq!((bench.state().as_str(), bench.write()), ("pending", 1));
    assert_eq!((bench.state().as_str(), bench.annotation), ("proven", PROVEN));
    bench.say(Proof::Lost);
    assert_eq!(bench.state(), "lost");
    // The watch still tells what stood there before.
    bench.read();
    assert_eq!(bench.state(), "lost");
    assert_eq!((bench.write(), bench.annotation), (1, LOST));
    bench.read();
    assert_eq!((bench.state().as_str(), bench.write()), ("lost", 0));
}

/// In either order: the replica may hear of the label first, or of the agent.
#[tokio::test]
async fn a_pod_that_left_and_joins_again_is_not_lost() {
    for label_first in [true, false] {
        let mut bench = Bench::new(PROVEN);
        if !label_first {
            bench.say(Proof::Lost);
        }
        bench.enabled = false;
        bench.read();
        if label_first {
            bench.say(Proof::Lost);
        }
        while bench.write() > 0 {
            bench.read();
        }
        assert_eq!((bench.state().as_str(), bench.annotation), ("no member", None));
        bench.enabled = true;
        bench.read();
        assert_eq!((bench.state().as_str(), bench.write()), ("pending", 0), "{label_first}");
        bench.say(Proof::Lost);
        assert_eq!(bench.state(), "lost", "{label_first}: what is said of a member counts");
    }
}

#[tokio::test(start_paused = true)]
async fn what_another_one_writes_over_a_write_counts_once_its_echo_had_its_time() {
    let mut bench = Bench::new(None);
    bench.say(Proof::Proven);
    assert_eq!(bench.write(), 1);
    // Before the write has come back somebody writes over it: the watch tells the newest alone.
    bench.annotation = LOST;
    bench.read();
    assert_eq!(bench.state(), "proven", "what is read may be older than the write");
    tokio::time::advance(CAPTURE_ECHO).await;
    // And nothing else is told in a quiet cluster.
    bench.control.look_at_capture("u");
    assert_eq!(bench.state(), "lost");
    // Where the echo came there is nothing to look for.
    bench.say(Proof::Proven);
    assert_eq!(bench.write(), 1);
    bench.read();
    bench.control.look_at_capture("u");
    assert_eq!((bench.state().as_str(), bench.annotation), ("proven", PROVEN));
}

#[tokio::test]
async fn a_proof_of_another_uid_proves_nothing() {
    let mut bench = Bench::new(None);
    bench.of = "another";
    bench.annotation = PROVEN;
    bench.read();
    assert_eq!(bench.state(), "pending", "another Pod's proof counts: {}", bench.state());
    assert_eq!(bench.write(), 0, "another replica may be putting it right");
    // Where it is known, it is put right.
    bench.annotation = None;
    bench.say(Proof::Proven);
    assert_eq!((bench.write(), bench.annotation), (1, PROVEN));
    bench.read();
    assert_eq!(
        (bench.state().as_str(), bench.write()),
        ("proven", 0),
        "its echo under another uid"
    );
}

#[tokio::test]
async fn what_another_replica_wrote_is_believed_and_the_older_word_is_forgotten() {
    let mut bench = Bench::new(PROVEN);
    assert_eq!(bench.state(), "proven", "as it was before this replica started");
    bench.say(Proof::Proven);
    assert_eq!(bench.write(), 0, "nothing is new");
    bench.annotation = LOST;
    bench.read();
    assert_eq!(bench.state(), "lost");
    bench.read();
    assert_eq!((bench.state().as_str(), bench.write(), bench.annotation), ("lost", 0, LOST));
    bench.say(Proof::Proven);
    assert_eq!((bench.write(), bench.state().as_str()), (1, "proven"), "a new word counts");
}

#[tokio::test]
async fn what_somebody_takes_away_is_written_again() {
    let mut bench = Bench::new(PROVEN);
    bench.annotation = None;
    bench.read();
    assert_eq!(bench.state(), "proven");
    assert_eq!((bench.write(), bench.annotation), (1, PROVEN));
}

#[tokio::test]
async fn nothing_stays_on_a_pod_that_leaves() {
    let mut bench = Bench::new(PROVEN);
    bench.enabled = false;
    bench.read();
    assert_eq!(
        (bench.state().as_str(), bench.write(), bench.annotation),
        ("no member", 1, None)
    );
    bench.enabled = true;
    bench.read();
    assert_eq!((bench.state().as_str(), bench.write()), ("pending", 0));
}

#[tokio::test]
async fn an_account_that_a_pod_names_and_that_is_not_there_was_deleted() {
    let bench = Bench::new(None);
    assert_eq!(bench.control.status()["revoked_identities"], serde_json::json!([]));
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, uid: u}\nspec: {serviceAccountName: gone}\n";
    let mut registry = Registry::default();
    registry.apply(&Scan::from([("a.yaml".to_owned(), Ok(Arc::from(text)))]));
    // A replica that starts with it; one that has seen the account come and go knows more.
    let fresh = Bench {
        control: Arc::new(ControlPlane::shared(
            Bench::new(None).control.inner.lock().parameters.clone(),
            Accounts::default(),
            Arc::default(),
            Arc::new(Metrics::new().expect("metrics")),
            Bounds::default(),
        )),
        ..bench
    };
    fresh.control.set_world(&registry);
    let revoked = &fresh.control.status()["revoked_identities"];
    assert_eq!(revoked, &serde_json::json!(["spiffe://cluster.local/ns/shop/sa/gone"]));
}

#[tokio::test(start_paused = true)]
async fn whoever_writes_is_woken_by_what_has_failed_and_by_what_was_wished_meanwhile() {
    let bench = Bench::new(None);
    bench.say(Proof::Proven);
    bench.shared.wished().await;
    let write = bench.shared.take(Instant::now()).expect("due");
    assert_eq!(bench.shared.take(Instant::now()), Err(None));
    bench.shared.failed(&write);
    bench.shared.wished().await;
    let due = bench.shared.take(Instant::now()).expect_err("later").expect("again");
    tokio::time::sleep_until(due).await;
    let write = bench.shared.take(Instant::now()).expect("due");
    bench.say(Proof::Lost);
    bench.shared.wished().await;
    assert_eq!(bench.shared.take(Instant::now()), Err(None), "one of a Pod at a time");
    bench.control.capture_written(&write);
    bench.shared.wished().await;
    assert_eq!(bench.shared.take(Instant::now()).expect("due").value, LOST);
    assert_eq!(bench.state(), "lost", "what was written says less than what was wished since");
}
