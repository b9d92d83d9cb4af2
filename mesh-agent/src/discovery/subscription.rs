//! One resource type of the delta protocol, without I/O: what is held, and what to answer to a response.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

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
    /// What was sent and cannot be used, with the reason, until something else of that name can be, or it is gone; at most
    /// [`MAX_REJECTED_NAMED`].
    rejected: BTreeMap<String, String>,
    /// Those of streams before. What is not sent again once this stream was answered is what is held, or is gone.
    unsaid: BTreeSet<String>,
    /// There was no room for more of them. On the next stream everything that is not held comes again: once that was answered, it is
    /// known anew.
    rejected_more: bool,
    rejected_more_before: bool,
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
            rejected: BTreeMap::new(),
            unsaid: BTreeSet::new(),
            rejected_more: false,
            rejected_more_before: false,
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

    /// "name: reason" of what cannot be used; `*` stands for those that found no room.
    pub fn rejected(&self) -> impl Iterator<Item = String> {
        let named = self.rejected.iter().map(|(name, reason)| format!("{name}: {reason}"));
        let has_more = self.rejected_more || self.rejected_more_before;
        let more = has_more.then(|| "*: there are more".to_owned());
        more.into_iter().chain(named)
    }

    /// The first request on a new stream: the wildcard, with what is held from streams before.
    #[must_use]
    pub fn open(&mut self, node: Node) -> DeltaDiscoveryRequest {
        self.unnamed.clone_from(&self.stand_ins);
        self.unsaid = self.rejected.keys().cloned().collect();
        self.rejected_more_before |= std::mem::take(&mut self.rejected_more);
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
                    self.reject(rejected.last());
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
            for name in std::mem::take(&mut self.unsaid) {
                self.rejected.remove(&name);
            }
            self.rejected_more_before = false;
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

    fn reject(&mut self, rejected: Option<&Rejected>) {
        let Some(Rejected { name, reason }) = rejected else { return };
        self.unsaid.remove(name);
        if self.rejected.len() < MAX_REJECTED_NAMED || self.rejected.contains_key(name) {
            self.rejected.insert(name.clone(), reason.clone());
        } else {
            self.rejected_more = true;
        }
    }

    fn forget(&mut self, name: &str) {
        self.rejected.remove(name);
        self.unsaid.remove(name);
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
mod tests;
