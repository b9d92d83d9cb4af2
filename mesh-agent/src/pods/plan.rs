//! What is to be done so that the node's enrolments are as the control plane's list says. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::capture::Origin;
use crate::discovery::node_pods::NodeList;

/// Of a Pod that is enrolled, what counts here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub origin: Origin,
    pub netns_cookie: u64,
    pub is_proven: bool,
    /// A release of it has begun.
    pub is_leaving: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// To be found on the node: members that are not enrolled; and those that are and cannot be proven, whose namespace may be
    /// another one by now.
    pub find: Vec<Arc<str>>,
    /// Listed as no members: at once.
    pub release: Vec<Arc<str>>,
    /// Whose release has begun and did not end: before anything else, whatever they are listed as by now.
    pub complete: Vec<Arc<str>>,
    /// Not listed any longer: once no process is in their namespace. A control plane that lags behind another one does not know the
    /// newest Pods, and the processes of a Pod can outlive its object.
    pub vanished: Vec<Arc<str>>,
    /// Members without an address: nothing can be done for them yet.
    pub waiting: usize,
}

pub(super) fn plan(list: &NodeList, enrolled: &BTreeMap<Arc<str>, Known>) -> Plan {
    let mut plan = Plan::default();
    for (uid, pod) in list.pods.iter().filter(|(_, pod)| pod.is_member) {
        let is_settled = enrolled
            .get(uid)
            .is_some_and(|known| known.is_proven || known.is_leaving || known.origin == Origin::Local);
        if is_settled {
            continue;
        }
        if pod.addresses.is_empty() {
            plan.waiting += usize::from(!enrolled.contains_key(uid));
        } else {
            plan.find.push(uid.clone());
        }
    }
    for (uid, known) in enrolled {
        // Who was enrolled by hand is released by hand.
        if known.origin == Origin::Local {
            continue;
        }
        if known.is_leaving {
            plan.complete.push(uid.clone());
            continue;
        }
        match list.pods.get(uid) {
            Some(pod) if !pod.is_member => plan.release.push(uid.clone()),
            None if !list.is_cut => plan.vanished.push(uid.clone()),
            _ => {}
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::node_pods::ListedPod;

    fn list(pods: &[(&str, bool, bool)]) -> NodeList {
        let pod = |(uid, is_member, has_address): &(&str, bool, bool)| {
            let pod = ListedPod {
                namespace: "shop".into(),
                name: (*uid).into(),
                service_account: "default".into(),
                addresses: if *has_address {
                    vec!["10.0.0.1".parse().unwrap()]
                } else {
                    vec![]
                },
                is_member: *is_member,
                refused: String::new(),
                is_static: false,
                probe_ports: vec![],
            };
            (Arc::from(*uid), pod)
        };
        NodeList {
            pods: pods.iter().map(pod).collect(),
            ..NodeList::default()
        }
    }

    fn enrolled(pods: &[(&str, Origin, bool)]) -> BTreeMap<Arc<str>, Known> {
        let known = |(uid, origin, is_proven): &(&str, Origin, bool)| {
            let known = Known {
                origin: *origin,
                netns_cookie: 1,
                is_proven: *is_proven,
                is_leaving: false,
            };
            (Arc::from(*uid), known)
        };
        pods.iter().map(known).collect()
    }

    fn names(uids: &[Arc<str>]) -> Vec<&str> {
        uids.iter().map(|uid| &**uid).collect()
    }

    #[test]
    fn members_are_looked_for_once_they_have_an_address_and_again_while_unproven() {
        let list = list(&[
            ("new", true, true),
            ("starting", true, false),
            ("stranger", false, true),
            ("done", true, true),
            ("lost", true, true),
            ("by-hand", true, true),
        ]);
        let plan = plan(
            &list,
            &enrolled(&[
                ("done", Origin::Cni, true),
                ("lost", Origin::Following, false),
                ("by-hand", Origin::Local, false),
            ]),
        );
        assert_eq!(names(&plan.find), ["lost", "new"]);
        assert_eq!(plan.waiting, 1);
        assert_eq!(names(&plan.release), [""; 0]);
    }

    #[test]
    fn a_release_that_has_begun_is_completed_whatever_the_list_says() {
        let list = list(&[
            ("again-a-member", true, true),
            ("no-member", false, true),
            ("by-hand", true, true),
        ]);
        let pods = ["again-a-member", "no-member", "not-listed"].map(|uid| (uid, Origin::Following, true));
        let mut enrolled = enrolled(&pods);
        enrolled.extend(self::enrolled(&[("by-hand", Origin::Local, true)]));
        enrolled.values_mut().for_each(|known| known.is_leaving = true);
        let plan = plan(&list, &enrolled);
        assert_eq!(names(&plan.complete), ["again-a-member", "no-member", "not-listed"]);
        assert_eq!((plan.find, plan.release, plan.vanished), (vec![], vec![], vec![]));
    }

    #[test]
    fn who_left_is_released_but_not_who_was_enrolled_by_hand() {
        let enrolled = enrolled(&[
            ("gone", Origin::Following, true),
            ("made", Origin::Cni, true),
            ("no-member", Origin::Following, false),
            ("by-hand", Origin::Local, true),
        ]);
        let mut list = list(&[("no-member", false, true)]);
        let told = plan(&list, &enrolled);
        assert_eq!(names(&told.release), ["no-member"]);
        assert_eq!(names(&told.vanished), ["gone", "made"]);
        // Of a list that has not everything, only who is on it counts.
        list.is_cut = true;
        let told = plan(&list, &enrolled);
        assert_eq!((names(&told.release), names(&told.vanished)), (vec!["no-member"], vec![]));
    }
}
