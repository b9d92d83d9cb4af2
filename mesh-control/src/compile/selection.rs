//! How many workloads of the mesh each policy and MeshConfig is for. Pure.

use std::collections::BTreeMap;

use mesh_proto::ROOT_NAMESPACE;

use super::Index;
use super::membership::{Membership, membership};
use crate::objects::{Kind, ObjectId, World};

/// Members that run or will, whether or not they have an address yet. Pods that another mesh captures are not ours to count.
pub(super) fn selected(world: &World, index: &Index<'_>) -> BTreeMap<ObjectId, usize> {
    let mut members: BTreeMap<&str, usize> = BTreeMap::new();
    let mut by_selector: BTreeMap<&ObjectId, usize> = BTreeMap::new();
    for (id, pod) in &index.pods {
        let namespace = index.namespaces.get(id.namespace.as_str());
        if membership(namespace, &id.namespace, pod) != Membership::Member {
            continue;
        }
        *members.entry(&id.namespace).or_default() += 1;
        // The mesh's own namespace has no members: it never stands for both.
        let selecting = [id.namespace.as_str(), ROOT_NAMESPACE]
            .into_iter()
            .filter_map(|namespace| index.selecting_policies.get(namespace))
            .flat_map(|selectors| selectors.choosing(&pod.labels));
        for policy in selecting {
            *by_selector.entry(policy).or_default() += 1;
        }
    }
    let of_namespace = |namespace: &str| {
        if namespace == ROOT_NAMESPACE {
            members.values().sum()
        } else {
            members.get(namespace).copied().unwrap_or_default()
        }
    };
    let policies = index.policies.iter().map(|(id, policy)| {
        let count = match policy.selector {
            Some(_) => by_selector.get(id).copied().unwrap_or_default(),
            None => of_namespace(&id.namespace),
        };
        ((*id).clone(), count)
    });
    let configs = world.keys().filter(|id| id.kind == Kind::MeshConfig);
    policies
        .chain(configs.map(|id| (id.clone(), of_namespace(&id.namespace))))
        .collect()
}
