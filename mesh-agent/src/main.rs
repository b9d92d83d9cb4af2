use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use mesh_agent::capture::{Capture, probe};
use mesh_agent::config::{CleanupArgs, Cli, Command};
use mesh_agent::{app, cni_install, local, memory};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        // Runs inside a Pod, many times a minute: without a runtime.
        Command::ProbeConnect(args) => return probe::run_child(args.arguments),
        Command::Run(args) => app::run(*args),
        Command::Enroll(args) => blocking(async {
            let (uid, cookie) = (args.uid.clone(), local::enroll(args).await?);
            say(&format!("{uid} is in the mesh (netns cookie {cookie})"))
        }),
        Command::Release(args) => blocking(async {
            let was_enrolled = local::release(&args.local.run_dir, args.uid.clone()).await?;
            say(&format!(
                "{} {}",
                args.uid,
                if was_enrolled { "is released" } else { "was not enrolled" }
            ))
        }),
        Command::List(args) => blocking(async {
            for pod in local::list(&args.run_dir).await? {
                say(&serde_json::json!({
                    "uid": pod.uid, "namespace": pod.namespace, "name": pod.name,
                    "netns_cookie": pod.netns_cookie, "proven": pod.proven, "reason": pod.reason,
                })
                .to_string())?;
            }
            Ok(())
        }),
        Command::InstallCni(args) => cni_install::install(&args.places, &args.run_dir, args.cni_binary.as_deref())
            .and_then(|entry| say(&cni_install::told(&entry))),
        Command::UninstallCni(places) => cni_install::uninstall(&places).and_then(|changed| {
            say(&format!(
                "the plugin is taken out of {} network configurations",
                changed.len()
            ))
        }),
        Command::Cleanup(args) => blocking(cleanup(args)),
        Command::Uninstall(args) => blocking(app::uninstall::run(args, say)),
        Command::Ready(args) => blocking(async { say(&app::own_readiness::ask(&args.ready_socket, args.alive).await?) }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to tell it to if standard error is closed.
            let _ = writeln!(io::stderr(), "mesh-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn cleanup(args: CleanupArgs) -> anyhow::Result<()> {
    // Undone under its hands, a running agent would say that it protects Pods that it does not.
    let _lock = local::lock(&args.run_dir).context("end the agent first")?;
    memory::remove(&args.run_dir)?;
    let summary = Capture::cleanup(&args.run_dir, &args.pin_path).await?;
    say(&format!(
        "{} links detached, {} maps removed, {} Pods released",
        summary.kernel.links_detached,
        summary.kernel.maps_removed,
        summary.released.len()
    ))?;
    if summary.failed.is_empty() {
        return Ok(());
    }
    let failed: Vec<String> = summary.failed.iter().map(|(uid, error)| format!("{uid}: {error}")).collect();
    anyhow::bail!("not everything could be undone: {}", failed.join("; "))
}

fn blocking(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

fn say(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(io::stdout().lock(), "{line}")?)
}
