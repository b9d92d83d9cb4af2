//! What the control plane is told beside the Pods' proofs, so that it can tell people: pieces of a capture that were put back, and
//! members that could not be enrolled.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_common::limits::MAX_PODS;
pub use mesh_proto::{PIECES, PROBLEMS};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::report::{PodStatus, Proof};

/// Pieces of a Pod, or of the node, that wait to be told; a Pod has fewer. As many more are put back, and counted in the metrics.
const MAX_PIECES: usize = 16;
/// Pods with such pieces, and the node. Beyond: not told, only counted.
const MAX_REPAIRED: usize = MAX_PODS as usize + 1;
/// Pods that the CNI plugin was refused; beyond, those that sort last by their uid are not told.
const MAX_FAILING: usize = MAX_PODS as usize;

/// Whose pieces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Node,
    Pod(Arc<str>),
}

/// With the report of this stream that has told it; 0: none yet. At most [`MAX_PIECES`].
type Pieces = BTreeMap<&'static str, u64>;

#[derive(Debug, Default)]
struct State {
    repaired: BTreeMap<Owner, Pieces>,
    /// Members that were looked for on the node.
    by_list: BTreeMap<Arc<str>, PodStatus>,
    /// Members whose sandbox waits in CNI ADD.
    by_cni: BTreeMap<Arc<str>, PodStatus>,
}

/// Shared by those who notice and by the reports.
#[derive(Debug, Default)]
pub struct Noticed {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

impl Noticed {
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub fn pod_repaired(&self, uid: &Arc<str>, pieces: &[&'static str]) {
        self.repaired(Owner::Pod(uid.clone()), pieces.iter().map(|piece| word(piece)));
    }

    pub fn node_repaired(&self, pieces: &[String]) {
        self.repaired(Owner::Node, pieces.iter().map(|piece| word(piece)));
    }

    fn repaired(&self, owner: Owner, pieces: impl Iterator<Item = &'static str>) {
        let mut state = self.state.lock();
        let mut pieces = pieces.peekable();
        if pieces.peek().is_none() || (!state.repaired.contains_key(&owner) && state.repaired.len() >= MAX_REPAIRED) {
            return;
        }
        let of = state.repaired.entry(owner).or_default();
        for piece in pieces {
            if of.len() < MAX_PIECES || of.contains_key(piece) {
                // Also one that was told before: it was missing again, and an earlier receipt says nothing of that.
                of.insert(piece, 0);
            }
        }
        drop(state);
        self.changed.send_modify(|turn| *turn += 1);
    }

    /// All of the list's that cannot be enrolled. `waits`: who is a member and not enrolled yet. A Pod that CNI ADD has failed of may
    /// have started all the same, by best effort, and be enrolled by the list since.
    pub fn failing_by_list(&self, failing: BTreeMap<Arc<str>, PodStatus>, waits: impl Fn(&str) -> bool) {
        self.change_failing(|state| {
            state.by_list = failing;
            state.by_cni.retain(|uid, _| waits(uid));
        });
    }

    pub fn failing_by_cni(&self, status: PodStatus) {
        self.change_failing(|state| {
            state.by_cni.insert(status.uid.clone(), status);
            if state.by_cni.len() > MAX_FAILING {
                state.by_cni.pop_last();
            }
        });
    }

    pub fn enrolled_by_cni(&self, uid: &str) {
        self.change_failing(|state| drop(state.by_cni.remove(uid)));
    }

    fn change_failing(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        let before = (state.by_list.clone(), state.by_cni.clone());
        change(&mut state);
        let is_changed = before != (state.by_list.clone(), state.by_cni.clone());
        drop(state);
        if is_changed {
            self.changed.send_modify(|turn| *turn += 1);
        }
    }

    /// Members that are not enrolled, each with the reason.
    #[must_use]
    pub fn failing(&self, is_enrolled: impl Fn(&str) -> bool) -> Vec<PodStatus> {
        let state = self.state.lock();
        let by_cni = state.by_cni.iter().filter(|(uid, _)| !state.by_list.contains_key(*uid));
        let all = state.by_list.iter().chain(by_cni).filter(|(uid, _)| !is_enrolled(uid));
        all.map(|(_, status)| status.clone()).collect()
    }

    /// For the report of this number: the node's pieces, and those of Pods. The control plane counts each time that it is told of one,
    /// and a stream keeps its order: so each is in one of its reports.
    pub(super) fn pieces(&self, sequence: u64) -> (Vec<String>, BTreeMap<Arc<str>, Vec<String>>) {
        let mut state = self.state.lock();
        let (mut node, mut pods) = (Vec::new(), BTreeMap::new());
        for (owner, pieces) in &mut state.repaired {
            let mut names = Vec::new();
            for (piece, told_in) in pieces.iter_mut().filter(|(_, told_in)| **told_in == 0) {
                *told_in = sequence;
                names.push((*piece).to_owned());
            }
            match owner {
                Owner::Node => node = names,
                Owner::Pod(uid) if !names.is_empty() => drop(pods.insert(uid.clone(), names)),
                Owner::Pod(_) => {}
            }
        }
        (node, pods)
    }

    pub(super) fn received(&self, sequence: u64) {
        self.state.lock().repaired.retain(|_, pieces| {
            pieces.retain(|_, told_in| *told_in == 0 || *told_in > sequence);
            !pieces.is_empty()
        });
    }

    /// A new stream counts anew.
    pub(super) fn start(&self) {
        for told_in in self.state.lock().repaired.values_mut().flat_map(BTreeMap::values_mut) {
            *told_in = 0;
        }
    }
}

/// As the control plane knows the piece.
fn word(piece: &str) -> &'static str {
    let known = PIECES.iter().find(|known| **known == piece).copied();
    known.unwrap_or(if piece.starts_with("pin of ") {
        "pin"
    } else if piece.starts_with("net/") {
        "setting"
    } else {
        "other"
    })
}

#[must_use]
pub fn failing(uid: &Arc<str>, namespace: &str, name: &str, reason: &str, problem: &'static str) -> PodStatus {
    PodStatus {
        uid: uid.clone(),
        namespace: namespace.into(),
        name: name.into(),
        netns_cookie: 0,
        proof: Proof::Pending,
        reason: reason.to_owned(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nobody(_: &str) -> bool {
        false
    }

    #[test]
    fn what_was_put_back_is_told_until_it_was_heard() {
        let noticed = Noticed::default();
        let uid: Arc<str> = "u".into();
        noticed.pod_repaired(&uid, &["sk_lookup"]);
        noticed.node_repaired(&["connect4".to_owned()]);
        let (node, pods) = noticed.pieces(1);
        let names = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!((node, &pods[&uid]), (names(&["connect4"]), &names(&["sk_lookup"])));
        // Something more, before the receipt of the first.
        noticed.pod_repaired(&uid, &["pods_entry"]);
        noticed.received(1);
        let (node, pods) = noticed.pieces(2);
        assert_eq!((node, &pods[&uid]), (vec![], &names(&["pods_entry"])));
        // The stream broke: the next one counts from 1.
        noticed.start();
        assert_eq!(noticed.pieces(1).1.len(), 1);
        noticed.received(1);
        assert!(noticed.pieces(2).1.is_empty());
        noticed.pod_repaired(&uid, &[]);
        assert!(noticed.pieces(3).1.is_empty());
    }

    /// Whatever the control plane is told, it counts.
    #[test]
    fn what_was_put_back_once_is_told_once_in_a_stream() {
        let noticed = Noticed::default();
        let uid: Arc<str> = "u".into();
        let told = |sequence: u64| {
            let (node, pods) = noticed.pieces(sequence);
            (node, pods.get(&uid).cloned().unwrap_or_default())
        };
        let names = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        noticed.pod_repaired(&uid, &["sk_lookup"]);
        noticed.node_repaired(&["connect4".to_owned()]);
        assert_eq!(told(1), (names(&["connect4"]), names(&["sk_lookup"])));
        assert_eq!(told(2), (vec![], vec![]), "its proof changed before the receipt");
        noticed.pod_repaired(&uid, &["pods_entry"]);
        assert_eq!(told(3), (vec![], names(&["pods_entry"])));
        // It was missing again.
        noticed.pod_repaired(&uid, &["sk_lookup"]);
        noticed.received(1);
        assert_eq!(told(4), (vec![], names(&["sk_lookup"])));
        noticed.received(3);
        // What nobody has said to be heard is told again.
        noticed.start();
        assert_eq!(told(1), (vec![], names(&["sk_lookup"])));
    }

    #[test]
    fn pieces_are_told_by_the_words_that_the_control_plane_knows() {
        let noticed = Noticed::default();
        let pieces = ["pin of PODS", "net/ipv4/tcp_fwmark_accept", "something new", "connect4"];
        noticed.node_repaired(&pieces.map(str::to_owned));
        assert_eq!(noticed.pieces(1).0, ["connect4", "other", "pin", "setting"]);
    }

    #[test]
    fn whoever_cannot_be_enrolled_is_told_until_it_is_or_has_left() {
        let noticed = Noticed::default();
        let mut changed = noticed.changed();
        let [a, b]: [Arc<str>; 2] = ["a".into(), "b".into()];
        let reasons = || noticed.failing(nobody).into_iter().map(|pod| pod.reason).collect::<Vec<_>>();
        noticed.failing_by_cni(failing(&a, "shop", "a", "by cni", "io"));
        let list = BTreeMap::from([(b.clone(), failing(&b, "shop", "b", "no process", "no_process"))]);
        noticed.failing_by_list(list.clone(), |_| true);
        assert_eq!(reasons(), ["no process", "by cni"]);
        assert!(changed.has_changed().expect("open"));
        changed.mark_unchanged();
        noticed.failing_by_list(list, |_| true);
        assert!(!changed.has_changed().expect("open"), "nothing has changed");
        noticed.enrolled_by_cni("a");
        assert_eq!(reasons(), ["no process"]);
        noticed.failing_by_cni(failing(&a, "shop", "a", "by cni", "io"));
        noticed.failing_by_list(BTreeMap::new(), |_| false);
        assert!(reasons().is_empty());
    }

    /// Best effort: CNI ADD has failed, the Pod runs all the same, and is enrolled by the list.
    #[test]
    fn a_pod_that_was_enrolled_after_all_is_not_failing() {
        let noticed = Noticed::default();
        noticed.failing_by_cni(failing(&"a".into(), "shop", "a", "by cni", "io"));
        assert_eq!(noticed.failing(nobody).len(), 1);
        assert!(
            noticed.failing(|uid| uid == "a").is_empty(),
            "what is enrolled is shown as failing"
        );
        noticed.failing_by_list(BTreeMap::new(), |uid| uid != "a");
        assert!(noticed.failing(nobody).is_empty(), "it is remembered for ever");
    }

    #[test]
    fn what_is_told_has_bounds() {
        let noticed = Noticed::default();
        for n in 0..=MAX_REPAIRED {
            let uid: Arc<str> = n.to_string().into();
            noticed.pod_repaired(&uid, &["sk_lookup"]);
            noticed.failing_by_cni(failing(&uid, "n", "p", "why", "io"));
        }
        assert_eq!(noticed.pieces(1).1.len(), MAX_REPAIRED);
        assert_eq!(noticed.failing(nobody).len(), MAX_FAILING);
        noticed.node_repaired(&["connect4".to_owned()]);
        assert!(noticed.pieces(1).0.is_empty(), "no room");
        let noticed = Noticed::default();
        let many = PIECES.map(str::to_owned);
        noticed.node_repaired(&many);
        noticed.node_repaired(&many);
        assert_eq!(noticed.pieces(1).0.len(), MAX_PIECES);
    }
}
