//! Helm: found, or built once by Go from its own module, and what this project has it do.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::tools;
use crate::workspace::Workspace;

const VERSION: &str = "v3.19.2";
const MODULE: &str = "helm.sh/helm/v3/cmd/helm";
/// As the README installs it.
const NAMESPACE: &str = "culvert-system";

pub struct Helm {
    program: PathBuf,
    chart: PathBuf,
}

impl Helm {
    /// The one on the machine or in the cache; built now if there is Go. `None`: there is neither.
    pub fn find(workspace: &Workspace) -> Result<Option<Self>> {
        let chart = workspace.root.join("deploy/chart/culvert");
        let cached = tools::cache_folder(workspace).join(format!("helm-{VERSION}"));
        // Of another version it would render the same chart in another form.
        let program = if let Some(program) = tools::find_command("helm").filter(|helm| is_wanted(helm)) {
            program
        } else if cached.join("helm").is_file() {
            cached.join("helm")
        } else if let Some(go) = tools::find_command("go").or_else(go_of_its_own) {
            tools::say(&format!(
                "building helm {VERSION}: it renders deploy/culvert.yaml (minutes, once)"
            ));
            std::fs::create_dir_all(&cached)?;
            tools::run(
                Command::new(go)
                    .args(["install", "-trimpath", "-ldflags=-s -w", &format!("{MODULE}@{VERSION}")])
                    .env("GOBIN", &cached)
                    .env("CGO_ENABLED", "0"),
            )?;
            cached.join("helm")
        } else {
            return Ok(None);
        };
        Ok(Some(Self { program, chart }))
    }

    /// What is wrong with the chart by Helm's own rules, with every part of it turned on.
    pub fn lint(&self) -> Result<()> {
        let mut command = self.command(&["lint", "--strict", "--quiet", "--namespace", NAMESPACE]);
        tools::output(command.arg(&self.chart).args(ALL)).map(drop)
    }

    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The same with the chart as `helm package` packs it, into this folder.
    pub fn packed(&self, folder: &Path) -> Result<Self> {
        let _ = std::fs::remove_dir_all(folder);
        let mut command = self.command(&["package", "--destination"]);
        tools::output(command.arg(folder).arg(&self.chart))?;
        let mut files = std::fs::read_dir(folder)?;
        Ok(Self {
            program: self.program.clone(),
            chart: files.next().context("helm has packed nothing")??.path(),
        })
    }

    /// What the chart makes of these values, hooks included.
    pub fn render(&self, values: &[&str]) -> Result<String> {
        self.template(values, &[])
    }

    /// The same with more of `helm template`'s arguments.
    pub fn template(&self, values: &[&str], arguments: &[&str]) -> Result<String> {
        let mut command = self.command(&["template", "culvert"]);
        command
            .arg(&self.chart)
            .args(["--namespace", NAMESPACE, "--kube-version", "1.32.0"])
            .args(arguments);
        for value in values {
            command.args(["--set", value]);
        }
        let output = command.output().context("starting helm")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        // Nobody's repositories, plugins or cluster.
        command
            .args(arguments)
            .env("HELM_NO_PLUGINS", "1")
            .env("KUBECONFIG", "/dev/null");
        command
    }
}

/// Values that turn on what is off.
const ALL: [&str; 2] = [
    "--set",
    "namespace.create=true,podMonitor.enabled=true,prometheusRule.enabled=true,dashboards.enabled=true",
];

fn is_wanted(helm: &Path) -> bool {
    let version = Command::new(helm).args(["version", "--template", "{{.Version}}"]).output();
    version.is_ok_and(|output| output.stdout == VERSION.as_bytes())
}

fn go_of_its_own() -> Option<PathBuf> {
    Some(Path::new("/usr/local/go/bin/go").to_owned()).filter(|go| go.is_file())
}
