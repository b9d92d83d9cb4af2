//! A cluster that is there already, of any maker: what `cargo xtask test kube --cluster kind` hands to a suite.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::Kubectl;
use super::culvert::shipped;
use crate::process::Place;
use crate::run_folder::RunFolder;
use crate::run_id::RunId;

/// Names the kubeconfig of its administrator.
pub const KUBECONFIG_VARIABLE: &str = "CULVERT_TEST_KUBECONFIG";

#[derive(Debug)]
pub struct Given {
    kubectl: Kubectl,
    folder: RunFolder,
}

impl Given {
    /// `None`: none is named.
    ///
    /// # Errors
    /// The one that is named cannot be used, and why.
    pub fn find() -> Result<Option<Self>> {
        let Some(kubeconfig) = std::env::var_os(KUBECONFIG_VARIABLE).map(PathBuf::from) else {
            return Ok(None);
        };
        ensure!(
            kubeconfig.is_file(),
            "{KUBECONFIG_VARIABLE}: {} is no file",
            kubeconfig.display()
        );
        let folders = std::env::var_os("PATH").unwrap_or_default();
        let binary = std::env::split_paths(&folders)
            .map(|folder| folder.join("kubectl"))
            .find(|path| path.is_file())
            .context("no kubectl in PATH")?;
        let folder = RunFolder::create(RunId::new().folder())?;
        // The README's commands name what is below `deploy`, and write beside it.
        symlink(shipped()?, folder.path().join("deploy"))?;
        let kubectl = Kubectl {
            binary,
            kubeconfig,
            place: Place::here(),
            folder: folder.path().to_owned(),
        };
        Ok(Some(Self { kubectl, folder }))
    }

    #[must_use]
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// Where the README's commands are run.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}
