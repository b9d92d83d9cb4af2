//! What `cargo xtask fuzz` feeds with bytes; compiled for nothing else.

use std::sync::Arc;

use crate::authority;
use crate::registry::{Registry, Scan};

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
