//! `cargo xtask fresh`: the README's two commands on a machine that has nothing: a minimal Debian 12 made for the purpose,
//! with only rustup's active stable toolchain brought in. This machine's apt sources and options are used, as any mirror will do.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::tools;
use crate::workspace::Workspace;

/// Root's home inside the fresh machine.
const GUEST_HOME: &str = "/root";

/// What rustup puts into `.cargo/bin`.
const RUSTUPS_TOOLS: [&str; 14] = [
    "cargo",
    "cargo-clippy",
    "cargo-fmt",
    "cargo-miri",
    "clippy-driver",
    "rls",
    "rust-analyzer",
    "rust-gdb",
    "rust-gdbgui",
    "rust-lldb",
    "rustc",
    "rustdoc",
    "rustfmt",
    "rustup",
];

#[derive(Args)]
pub struct Arguments {
    /// What to run there, in turn
    #[arg(long = "run", default_values_t = ["cargo xtask demo --check".to_owned(), "cargo xtask test".to_owned()])]
    commands: Vec<String>,
    /// Leaves the root folder for inspection
    #[arg(long)]
    keep: bool,
}

const RELEASE: &str = "bookworm";
/// Everything beside the minimal system that a person who has rustup's toolchain surely has.
const PACKAGES: &str = "ca-certificates";

pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    if !tools::is_root() {
        bail!("root is missing: the fresh machine runs network namespaces and eBPF");
    }
    tools::ensure_command("mmdebstrap", "mmdebstrap", "makes the fresh machine")?;
    let machine = Machine::create(arguments.keep)?;
    machine.check_out(workspace)?;
    for command in &arguments.commands {
        tools::say(&format!("== on the fresh machine: {command}"));
        let status = machine.command(command)?.status()?;
        if !status.success() {
            tools::say(&format!("on the fresh machine, `{command}` ended with {status}"));
            return Ok(ExitCode::FAILURE);
        }
    }
    tools::say("everything passed on the fresh machine");
    Ok(ExitCode::SUCCESS)
}

struct Machine {
    root: PathBuf,
    keep: bool,
}

impl Machine {
    fn create(keep: bool) -> Result<Self> {
        let root = std::env::temp_dir().join(format!("culvert-fresh-{}", std::process::id()));
        tools::say(&format!("making a minimal Debian 12 in {}", root.display()));
        let machine = Self { root, keep };
        let mut command = Command::new("mmdebstrap");
        command.args([
            "--quiet",
            "--variant=minbase",
            "--mode=root",
            &format!("--include={PACKAGES}"),
        ]);
        for option in apt_options()? {
            command.arg(format!("--aptopt={option}"));
        }
        command.arg(RELEASE).arg(&machine.root);
        command.args(apt_sources()?);
        tools::run(&mut command)?;
        // Names are resolved and servers trusted as on this machine.
        for file in ["etc/resolv.conf", "etc/hosts", "etc/ssl/certs/ca-certificates.crt"] {
            let from = Path::new("/").join(file);
            if from.exists() {
                let to = machine.root.join(file);
                let _ = std::fs::remove_file(&to);
                std::fs::copy(&from, &to).with_context(|| format!("copying {}", from.display()))?;
            }
        }
        Ok(machine)
    }

    /// The committed state, and nothing that only this checkout has.
    fn check_out(&self, workspace: &Workspace) -> Result<()> {
        let target = self.root.join("culvert");
        std::fs::create_dir(&target)?;
        let mut archive = Command::new("git");
        archive
            .args(["archive", "--format=tar", "HEAD"])
            .current_dir(&workspace.root)
            .stdout(std::process::Stdio::piped());
        let mut child = archive.spawn().context("git archive")?;
        let tar = child.stdout.take().context("the archive")?;
        tools::run(Command::new("tar").args(["-x", "-C"]).arg(&target).stdin(tar))?;
        if !child.wait()?.success() {
            bail!("git archive failed");
        }
        Ok(())
    }

    /// A shell command inside, in a mount namespace of its own: what is mounted ends with it.
    fn command(&self, line: &str) -> Result<Command> {
        let home = PathBuf::from(std::env::var_os("HOME").context("HOME")?);
        let root = self.root.display();
        // The root of a machine is a mount, which `ip` counts on.
        let mut script = format!("set -eu\nmount --bind {root} {root}\n");
        for (kind, path) in [("proc", "proc"), ("sysfs", "sys"), ("tmpfs", "run"), ("tmpfs", "tmp")] {
            script += &format!("mount -t {kind} {kind} {root}/{path}\n");
        }
        script += &format!("mount --rbind /dev {root}/dev\nmkdir -p {root}/sys/fs/cgroup\n");
        script += &format!("mount -t cgroup2 cgroup2 {root}/sys/fs/cgroup\nmount -t bpf bpf {root}/sys/fs/bpf\n");
        // The stable toolchain alone: with another that builds `core`, the way that everybody else's machine goes is not gone.
        let toolchain = stable_toolchain()?;
        let name = toolchain.file_name().context("a toolchain has a name")?.display();
        let (rustup, cargo) = (
            format!("{root}{GUEST_HOME}/.rustup"),
            format!("{root}{GUEST_HOME}/.cargo/bin"),
        );
        script += &format!("mkdir -p {rustup}/toolchains/{name} {cargo}\n");
        script += &format!("mount --bind {} {rustup}/toolchains/{name}\n", toolchain.display());
        script += &format!("mount --bind {} {cargo}\n", home.join(".cargo/bin").display());
        script += &format!("printf 'version = \"12\"\\ndefault_toolchain = \"{name}\"\\n' > {rustup}/settings.toml\n");
        for file in [".cargo/config.toml", ".cargo/env"] {
            if home.join(file).is_file() {
                script += &format!(
                    "mkdir -p {root}{GUEST_HOME}/.cargo\ncp {} {root}{GUEST_HOME}/{file}\n",
                    home.join(file).display()
                );
            }
        }
        // What else lies beside rustup's tools (bpf-linker, cargo-deny) is the project's business to bring.
        for entry in std::fs::read_dir(home.join(".cargo/bin"))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !RUSTUPS_TOOLS.contains(&name.as_str()) {
                script += &format!("mount --bind /dev/null {root}{GUEST_HOME}/.cargo/bin/{name}\n");
            }
        }
        script += &format!("exec chroot {root} /bin/sh -c 'cd /culvert && exec \"$@\"' sh {line}\n");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .env_clear();
        // Proxies and cargo's registry settings travel; nothing else of this shell does.
        for (name, value) in std::env::vars() {
            let lower = name.to_lowercase();
            if lower.ends_with("_proxy")
                || (name.starts_with("CARGO_") && name.contains("REGISTR"))
                || name.starts_with("CARGO_HTTP")
                || name.starts_with("CARGO_NET")
            {
                command.env(name, value);
            }
        }
        command
            .env("HOME", GUEST_HOME)
            .env(
                "PATH",
                format!("{GUEST_HOME}/.cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            )
            .env("LANG", "C.UTF-8")
            .env("RUSTUP_AUTO_INSTALL", "0")
            .process_group(0);
        Ok(command)
    }
}

/// Where the toolchain is that builds this checkout.
fn stable_toolchain() -> Result<PathBuf> {
    let version = tools::output(Command::new("rustc").arg("--version"))?;
    if version.contains("-nightly") || version.contains("-beta") {
        bail!("the active toolchain is {version}; README asks for stable, so only that is brought in");
    }
    tools::rust_sysroot()
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.keep {
            tools::say(&format!("the fresh machine's files stay in {}", self.root.display()));
        } else {
            let _ = Command::new("rm")
                .args(["-rf", "--one-file-system", "--"])
                .arg(&self.root)
                .status();
        }
    }
}

/// The settings of this machine's apt that decide whether a mirror can be reached.
fn apt_options() -> Result<Vec<String>> {
    let dump = tools::output(Command::new("apt-config").arg("dump"))?;
    Ok(dump
        .lines()
        .filter(|line| line.starts_with("Acquire::") && !line.ends_with("\"\";"))
        .filter(|line| {
            ["http", "https", "Retries", "ForceIPv4", "Check", "AllowInsecure"]
                .iter()
                .any(|word| line.contains(word))
        })
        .map(|line| line.trim_end_matches(';').to_owned())
        .collect())
}

/// This machine's own sources of Debian packages.
fn apt_sources() -> Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    let list = PathBuf::from("/etc/apt/sources.list");
    if std::fs::read_to_string(&list).is_ok_and(|text| text.lines().any(|line| line.starts_with("deb "))) {
        sources.push(list);
    }
    if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
        sources.extend(entries.flatten().map(|entry| entry.path()).filter(|path| {
            let debian = std::fs::read_to_string(path).is_ok_and(|text| text.contains(RELEASE));
            debian && path.extension().is_some_and(|kind| kind == "sources" || kind == "list")
        }));
    }
    if sources.is_empty() {
        bail!("this machine has no apt sources of Debian {RELEASE}");
    }
    Ok(sources)
}
