//! The name of one run: every namespace, cgroup and folder that it makes starts with it.

use std::fmt;
use std::path::{Path, PathBuf};

/// "cv<pid>x<4 hex digits>": the pid lets a later run see whether its maker still lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunId(String);

impl RunId {
    #[must_use]
    pub fn new() -> Self {
        Self(format!("cv{}x{:04x}", std::process::id(), rand::random::<u16>()))
    }

    /// The maker's process id, if `name` belongs to a run.
    #[must_use]
    pub fn maker_of(name: &str) -> Option<u32> {
        let (pid, rest) = name.strip_prefix("cv")?.split_once('x')?;
        let random = rest.split('-').next()?;
        let is_random = random.len() == 4 && random.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_random.then(|| pid.parse().ok()).flatten()
    }

    /// Whether `name` was left behind by a run whose process is gone.
    #[must_use]
    pub fn is_left_behind(name: &str) -> bool {
        Self::maker_of(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    }

    #[must_use]
    pub fn name(&self, part: &str) -> String {
        format!("{}-{part}", self.0)
    }

    /// The run's folder. Traversable by anyone: unprivileged applications run their binary from it.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        Self::base().join(&self.0)
    }

    /// Where the folders of all runs are.
    #[must_use]
    pub fn base() -> PathBuf {
        std::env::temp_dir().join("culvert-runs")
    }
}

impl Default for RunId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_recognises_its_own_names_and_no_others() {
        let id = RunId::new();
        assert_eq!(RunId::maker_of(&id.name("node-1")), Some(std::process::id()));
        assert!(!RunId::is_left_behind(&id.name("node-1")));
        for other in ["cv", "cvx", "cv12", "cvfoo-x", "eth0", "cv12x-n", "cv1x12345"] {
            assert_eq!(RunId::maker_of(other), None, "{other}");
        }
    }
}
