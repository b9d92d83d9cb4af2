//! Rendered manifests as objects.

use anyhow::{Context as _, Result};
use serde::Deserialize as _;
use serde_json::Value;

pub fn parse(text: &str) -> Result<Vec<Value>> {
    let all = serde_norway::Deserializer::from_str(text).map(Value::deserialize);
    let all: Vec<Value> = all.collect::<Result<_, _>>().context("what the chart renders is no YAML")?;
    // One that has comments alone.
    Ok(all.into_iter().filter(|document| !document.is_null()).collect())
}

/// By kind and name, as `DaemonSet/mesh-agent`.
pub fn find<'d>(documents: &'d [Value], id: &str) -> Option<&'d Value> {
    documents.iter().find(|document| self::id(document) == id)
}

pub fn id(document: &Value) -> String {
    let text = |pointer| document.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    format!("{}/{}", text("/kind"), text("/metadata/name"))
}

pub fn list<'v>(value: &'v Value, pointer: &str) -> &'v [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}
