//! One resource type of the delta protocol, without I/O: what is held, and what to answer to a response.

use std::collections::{HashMap, HashSet};

use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status};
use mesh_proto::{MAX_RESOURCES, MAX_RESUME_BYTES, PARTIAL_VERSION};
use prost_types::Any;

/// uids and "namespace/hostname" are at most some 600 bytes long.
const MAX_NAME_BYTES: usize = 1024;
/// Resources named in a NACK, and in the node's report.
pub const MAX_REJECTED_NAMED: usize = 64;
const MAX_REASON_BYTES: usize = 200;
/// google.rpc.Code.INVALID_ARGUMENT.
const INVALID_ARGUMENT: i32 = 3;

/// A resource that could not be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    pub name: String,
    pub reason: String,
}

/// What a response means: to be applied first, and only then answered.
#[derive(Debug)]
pub struct Received<C> {
    pub changes: Vec<C>,
    /// The ACK or the NACK.
    pub reply: DeltaDiscoveryRequest,
    pub rejected: Vec<Rejected>,
}

/// The wildcard subscription of one type. Outlives streams: what it holds is told to the next server.
#[derive(Debug)]
pub struct Subscription {
    type_url: &'static str,
    /// What the agent's state holds, as it came: a restarted agent reads it again.
    held: HashMap<String, Held>,
    /// Of names and versions held, as a request has them.
    held_bytes: usize,
    /// Names that cannot be used and never could: the agent's state holds something in their place.
    stand_ins: HashSet<String>,
    /// Those of streams before that this stream has not named yet. No server is told of them, so none says that they are gone.
    unnamed: HashSet<String>,
    /// system_version_info of the last response.
    version: String,
    answered: bool,
    /// By a server, and not only by what was remembered.
    confirmed: bool,
}

/// A resource that is in force.
#[derive(Debug)]
struct Held {
    version: String,
    resource: Option<Any>,
}

impl Subscription {
    #[must_use]
    pub fn new(type_url: &'static str) -> Self {
        Self {
            type_url,
            held: HashMap::new(),
            held_bytes: 0,
            stand_ins: HashSet::new(),
            unnamed: HashSet::new(),
            version: String::new(),
            answered: false,
            confirmed: false,
        }
    }

    #[must_use]
    pub fn type_url(&self) -> &'static str {
        self.type_url
    }

    /// Whether all that there was at some moment has come.
    #[must_use]
    pub fn answered(&self) -> bool {
        self.answered
    }

    /// Whether a server has answered since the agent started.
    #[must_use]
    pub fn confirmed(&self) -> bool {
        self.confirmed
    }

    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// What is in force although it could not be used.
    #[must_use]
    pub fn stand_ins(&self) -> &HashSet<String> {
        &self.stand_ins
    }

    /// The first request on a new stream: the wildcard, with what is held from streams before.
    #[must_use]
    pub fn open(&mut self, node: Node) -> DeltaDiscoveryRequest {
        self.unnamed.clone_from(&self.stand_ins);
        DeltaDiscoveryRequest {
            node: Some(node),
            type_url: self.type_url.to_owned(),
            initial_resource_versions: self
                .held
                .iter()
                .map(|(name, held)| (name.clone(), held.version.clone()))
                .collect(),
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// What is in force, as a response that brings a new agent to the same: stand-ins have no content there, and stand in again.
    #[must_use]
    pub fn snapshot(&self) -> DeltaDiscoveryResponse {
        let held = self.held.iter().map(|(name, held)| Resource {
            name: name.clone(),
            version: held.version.clone(),
            resource: held.resource.clone(),
            ..Resource::default()
        });
        let stand_ins = self.stand_ins.iter().map(|name| Resource {
            name: name.clone(),
            ..Resource::default()
        });
        DeltaDiscoveryResponse {
            type_url: self.type_url.to_owned(),
            // What it holds is whole, whatever was still to come.
            system_version_info: self.version.trim_end_matches(PARTIAL_VERSION).to_owned(),
            resources: held.chain(stand_ins).collect(),
            ..DeltaDiscoveryResponse::default()
        }
    }

    /// Takes [`Self::snapshot`] of an agent before. No server has confirmed it.
    pub fn restore<C>(
        &mut self,
        snapshot: DeltaDiscoveryResponse,
        decode: impl FnMut(&Resource) -> Result<C, String>,
        stand_in: impl FnMut(&str) -> Option<C>,
    ) -> Received<C> {
        let received = self.receive(snapshot, decode, |_| None, stand_in);
        self.confirmed = false;
        received
    }

    /// Takes a response apart. `decode` turns a resource into a change, or says why it cannot; `remove` names one that is gone;
    /// `stand_in` is what holds in the place of a name that cannot be used and never could.
    ///
    /// A rejected resource leaves what was held of that name in place, here as in the state. A stand-in counts as not held: the
    /// next server is asked for it again, and it is dropped when that one answers without it.
    pub fn receive<C>(
        &mut self,
        response: DeltaDiscoveryResponse,
        mut decode: impl FnMut(&Resource) -> Result<C, String>,
        mut remove: impl FnMut(String) -> Option<C>,
        mut stand_in: impl FnMut(&str) -> Option<C>,
    ) -> Received<C> {
        let mut changes = Vec::with_capacity(response.resources.len() + response.removed_resources.len());
        let mut rejected = Vec::new();
        // Removals first: a name that is both gone and there is there.
        for name in response.removed_resources {
            self.forget(&name);
            changes.extend(remove(name));
        }
        for resource in response.resources {
            match self.checked(&resource).and_then(|()| decode(&resource)) {
                Ok(change) => {
                    self.forget(&resource.name);
                    self.held_bytes += entry_bytes(&resource.name, &resource.version);
                    let held = Held {
                        version: resource.version,
                        resource: resource.resource,
                    };
                    self.held.insert(resource.name, held);
                    changes.push(change);
                }
                Err(reason) => {
                    rejected.push(Rejected {
                        name: shortened(&resource.name, MAX_NAME_BYTES),
                        reason: shortened(&reason, MAX_REASON_BYTES),
                    });
                    self.unnamed.remove(&resource.name);
                    if !self.held.contains_key(&resource.name)
                        && self.has_room(&resource.name)
                        && let Some(change) = stand_in(&resource.name)
                    {
                        self.stand_ins.insert(resource.name.clone());
                        changes.push(change);
                    }
                }
            }
        }
        let is_whole = !response.system_version_info.ends_with(PARTIAL_VERSION);
        if is_whole {
            // The wildcard is answered, and everything that was not told as held was sent: what was not is gone.
            for name in std::mem::take(&mut self.unnamed) {
                self.forget(&name);
                changes.extend(remove(name));
            }
        }
        self.answered |= is_whole;
        self.confirmed |= is_whole;
        self.version = shortened(&response.system_version_info, MAX_NAME_BYTES);
        let reply = DeltaDiscoveryRequest {
            type_url: self.type_url.to_owned(),
            response_nonce: response.nonce,
            error_detail: error_detail(&rejected),
            ..DeltaDiscoveryRequest::default()
        };
        Received {
            changes,
            reply,
            rejected,
        }
    }

    fn forget(&mut self, name: &str) {
        if let Some(held) = self.held.remove(name) {
            self.held_bytes -= entry_bytes(name, &held.version);
        }
        self.stand_ins.remove(name);
        self.unnamed.remove(name);
    }

    /// Names of at most 1,024 bytes, and not too many.
    fn has_room(&self, name: &str) -> bool {
        let known = self.held.contains_key(name) || self.stand_ins.contains(name);
        is_name(name) && (known || self.held.len() + self.stand_ins.len() < MAX_RESOURCES)
    }

    fn checked(&self, resource: &Resource) -> Result<(), String> {
        if !is_name(&resource.name) {
            return Err("has no name of at most 1024 bytes".to_owned());
        }
        if !self.has_room(&resource.name) {
            return Err(format!("more than {MAX_RESOURCES} resources of this type"));
        }
        // Told in one request after a reconnect: what does not fit there would cut every further stream off.
        let before = self
            .held
            .get(&resource.name)
            .map_or(0, |held| entry_bytes(&resource.name, &held.version));
        if self.held_bytes - before + entry_bytes(&resource.name, &resource.version) > MAX_RESUME_BYTES {
            return Err(format!(
                "more than {MAX_RESUME_BYTES} bytes of names and versions of this type"
            ));
        }
        let url = resource.resource.as_ref().map(|any| any.type_url.as_str());
        match url {
            Some(url) if url == self.type_url => Ok(()),
            Some(url) => Err(format!("is a `{}`", shortened(url, 100))),
            None => Err("is empty".to_owned()),
        }
    }
}

/// Of a map's entry on the wire: tags and lengths are at most 16 bytes.
fn entry_bytes(name: &str, version: &str) -> usize {
    name.len() + version.len() + 16
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME_BYTES
}

/// The NACK of a response whose type was never asked for.
#[must_use]
pub fn refuse_unknown_type(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        error_detail: Some(Status {
            code: INVALID_ARGUMENT,
            message: "this type was not subscribed to".to_owned(),
            details: Vec::new(),
        }),
        ..DeltaDiscoveryRequest::default()
    }
}

fn error_detail(rejected: &[Rejected]) -> Option<Status> {
    if rejected.is_empty() {
        return None;
    }
    let mut message = String::new();
    for Rejected { name, reason } in rejected.iter().take(MAX_REJECTED_NAMED) {
        if !message.is_empty() {
            message.push_str("; ");
        }
        message.push_str(&format!("{name}: {reason}"));
    }
    if rejected.len() > MAX_REJECTED_NAMED {
        message.push_str(&format!("; and {} more", rejected.len() - MAX_REJECTED_NAMED));
    }
    Some(Status {
        code: INVALID_ARGUMENT,
        message,
        details: Vec::new(),
    })
}

fn shortened(text: &str, bytes: usize) -> String {
    let mut end = text.len().min(bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::Any;
    use std::collections::BTreeMap;

    const TYPE: &str = "type.googleapis.com/test.Thing";

    #[derive(Debug, PartialEq)]
    enum Change {
        Set(String),
        Remove(String),
    }

    fn resource(name: &str, version: &str) -> Resource {
        Resource {
            name: name.to_owned(),
            version: version.to_owned(),
            resource: Some(Any {
                type_url: TYPE.to_owned(),
                value: Vec::new(),
            }),
            ..Resource::default()
        }
    }

    fn response(nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
        DeltaDiscoveryResponse {
            nonce: nonce.to_owned(),
            type_url: TYPE.to_owned(),
            system_version_info: format!("v-{nonce}"),
            resources,
            removed_resources: removed.iter().map(|&r| r.to_owned()).collect(),
        }
    }

    /// Resources whose name holds "bad" cannot be used.
    fn receive(subscription: &mut Subscription, response: DeltaDiscoveryResponse) -> Received<Change> {
        subscription.receive(
            response,
            |r| {
                if r.name.contains("bad") {
                    Err("is bad".to_owned())
                } else {
                    Ok(Change::Set(r.name.clone()))
                }
            },
            |name| Some(Change::Remove(name)),
            |name| name.contains("policy").then(|| Change::Set(format!("denies for {name}"))),
        )
    }

    fn held(subscription: &mut Subscription) -> BTreeMap<String, String> {
        subscription
            .open(Node::default())
            .initial_resource_versions
            .into_iter()
            .collect()
    }

    fn versions(of: &[(&str, &str)]) -> BTreeMap<String, String> {
        of.iter().map(|&(n, v)| (n.to_owned(), v.to_owned())).collect()
    }

    #[test]
    fn the_first_request_is_the_wildcard() {
        let request = Subscription::new(TYPE).open(Node {
            id: "me".to_owned(),
            ..Node::default()
        });
        assert_eq!(request.type_url, TYPE);
        assert!(request.resource_names_subscribe.is_empty() && request.resource_names_unsubscribe.is_empty());
        assert!(request.initial_resource_versions.is_empty() && request.response_nonce.is_empty());
        assert_eq!(request.node.unwrap().id, "me");
    }

    #[test]
    fn a_usable_response_is_acknowledged_and_held_for_the_next_stream() {
        let mut subscription = Subscription::new(TYPE);
        assert!(!subscription.answered());
        let received = receive(
            &mut subscription,
            response("1", vec![resource("a", "1"), resource("b", "7")], &[]),
        );
        assert_eq!(received.changes, [Change::Set("a".into()), Change::Set("b".into())]);
        assert_eq!(
            (received.reply.response_nonce.as_str(), received.reply.error_detail),
            ("1", None)
        );
        assert!(received.reply.resource_names_subscribe.is_empty());
        let received = receive(
            &mut subscription,
            response("2", vec![resource("a", "2")], &["b", "never-known"]),
        );
        assert_eq!(
            received.changes,
            [
                Change::Remove("b".into()),
                Change::Remove("never-known".into()),
                Change::Set("a".into())
            ]
        );
        assert_eq!(held(&mut subscription), versions(&[("a", "2")]));
        assert_eq!(subscription.version(), "v-2");
    }

    #[test]
    fn an_empty_response_answers() {
        let mut subscription = Subscription::new(TYPE);
        let received = receive(&mut subscription, response("1", vec![], &[]));
        assert!(subscription.answered() && received.changes.is_empty() && received.reply.error_detail.is_none());
    }

    #[test]
    fn what_cannot_be_used_is_named_and_the_rest_applies() {
        let mut subscription = Subscription::new(TYPE);
        let mut foreign = resource("foreign", "1");
        foreign.resource = Some(Any {
            type_url: "other".to_owned(),
            value: vec![0xff],
        });
        let mut empty = resource("empty", "1");
        empty.resource = None;
        let all = vec![
            resource("bad-1", "1"),
            resource("good", "1"),
            foreign,
            empty,
            resource("", "1"),
        ];
        let received = receive(&mut subscription, response("1", all, &[]));
        assert_eq!(received.changes, [Change::Set("good".into())]);
        let detail = received.reply.error_detail.unwrap();
        assert_eq!((received.reply.response_nonce.as_str(), detail.code), ("1", 3));
        for named in ["bad-1: is bad", "foreign: is a `other`", "empty: is empty"] {
            assert!(detail.message.contains(named), "{}", detail.message);
        }
        assert_eq!(received.rejected.len(), 4);
        assert_eq!(held(&mut subscription), versions(&[("good", "1")]));
    }

    #[test]
    fn a_rejected_update_leaves_the_version_that_is_still_in_force() {
        let mut subscription = Subscription::new(TYPE);
        receive(&mut subscription, response("1", vec![resource("x", "1")], &[]));
        let received = subscription.receive(
            response("2", vec![resource("x", "2")], &[]),
            |_| Err::<Change, _>("broken".to_owned()),
            |_| None,
            |_| None,
        );
        assert!(received.changes.is_empty() && received.reply.error_detail.is_some());
        assert_eq!(held(&mut subscription), versions(&[("x", "1")]));
    }

    #[test]
    fn a_part_of_the_answer_does_not_answer() {
        let mut subscription = Subscription::new(TYPE);
        let mut part = response("1", vec![resource("a", "1")], &[]);
        part.system_version_info.push_str(PARTIAL_VERSION);
        assert_eq!(receive(&mut subscription, part.clone()).changes, [Change::Set("a".into())]);
        assert!(!subscription.answered());
        receive(&mut subscription, response("2", vec![resource("b", "1")], &[]));
        assert!(subscription.answered());
        receive(&mut subscription, part);
        assert!(subscription.answered(), "for good");
    }

    #[test]
    fn a_stand_in_takes_the_place_of_what_never_was_good() {
        let mut subscription = Subscription::new(TYPE);
        let received = receive(&mut subscription, response("1", vec![resource("bad-policy", "1")], &[]));
        assert_eq!(received.changes, [Change::Set("denies for bad-policy".into())]);
        assert!(received.reply.error_detail.is_some());
        assert_eq!(subscription.held(), 0, "asked for again");
        let held = Held {
            version: "0".into(),
            resource: None,
        };
        subscription.held.insert("bad-policy".into(), held);
        subscription.held_bytes = entry_bytes("bad-policy", "0");
        let received = receive(&mut subscription, response("2", vec![resource("bad-policy", "2")], &[]));
        assert_eq!(received.changes, [], "its last good form stands");
    }

    #[test]
    fn what_is_held_fits_the_request_that_resumes_it() {
        let mut subscription = Subscription::new(TYPE);
        let name = |i: usize| format!("{i}-{}", "x".repeat(MAX_NAME_BYTES - 10));
        let count = mesh_proto::MAX_REQUEST_BYTES / MAX_NAME_BYTES + 10;
        let all = (0..count).map(|i| resource(&name(i), "1")).collect();
        let received = receive(&mut subscription, response("1", all, &[]));
        assert!(
            received
                .reply
                .error_detail
                .unwrap()
                .message
                .contains("bytes of names and versions")
        );
        assert!(subscription.held() > count / 2 && subscription.held() < count);
        let resume = subscription.open(Node::default());
        assert!(prost::Message::encoded_len(&resume) < mesh_proto::MAX_REQUEST_BYTES);
        // What is held is still updated, and what goes makes room.
        let received = receive(&mut subscription, response("2", vec![resource(&name(0), "2")], &[]));
        assert_eq!(received.rejected, []);
        let (gone, new) = (name(1), name(count));
        let received = receive(&mut subscription, response("3", vec![resource(&new, "1")], &[&gone]));
        assert_eq!(received.rejected, []);
    }

    #[test]
    fn what_is_no_resource_of_the_type_has_a_stand_in_too() {
        let mut subscription = Subscription::new(TYPE);
        let mut foreign = resource("foreign-policy", "1");
        foreign.resource = Some(Any {
            type_url: "other".to_owned(),
            value: vec![],
        });
        let mut empty = resource("empty-policy", "1");
        empty.resource = None;
        let received = receive(&mut subscription, response("1", vec![foreign, empty], &[]));
        assert_eq!(
            received.changes,
            [
                Change::Set("denies for foreign-policy".into()),
                Change::Set("denies for empty-policy".into())
            ]
        );
        assert_eq!(subscription.stand_ins().len(), 2);
    }

    #[test]
    fn a_stand_in_ends_with_its_resource() {
        let mut subscription = Subscription::new(TYPE);
        let names = [
            "bad-policy-good-later",
            "bad-policy-removed",
            "bad-policy-gone",
            "bad-policy-still",
        ];
        let all = names.iter().map(|name| resource(name, "1")).collect();
        assert_eq!(receive(&mut subscription, response("1", all, &[])).changes.len(), 4);
        // On the stream: the server says so.
        receive(&mut subscription, response("2", vec![], &["bad-policy-removed"]));
        assert_eq!(subscription.stand_ins().len(), 3);

        // Deleted while there was no stream: nobody says so, for no server knows that it is held.
        assert!(held(&mut subscription).is_empty());
        let mut part = response("1", vec![resource("bad-policy-still", "1")], &[]);
        part.system_version_info.push_str(PARTIAL_VERSION);
        assert_eq!(
            receive(&mut subscription, part).changes,
            [Change::Set("denies for bad-policy-still".into())],
            "more may come"
        );
        let good = subscription.receive(
            response("2", vec![resource("bad-policy-good-later", "2")], &[]),
            |r| Ok(Change::Set(r.name.clone())),
            |name| Some(Change::Remove(name)),
            |_| None,
        );
        assert_eq!(
            good.changes,
            [
                Change::Set("bad-policy-good-later".into()),
                Change::Remove("bad-policy-gone".into())
            ]
        );
        assert_eq!(subscription.stand_ins(), &HashSet::from(["bad-policy-still".to_owned()]));
        assert!(
            receive(&mut subscription, response("3", vec![], &[])).changes.is_empty(),
            "once a stream"
        );
        assert_eq!(held(&mut subscription), versions(&[("bad-policy-good-later", "2")]));
    }

    #[test]
    fn a_nack_stays_small_whatever_is_rejected() {
        let mut subscription = Subscription::new(TYPE);
        let all = (0..10_000)
            .map(|i| resource(&format!("bad-{i}-{}", "é".repeat(2000)), "1"))
            .collect();
        let received = receive(&mut subscription, response("1", all, &[]));
        let detail = received.reply.error_detail.unwrap();
        assert!(detail.message.len() < MAX_REJECTED_NAMED * 1300, "{}", detail.message.len());
        assert!(detail.message.ends_with("and 9936 more"));
        assert_eq!(subscription.held(), 0);
    }

    #[test]
    fn a_type_that_was_not_asked_for_is_refused() {
        let reply = refuse_unknown_type(&response("9", vec![], &[]));
        assert!(reply.error_detail.is_some() && reply.response_nonce == "9" && reply.type_url == TYPE);
    }
}
