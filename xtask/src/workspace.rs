//! Where things are, and cargo on them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{ebpf, tools};

/// All that runs in user space. Always together: cargo resolves the features of dependencies for what is selected, and
/// another selection builds many of them again.
pub const USER_HALF: [&str; 3] = ["--workspace", "--exclude", "mesh-ebpf"];

/// The CNI plugin's package and binary.
pub const PLUGIN: &str = "mesh-cni";

pub struct Workspace {
    pub root: PathBuf,
    pub target: PathBuf,
    profile: &'static str,
}

impl Workspace {
    pub fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask lies in the workspace")?
            .to_owned();
        // Cargo takes a relative path from where it was started.
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(path) => std::path::absolute(path)?,
            None => root.join("target"),
        };
        Ok(Self {
            root,
            target,
            profile: "dev",
        })
    }

    /// A copy of the checkout, with a target folder of its own.
    pub fn at(root: PathBuf, target: PathBuf) -> Self {
        Self {
            root,
            target,
            profile: "dev",
        }
    }

    /// The same one, optimized: what is measured must be what runs in production.
    pub fn for_release(&self) -> Self {
        Self {
            root: self.root.clone(),
            target: self.target.clone(),
            profile: "release",
        }
    }

    /// Cargo in the workspace.
    pub fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .args(arguments)
            .current_dir(&self.root)
            .env("CARGO_TARGET_DIR", &self.target);
        command
    }

    /// The names of all integration tests.
    pub fn suites(&self) -> Result<Vec<String>> {
        let metadata = tools::output(&mut self.cargo(&["metadata", "--no-deps", "--format-version", "1", "--locked"]))?;
        let metadata: serde_json::Value = serde_json::from_str(&metadata).context("reading cargo's metadata")?;
        Ok(suites_in(&metadata))
    }

    /// Builds the kernel programs and then all binaries with them; answers the folder of the binaries.
    pub fn build(&self) -> Result<PathBuf> {
        let object = ebpf::object(self)?;
        let mut cargo = self.cargo(&["build", "--locked", "--bins", "--profile", self.profile]);
        tools::run(cargo.args(USER_HALF).env(ebpf::OBJECT_VARIABLE, object))?;
        self.build_plugin()?;
        Ok(self.binaries())
    }

    /// The CNI plugin once more, and linked statically: it is copied out of its image to the node, which may have another C library or
    /// none. It resolves no names, for which a static one would look for shared objects all the same.
    pub fn build_plugin(&self) -> Result<()> {
        let own = Self {
            target: self.target.join("static"),
            root: self.root.clone(),
            profile: self.profile,
        };
        let mut cargo = own.cargo(&["rustc", "--locked", "--quiet", "--package", PLUGIN, "--bin", PLUGIN]);
        tools::run(cargo.args(["--profile", self.profile, "--", "-C", "target-feature=+crt-static"])).context(
            "linking the CNI plugin statically: that needs the C library as an archive, libc.a (in Debian's libc6-dev; elsewhere \
             glibc-static)",
        )?;
        // What is there is a link to what cargo keeps, and may be running.
        let (made, place) = (own.binaries().join(PLUGIN), self.binaries().join(PLUGIN));
        let beside = place.with_extension(std::process::id().to_string());
        std::fs::copy(&made, &beside).with_context(|| format!("copying {}", made.display()))?;
        std::fs::rename(&beside, &place).with_context(|| place.display().to_string())
    }

    pub fn binaries(&self) -> PathBuf {
        self.target.join(if self.profile == "dev" { "debug" } else { self.profile })
    }
}

fn suites_in(metadata: &serde_json::Value) -> Vec<String> {
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let targets = list(&metadata["packages"])
        .into_iter()
        .flat_map(|package| list(&package["targets"]));
    let suites = targets.filter(|target| list(&target["kind"]).iter().any(|kind| kind == "test"));
    suites
        .filter_map(|target| target["name"].as_str().map(str::to_owned))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_told_from_other_targets() {
        let suites = Workspace::find().unwrap().suites().unwrap();
        for suite in ["hooks", "topology", "kube_api_server"] {
            assert!(suites.iter().any(|name| name == suite), "{suite} is not in {suites:?}");
        }
        for other in ["mesh_tests", "mesh-test-app", "xtask"] {
            assert!(!suites.iter().any(|name| name == other), "{other} is in {suites:?}");
        }
    }
}
