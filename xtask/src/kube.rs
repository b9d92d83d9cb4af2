//! The tools of the suites on a real Kubernetes: its parts, built from Go modules into one binary (`tests/kube`), and what a
//! node needs beside them, from Debian's packages. Kept outside the checkout, so that the next clean clone finds them; the
//! packages are unpacked and not installed, for installing containerd would start it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::tools;
use crate::workspace::Workspace;

/// Where the suites look for the tools.
pub const DIR_VARIABLE: &str = "CULVERT_KUBE_DIR";

/// What `tests/kube/components/go.mod` asks for.
const KUBERNETES: &str = "1.34.4";
const GO_AT_LEAST: (u32, u32) = (1, 24);
/// The Go modules below `tests/kube`, and the binaries that they become.
const MODULES: [(&str, &str); 2] = [("components", "kube-components"), ("dns", "coredns")];
/// What a module is built from; `go.sum` names the content of all that it depends on.
const MODULE_FILES: [&str; 3] = ["go.mod", "go.sum", "main.go"];
/// The parts of the first; each is a link to it.
const COMPONENTS: [&str; 7] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
];
const PACKAGES: [&str; 4] = ["busybox-static", "containerd", "containernetworking-plugins", "runc"];

pub enum Tools {
    /// In this folder.
    Here(PathBuf),
    /// This machine cannot build them, and why.
    Impossible(String),
}

/// Finds the tools; builds them if they are not there, which takes minutes.
pub fn tools(workspace: &Workspace) -> Result<Tools> {
    let go = match go_version(workspace) {
        Ok(version) => version,
        Err(lacks) => return Ok(Tools::Impossible(lacks)),
    };
    if tools::find_command("apt-get").is_none() {
        let packages = PACKAGES.join(", ");
        return Ok(Tools::Impossible(format!(
            "the nodes run Debian's {packages}, and this machine has no apt-get to fetch them"
        )));
    }
    let cache = tools::cache_folder(workspace);
    std::fs::create_dir_all(&cache)?;
    // Another checkout may be at the same.
    let lock = File::create(cache.join("kube.lock"))?;
    lock.lock().context("waiting for another build of the Kubernetes tools")?;
    let unpacked = packages(&cache)?;
    Ok(Tools::Here(binaries(workspace, &cache, &go, &unpacked)?))
}

/// Go's version, or what to do about it.
fn go_version(workspace: &Workspace) -> Result<String, String> {
    let (major, minor) = GO_AT_LEAST;
    let wanted = format!("Go {major}.{minor} or later builds Kubernetes: please put its `go` into PATH");
    let go = tools::find_command("go").ok_or(format!("{wanted} (there is none)"))?;
    let said = Command::new(go)
        .args(["env", "GOVERSION"])
        .current_dir(workspace.root.join("tests/kube").join(MODULES[0].0))
        .stderr(Stdio::null())
        .output();
    let version = said.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let version = version.unwrap_or_default();
    if is_recent(&version) {
        Ok(version)
    } else {
        Err(format!("{wanted} (`go env GOVERSION` says {version:?})"))
    }
}

/// "go1.26.8" is; so is "go1.25rc1".
fn is_recent(version: &str) -> bool {
    let number = |text: &str| {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u32>().ok()
    };
    let mut parts = version.strip_prefix("go").unwrap_or_default().split('.').map(number);
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(major), Some(minor)) => (major, minor) >= GO_AT_LEAST,
        _ => false,
    }
}

/// What the linker writes into the binaries: without it they take themselves for version 0.
fn linker_flags() -> String {
    let (major_minor, _) = KUBERNETES.rsplit_once('.').unwrap_or((KUBERNETES, ""));
    let (major, minor) = major_minor.split_once('.').unwrap_or((major_minor, ""));
    let facts = [
        ("gitVersion", format!("v{KUBERNETES}")),
        ("gitMajor", major.to_owned()),
        ("gitMinor", minor.to_owned()),
        ("gitCommit", "none".to_owned()),
        ("gitTreeState", "clean".to_owned()),
        ("buildDate", "1970-01-01T00:00:00Z".to_owned()),
    ];
    let mut flags = "-s -w".to_owned();
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        for (name, value) in &facts {
            flags += &format!(" -X {package}.{name}={value}");
        }
    }
    flags
}

/// The folder of the binaries, named by what they are built from.
fn binaries(workspace: &Workspace, cache: &Path, go: &str, unpacked: &Path) -> Result<PathBuf> {
    let sources = workspace.root.join("tests/kube");
    let own = cache.join(folder_name(go, unpacked, &built_from(&sources)?));
    if own.exists() {
        return Ok(own);
    }
    tools::say(&format!(
        "building Kubernetes {KUBERNETES} and CoreDNS from their Go modules (half an hour on two cores, once)"
    ));
    made_whole(&own, |folder| {
        let bin = folder.join("bin");
        std::fs::create_dir(&bin)?;
        for (module, binary) in MODULES {
            let mut go = Command::new("nice");
            go.args(["go", "build", "-trimpath", "-ldflags", &linker_flags(), "-o"])
                .arg(bin.join(binary))
                .arg(".")
                .current_dir(sources.join(module))
                .env("CGO_ENABLED", "0");
            tools::run(&mut go)?;
        }
        for component in COMPONENTS {
            std::os::unix::fs::symlink(MODULES[0].1, bin.join(component))?;
        }
        std::os::unix::fs::symlink(unpacked, folder.join("debian"))?;
        Ok(())
    })?;
    Ok(own)
}

fn built_from(sources: &Path) -> Result<Vec<Vec<u8>>> {
    let mut files = Vec::new();
    for (module, _) in MODULES {
        for file in MODULE_FILES {
            let path = sources.join(module).join(file);
            files.push(std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?);
        }
    }
    Ok(files)
}

/// By content: the compiler, its flags, what the binaries run beside, and each file that they are built from.
fn folder_name(go: &str, unpacked: &Path, files: &[Vec<u8>]) -> String {
    let mut digest = Sha256::new();
    digest.update(format!("{go} {} {}", linker_flags(), unpacked.display()));
    for file in files {
        digest.update(file);
    }
    format!("kube-{KUBERNETES}-{}", hex::encode(&digest.finalize()[..8]))
}

/// Debian's packages, unpacked.
fn packages(cache: &Path) -> Result<PathBuf> {
    let release = std::fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let digest = Sha256::digest(format!("{release} {} {PACKAGES:?}", std::env::consts::ARCH));
    let own = cache.join(format!("kube-debian-{}", hex::encode(&digest[..8])));
    // kube-proxy calls it. Debian's package starts nothing.
    tools::ensure_command(
        "nft",
        "nftables",
        "kube-proxy on the nodes of the Kubernetes suites writes its rules with it",
    )?;
    if own.exists() {
        return Ok(own);
    }
    tools::say(&format!(
        "unpacking {}: the nodes of the Kubernetes suites run them",
        PACKAGES.join(" ")
    ));
    made_whole(&own, |folder| {
        let archives = folder.join("archives");
        std::fs::create_dir(&archives)?;
        if tools::run(&mut download(&archives)).is_err() {
            // apt has never looked, or the archive has moved on since.
            tools::run(Command::new("apt-get").args(["update", "-q"]).stdout(Stdio::null()))?;
            tools::run(&mut download(&archives))?;
        }
        for archive in std::fs::read_dir(&archives)? {
            tools::run(Command::new("dpkg").arg("-x").arg(archive?.path()).arg(folder))?;
        }
        std::fs::remove_dir_all(&archives)?;
        Ok(())
    })?;
    Ok(own)
}

fn download(to: &Path) -> Command {
    let mut apt = Command::new("apt-get");
    // Without another user, who could not write into the cache.
    apt.args(["-q", "-o", "APT::Sandbox::User=root", "download"])
        .args(PACKAGES)
        .current_dir(to)
        .stdout(Stdio::null());
    apt
}

/// A folder that is there only when everything in it is.
fn made_whole(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = path.file_name().context("a folder has a name")?.to_string_lossy();
    let partial = path.with_file_name(format!("partial-{name}"));
    // Of a build that was killed: the lock is ours.
    if partial.exists() {
        std::fs::remove_dir_all(&partial)?;
    }
    std::fs::create_dir(&partial).with_context(|| format!("making {}", partial.display()))?;
    if let Err(error) = make(&partial) {
        let _ = std::fs::remove_dir_all(&partial);
        bail!(error);
    }
    std::fs::rename(&partial, path).with_context(|| format!("making {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_go_are_compared_as_numbers() {
        for recent in ["go1.24", "go1.24.0", "go1.26.8", "go1.100.1", "go1.25rc1", "go2.0"] {
            assert!(is_recent(recent), "{recent}");
        }
        for old in ["go1.19.8", "go1.9", "go1.23.12", "", "devel", "go", "go1"] {
            assert!(!is_recent(old), "{old}");
        }
    }

    #[test]
    fn the_version_is_that_of_the_module() {
        let module = include_str!("../../tests/kube/components/go.mod");
        assert!(module.contains(&format!("k8s.io/kubernetes v{KUBERNETES}\n")));
        assert!(module.contains(&format!("go {}.{}", GO_AT_LEAST.0, GO_AT_LEAST.1)));
        assert!(linker_flags().contains("version.gitMinor=34 "));
    }

    /// Another checkout of the same sources finds the same folder, whatever it is called; one of others builds its own.
    #[test]
    fn the_folder_is_named_by_what_the_binaries_are_built_from() {
        let sources = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/kube"));
        let files = built_from(sources).unwrap();
        for (module, _) in MODULES {
            let sums = std::fs::read(sources.join(module).join("go.sum")).unwrap();
            assert!(files.contains(&sums), "{module}: what it depends on is not in the name");
        }
        let (go, unpacked) = ("go1.26.8", Path::new("/cache/kube-debian-1"));
        let name = folder_name(go, unpacked, &files);
        assert!(name.starts_with(&format!("kube-{KUBERNETES}-")), "{name}");
        assert_eq!(folder_name(go, unpacked, &files.clone()), name);
        for i in 0..files.len() {
            let mut changed = files.clone();
            changed[i].push(b'\n');
            assert_ne!(folder_name(go, unpacked, &changed), name, "file {i}");
        }
        assert_ne!(folder_name("go1.26.9", unpacked, &files), name);
        assert_ne!(folder_name(go, Path::new("/cache/kube-debian-2"), &files), name);
    }

    #[test]
    fn what_fails_half_way_is_not_there() {
        let base = std::env::temp_dir().join(format!("culvert-whole-{}", std::process::id()));
        std::fs::create_dir(&base).unwrap();
        let path = base.join("thing");
        let half = made_whole(&path, |folder| {
            std::fs::write(folder.join("a"), "a")?;
            bail!("the other half failed")
        });
        let left = std::fs::read_dir(&base).unwrap().count();
        let whole = made_whole(&path, |folder| Ok(std::fs::write(folder.join("a"), "a")?));
        let is_there = path.join("a").exists();
        std::fs::remove_dir_all(&base).unwrap();
        assert_eq!(half.unwrap_err().to_string(), "the other half failed");
        assert_eq!(left, 0);
        assert!(whole.is_ok() && is_there);
    }
}
