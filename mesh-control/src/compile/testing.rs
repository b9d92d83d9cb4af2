//! What the tests of this module compile from.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{EndpointSource, Parameters};
use crate::objects::{Kind, ObjectId, World};
use crate::registry::convert;

pub fn parameters(endpoints: EndpointSource) -> Parameters {
    Parameters {
        trust_domain: "cluster.local".into(),
        cluster: "Kubernetes".into(),
        pod_ranges: vec![],
        trust_bundle: vec![],
        revoked: BTreeSet::new(),
        endpoints,
    }
}

/// Of documents as a cluster has them: also of kinds that no file is read for.
pub fn world(text: &str) -> World {
    let mut world = World::new();
    for document in text.split("---\n") {
        let value: serde_json::Value = serde_norway::from_str(document).expect("YAML");
        let kind = Kind::ALL
            .into_iter()
            .find(|kind| value["kind"] == kind.as_str())
            .expect("a kind");
        let text_of = |name: &str| value["metadata"][name].as_str().unwrap_or_default().to_owned();
        let id = ObjectId {
            kind,
            namespace: text_of("namespace"),
            name: text_of("name"),
        };
        let object = convert::parse(&id, &value).unwrap_or_else(|error| panic!("{error}: {document}"));
        world.insert(id, Arc::new(object));
    }
    world
}
