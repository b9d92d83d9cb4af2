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

/// The linker of kernel programs: the one on the machine if it has the right version, else one built against an LLVM that is
/// there, and kept outside the checkout, so that the next clean clone finds it.
pub fn bpf_linker(workspace: &Workspace) -> Result<PathBuf> {
    if let Some(linker) = find_command("bpf-linker").filter(|linker| is_wanted(linker)) {
        return Ok(linker);
    }
    first_that_works(
        &[("the LLVM of rustup's rustc", &rust_llvm), ("Debian's LLVM", &debian_llvm)],
        |llvm| linker_for(workspace, llvm),
    )
    .context("no bpf-linker, which links the kernel programs")
}

/// What `make` makes of the first thing for which it does. A failure is said at once: what follows takes minutes.
fn first_that_works<T>(things: &[(&str, &dyn Fn() -> Result<PathBuf>)], make: impl Fn(&Path) -> Result<T>) -> Result<T> {
    let mut failures = Vec::new();
    for (name, thing) in things {
        match thing().and_then(|thing| make(&thing)) {
            Ok(made) => return Ok(made),
            Err(error) => {
                let failure = format!("with {name}: {error:#}");
                say(&failure);
                failures.push(failure);
            }
        }
    }
    bail!("{}", failures.join("; "))
}

fn is_wanted(linker: &Path) -> bool {
    let version = Command::new(linker).arg("--version").stderr(Stdio::null()).output();
    version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).starts_with(&format!("bpf-linker {BPF_LINKER_VERSION}")))
}

/// The linker that was built against that library; built now if it was not.
fn linker_for(workspace: &Workspace, llvm: &Path) -> Result<PathBuf> {
    let own = cache_folder(workspace).join(format!("bpf-linker-{BPF_LINKER_VERSION}-{}", identity_of(llvm)?));
    let built = own.join("bin").join("bpf-linker");
    if is_wanted(&built) {
        return Ok(built);
    }
    say(&format!(
        "building bpf-linker {BPF_LINKER_VERSION}: it links the kernel programs (a minute or two, once)"
    ));
    let prefix = link_llvm(llvm, &own)?;
    let scratch = own.join("build");
    let mut cargo = workspace.cargo(&[
        "install",
        "bpf-linker",
        "--quiet",
        "--locked",
        "--force",
        "--no-default-features",
    ]);
    cargo
        .args(["--features", "llvm-22", "--version", BPF_LINKER_VERSION, "--root"])
        .arg(&own)
        .env("LLVM_PREFIX", &prefix)
        .env("CARGO_TARGET_DIR", &scratch)
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "true")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
    let installed = run(&mut cargo);
    let _ = std::fs::remove_dir_all(scratch);
    installed?;
    if !is_wanted(&built) {
        bail!("{} was built and does not run", built.display());
    }
    Ok(built)
}

/// What is kept between checkouts.
pub fn cache_folder(workspace: &Workspace) -> PathBuf {
    let folder = |name| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    folder("XDG_CACHE_HOME")
        .or_else(|| folder("HOME").map(|home| home.join(".cache")))
        .map_or_else(|| workspace.target.join("ebpf").join("tools"), |cache| cache.join("culvert"))
}

/// Tells one LLVM from another: the linker runs with exactly the library that it was built against.
fn identity_of(library: &Path) -> Result<String> {
    use sha2::{Digest as _, Sha256};
    let size = std::fs::metadata(library)?.len();
    let digest = Sha256::digest(format!("{} {size}", library.display()));
    Ok(hex::encode(&digest[..8]))
}

/// The LLVM that rustup's rustc brings.
fn rust_llvm() -> Result<PathBuf> {
    let folder = rust_sysroot()?.join("lib");
    let is_llvm = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("libLLVM.so.22."))
    };
    std::fs::read_dir(&folder)?
        .flatten()
        .map(|entry| entry.path())
        .find(is_llvm)
        .with_context(|| format!("no LLVM 22 in {}: Rust 1.95 from rustup brings it", folder.display()))
}

/// The one that Debian's compiler for kernel programs brings.
fn debian_llvm() -> Result<PathBuf> {
    const PACKAGE: &str = "libllvm22";
    let library = PathBuf::from(format!("/usr/lib/{}-linux-gnu/libLLVM.so.22.1", std::env::consts::ARCH));
    if !library.exists() {
        install(&[PACKAGE], "the LLVM of the linker of kernel programs")?;
    }
    if !library.exists() {
        bail!("{PACKAGE} has no {}", library.display());
    }
    Ok(library)
}

/// A folder that looks like an installed LLVM: a library that is there already, under the names that the linker asks for
/// when it is built (`libLLVM.so`) and when it runs (its own).
fn link_llvm(library: &Path, own: &Path) -> Result<PathBuf> {
    let prefix = own.join("llvm");
    std::fs::create_dir_all(prefix.join("lib"))?;
    let own_name = library.file_name().context("a library has a name")?;
    for name in [std::ffi::OsStr::new("libLLVM.so"), own_name] {
        let link = prefix.join("lib").join(name);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(library, &link)?;
    }
    Ok(prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_stood_in_for_and_named_if_nothing_works() {
        let there = || Ok(PathBuf::from("/there"));
        let missing = || bail!("it is missing");
        let broken = |path: &Path| {
            if path.ends_with("broken") {
                bail!("it does not link");
            }
            Ok(path.to_owned())
        };
        let works = first_that_works(
            &[("one", &missing), ("two", &|| Ok("/broken".into())), ("three", &there)],
            broken,
        );
        assert_eq!(works.unwrap(), Path::new("/there"));
        let nothing = first_that_works(&[("one", &missing), ("two", &|| Ok("/broken".into()))], broken);
        let said = nothing.unwrap_err().to_string();
        assert_eq!(said, "with one: it is missing; with two: it does not link");
    }
}
