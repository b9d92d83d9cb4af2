use std::str::FromStr;

use prometheus::proto::MetricFamily;

/// What the names of all metrics begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsPrefix(String);

impl MetricsPrefix {
    const DEFAULT: &'static str = "mesh_";

    pub(super) fn apply(&self, families: &mut [MetricFamily]) {
        if self.0 == Self::DEFAULT {
            return;
        }
        for family in families {
            if let Some(rest) = family.name().strip_prefix(Self::DEFAULT) {
                let name = format!("{}{rest}", self.0);
                family.set_name(name);
            }
        }
    }
}

impl Default for MetricsPrefix {
    fn default() -> Self {
        Self(Self::DEFAULT.to_owned())
    }
}

impl FromStr for MetricsPrefix {
    type Err = String;

    /// Parts of names in the Prometheus text format: `[a-zA-Z_][a-zA-Z0-9_]*`. Colons are the rules' own.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ends = |first: char| first.is_ascii_alphabetic() || first == '_';
        let inside = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if text.len() <= 64 && text.starts_with(ends) && text.chars().all(inside) {
            Ok(Self(text.to_owned()))
        } else {
            Err("a prefix of metrics is up to 64 letters, digits and underscores, and does not begin with a digit".to_owned())
        }
    }
}
