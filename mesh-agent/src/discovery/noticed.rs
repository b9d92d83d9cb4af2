//! What the control plane is told beside the Pods' proofs, so that it can tell people: pieces of a capture that were put back, and
//! members that could not be enrolled.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_common::limits::MAX_PODS;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::report::{PodStatus, Proof};

/// Pieces of a Pod, or of the node, that wait to be told; a Pod has fewer. As many more are put back, and counted in the metrics.
const MAX_PIECES: usize = 32;
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

#[derive(Debug, Default)]
struct Pieces {
    names: BTreeSet<String>,
    /// The first report of this stream that told them; 0: none yet.
    told_in: u64,
}

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
        self.repaired(Owner::Pod(uid.clone()), pieces.iter().map(ToString::to_string));
    }

    pub fn node_repaired(&self, pieces: &[String]) {
        self.repaired(Owner::Node, pieces.iter().cloned());
    }

    fn repaired(&self, owner: Owner, pieces: impl Iterator<Item = String>) {
        let mut state = self.state.lock();
        let mut pieces = pieces.peekable();
        if pieces.peek().is_none() || (!state.repaired.contains_key(&owner) && state.repaired.len() >= MAX_REPAIRED) {
            return;
        }
        let of = state.repaired.entry(owner).or_default();
        let room = MAX_PIECES.saturating_sub(of.names.len());
        of.names.extend(pieces.take(room));
        // A receipt of a report that did not have all of them must not take the new ones away.
        of.told_in = 0;
        drop(state);
        self.changed.send_modify(|turn| *turn += 1);
    }

    /// All of the list's that cannot be enrolled. `is_listed`: who is a member at all.
    pub fn failing_by_list(&self, failing: BTreeMap<Arc<str>, PodStatus>, is_listed: impl Fn(&str) -> bool) {
        self.change_failing(|state| {
            state.by_list = failing;
            state.by_cni.retain(|uid, _| is_listed(uid));
        });
    }

    pub fn failing_by_cni(&self, uid: &Arc<str>, namespace: &str, name: &str, reason: &str) {
        let status = failing(uid, namespace, name, reason);
        self.change_failing(|state| {
            state.by_cni.insert(uid.clone(), status);
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
    pub fn failing(&self) -> Vec<PodStatus> {
        let state = self.state.lock();
        let by_cni = state.by_cni.iter().filter(|(uid, _)| !state.by_list.contains_key(*uid));
        state.by_list.iter().chain(by_cni).map(|(_, status)| status.clone()).collect()
    }

    /// For the report of this number: the node's pieces, and those of Pods.
    pub(super) fn pieces(&self, sequence: u64) -> (Vec<String>, BTreeMap<Arc<str>, Vec<String>>) {
        let mut state = self.state.lock();
        let (mut node, mut pods) = (Vec::new(), BTreeMap::new());
        for (owner, pieces) in &mut state.repaired {
            if pieces.told_in == 0 {
                pieces.told_in = sequence;
            }
            let names = pieces.names.iter().cloned().collect();
            match owner {
                Owner::Node => node = names,
                Owner::Pod(uid) => drop(pods.insert(uid.clone(), names)),
            }
        }
        (node, pods)
    }

    pub(super) fn received(&self, sequence: u64) {
        let mut state = self.state.lock();
        state
            .repaired
            .retain(|_, pieces| pieces.told_in == 0 || pieces.told_in > sequence);
    }

    /// A new stream counts anew.
    pub(super) fn start(&self) {
        for pieces in self.state.lock().repaired.values_mut() {
            pieces.told_in = 0;
        }
    }
}

#[must_use]
pub fn failing(uid: &Arc<str>, namespace: &str, name: &str, reason: &str) -> PodStatus {
    PodStatus {
        uid: uid.clone(),
        namespace: namespace.into(),
        name: name.into(),
        netns_cookie: 0,
        proof: Proof::Pending,
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_back_is_told_until_it_was_heard() {
        let noticed = Noticed::default();
        let uid: Arc<str> = "u".into();
        noticed.pod_repaired(&uid, &["sk_lookup"]);
        noticed.node_repaired(&["connect4".to_owned()]);
        let (node, pods) = noticed.pieces(1);
        assert_eq!(
            (node, &pods[&uid]),
            (vec!["connect4".to_owned()], &vec!["sk_lookup".to_owned()])
        );
        // Something more, before the receipt of the first.
        noticed.pod_repaired(&uid, &["pods_entry"]);
        noticed.received(1);
        let (node, pods) = noticed.pieces(2);
        assert_eq!(
            (node.len(), &pods[&uid][..]),
            (0, &["pods_entry".to_owned(), "sk_lookup".to_owned()][..])
        );
        // The stream broke: the next one counts from 1.
        noticed.start();
        assert_eq!(noticed.pieces(1).1.len(), 1);
        noticed.received(1);
        assert!(noticed.pieces(2).1.is_empty());
        noticed.pod_repaired(&uid, &[]);
        assert!(noticed.pieces(3).1.is_empty());
    }

    #[test]
    fn whoever_cannot_be_enrolled_is_told_until_it_is_or_has_left() {
        let noticed = Noticed::default();
        let mut changed = noticed.changed();
        let [a, b]: [Arc<str>; 2] = ["a".into(), "b".into()];
        let reasons = |noticed: &Noticed| noticed.failing().into_iter().map(|pod| pod.reason).collect::<Vec<_>>();
        noticed.failing_by_cni(&a, "shop", "a", "by cni");
        let list = BTreeMap::from([(b.clone(), failing(&b, "shop", "b", "no process"))]);
        noticed.failing_by_list(list.clone(), |_| true);
        assert_eq!(reasons(&noticed), ["no process", "by cni"]);
        assert!(changed.has_changed().expect("open"));
        changed.mark_unchanged();
        noticed.failing_by_list(list, |_| true);
        assert!(!changed.has_changed().expect("open"), "nothing has changed");
        noticed.enrolled_by_cni("a");
        assert_eq!(reasons(&noticed), ["no process"]);
        noticed.failing_by_cni(&a, "shop", "a", "by cni");
        noticed.failing_by_list(BTreeMap::new(), |_| false);
        assert!(reasons(&noticed).is_empty());
    }

    #[test]
    fn what_is_told_has_bounds() {
        let noticed = Noticed::default();
        for n in 0..=MAX_REPAIRED {
            noticed.pod_repaired(&n.to_string().into(), &["x"]);
            noticed.failing_by_cni(&n.to_string().into(), "n", "p", "why");
        }
        assert_eq!(noticed.pieces(1).1.len(), MAX_REPAIRED);
        assert_eq!(noticed.failing().len(), MAX_FAILING);
        noticed.node_repaired(&["y".to_owned()]);
        assert!(noticed.pieces(1).0.is_empty(), "no room");
        let noticed = Noticed::default();
        let many: Vec<String> = (0..2 * MAX_PIECES).map(|n| n.to_string()).collect();
        noticed.node_repaired(&many);
        noticed.node_repaired(&many);
        assert_eq!(noticed.pieces(1).0.len(), MAX_PIECES);
    }
}
