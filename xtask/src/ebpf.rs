//! Building the kernel programs on stable Rust: rustup's cargo drives a rustc that has `core` for BPF. Debian's does, as a
//! package; rustup has none for stable.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::tools;
use crate::workspace::Workspace;

/// Names a prebuilt object; mesh-agent's build embeds what it names.
pub const OBJECT_VARIABLE: &str = "EBPF_OBJECT";
/// Names a rustc that has `core` for [`TARGET`].
const RUSTC_VARIABLE: &str = "EBPF_RUSTC";
const TARGET: &str = "bpfel-unknown-none";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];
/// Between the flags of CARGO_ENCODED_RUSTFLAGS.
const FLAG_SEPARATOR: &str = "\x1f";

/// The object with the kernel programs, built if its sources changed.
pub fn object(workspace: &Workspace) -> Result<PathBuf> {
    if let Some(object) = std::env::var_os(OBJECT_VARIABLE).filter(|path| !path.is_empty()) {
        let object = std::path::absolute(object)?;
        if !object.is_file() {
            bail!("{OBJECT_VARIABLE} names {}, which does not exist", object.display());
        }
        return Ok(object);
    }
    build(workspace)
}

/// Builds it, whatever object is named.
pub fn build(workspace: &Workspace) -> Result<PathBuf> {
    let compiler = compiler()?;
    let linker = tools::bpf_linker(workspace)?;
    let folder = workspace.target.join("ebpf");
    let flags = [
        format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        // The linker makes BTF from debug information.
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", linker.display()),
    ];
    let mut cargo = workspace.cargo(&[
        "build",
        "--quiet",
        "--locked",
        "--package",
        "mesh-ebpf",
        "--release",
        "--target",
        TARGET,
    ]);
    if compiler.builds_core {
        cargo.arg("-Zbuild-std=core");
    }
    cargo
        .env("RUSTC", &compiler.rustc)
        // Cargo and rustc are of different makes; BPF is a target without a stable promise.
        .env("RUSTC_BOOTSTRAP", "1")
        // A panic is an endless loop, which no kernel loads.
        .env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "false")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join(FLAG_SEPARATOR))
        // Of its own: the outer cargo holds the lock of the usual one.
        .env("CARGO_TARGET_DIR", folder.join("build"));
    for variable in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS"] {
        cargo.env_remove(variable);
    }
    tools::run(&mut cargo).context("building the kernel programs")?;
    let built = folder.join("build").join(TARGET).join("release").join("mesh-ebpf");
    let object = folder.join("mesh-ebpf.o");
    strip(&built, &object)?;
    Ok(object)
}

/// Copies without debug information; BTF stays. An unchanged object is left alone, or mesh-agent would be built again.
fn strip(built: &Path, object: &Path) -> Result<()> {
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let objcopy = tools::rust_sysroot()?.join("lib/rustlib").join(host).join("bin/rust-objcopy");
    let fresh = object.with_extension("o.new");
    tools::run(Command::new(objcopy).arg("--strip-debug").arg(built).arg(&fresh))?;
    if std::fs::read(object).ok() == Some(std::fs::read(&fresh)?) {
        std::fs::remove_file(&fresh)?;
    } else {
        std::fs::rename(&fresh, object)?;
    }
    Ok(())
}

struct Compiler {
    rustc: PathBuf,
    /// It brings `core` as source, not built for [`TARGET`].
    builds_core: bool,
}

/// The one that is named; else one that has `core` for BPF; else rustup's nightly with rust-src; else Debian's is installed.
fn compiler() -> Result<Compiler> {
    let prebuilt = |rustc| Compiler {
        rustc,
        builds_core: false,
    };
    if let Some(path) = std::env::var_os(RUSTC_VARIABLE).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        if !has_core(&path) {
            bail!("{RUSTC_VARIABLE} names {}, which has no `core` for {TARGET}", path.display());
        }
        return Ok(prebuilt(path));
    }
    for candidate in [PathBuf::from("rustc"), PathBuf::from(DEBIAN_RUSTC)] {
        if has_core(&candidate) {
            return Ok(prebuilt(candidate));
        }
    }
    if let Some(rustc) = nightly_with_source() {
        return Ok(Compiler {
            rustc,
            builds_core: true,
        });
    }
    tools::install(&DEBIAN_PACKAGES, "a Rust compiler with a `core` library for eBPF").with_context(|| {
        format!(
            "no compiler for eBPF. One of: apt-get install {}; rustup's nightly with its rust-src; {RUSTC_VARIABLE}=<a rustc with \
             `core` for {TARGET}>; {OBJECT_VARIABLE}=<the object, built elsewhere>",
            DEBIAN_PACKAGES.join(" ")
        )
    })?;
    let installed = PathBuf::from(DEBIAN_RUSTC);
    if !has_core(&installed) {
        bail!(
            "{DEBIAN_RUSTC} has no `core` for {TARGET}, although {} are installed",
            DEBIAN_PACKAGES.join(" and ")
        );
    }
    Ok(prebuilt(installed))
}

/// rustup's nightly, if it is installed and can build `core`. Asked without letting rustup install anything.
fn nightly_with_source() -> Option<PathBuf> {
    let mut rustup = Command::new("rustup");
    rustup
        .args(["run", "nightly", "rustc", "--print", "sysroot"])
        .env("RUSTUP_AUTO_INSTALL", "0");
    let output = rustup.output().ok().filter(|output| output.status.success())?;
    let sysroot = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    let source = sysroot.join("lib/rustlib/src/rust/library/core");
    source.is_dir().then(|| sysroot.join("bin/rustc"))
}

fn has_core(rustc: &Path) -> bool {
    let output = Command::new(rustc)
        .args(["--print", "target-libdir", "--target", TARGET])
        .output();
    let Ok(output) = output else { return false };
    let folder = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    std::fs::read_dir(folder).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
    })
}
