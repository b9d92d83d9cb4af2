//! All that enrolling a Pod could leave behind in its network namespace, as text to be compared.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::netns::{self, Netns};

const COMMANDS: [&[&str]; 7] = [
    &["ip", "-d", "addr"],
    &["ip", "-d", "rule"],
    &["ip", "-d", "-6", "rule"],
    &["ip", "-d", "route", "show", "table", "all"],
    &["ip", "-d", "-6", "route", "show", "table", "all"],
    &["ss", "-H", "-lntp"],
    &["ss", "-H", "-lnup"],
];

/// # Errors
/// A command is missing or fails.
pub fn of(netns: &Netns) -> Result<String> {
    at(&netns.path())
}

/// The same of a namespace by its path.
///
/// # Errors
/// As [`of`].
pub fn at(path: &Path) -> Result<String> {
    let mut text = String::new();
    netns::within(path, || {
        for command in COMMANDS {
            let output = Command::new(command[0])
                .args(&command[1..])
                .output()
                .with_context(|| format!("starting {command:?}"))?;
            ensure!(
                output.status.success(),
                "{command:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            // `ss` lists in the order of a hash table.
            let output = String::from_utf8_lossy(&output.stdout);
            let mut lines: Vec<&str> = output.lines().collect();
            if command[0] == "ss" {
                lines.sort_unstable();
            }
            writeln!(text, "$ {}\n{}", command.join(" "), lines.join("\n"))?;
        }
        for folder in ["ipv4", "ipv6"] {
            sysctls(&format!("/proc/sys/net/{folder}"), &mut text)?;
        }
        Ok(())
    })?;
    Ok(text)
}

/// Every key that can be read, but for those that change by themselves.
fn sysctls(folder: &str, text: &mut String) -> Result<()> {
    let mut entries: Vec<_> = std::fs::read_dir(folder)?.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    for path in entries {
        let name = path.display().to_string();
        if path.is_dir() {
            sysctls(&name, text)?;
        } else if let Ok(value) = std::fs::read_to_string(&path)
            && !name.ends_with("mtu_expires")
        {
            writeln!(text, "{name} = {}", value.trim())?;
        }
    }
    Ok(())
}

/// Files and folders below a folder.
///
/// # Errors
/// It cannot be read.
pub fn count_below(folder: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        count += 1;
        if entry.file_type()?.is_dir() {
            count += count_below(&entry.path())?;
        }
    }
    Ok(count)
}
