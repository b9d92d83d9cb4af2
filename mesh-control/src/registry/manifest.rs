//! Manifests as people write them → objects. Pure: text in, objects and rejections out.

use serde::Deserialize;
use serde_json::Value;

use super::convert::{self, Reason, Rejected, identify, typed};
use crate::limits::MAX_DOCUMENTS;
use crate::objects::{Kind, Object, ObjectId};

#[cfg(test)]
mod tests;

/// One document of a file that the mesh reads.
#[derive(Debug)]
pub struct Document {
    /// Counted from 1; a List's items count as documents.
    pub number: usize,
    pub content: Result<(ObjectId, Object), Rejected>,
}

/// What a file holds.
#[derive(Debug, Default)]
pub struct Parsed {
    /// In order. Documents of other kinds are left out.
    pub documents: Vec<Document>,
    /// Documents of other kinds that look as if somebody meant them for the mesh: number, kind and apiVersion.
    pub ignored: Vec<String>,
}

/// By way of YAML's own values, whose mappings refuse a key that is there twice: JSON's take the last one, and a policy would lose
/// the rules of the first in silence.
fn read(part: &str) -> Result<Value, String> {
    let value: serde_norway::Value = serde_norway::from_str(part).map_err(|error| error.to_string())?;
    serde_json::to_value(value).map_err(|error| error.to_string())
}

#[must_use]
pub fn parse_file(text: &str) -> Parsed {
    let Parsed {
        mut documents,
        mut ignored,
    } = Parsed::default();
    let mut number = 0;
    for part in split_documents(text.strip_prefix('\u{feff}').unwrap_or(text)) {
        let value = match read(part) {
            Ok(Value::Null) => continue,
            Ok(value) => value,
            Err(error) => {
                number += 1;
                documents.push(rejected(number, None, Reason::Syntax, format!("no YAML: {error}")));
                continue;
            }
        };
        for value in items(value) {
            number += 1;
            if number > MAX_DOCUMENTS {
                let message = format!("more than {MAX_DOCUMENTS} documents in a file; split it");
                documents.push(rejected(number, None, Reason::File, message));
                return Parsed { documents, ignored };
            }
            match parse_document(value) {
                Ok(Content::Other(None)) => {}
                Ok(Content::Other(Some(what))) => ignored.push(format!("document {number}: {what}")),
                Ok(Content::Object(id, object)) => documents.push(Document {
                    number,
                    content: Ok((id, *object)),
                }),
                Err(error) => documents.push(Document {
                    number,
                    content: Err(error),
                }),
            }
        }
    }
    Parsed { documents, ignored }
}

enum Content {
    Object(ObjectId, Box<Object>),
    /// A kind that the mesh does not read; named when it is one that it seems to be meant to.
    Other(Option<String>),
}

fn rejected(number: usize, id: Option<ObjectId>, reason: Reason, message: String) -> Document {
    Document {
        number,
        content: Err(Rejected { id, reason, message }),
    }
}

/// A line that begins with `---` ends a document wherever it stands (YAML 1.2, 9.1.2), so that each part can be read by itself
/// and a broken one hides no other.
fn split_documents(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let mut offset = 0;
        for line in text.split_inclusive('\n') {
            // The first line's own marker opens the document, it does not end an empty one before it.
            if offset > 0 && line.starts_with("---") && line[3..].chars().next().is_none_or(char::is_whitespace) {
                rest = Some(&text[offset..]);
                return Some(&text[..offset]);
            }
            offset += line.len();
        }
        rest = None;
        Some(text)
    })
}

/// `kubectl get -o yaml` prints a List.
fn items(value: Value) -> Vec<Value> {
    if let Value::Object(mut fields) = value {
        let is_list = fields
            .get("kind")
            .and_then(Value::as_str)
            .is_some_and(|kind| kind.ends_with("List"));
        match fields.remove("items") {
            Some(Value::Array(items)) if is_list => return items,
            Some(other) => {
                fields.insert("items".to_owned(), other);
            }
            None => {}
        }
        return vec![Value::Object(fields)];
    }
    vec![value]
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    api_version: Option<String>,
    kind: Option<String>,
    metadata: Option<HeaderMetadata>,
}

#[derive(Deserialize)]
struct HeaderMetadata {
    name: Option<String>,
    namespace: Option<String>,
}

fn parse_document(value: Value) -> Result<Content, Rejected> {
    let syntax = |message: String| Rejected {
        id: None,
        reason: Reason::Syntax,
        message,
    };
    let header: Header = typed(&value).map_err(|error| syntax(format!("no Kubernetes object: {error}")))?;
    let (Some(api_version), Some(kind_name)) = (header.api_version, header.kind) else {
        return Err(syntax("no Kubernetes object: apiVersion and kind are needed".to_owned()));
    };
    let Some(kind) = Kind::of(&api_version, &kind_name) else {
        if api_version.split('/').next() == Some(mesh_api::GROUP) {
            return Err(syntax(format!(
                "apiVersion: {api_version:?} is unknown with kind {kind_name:?}; write {} and AuthorizationPolicy or MeshConfig",
                mesh_api::API_VERSION
            )));
        }
        let meant = is_meant_for_the_mesh(&api_version, &kind_name);
        return Ok(Content::Other(
            meant.then(|| format!("{kind_name:.64} of {api_version:.128}")),
        ));
    };
    let metadata = header.metadata.unwrap_or(HeaderMetadata {
        name: None,
        namespace: None,
    });
    let namespace = kind
        .is_namespaced()
        .then(|| metadata.namespace.unwrap_or_else(|| "default".to_owned()));
    let id = identify(kind, metadata.name.unwrap_or_default(), namespace)?;
    match convert::parse(&id, &value) {
        Ok(object) => Ok(Content::Object(id, Box::new(object))),
        Err(message) => Err(Rejected {
            id: Some(id),
            reason: Reason::Field,
            message,
        }),
    }
}

/// What another mesh reads, and what is almost what this one reads: whoever wrote it believes that it protects something.
fn is_meant_for_the_mesh(api_version: &str, kind: &str) -> bool {
    let is = |name: &&str| name.eq_ignore_ascii_case(kind);
    let (group, _) = api_version.split_once('/').unwrap_or(("", api_version));
    group == "security.istio.io"
        || [
            "AuthorizationPolicy",
            "MeshConfig",
            "PeerAuthentication",
            "RequestAuthentication",
        ]
        .iter()
        .any(is)
        || (group.is_empty() && Kind::ALL.iter().any(|kind| is(&kind.as_str())))
}
