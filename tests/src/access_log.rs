//! The agent's access log, read as a person would: one JSON object a line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use crate::poll;

#[derive(Clone, Debug)]
pub struct AccessLog {
    path: PathBuf,
}

/// A place in the log: what comes after it is new.
#[derive(Clone, Copy, Debug)]
pub struct Position(usize);

/// Lines must have these fields with these values (compared as text).
pub type Fields<'a> = &'a [(&'a str, &'a str)];

impl AccessLog {
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    #[must_use]
    pub fn lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    #[must_use]
    pub fn position(&self) -> Position {
        Position(self.lines().len())
    }

    /// All lines after `position` with these fields.
    #[must_use]
    pub fn since(&self, position: Position, fields: Fields<'_>) -> Vec<Value> {
        let lines = self.lines().into_iter().skip(position.0);
        lines.filter(|line| matches(line, fields)).collect()
    }

    /// Waits for a line after `position` with all these fields.
    ///
    /// # Errors
    /// None came: shows the lines that did.
    pub fn wait_for(&self, position: Position, fields: Fields<'_>, deadline: Duration) -> Result<Value> {
        poll::until("an access-log line", deadline, || {
            Ok(self.lines().into_iter().skip(position.0).find(|line| matches(line, fields)))
        })
        .map_err(|error| {
            let seen: Vec<String> = self.lines().iter().skip(position.0).map(Value::to_string).collect();
            error.context(format!(
                "no access-log line with {fields:?}; these came:\n{}",
                seen.join("\n")
            ))
        })
    }
}

/// A field as text; absent or null is empty.
#[must_use]
pub fn text(line: &Value, field: &str) -> String {
    match line.get(field) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

fn matches(line: &Value, fields: Fields<'_>) -> bool {
    fields.iter().all(|(field, wanted)| text(line, field) == *wanted)
}
