//! Putting the plugin into a network configuration list, and taking it out again, as text: the rest stays as its owner wrote it,
//! byte for byte. Pure.

use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};

use crate::plugin::SUPPORTED_VERSIONS;
use crate::protocol::PLUGIN;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConflistError {
    #[error("it is no JSON object ({0})")]
    NotJson(String),
    #[error("`plugins` is no list of plugins with at least one to stand behind")]
    NoPlugins,
    #[error("cniVersion {0:?} is none that the plugin speaks")]
    Version(String),
    /// A form of JSON that the editing does not understand, such as a key with escapes.
    #[error("its form is not one that can be edited without risk")]
    Form,
}

/// The plugin's entry.
#[must_use]
pub fn entry(run_dir: &Path, namespace_list: Option<&Path>) -> Value {
    let mut entry = json!({"type": PLUGIN, "runDir": run_dir.to_string_lossy()});
    if let Some(list) = namespace_list {
        entry["namespaceList"] = json!(list.to_string_lossy());
    }
    entry
}

/// With the entry, behind the plugins that are there. `None`: it is there already, just so.
///
/// # Errors
/// It is no list that the plugin can be put into.
pub fn insert(text: &str, entry: &Value) -> Result<Option<String>, ConflistError> {
    let before = parse(text)?;
    let version = before["cniVersion"].as_str().unwrap_or_default();
    if !SUPPORTED_VERSIONS.contains(&version) {
        return Err(ConflistError::Version(version.to_owned()));
    }
    let ours: Vec<&Value> = plugins(&before)?.iter().filter(|plugin| is_ours(plugin)).collect();
    if ours == [entry] {
        return Ok(None);
    }
    let without = remove(text)?;
    let text = without.as_deref().unwrap_or(text);
    let mut wanted = parse(text)?;
    if plugins(&wanted)?.is_empty() {
        return Err(ConflistError::NoPlugins);
    }
    if let Some(plugins) = wanted["plugins"].as_array_mut() {
        plugins.push(entry.clone());
    }
    let elements = elements(text).ok_or(ConflistError::Form)?;
    let last = elements.last().ok_or(ConflistError::NoPlugins)?;
    // On a line of its own where the others are.
    let lead = text[..last.start].len() - text[..last.start].trim_end().len();
    let lead = &text[last.start - lead..last.start];
    let edited = format!("{},{lead}{entry}{}", &text[..last.end], &text[last.end..]);
    checked(edited, &wanted).map(Some)
}

/// Without any entry of the plugin. `None`: there is none.
///
/// # Errors
/// It is no list of plugins.
pub fn remove(text: &str) -> Result<Option<String>, ConflistError> {
    let mut wanted = parse(text)?;
    let ours: Vec<bool> = plugins(&wanted)?.iter().map(is_ours).collect();
    if !ours.contains(&true) {
        return Ok(None);
    }
    if let Some(plugins) = wanted["plugins"].as_array_mut() {
        plugins.retain(|plugin| !is_ours(plugin));
    }
    let elements = elements(text).ok_or(ConflistError::Form)?;
    if elements.len() != ours.len() {
        return Err(ConflistError::Form);
    }
    let mut edited = text.to_owned();
    for (i, element) in elements.iter().enumerate().rev().filter(|(i, _)| ours[*i]) {
        // With the comma before it; where no other stays in front, with the one behind.
        let gone: Range<usize> = if ours[..i].contains(&false) {
            elements[i - 1].end..element.end
        } else {
            element.start..elements.get(i + 1).map_or(element.end, |next| next.start)
        };
        edited.replace_range(gone, "");
    }
    checked(edited, &wanted).map(Some)
}

fn parse(text: &str) -> Result<Value, ConflistError> {
    match serde_json::from_str::<Value>(text) {
        Ok(value) if value.is_object() => Ok(value),
        Ok(_) => Err(ConflistError::NotJson("another kind of value".to_owned())),
        Err(error) => Err(ConflistError::NotJson(error.to_string())),
    }
}

fn plugins(conflist: &Value) -> Result<&Vec<Value>, ConflistError> {
    conflist["plugins"].as_array().ok_or(ConflistError::NoPlugins)
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN
}

/// Whatever the scanner took the text for, what comes out means what was wanted.
fn checked(edited: String, wanted: &Value) -> Result<String, ConflistError> {
    match serde_json::from_str::<Value>(&edited) {
        Ok(value) if value == *wanted => Ok(edited),
        _ => Err(ConflistError::Form),
    }
}

/// Where the elements of the top level's `plugins` are, in text that is valid JSON. Of several, those of the last, which is what
/// parsers take.
fn elements(text: &str) -> Option<Vec<Range<usize>>> {
    let bytes = text.as_bytes();
    let mut found = None;
    let mut depth = 0_usize;
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                let end = string_end(bytes, at)?;
                let colon = next_solid(bytes, end).filter(|next| bytes[*next] == b':');
                if depth == 1
                    && &text[at..end] == "\"plugins\""
                    && let Some(open) = colon.and_then(|colon| next_solid(bytes, colon + 1))
                    && bytes[open] == b'['
                {
                    let (elements, close) = array(bytes, open)?;
                    found = Some(elements);
                    at = close + 1;
                    continue;
                }
                at = end;
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        at += 1;
    }
    found
}

/// The elements of the array that opens here, and where it closes.
fn array(bytes: &[u8], open: usize) -> Option<(Vec<Range<usize>>, usize)> {
    let mut elements = Vec::new();
    let mut depth = 0_usize;
    let mut start = None;
    let mut end = open;
    let mut at = open + 1;
    loop {
        let byte = *bytes.get(at)?;
        let is_end = depth == 0 && matches!(byte, b',' | b']');
        if is_end {
            if let Some(start) = start.take() {
                elements.push(start..end);
            }
            if byte == b']' {
                return Some((elements, at));
            }
        } else if !byte.is_ascii_whitespace() {
            start.get_or_insert(at);
            match byte {
                b'"' => at = string_end(bytes, at)? - 1,
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.checked_sub(1)?,
                _ => {}
            }
            end = at + 1;
        }
        at += 1;
    }
}

/// Behind the closing quote of the string that opens here.
fn string_end(bytes: &[u8], open: usize) -> Option<usize> {
    let mut at = open + 1;
    loop {
        match *bytes.get(at)? {
            b'\\' => at += 2,
            b'"' => return Some(at + 1),
            _ => at += 1,
        }
    }
}

fn next_solid(bytes: &[u8], from: usize) -> Option<usize> {
    (from..bytes.len()).find(|at| !bytes[*at].is_ascii_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRETTY: &str = "{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"kind\",\n  \"plugins\": [\n    {\n      \"type\": \"ptp\",\n      \"ipam\": {\"ranges\": [[{\"subnet\": \"10.1.0.0/24\"}]], \"note\": \"a ] and a \\\" in it\"}\n    },\n    {\"type\": \"portmap\", \"capabilities\": {\"portMappings\": true}}\n  ]\n}\n";
    const COMPACT: &str = r#"{"plugins":[{"type":"bridge"}],"name":"x","cniVersion":"0.4.0"}"#;

    fn ours() -> Value {
        entry("/run/culvert".as_ref(), None)
    }

    fn types(text: &str) -> Vec<String> {
        let value: Value = serde_json::from_str(text).unwrap();
        let plugins = value["plugins"].as_array().unwrap();
        plugins
            .iter()
            .map(|plugin| plugin["type"].as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn the_entry_goes_behind_the_others_once_and_comes_out_without_a_trace() {
        for (text, expected) in [(PRETTY, vec!["ptp", "portmap", PLUGIN]), (COMPACT, vec!["bridge", PLUGIN])] {
            let with = insert(text, &ours()).unwrap().expect("it was not there");
            assert_eq!(types(&with), expected);
            assert_eq!(insert(&with, &ours()).unwrap(), None, "a second time changes nothing");
            assert_eq!(remove(&with).unwrap().as_deref(), Some(text));
            assert_eq!(remove(text).unwrap(), None);
        }
    }

    #[test]
    fn an_entry_of_another_version_is_replaced_and_what_stands_behind_it_stays() {
        let old = entry("/var/run/old".as_ref(), Some("/var/lib/list".as_ref()));
        let with = insert(PRETTY, &old).unwrap().unwrap();
        let with = with.replace("\n  ]\n}", ",\n    {\"type\": \"bandwidth\"}\n  ]\n}");
        let replaced = insert(&with, &ours()).unwrap().expect("it differs");
        assert_eq!(types(&replaced), ["ptp", "portmap", "bandwidth", PLUGIN]);
        assert!(!replaced.contains("/var/run/old"));
        let without = remove(&replaced).unwrap().unwrap();
        assert_eq!(types(&without), ["ptp", "portmap", "bandwidth"]);
    }

    #[test]
    fn an_entry_in_front_of_others_and_several_are_taken_out() {
        let text = r#"{"cniVersion":"1.0.0","plugins":[ {"type":"mesh-cni"}, {"type":"a"},{"type":"mesh-cni"} ,{"type":"b"}]}"#;
        assert_eq!(types(&remove(text).unwrap().unwrap()), ["a", "b"]);
        let in_front = r#"{"cniVersion":"1.0.0","plugins":[{"type":"mesh-cni"}, {"type":"mesh-cni"},{"type":"a"}]}"#;
        assert_eq!(types(&remove(in_front).unwrap().unwrap()), ["a"]);
        let alone = r#"{"cniVersion":"1.0.0","plugins":[{"type":"mesh-cni"}]}"#;
        assert_eq!(types(&remove(alone).unwrap().unwrap()), [""; 0]);
        assert_eq!(insert(alone, &entry("/x".as_ref(), None)), Err(ConflistError::NoPlugins));
    }

    #[test]
    fn what_is_malformed_is_refused_with_what_is_wrong() {
        for text in ["", "{", "[]", "null", "{\"plugins\": [}"] {
            assert!(matches!(insert(text, &ours()), Err(ConflistError::NotJson(_))), "{text}");
            assert!(matches!(remove(text), Err(ConflistError::NotJson(_))), "{text}");
        }
        for plugins in ["{}", "[]", "null", "7"] {
            let text = format!("{{\"cniVersion\": \"1.0.0\", \"plugins\": {plugins}}}");
            assert_eq!(insert(&text, &ours()), Err(ConflistError::NoPlugins), "{text}");
        }
        assert_eq!(insert("{\"cniVersion\": \"1.0.0\"}", &ours()), Err(ConflistError::NoPlugins));
        let old = COMPACT.replace("0.4.0", "0.1.0");
        assert_eq!(insert(&old, &ours()), Err(ConflistError::Version("0.1.0".to_owned())));
    }

    /// Decoys: strings and nested objects that look like what is sought, a key with an escape, a key that is there twice.
    #[test]
    fn text_that_only_looks_like_the_list_is_never_edited() {
        let decoys = r#"{"cniVersion":"1.0.0","x":{"plugins":[{"type":"no"}]},"note":"\"plugins\":[","plugins":[{"type":"a","plugins":[1]}]}"#;
        let with = insert(decoys, &ours()).unwrap().unwrap();
        assert_eq!(types(&with), ["a", PLUGIN]);
        assert_eq!(remove(&with).unwrap().as_deref(), Some(decoys));
        let escaped = r#"{"cniVersion":"1.0.0","plug\u0069ns":[{"type":"a"}]}"#;
        assert_eq!(insert(escaped, &ours()), Err(ConflistError::Form));
        let twice = r#"{"cniVersion":"1.0.0","plugins":[{"type":"a"}],"plugins":[{"type":"b"}]}"#;
        assert_eq!(types(&insert(twice, &ours()).unwrap().unwrap()), ["b", PLUGIN]);
    }
}
