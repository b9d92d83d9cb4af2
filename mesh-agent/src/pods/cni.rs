//! Pods that the CNI plugin brings, before anything runs in them, and takes away again.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::standing::Why;
use super::{ENROLMENT_PATIENCE, Pods, validate};
use crate::capture::netns::NetNamespace;
use crate::capture::{Origin, PodToEnroll};
use crate::discovery::node_pods::{ListedPod, NodeList, NodeLists};
use crate::discovery::noticed::failing;

/// How long a Pod of the mesh waits for the control plane to tell of it: the kubelet may hear of it first.
const LIST_PATIENCE: Duration = Duration::from_secs(10);
/// The same of a Pod whose namespace is not in the mesh, as far as is known.
const OTHERS_PATIENCE: Duration = Duration::from_millis(500);

/// As the container runtime tells of it.
#[derive(Clone, Debug)]
pub struct CniPod {
    pub uid: Arc<str>,
    pub namespace: String,
    pub name: String,
    pub netns: PathBuf,
    pub addresses: Vec<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Done,
    NotAMember(String),
    Failed(String),
}

impl Pods {
    /// Waits until the Pod is captured, proven and has its certificate; bounded.
    pub async fn add_by_cni(self: Arc<Self>, pod: CniPod, mut lists: NodeLists) -> Verdict {
        let listed = match listed(&pod, &mut lists).await {
            Ok(listed) => listed,
            Err(verdict) => return verdict,
        };
        let uid = pod.uid.clone();
        match self.clone().enroll_made(pod, listed.clone()).await {
            Ok(()) => {
                self.noticed.enrolled_by_cni(&uid);
                Verdict::Done
            }
            Err(why) => {
                self.noticed
                    .failing_by_cni(failing(&uid, &listed.namespace, &listed.name, &why.text, why.problem));
                Verdict::Failed(why.text)
            }
        }
    }

    async fn enroll_made(self: Arc<Self>, pod: CniPod, listed: ListedPod) -> Result<(), Why> {
        let netns = NetNamespace::open(&pod.netns)?;
        let to_enroll = PodToEnroll {
            uid: pod.uid.to_string(),
            namespace: listed.namespace,
            name: listed.name,
            service_account: listed.service_account,
            netns_path: pod.netns,
            addresses: pod.addresses,
            cgroup_path: None,
            origin: Origin::Cni,
        };
        validate(&to_enroll)?;
        // Its processes tell whose a namespace is, whatever we are told.
        if let Some(other) = self.capture.other_pod_in(&netns, &pod.uid).await? {
            let text = format!("processes of Pod {other} run in its network namespace");
            return Err(Why::new("another_pod", text));
        }
        self.ended.lock().remove(&pod.uid);
        if self.has_other_namespace(&pod.uid, &netns) {
            info!(uid = %pod.uid, "the Pod's sandbox is made anew: the one before is released");
            self.clone().release(&pod.uid).await?;
        }
        self.trust_domain.known(ENROLMENT_PATIENCE).await;
        self.capture_in(&pod.uid, to_enroll, netns).await?;
        self.wait_until_proven(&pod.uid, Instant::now() + ENROLMENT_PATIENCE).await?;
        Ok(())
    }

    fn has_other_namespace(&self, uid: &str, netns: &NetNamespace) -> bool {
        self.known()
            .get(uid)
            .is_some_and(|known| known.origin != Origin::Local && known.netns_cookie != netns.cookie())
    }

    #[must_use]
    pub fn check_by_cni(&self, pod: &CniPod, lists: &NodeLists) -> Verdict {
        let is_member = lists
            .borrow()
            .as_ref()
            .is_some_and(|list| list.pods.get(&pod.uid).is_some_and(|listed| listed.is_member));
        let known = self.known().get(&pod.uid).copied();
        let cookie = NetNamespace::open(&pod.netns).map(|netns| netns.cookie());
        match (known, cookie) {
            (_, Err(error)) => Verdict::Failed(error.to_string()),
            (None, Ok(_)) if is_member => Verdict::Failed("it is not enrolled".to_owned()),
            (None, Ok(_)) => Verdict::NotAMember(String::new()),
            (Some(known), Ok(cookie)) if known.netns_cookie != cookie => {
                Verdict::Failed("another network namespace is enrolled for it".to_owned())
            }
            (Some(known), Ok(_)) if !known.is_proven => Verdict::Failed("its capture is not proven".to_owned()),
            (Some(_), Ok(_)) => Verdict::Done,
        }
    }

    /// Only the sandbox that ends: the runtime may tell of an earlier one of the same Pod again, while its successor lives.
    pub async fn delete_by_cni(self: Arc<Self>, pod: CniPod) -> Verdict {
        let recorded = {
            let enrolled = self.enrolled.lock();
            enrolled
                .get(&pod.uid)
                .filter(|enrolled| enrolled.pod.origin != Origin::Local)
                .map(|enrolled| (enrolled.netns_cookie, enrolled.pod.netns_path == pod.netns))
        };
        let Some((cookie, is_its_path)) = recorded else {
            return Verdict::Done;
        };
        let is_it = match NetNamespace::open(&pod.netns) {
            Ok(netns) => netns.cookie() == cookie,
            Err(_) => is_its_path,
        };
        if !is_it {
            return Verdict::Done;
        }
        // Before it is released: from then on it is looked for.
        self.ended.lock().insert(pod.uid.clone());
        match self.release(&pod.uid).await {
            Ok(_) => Verdict::Done,
            Err(error) => Verdict::Failed(error.to_string()),
        }
    }
}

/// The Pod as the control plane knows it, if it is a member; else what the plugin is told.
async fn listed(pod: &CniPod, lists: &mut NodeLists) -> Result<ListedPod, Verdict> {
    let is_of_mesh = lists
        .borrow()
        .as_ref()
        .is_none_or(|list| may_be_of_mesh(list, &pod.namespace));
    let patience = if is_of_mesh { LIST_PATIENCE } else { OTHERS_PATIENCE };
    let told = timeout(
        patience,
        lists.wait_for(|list| list.as_ref().is_some_and(|list| of_list(list, pod).is_some())),
    );
    let listed = match told.await {
        Ok(Ok(list)) => list.as_ref().and_then(|list| of_list(list, pod).cloned()),
        Ok(Err(_)) | Err(_) => None,
    };
    let Some(listed) = listed else {
        return Err(if is_of_mesh {
            Verdict::Failed(format!("the control plane has not told of it within {patience:?}"))
        } else {
            Verdict::NotAMember("its namespace is not in the mesh".to_owned())
        });
    };
    if (&listed.namespace, &listed.name) != (&pod.namespace, &pod.name) {
        warn!(uid = %pod.uid, namespace = pod.namespace, pod = pod.name, "the runtime names another Pod than the control plane");
        return Err(Verdict::Failed(format!(
            "its uid is that of Pod {}/{}",
            listed.namespace, listed.name
        )));
    }
    if !listed.is_member {
        return Err(Verdict::NotAMember(listed.refused));
    }
    Ok(listed)
}

/// By its uid; a static Pod, which is never a member, by its name.
fn of_list<'a>(list: &'a NodeList, pod: &CniPod) -> Option<&'a ListedPod> {
    let is_it = |listed: &&ListedPod| listed.is_static && (&listed.namespace, &listed.name) == (&pod.namespace, &pod.name);
    list.pods.get(&pod.uid).or_else(|| list.pods.values().find(is_it))
}

fn may_be_of_mesh(list: &NodeList, namespace: &str) -> bool {
    list.namespaces.contains_key(namespace) || list.are_namespaces_cut
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tokio::sync::watch;

    use super::*;

    fn pod(namespace: &str) -> CniPod {
        CniPod {
            uid: "u-1".into(),
            namespace: namespace.into(),
            name: "web".into(),
            netns: "/run/netns/x".into(),
            addresses: vec![],
        }
    }

    fn list(listed: Option<(&str, bool)>) -> NodeList {
        let listed = listed.map(|(name, is_member)| {
            let listed = ListedPod {
                namespace: "shop".into(),
                name: name.into(),
                service_account: "web".into(),
                addresses: vec![],
                is_member,
                refused: String::new(),
                is_static: false,
                probe_ports: vec![],
            };
            (Arc::from("u-1"), listed)
        });
        NodeList {
            pods: listed.into_iter().collect(),
            namespaces: BTreeMap::from([("shop".to_owned(), false)]),
            ..NodeList::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_of_the_mesh_is_waited_for_until_it_is_told_of() {
        let (sender, mut lists) = watch::channel(Some(Arc::new(list(None))));
        let told = async {
            tokio::time::sleep(LIST_PATIENCE / 2).await;
            sender.send_replace(Some(Arc::new(list(Some(("web", true))))));
        };
        let of_shop = pod("shop");
        let (listed, ()) = tokio::join!(listed(&of_shop, &mut lists), told);
        assert_eq!(listed.map(|listed| listed.service_account), Ok("web".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_not_told_of_fails_only_if_it_may_be_of_the_mesh() {
        let (_sender, mut lists) = watch::channel(Some(Arc::new(list(None))));
        assert!(matches!(listed(&pod("shop"), &mut lists).await, Err(Verdict::Failed(_))));
        let began = Instant::now();
        assert!(matches!(
            listed(&pod("kube-system"), &mut lists).await,
            Err(Verdict::NotAMember(_))
        ));
        assert_eq!(began.elapsed().as_secs(), 0, "others are kept waiting");
        let (_sender, mut none) = watch::channel(None);
        assert!(matches!(listed(&pod("shop"), &mut none).await, Err(Verdict::Failed(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_static_pod_is_known_by_its_name_and_left_alone() {
        let mut told = list(Some(("web", false)));
        let mut shown = told.pods.pop_first().unwrap().1;
        shown.is_static = true;
        shown.refused = "static".to_owned();
        told.pods.insert("uid-at-the-api-server".into(), shown);
        let (_sender, mut lists) = watch::channel(Some(Arc::new(told)));
        let verdict = listed(&pod("shop"), &mut lists).await.err();
        assert_eq!(verdict, Some(Verdict::NotAMember("static".to_owned())));
    }

    #[tokio::test(start_paused = true)]
    async fn a_uid_of_another_name_fails_and_a_non_member_is_left_alone() {
        let (_sender, mut other) = watch::channel(Some(Arc::new(list(Some(("db", true))))));
        assert!(matches!(listed(&pod("shop"), &mut other).await, Err(Verdict::Failed(_))));
        let (_sender, mut out) = watch::channel(Some(Arc::new(list(Some(("web", false))))));
        assert_eq!(
            listed(&pod("shop"), &mut out).await.err(),
            Some(Verdict::NotAMember(String::new()))
        );
    }
}
