//! What can be wrong with a Pod's protection, and what people are told of it.
//!
//! A node's agent names it by a word; the texts are from here. So whoever has taken over a node cannot make the control plane say to a
//! Pod's owner what he likes.

use mesh_proto::PIECES;

use crate::limits::MAX_PIECES_NAMED;

/// Why a Pod is not proven, as its agent names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Problem {
    NoProcess,
    HostNetwork,
    NoAddress,
    Ambiguous,
    AnotherNamespace,
    OutboundNotCaptured,
    InboundNotCaptured,
    NoCertificate,
    ListenerClosed,
    /// The agent has let it go: its sandbox ended, or it was told to.
    Released,
    /// Of a newer agent, or nothing that people need to tell apart: its log has it.
    Other,
}

impl Problem {
    pub const ALL: [Self; 11] = [
        Self::NoProcess,
        Self::HostNetwork,
        Self::NoAddress,
        Self::Ambiguous,
        Self::AnotherNamespace,
        Self::OutboundNotCaptured,
        Self::InboundNotCaptured,
        Self::NoCertificate,
        Self::ListenerClosed,
        Self::Released,
        Self::Other,
    ];

    /// Of the wire.
    #[must_use]
    pub fn of(word: &str) -> Self {
        let known = Self::ALL.into_iter().find(|problem| problem.word() == word);
        known.unwrap_or(Self::Other)
    }

    fn word(self) -> &'static str {
        match self {
            Self::NoProcess => "no_process",
            Self::HostNetwork => "host_network",
            Self::NoAddress => "no_address",
            Self::Ambiguous => "ambiguous",
            Self::AnotherNamespace => "another_namespace",
            Self::OutboundNotCaptured => "outbound_not_captured",
            Self::InboundNotCaptured => "inbound_not_captured",
            Self::NoCertificate => "no_certificate",
            Self::ListenerClosed => "listener_closed",
            Self::Released => "released",
            Self::Other => "other",
        }
    }

    /// What is wrong, and what to do about it.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::NoProcess => {
                "no process of it is found on its node; if its containers run, the agent does not see them: \
                 look whether mesh-agent has hostPID"
            }
            Self::HostNetwork => {
                "its processes are in the node's own network namespace; delete the Pod, so that its sandbox is made anew"
            }
            Self::NoAddress => {
                "none of its processes is in a network namespace with the Pod's address; delete the Pod, so that its sandbox is \
                 made anew"
            }
            Self::Ambiguous => {
                "its processes are in several network namespaces that have its address; end those that the Pod made itself, or \
                 delete the Pod"
            }
            Self::AnotherNamespace => {
                "its processes are in two sandboxes; it stays captured in the first until that has ended, or delete the Pod"
            }
            Self::OutboundNotCaptured => {
                "what it sends does not arrive at the agent; look what else changes connections on its node, or delete the Pod, so \
                 that it is enrolled anew"
            }
            Self::InboundNotCaptured => {
                "what is sent to it does not arrive at the agent; look what else filters or changes connections on its node, or \
                 delete the Pod, so that it is enrolled anew"
            }
            Self::NoCertificate => {
                "it has no certificate; look whether mesh-control is ready and whether the Pod's ServiceAccount still exists"
            }
            Self::ListenerClosed => {
                "listeners of the agent in it were closed, and are opened again; find out which privileged process closed them"
            }
            Self::Released => "the agent has let it go",
            Self::Other => "the log of mesh-agent on its node says why, and what to do",
        }
    }
}

/// Pieces that were put back: those with a name that is known, and how many others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    named: Vec<&'static str>,
    others: usize,
}

impl Repaired {
    /// Of the wire; of a long list only the first are looked at.
    #[must_use]
    pub fn of(words: &[String]) -> Self {
        let mut repaired = Self::default();
        for word in words.iter().take(MAX_PIECES_NAMED) {
            match PIECES.iter().find(|piece| *piece == word) {
                Some(piece) if repaired.named.contains(piece) => {}
                Some(piece) => repaired.named.push(piece),
                None => repaired.others += 1,
            }
        }
        repaired.others += words.len().saturating_sub(MAX_PIECES_NAMED);
        repaired.named.sort_unstable();
        repaired
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.named.is_empty() && self.others == 0
    }

    /// `whose`: "its", say.
    #[must_use]
    pub fn text(&self, whose: &str) -> String {
        let mut text = format!(
            "pieces of {whose} capture were missing and are put back: {}",
            self.named.join(", ")
        );
        if self.others > 0 {
            let and = if self.named.is_empty() { "" } else { " and " };
            text.push_str(&format!("{and}{} more", self.others));
        }
        text.push_str("; find out which privileged process on the node took them away");
        text
    }
}

#[cfg(test)]
mod tests {
    use mesh_proto::PROBLEMS;

    use super::*;
    use crate::limits::MAX_EVENT_NOTE_BYTES;

    #[test]
    fn words_of_the_wire_are_one_of_a_closed_set() {
        for problem in Problem::ALL {
            assert_eq!(Problem::of(problem.word()), problem);
        }
        for word in PROBLEMS {
            assert_ne!(
                Problem::of(word),
                Problem::Other,
                "agents say {word}, and nobody is told what it is"
            );
        }
        assert_eq!(Problem::of("call +1 555 0100 to have it mended"), Problem::Other);
    }

    #[test]
    fn nothing_that_a_node_writes_is_in_a_text() {
        let words = ["sk_lookup", "visit evil.test", "connect4", "sk_lookup"].map(str::to_owned);
        let text = Repaired::of(&words).text("its");
        assert!(text.contains("put back: connect4, sk_lookup and 1 more;"), "{text}");
        let only = Repaired::of(&["visit evil.test".to_owned()]).text("its");
        assert!(only.contains("put back: 1 more;"), "{only}");
        assert!(Repaired::of(&[]).is_empty());
    }

    #[test]
    fn texts_fit_into_an_event_whatever_is_named() {
        let many: Vec<String> = PIECES.iter().map(ToString::to_string).collect();
        let many = Repaired::of(&[many.clone(), many.clone(), many].concat());
        assert!(many.named.len() > 1 && many.others > 0, "{many:?}");
        assert!(many.text("the node's").len() < MAX_EVENT_NOTE_BYTES);
        for problem in Problem::ALL {
            assert!(problem.text().len() < MAX_EVENT_NOTE_BYTES / 2, "{problem:?}");
        }
    }
}
