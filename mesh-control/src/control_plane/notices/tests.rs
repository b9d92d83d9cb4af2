use super::*;
use crate::accounts::Accounts;
use crate::capture_states::Proof;
use crate::compile::network_policies::in_the_way;
use crate::compile::{EndpointSource, Parameters};
use crate::control_plane::Shared;
use crate::limits::{Bounds, MAX_EVENTS_WAITING_OF_NAMESPACE, NOT_ENROLLED_AFTER};
use crate::registry::{Registry, Scan};
use crate::troubles::Problem;

const WORLD: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: u}
spec: {nodeName: n}
---
apiVersion: v1
kind: Pod
metadata: {name: vm, namespace: shop, uid: vm}
spec: {nodeName: n, runtimeClassName: kata}
---
apiVersion: v1
kind: Pod
metadata: {name: theirs, namespace: shop, uid: t, annotations: {ambient.istio.io/redirection: enabled}}
spec: {nodeName: n}
"#;

struct Bench {
    control: Arc<ControlPlane>,
    shared: Arc<Shared>,
}

impl Bench {
    fn new(world: &str, is_writer: bool) -> Self {
        let parameters = Parameters {
            trust_domain: "cluster.local".into(),
            cluster: "Kubernetes".into(),
            pod_ranges: vec![],
            trust_bundle: vec![],
            revoked: BTreeSet::new(),
            endpoints: EndpointSource::Slices,
        };
        let shared = Arc::new(Shared::default());
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let bounds = Bounds::default();
        let control = ControlPlane::shared(parameters, Accounts::default(), Arc::clone(&shared), metrics, bounds);
        control.set_writer(is_writer);
        let bench = Self {
            control: Arc::new(control),
            shared,
        };
        bench.streams(1);
        bench.set(world);
        bench
    }

    /// Of reports, that the node `n` has open.
    fn streams(&self, count: usize) {
        self.control.with_node("n", |status| status.report_streams = count);
    }

    fn set(&self, world: &str) {
        let mut registry = Registry::default();
        registry.apply(&Scan::from([("a.yaml".to_owned(), Ok(Arc::from(world)))]));
        assert!(registry.rejections().is_empty(), "{:?}", registry.rejections());
        self.control.set_world(&registry);
    }

    fn say(&self, node: &str, proof: Proof) {
        self.control.set_report(node, vec![word("u", "web", proof)]);
    }

    /// Of Events: kind and name of what they are about, reason. Of annotations: `problem`, Pod, kind of trouble.
    fn told(&self) -> Vec<(String, String, String)> {
        self.told_at(Instant::now())
    }

    fn told_at(&self, now: Instant) -> Vec<(String, String, String)> {
        let mut told = Vec::new();
        let notices = &self.shared.notices;
        while let Ok(event) = notices.take_event(&self.control, now, SystemTime::now()) {
            let Telling { subject, reason, .. } = event.telling;
            told.push((subject.kind.to_owned(), subject.name, reason.as_str().to_owned()));
        }
        while let Ok(problem) = notices.take_problem(&self.control, now) {
            let text = problem.text.unwrap_or_default();
            let kind = text.split(':').next().unwrap_or_default().to_owned();
            told.push(("problem".to_owned(), problem.pod.name, kind));
        }
        told.sort();
        told
    }
}

fn word(uid: &str, name: &str, proof: Proof) -> PodWord {
    PodWord {
        uid: uid.into(),
        namespace: "shop".into(),
        name: name.into(),
        proof,
        problem: Problem::InboundNotCaptured,
        repaired: Repaired::default(),
    }
}

fn expected(list: &[(&str, &str, &str)]) -> Vec<(String, String, String)> {
    let owned = |(a, b, c): &(&str, &str, &str)| ((*a).to_owned(), (*b).to_owned(), (*c).to_owned());
    list.iter().map(owned).collect()
}

#[tokio::test]
async fn who_cannot_be_enrolled_is_told_by_the_replica_that_writes_and_who_leaves_is_told_no_longer() {
    let bench = Bench::new(WORLD, true);
    let refused = [
        ("Pod", "theirs", "MeshNotEnrolled"),
        ("Pod", "vm", "MeshNotEnrolled"),
        ("problem", "theirs", "refused"),
        ("problem", "vm", "refused"),
    ];
    assert_eq!(bench.told(), expected(&refused));
    assert!(Bench::new(WORLD, false).told().is_empty(), "each replica tells it");
    let text = "refused: its runtime class runs it in a machine of its own, whose sockets the node does not see";
    let written = WORLD.replace(
        "uid: vm}",
        &format!("uid: vm, annotations: {{culvert.dev/problem: '{text}'}}}}"),
    );
    bench.set(&written);
    assert_eq!(bench.told(), []);
    // What another replica has told, and this one finds when it comes to write.
    let after = Bench::new(&written, true);
    let of_vm = |told: Vec<(String, String, String)>| told.into_iter().filter(|(_, name, _)| name == "vm").collect::<Vec<_>>();
    assert_eq!(of_vm(after.told()), []);
    after.set(&written.replace("culvert.dev/mesh: enabled", "a: b"));
    assert_eq!(of_vm(after.told()), expected(&[("problem", "vm", "")]));
}

#[tokio::test]
async fn who_comes_to_write_tells_what_nobody_has_told() {
    let bench = Bench::new(WORLD, false);
    assert_eq!(bench.told(), []);
    let told = tokio::spawn(Arc::clone(&bench.control).tell_as_writer());
    bench.control.set_writer(true);
    bench.shared.notices.more_events().await;
    let is_vm = |(kind, name, _): &(String, String, String)| kind == "Pod" && name == "vm";
    // What woke us may have been an earlier change: the next one is the look.
    while !bench.told().iter().any(is_vm) {
        bench.shared.notices.more_events().await;
    }
    told.abort();
}

#[tokio::test]
async fn an_agent_is_heard_of_the_pods_of_its_node_alone_and_not_of_those_that_are_refused() {
    let bench = Bench::new(WORLD, false);
    bench.say("another", Proof::Lost);
    let told = bench.told();
    assert!(told.is_empty(), "an agent's word on another node's Pod is told: {told:?}");
    bench.control.set_report("n", vec![word("another", "web", Proof::Lost)]);
    bench.control.set_report("n", vec![word("u", "vm", Proof::Lost)]);
    // Peers take it for a member, and another mesh's it is.
    bench.control.set_report("n", vec![word("t", "theirs", Proof::Lost)]);
    assert_eq!(bench.told(), []);
    let mut lost = word("u", "web", Proof::Lost);
    lost.repaired = Repaired::of(&["sk_lookup".to_owned()]);
    bench.control.set_report("n", vec![lost]);
    let all = [
        ("Pod", "web", "MeshProtectionLost"),
        ("Pod", "web", "MeshProtectionRepaired"),
        ("problem", "web", "lost"),
    ];
    assert_eq!(bench.told(), expected(&all));
    // Neither what is compiled meanwhile nor the same word tells it again; what was put back is kept with no word.
    bench.set(&format!("{WORLD}---\nkind: Node\napiVersion: v1\nmetadata: {{name: n}}\n"));
    bench.say("n", Proof::Lost);
    assert!(!bench.told().iter().any(|(kind, ..)| kind == "Pod"));
    bench.say("n", Proof::Proven);
    let told = bench.told_at(Instant::now() + crate::limits::PROBLEM_PACE);
    assert_eq!(told, expected(&[("Pod", "web", "MeshProtected"), ("problem", "web", "")]));
}

#[tokio::test]
async fn one_that_stays_pending_is_told_after_a_while_unless_it_ends() {
    let bench = Bench::new(WORLD, false);
    bench.say("n", Proof::Pending);
    assert_eq!(bench.told(), []);
    let later = Instant::now() + NOT_ENROLLED_AFTER * 2;
    let both = [("Pod", "web", "MeshNotEnrolled"), ("problem", "web", "not enrolled")];
    assert_eq!(bench.told_at(later), expected(&both));
    let bench = Bench::new(WORLD, false);
    bench.say("n", Proof::Pending);
    let ending = "uid: u, deletionTimestamp: '2026-01-01T00:00:00Z'}";
    bench.set(&WORLD.replace("uid: u}", ending));
    assert_eq!(bench.told_at(later), []);
    bench.say("n", Proof::Lost);
    assert_eq!(bench.told_at(later), [], "its normal end is told as a loss");
}

#[tokio::test]
async fn what_an_agent_has_said_is_not_told_by_a_replica_that_it_has_left() {
    let bench = Bench::new(WORLD, false);
    bench.say("n", Proof::Pending);
    bench.streams(0);
    let later = Instant::now() + NOT_ENROLLED_AFTER * 2;
    assert_eq!(bench.told_at(later), [], "another replica may know that it is proven");
    // It comes back, and says the same.
    bench.streams(1);
    bench.say("n", Proof::Pending);
    assert_eq!(bench.told_at(later), [], "it has only just come back");
    let both = [("Pod", "web", "MeshNotEnrolled"), ("problem", "web", "not enrolled")];
    assert_eq!(bench.told_at(later + NOT_ENROLLED_AFTER), expected(&both));
}

#[tokio::test]
async fn what_is_told_of_a_node_and_of_an_ignored_label_is_told_once() {
    let labelled = "apiVersion: v1\nkind: Namespace\nmetadata: {name: kube-system, labels: {culvert.dev/mesh: enabled}}\n";
    let bench = Bench::new(labelled, true);
    assert_eq!(bench.told(), expected(&[("Namespace", "kube-system", "MeshLabelIgnored")]));
    bench.set(&format!("{labelled}---\n{WORLD}"));
    assert!(bench.told().iter().all(|(kind, ..)| kind != "Namespace"));
    bench.control.node_repaired("n", &Repaired::default());
    assert_eq!(bench.told(), []);
    bench.control.node_repaired("n", &Repaired::of(&["connect4".to_owned()]));
    assert_eq!(bench.told(), expected(&[("Node", "n", "MeshProtectionRepaired")]));
}

fn walled(generation: i64) -> World {
    let policy = format!(
        "{{\"metadata\": {{\"uid\": \"p\", \"generation\": {generation}}}, \"spec\": {{\"podSelector\": {{}}, \
         \"ingress\": [{{\"ports\": [{{\"port\": 8080}}]}}]}}}}"
    );
    let policy = serde_json::from_str(&policy).expect("a NetworkPolicy");
    let id = ObjectId {
        kind: Kind::NetworkPolicy,
        namespace: "shop".into(),
        name: "only-http".into(),
    };
    let policy = crate::network_policy::convert(policy).expect("a NetworkPolicy");
    World::from([(id, Arc::new(Object::NetworkPolicy(Box::new(policy))))])
}

#[tokio::test]
async fn a_network_policy_in_the_way_is_told_once_in_each_form_by_the_replica_that_writes() {
    let look = |bench: &Bench, generation: i64| {
        let mut world = (*bench.control.inner.lock().world).clone();
        world.extend(walled(generation));
        let findings = in_the_way(&world, &bench.control.snapshot());
        assert_eq!(findings.policies.len(), 1, "{findings:?}");
        let when = (Instant::now(), SystemTime::now());
        let notices = &bench.shared.notices;
        assert!(notices.policies(&world, &findings.policies, when, &bench.control.metrics));
        let told = bench.told().into_iter();
        told.filter(|(kind, ..)| kind == "NetworkPolicy").collect::<Vec<_>>()
    };
    let blocked = expected(&[("NetworkPolicy", "only-http", "MeshPortBlocked")]);
    let bench = Bench::new(WORLD, true);
    assert_eq!(look(&bench, 1), blocked);
    assert_eq!(look(&bench, 1), []);
    assert_eq!(look(&bench, 2), blocked);
    let other = Bench::new(WORLD, false);
    assert_eq!(look(&other, 1), []);
    // It has the Lease by now.
    other.control.set_writer(true);
    assert_eq!(look(&other, 1), blocked);
}

#[tokio::test]
async fn a_network_policy_for_which_there_was_no_room_is_told_later_and_counts_once() {
    let bench = Bench::new(WORLD, true);
    assert!(!bench.told().is_empty());
    let all = MAX_EVENTS_WAITING_OF_NAMESPACE + 8;
    let (policy, mut world) = (walled(1), World::new());
    for n in 0..all {
        let renamed = |(id, policy): (&ObjectId, &Arc<Object>)| {
            let name = format!("policy-{n}");
            (ObjectId { name, ..id.clone() }, Arc::clone(policy))
        };
        world.extend(policy.iter().map(renamed));
    }
    let findings: Vec<Finding> = (0..all)
        .map(|n| Finding {
            namespace: "shop".into(),
            name: format!("policy-{n}"),
            direction: Direction::Ingress,
            pods: 1,
        })
        .collect();
    let (metrics, notices) = (&bench.control.metrics, &bench.shared.notices);
    let (now, at) = (Instant::now(), SystemTime::now());
    let look = |now: Instant| {
        let all_told = notices.policies(&world, &findings, (now, at), metrics);
        (all_told, bench.told().len())
    };
    let (all_told, first) = look(now);
    assert!(!all_told && first < all, "{first} of {all}");
    assert_eq!(look(now), (false, 0));
    let later = now + crate::limits::NETWORK_POLICY_UNTOLD;
    assert_eq!(look(later), (true, all - first));
    assert_eq!(look(later), (true, 0));
    let text = metrics.text().expect("a text");
    let dropped = format!(
        "mesh_control_events_dropped_total{{reason=\"namespace_limit\"}} {}",
        all - first
    );
    assert!(text.contains(&dropped), "{text}");
}

#[tokio::test]
async fn what_is_not_told_is_counted_by_the_reason() {
    let mut world = WORLD.to_owned();
    for n in 0..MAX_EVENTS_WAITING_OF_NAMESPACE + 3 {
        world += &format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: vm-{n}, namespace: shop, uid: vm-{n}}}\n\
             spec: {{nodeName: n, runtimeClassName: kata}}\n"
        );
    }
    let bench = Bench::new(&world, true);
    let text = bench.control.metrics.text().expect("a text");
    // Two more Pods are refused in that world.
    assert!(
        text.contains(r#"mesh_control_events_dropped_total{reason="no_room"} 5"#),
        "{text}"
    );
}
