//! What the commands need of the machine: found, or installed with a word of why.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::workspace::Workspace;

const BPF_LINKER_VERSION: &str = "0.13.0";

/// A line for the person who waits.
pub fn say(line: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "{line}");
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Runs to the end, with its output shown.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("starting {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

/// Runs to the end and answers its standard output, trimmed.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!("{command:?} ended with {}", output.status);
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

pub fn find_command(name: &str) -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> = std::env::var_os("PATH")
        .map(|path| std::env::split_paths(&path).collect())
        .unwrap_or_default();
    // Not in everybody's PATH on Debian.
    folders.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders
        .into_iter()
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

/// Installs Debian packages, saying why.
pub fn install(packages: &[&str], why: &str) -> Result<()> {
    let names = packages.join(" ");
    if find_command("apt-get").is_none() {
        bail!("missing: {names} ({why}); this machine has no apt-get, so please install them yourself");
    }
    if !is_root() {
        bail!("missing: {names} ({why}); run as root to have them installed, or: apt-get install {names}");
    }
    say(&format!("installing {names}: {why}"));
    run(Command::new("apt-get").args(["update", "-q"]).stdout(Stdio::null()))?;
    run(Command::new("apt-get")
        .args(["install", "-y", "-q", "--no-install-recommends"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdout(Stdio::null()))
}

/// Makes sure of a command, by its Debian package where it is missing.
pub fn ensure_command(name: &str, package: &str, why: &str) -> Result<()> {
    if find_command(name).is_some() {
        Ok(())
    } else {
        install(&[package], why)
    }
}

/// Where the toolchain that builds the user-space half is installed.
pub fn rust_sysroot() -> Result<PathBuf> {
    Ok(PathBuf::from(output(Command::new("rustc").args(["--print", "sysroot"]))?))
}

/// The linker of kernel programs: the one on the machine if it has the right version, else one built into the target folder
/// against rustup's own LLVM.
pub fn bpf_linker(workspace: &Workspace) -> Result<PathBuf> {
    let wanted = format!("bpf-linker {BPF_LINKER_VERSION}");
    let own = workspace.target.join("ebpf").join("tools");
    let candidates = [find_command("bpf-linker"), Some(own.join("bin").join("bpf-linker"))];
    for candidate in candidates.into_iter().flatten() {
        let version = Command::new(&candidate).arg("--version").stderr(Stdio::null()).output();
        if version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).starts_with(&wanted)) {
            return Ok(candidate);
        }
    }
    say(&format!(
        "building bpf-linker {BPF_LINKER_VERSION}: it links the kernel programs (a minute or two, once)"
    ));
    let llvm = link_llvm(&own)?;
    let mut cargo = workspace.cargo(&["install", "bpf-linker", "--quiet", "--locked", "--no-default-features"]);
    cargo
        .args(["--features", "llvm-22", "--version", BPF_LINKER_VERSION, "--root"])
        .arg(&own)
        .env("LLVM_PREFIX", &llvm)
        .env("CARGO_TARGET_DIR", own.join("build"))
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "true")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
    run(&mut cargo)?;
    Ok(own.join("bin").join("bpf-linker"))
}

/// A folder that looks like an installed LLVM: the library that rustc itself brings, under the names that the linker asks for
/// when it is built (`libLLVM.so`) and when it runs (its own).
fn link_llvm(own: &Path) -> Result<PathBuf> {
    let library_folder = rust_sysroot()?.join("lib");
    let library = std::fs::read_dir(&library_folder)?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with("libLLVM.so.22."))
        .with_context(|| format!("no LLVM 22 in {}: Rust 1.95 from rustup brings it", library_folder.display()))?;
    let prefix = own.join("llvm");
    std::fs::create_dir_all(prefix.join("lib"))?;
    for name in [std::ffi::OsString::from("libLLVM.so"), library.file_name()] {
        let link = prefix.join("lib").join(name);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(library.path(), &link)?;
    }
    Ok(prefix)
}
