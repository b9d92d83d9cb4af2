//! What `cargo xtask fuzz` feeds with bytes; compiled for nothing else.

use std::sync::Arc;

use mesh_proto::discovery::DeltaDiscoveryRequest;
use mesh_proto::node::NodeReport;
use prost::Message as _;

use crate::accounts::Accounts;
use crate::capture_states::CaptureStates;
use crate::discovery::subscription::Subscription;
use crate::registry::{LastGood, Registry, Scan};
use crate::{authority, proto, roots, tokens};

/// A file of the registry folder: read twice it says the same, and what was good once stays when it breaks.
pub fn manifests(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let scan = |text: &str| -> Scan { [("a.yaml".to_owned(), Ok(Arc::from(text)))].into() };
    let mut registry = Registry::default();
    registry.apply(&scan(text));
    assert!(!registry.apply(&scan(text)), "the same file changed something");
    let before = registry.world();
    registry.apply(&scan("{"));
    assert_eq!(before, registry.world(), "a broken file took something out of force");
}

/// A certificate request.
pub fn request(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        authority::fuzz(text);
    }
}

/// What an agent asks for on a stream, one request after the other, where there is nothing yet: no name that it gives is answered
/// without having been asked for.
pub fn subscriptions(mut bytes: &[u8]) {
    let mut subscription = Subscription::default();
    while let Ok(request) = DeltaDiscoveryRequest::decode_length_delimited(&mut bytes) {
        let _ = proto::text_field(request.node.as_ref().and_then(|node| node.metadata.as_ref()), "NODE_NAME");
        if subscription.request(proto::request_from_wire(request), None).is_err() {
            return;
        }
    }
}

/// What an agent says of its Pods: no word about a Pod that it did not name.
pub fn reports(bytes: &[u8]) {
    if let Ok(report) = NodeReport::decode(bytes) {
        assert!(proto::pod_words(&report.pods).len() <= report.pods.len());
    }
}

/// A file of the state directory, as each of those that there are. What is taken is taken again as it was written.
pub fn state(bytes: &[u8]) {
    if let Ok(accounts) = Accounts::from_json(bytes) {
        let again = accounts.to_json().and_then(|text| Accounts::from_json(&text));
        assert!(again.is_ok_and(|again| again == accounts), "accounts");
    }
    if let Ok(states) = serde_json::from_slice::<CaptureStates>(bytes) {
        let again = serde_json::to_vec(&states).and_then(|text| serde_json::from_slice(&text));
        assert!(again.is_ok_and(|again: CaptureStates| again == states), "capture states");
    }
    if let Ok(kept) = serde_json::from_slice::<LastGood>(bytes) {
        let mut registry = Registry::restore(kept);
        let world = registry.world();
        // The folder can no longer be read.
        let files = registry.files().map(|file| (file.to_owned(), Err("unreadable".to_owned())));
        let unreadable: Scan = files.collect();
        registry.apply(&unreadable);
        let after = registry.world();
        assert!(
            after.keys().all(|id| world.contains_key(id)),
            "something came into force of itself"
        );
    }
    roots::fuzz(bytes);
    tokens::fuzz(bytes);
}
