//! Strings with at most one `*`.

/// How a string of a connection is compared.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StringMatch {
    Exact(String),
    /// `text*`
    Prefix(String),
    /// `*text`
    Suffix(String),
    /// `*`: there is a value.
    Present,
}

impl StringMatch {
    /// `None` when the `*` is neither the first nor the last character, or there are several.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match (text.matches('*').count(), text.strip_prefix('*'), text.strip_suffix('*')) {
            (0, _, _) => Some(Self::Exact(text.to_owned())),
            (1, Some(""), _) => Some(Self::Present),
            (1, Some(suffix), _) => Some(Self::Suffix(suffix.to_owned())),
            (1, _, Some(prefix)) => Some(Self::Prefix(prefix.to_owned())),
            _ => None,
        }
    }
}
