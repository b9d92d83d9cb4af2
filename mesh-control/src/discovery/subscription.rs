//! One client's subscription to one type. Pure: requests and snapshots in, responses out.
//!
//! At most one response is in flight; meanwhile changes only pile up as the difference between the newest snapshot and what
//! the client was last sent, so a slow client costs no more memory than a quick one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_proto::PARTIAL_VERSION;

use crate::compile::{CompiledResource, TypeSnapshot};
use crate::limits::{MAX_ABSENT_NAMES, MAX_NAME_BYTES, MAX_RESOURCES, MAX_RESPONSE_BYTES};

#[cfg(test)]
mod tests;

const WILDCARD: &str = "*";

/// A discovery request of this type.
#[derive(Clone, Debug, Default)]
pub struct Request {
    pub subscribe: Vec<String>,
    pub unsubscribe: Vec<String>,
    /// What the client holds from an earlier stream; read in the first request only.
    pub initial_versions: BTreeMap<String, String>,
    pub nonce: String,
    pub error: Option<String>,
}

impl Request {
    pub fn forget_names(&mut self) {
        self.subscribe.retain(|name| name == WILDCARD);
        self.unsubscribe.clear();
        self.initial_versions.clear();
    }
}

#[derive(Debug)]
pub struct Response {
    /// The snapshot's version; with `+partial` while more has to follow.
    pub version: String,
    pub nonce: String,
    pub resources: Vec<Arc<CompiledResource>>,
    pub removed: Vec<String>,
}

/// What a request meant for the response in flight.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// It only changes what is subscribed to, or answers a response that is in flight no more.
    None,
    Acknowledged,
    /// The client goes on with what it had.
    Rejected {
        names: Vec<String>,
        error: String,
    },
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TooMuch {
    #[error("more than {MAX_RESOURCES} names in a subscription")]
    Names,
    #[error("more than {MAX_ABSENT_NAMES} names that are no resource's in a subscription")]
    Absent,
    #[error("a resource name of more than {MAX_NAME_BYTES} bytes")]
    NameLength,
}

#[derive(Debug, Default)]
pub struct Subscription {
    wildcard: bool,
    /// As the client named them: resource names or aliases.
    names: BTreeSet<String>,
    /// Resource name → version last sent, or told by the client. A version that it rejected counts as sent: it comes again when
    /// it changes, and its removal is told.
    sent: BTreeMap<String, String>,
    /// Names just subscribed to, which need an answer even when there is nothing.
    unanswered: BTreeSet<String>,
    in_flight: Option<InFlight>,
    /// The state of which nothing lacks, so that most changes need not be looked for: they are of other types.
    told: Option<String>,
    started: bool,
    /// The client waits for a response even if it is empty.
    owes_response: bool,
    nonces: u64,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    names: Vec<String>,
}

impl Subscription {
    #[must_use]
    pub fn in_flight(&self) -> bool {
        self.in_flight.is_some()
    }

    /// # Errors
    /// The client subscribes to more than a stream may; end it.
    pub fn request(&mut self, request: Request, snapshot: Option<&TypeSnapshot>) -> Result<Answer, TooMuch> {
        let mut given = request
            .subscribe
            .iter()
            .chain(&request.unsubscribe)
            .chain(request.initial_versions.keys());
        if given.any(|name| name.len() > MAX_NAME_BYTES) {
            return Err(TooMuch::NameLength);
        }
        if self.names.len() + request.subscribe.len() > MAX_RESOURCES || request.initial_versions.len() > MAX_RESOURCES {
            return Err(TooMuch::Names);
        }
        let answer = self.settle(&request);
        let asks = !request.subscribe.is_empty();
        if !self.started || asks || !request.unsubscribe.is_empty() {
            self.told = None;
        }
        if !self.started {
            self.started = true;
            self.owes_response = true;
            self.wildcard = request.subscribe.is_empty();
            self.sent = request.initial_versions;
            // A first request names everything that it wants; what it holds need not come again.
            for name in request.subscribe {
                self.subscribe(name);
            }
        } else {
            for name in request.subscribe {
                // Asking again for a resource means that it was dropped: it is sent again whatever was sent before.
                self.sent.remove(&name);
                self.subscribe(name);
            }
        }
        for name in request.unsubscribe {
            if name == WILDCARD {
                self.wildcard = false;
                continue;
            }
            self.names.remove(&name);
            self.unanswered.remove(&name);
            // The client drops it; should a wildcard still want it, it goes out again.
            self.sent.remove(&name);
        }
        // What is there bounds itself; what is not could be anything.
        let is_there = |name: &&String| snapshot.is_some_and(|snapshot| snapshot.resolve(name).next().is_some());
        if asks
            && self
                .names
                .iter()
                .filter(|name| !is_there(name))
                .nth(MAX_ABSENT_NAMES)
                .is_some()
        {
            return Err(TooMuch::Absent);
        }
        Ok(answer)
    }

    fn subscribe(&mut self, name: String) {
        if name == WILDCARD {
            self.wildcard = true;
            self.owes_response = true;
        } else {
            self.unanswered.insert(name.clone());
            self.names.insert(name);
        }
    }

    fn settle(&mut self, request: &Request) -> Answer {
        match self.in_flight.take_if(|flight| flight.nonce == request.nonce) {
            None => Answer::None,
            Some(flight) => match &request.error {
                None => Answer::Acknowledged,
                Some(error) => Answer::Rejected {
                    names: flight.names,
                    error: error.clone(),
                },
            },
        }
    }

    /// The next response to send: what the client lacks, at most [`MAX_RESPONSE_BYTES`] of it.
    pub fn next(&mut self, snapshot: &TypeSnapshot) -> Option<Response> {
        if !self.started || self.in_flight.is_some() {
            return None;
        }
        if self.told.as_ref() == Some(&snapshot.version) && !self.owes_response {
            return None;
        }
        let mut wanted: BTreeMap<&str, &Arc<CompiledResource>> = BTreeMap::new();
        if self.wildcard {
            wanted.extend(snapshot.resources.iter().map(|(name, resource)| (name.as_str(), resource)));
        }
        let mut unknown = Vec::new();
        for name in &self.names {
            let mut found = false;
            for resource in snapshot.resolve(name) {
                found = true;
                // A subscription by alias is asked for again by alias.
                if self.unanswered.contains(name) && *name != resource.name && !self.owes_response {
                    self.sent.remove(&resource.name);
                }
                wanted.insert(&resource.name, resource);
            }
            if !found && self.unanswered.contains(name) {
                unknown.push(name.clone());
            }
        }
        let gone = self.sent.keys().filter(|name| !wanted.contains_key(name.as_str()));
        // What does not fit follows in the next response: it is still in `sent` or in `unanswered`.
        let mut partial = false;
        let mut bytes = 0;
        let mut removed = BTreeSet::new();
        for name in gone.chain(&unknown) {
            bytes += name.len() + 8;
            if bytes > MAX_RESPONSE_BYTES {
                partial = true;
                break;
            }
            removed.insert(name.clone());
        }
        for name in &removed {
            self.sent.remove(name);
        }
        self.unanswered.retain(|name| partial && !removed.contains(name));

        let mut resources = Vec::new();
        for (name, resource) in wanted {
            if self.sent.get(name) == Some(&resource.version) {
                continue;
            }
            // Beside the value: name, version, aliases and type URL.
            let size = resource.value.len() + 2 * name.len() + 256;
            if bytes + size > MAX_RESPONSE_BYTES && bytes > 0 {
                partial = true;
                break;
            }
            bytes += size;
            self.sent.insert(name.to_owned(), resource.version.clone());
            resources.push(Arc::clone(resource));
        }
        self.told = (!partial).then(|| snapshot.version.clone());
        if resources.is_empty() && removed.is_empty() && !self.owes_response {
            return None;
        }
        self.owes_response = false;
        self.nonces += 1;
        let nonce = self.nonces.to_string();
        let names = resources
            .iter()
            .map(|resource| resource.name.clone())
            .chain(removed.iter().cloned())
            .collect();
        self.in_flight = Some(InFlight {
            nonce: nonce.clone(),
            names,
        });
        let version = if partial {
            format!("{}{PARTIAL_VERSION}", snapshot.version)
        } else {
            snapshot.version.clone()
        };
        Some(Response {
            version,
            nonce,
            resources,
            removed: removed.into_iter().collect(),
        })
    }
}
