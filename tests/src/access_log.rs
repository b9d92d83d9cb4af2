//! The agent's access log, read as a person would: one JSON object a line.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use crate::poll;

/// A line is written within milliseconds of its connection's end, on a machine that is busy within some more.
const QUIET: Duration = Duration::from_millis(500);

#[derive(Clone, Debug)]
pub struct AccessLog {
    path: PathBuf,
}

/// A place in the log, in bytes, at the start of a line: what comes after it is new.
#[derive(Clone, Copy, Debug)]
pub struct Position(u64);

/// Lines must have these fields with these values (compared as text).
pub type Fields<'a> = &'a [(&'a str, &'a str)];

impl AccessLog {
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// After the last whole line.
    #[must_use]
    pub fn position(&self) -> Position {
        let bytes = std::fs::read(&self.path).unwrap_or_default();
        let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        Position(end as u64)
    }

    /// As [`AccessLog::position`], once nothing more comes of what was before.
    ///
    /// # Errors
    /// Lines never cease.
    pub fn quiet_position(&self) -> Result<Position> {
        poll::until("the access log is quiet", poll::SOON, || {
            let before = self.position();
            std::thread::sleep(QUIET);
            let after = self.position();
            Ok((before.0 == after.0).then_some(after))
        })
    }

    /// Parses only what is new: a log of a thousand connections is long, and is asked often.
    fn lines_after(&self, position: Position) -> Vec<Value> {
        let mut text = String::new();
        let read = File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(position.0))?;
            file.read_to_string(&mut text)
        });
        if read.is_err() {
            // Not there yet, or cut in the middle of a character: asked again.
            return Vec::new();
        }
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// All lines after `position` with these fields.
    #[must_use]
    pub fn since(&self, position: Position, fields: Fields<'_>) -> Vec<Value> {
        let lines = self.lines_after(position).into_iter();
        lines.filter(|line| matches(line, fields)).collect()
    }

    /// Waits for a line after `position` with all these fields.
    ///
    /// # Errors
    /// None came: shows the lines that did.
    pub fn wait_for(&self, position: Position, fields: Fields<'_>, deadline: Duration) -> Result<Value> {
        poll::until("an access-log line", deadline, || {
            Ok(self.lines_after(position).into_iter().find(|line| matches(line, fields)))
        })
        .map_err(|error| {
            let seen: Vec<String> = self.lines_after(position).iter().map(Value::to_string).collect();
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
