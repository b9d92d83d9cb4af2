use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;
use mesh_control::app;
use mesh_control::config::{Cli, Command};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // The API server's client logs whole answers that it cannot read: of Secrets and of tokens. Whatever RUST_LOG says, it does not.
    let without_answers = "kube_client::client=error".parse().expect("it is a directive");
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("info"))
        .add_directive(without_answers);
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let done = match cli.command {
        Some(Command::NodeToken(args)) => app::node_token(&args),
        Some(Command::RotateRoot(args)) => app::rotate_root(&args),
        Some(Command::AwaitUninstall(args)) => blocking(mesh_control::kubernetes::uninstall::wait(&args)),
        None => serve(&cli.serve),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn blocking(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

fn serve(args: &mesh_control::config::ServeArgs) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let running = app::start(args).await?;
            running.until_signal().await
        })
}
