//! `cargo xtask generate`: what is committed and made from something else: the definitions in deploy/crds, from mesh-api, and
//! deploy/culvert.yaml and deploy/uninstall.yaml, from the chart.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::helm::Helm;
use crate::tools;
use crate::workspace::{USER_HALF, Workspace};

#[derive(Args)]
pub struct Arguments {
    /// Only say what is stale
    #[arg(long)]
    check: bool,
}

const DEFINITIONS: &str = "deploy/crds";
const MANIFESTS: &str = "deploy/culvert.yaml";
const UNINSTALL: &str = "deploy/uninstall.yaml";
const UNINSTALL_HEAD: &str = "# Rendered from deploy/chart/culvert by `cargo xtask generate`, for clusters without Helm. It leaves every node as it was:\n\
                              #   kubectl apply --server-side -f deploy/uninstall.yaml\n\
                              #   kubectl -n culvert-system rollout status daemonset/mesh-uninstall\n\
                              # Then delete the namespace, with what is left of deploy/culvert.yaml. Where the mesh is to come back, only\n\
                              #   kubectl -n culvert-system delete daemonset,serviceaccount mesh-uninstall\n";
/// By which Helm runs something before it deletes; others would apply it with the rest.
const HOOK: &str = "helm.sh/hook";
const HEAD: &str = "# Rendered from deploy/chart/culvert by `cargo xtask generate`, for clusters without Helm:\n\
                    #   kubectl apply --server-side -f deploy/crds -f deploy/culvert.yaml\n";

pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let helm = Helm::find(workspace)?.context("no Helm, and no Go to build it with: install one of them")?;
    let mut stale = definitions(workspace, arguments.check)?;
    stale.extend(manifests(workspace, &helm, arguments.check)?);
    for file in &stale {
        tools::say(&format!(
            "{file}: {}",
            if arguments.check {
                "stale: cargo xtask generate"
            } else {
                "written"
            }
        ));
    }
    Ok(if stale.is_empty() || !arguments.check {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Writes the definitions, or only says which differ.
fn definitions(workspace: &Workspace, only_check: bool) -> Result<Vec<String>> {
    let mut cargo = workspace.cargo(&["build", "--locked", "--quiet", "--example", "crds"]);
    tools::run(cargo.args(USER_HALF))?;
    let made = workspace.target.join("crds");
    let _ = fs::remove_dir_all(&made);
    fs::create_dir_all(&made)?;
    tools::run(Command::new(workspace.binaries().join("examples/crds")).arg(&made))?;
    let folder = workspace.root.join(DEFINITIONS);
    let mut stale = Vec::new();
    for name in names(&made)? {
        let text = fs::read_to_string(made.join(&name))?;
        stale.extend(put(&folder.join(&name), &text, only_check)?.then(|| format!("{DEFINITIONS}/{name}")));
    }
    let made = names(&made)?;
    if let Some(foreign) = names(&folder)?.into_iter().find(|name| !made.contains(name)) {
        bail!("{DEFINITIONS}/{foreign} is made from nothing: remove it");
    }
    Ok(stale)
}

/// Writes the rendered chart, or only says what differs.
pub fn manifests(workspace: &Workspace, helm: &Helm, only_check: bool) -> Result<Vec<String>> {
    let render = |arguments: &[&str]| helm.template(&["namespace.create=true"], arguments);
    let uninstall = ["namespace", "uninstall"].map(|name| format!("--show-only=templates/{name}.yaml"));
    let mut stale = Vec::new();
    for (file, head, rendered) in [
        (MANIFESTS, HEAD, render(&["--no-hooks"])?),
        (UNINSTALL, UNINSTALL_HEAD, render(&uninstall.each_ref().map(String::as_str))?),
    ] {
        let text = format!("{head}{}", plain(&rendered));
        if put(&workspace.root.join(file), &text, only_check)? {
            stale.push(file.to_owned());
        }
    }
    Ok(stale)
}

/// What Helm adds for itself, or is told, is not for who has none.
fn plain(rendered: &str) -> String {
    let mut text = String::new();
    let mut lines = rendered.lines().peekable();
    while let Some(line) = lines.next() {
        let only_hooks = line.trim() == "annotations:" && lines.peek().is_some_and(|next| next.trim().starts_with(HOOK));
        if only_hooks || line.trim().starts_with(HOOK) || line.starts_with("# Source: ") {
            continue;
        }
        text += &line.replace("app.kubernetes.io/managed-by: Helm", "app.kubernetes.io/managed-by: kubectl");
        text.push('\n');
    }
    text
}

fn put(path: &Path, text: &str, only_check: bool) -> Result<bool> {
    let differs = fs::read_to_string(path).ok().as_deref() != Some(text);
    if differs && !only_check {
        fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    Ok(differs)
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}
