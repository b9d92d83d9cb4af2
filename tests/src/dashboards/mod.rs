//! What `deploy/` offers to those who watch a mesh: dashboards and alerts, read as Grafana and Prometheus read them.

pub mod grafana;
pub mod prometheus;
pub mod promql;
pub mod rules;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// A file of the checkout.
#[must_use]
pub fn checkout(path: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    root.unwrap_or(Path::new(".")).join(path)
}

/// # Errors
/// It cannot be read.
pub fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// The files of a folder with this extension, by name.
///
/// # Errors
/// The folder cannot be read.
pub fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|own| own == extension) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// The names that a scrape may bring: those of docs/METRICS.md, with a histogram's three, and what Prometheus adds.
///
/// # Errors
/// The document cannot be read.
pub fn documented_metrics() -> Result<BTreeSet<String>> {
    let document = read(&checkout("docs/METRICS.md"))?;
    let mut names = BTreeSet::from(["up".to_owned()]);
    for row in document.lines().filter(|line| line.starts_with("| `mesh_")) {
        let name = row.split('`').nth(1).unwrap_or_default();
        if row.contains("| histogram ") {
            names.extend(["_bucket", "_sum", "_count"].map(|part| format!("{name}{part}")));
        } else {
            names.insert(name.to_owned());
        }
    }
    Ok(names)
}
