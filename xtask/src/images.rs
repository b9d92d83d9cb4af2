//! `cargo xtask images`: container images without a container engine: a binary, the shared objects that it names, and nothing else.
//!
//! Not linked statically, but for the CNI plugin, which is copied to the node ([`Workspace::build_plugin`]): name resolution of a
//! static glibc looks for shared objects all the same, and with another C library than the one that everything is tested with, what is
//! shipped would not be what was tested.

mod archive;
mod check;
mod layer;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::tools;
use crate::workspace::{PLUGIN, Workspace};
use archive::{Image, Written};
use layer::Layer;

#[derive(Args)]
pub struct Arguments {
    /// Where to write <name>.tar [default: <target>/images]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The images' tag [default: the version]
    #[arg(long)]
    tag: Option<String>,
    /// Lay each image's files out in a folder <name> beside it, too
    #[arg(long)]
    lay_out: bool,
    /// With the binaries as they are tested, which are bigger and slower
    #[arg(long)]
    debug: bool,
}

/// What goes into an image.
pub struct Content {
    pub name: &'static str,
    /// At the image's root; the first one is what it runs.
    pub binaries: &'static [&'static str],
    pub user: &'static str,
}

/// What `deploy/chart` runs.
pub const IMAGES: [Content; 2] = [
    Content {
        name: "mesh-agent",
        binaries: &["mesh-agent", "mesh-cni"],
        user: "0:0",
    },
    Content {
        name: "mesh-control",
        binaries: &["mesh-control"],
        user: "65532:65532",
    },
];

/// What the quick start's Pods run on a cluster of others.
pub const APP_IMAGE: Content = Content {
    name: "mesh-test-app",
    binaries: &["mesh-test-app"],
    user: "65532:65532",
};

const ACCOUNTS: &str = "root:x:0:0::/:/\nnonroot:x:65532:65532::/:/\n";
const GROUPS: &str = "root:x:0:\nnonroot:x:65532:\n";
/// What a Pod's /etc/hosts says counts before its name server.
const NAME_SERVICES: &str = "hosts: files dns\n";

pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let release;
    let workspace = if arguments.debug {
        workspace
    } else {
        release = workspace.for_release();
        &release
    };
    let binaries = workspace.build()?;
    let folder = arguments.out.clone().unwrap_or_else(|| workspace.target.join("images"));
    let tag = arguments.tag.as_deref().unwrap_or(env!("CARGO_PKG_VERSION"));
    for content in &IMAGES {
        let (path, written) = write(content, &binaries, &folder, tag)?;
        check::archive(&path)?;
        if arguments.lay_out {
            check::lay_out(&path, &folder.join(content.name))?;
        }
        tools::say(&format!(
            "{}: {} MiB ({}), as {}:{tag}",
            path.display(),
            mebibytes(written.bytes),
            written
                .layers
                .iter()
                .map(|bytes| mebibytes(*bytes))
                .collect::<Vec<_>>()
                .join(" + "),
            content.name,
        ));
    }
    tools::say(
        "to bring them onto a node: ctr -n k8s.io images import <file>, docker load -i <file>, or kind load image-archive <file>",
    );
    Ok(ExitCode::SUCCESS)
}

/// Makes an image of binaries that are built already, and starts it in a root folder of exactly its layers (root).
pub fn test(workspace: &Workspace, content: &Content) -> Result<()> {
    let folder = workspace.target.join("images-test").join(std::process::id().to_string());
    let tried = try_image(content, &workspace.binaries(), &folder);
    let _ = std::fs::remove_dir_all(&folder);
    tried
}

/// Images of binaries that are built already, for the suites that run them; removed with this.
pub struct Made(pub PathBuf);

impl Made {
    /// `what` tells it from others at the same time.
    pub fn of(workspace: &Workspace, contents: &[&Content], binaries: &Path, what: &str) -> Result<Self> {
        let made = Self(
            workspace
                .target
                .join("images-kube")
                .join(format!("{what}-{}", std::process::id())),
        );
        for content in contents {
            write(content, binaries, &made.0, env!("CARGO_PKG_VERSION"))?;
        }
        Ok(made)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn try_image(content: &Content, binaries: &Path, folder: &Path) -> Result<()> {
    let (path, _) = write(content, binaries, folder, "test")?;
    check::archive(&path)?;
    let said = check::start(&path, &folder.join(content.name), &["--version"])?;
    let expected = format!("{} {}", content.name, env!("CARGO_PKG_VERSION"));
    if said != expected {
        bail!("in its image it says {said:?}, not {expected:?}");
    }
    Ok(())
}

/// `<folder>/<name>.tar`.
pub fn write(content: &Content, binaries: &Path, folder: &Path, tag: &str) -> Result<(PathBuf, Written)> {
    tools::ensure_command("strip", "binutils", "an image has no use for symbols")?;
    std::fs::create_dir_all(folder)?;
    let stripped = folder.join(format!("{}.stripped", content.name));
    std::fs::create_dir_all(&stripped)?;
    let mut own = Vec::new();
    for name in content.binaries {
        let path = stripped.join(name);
        tools::run(Command::new("strip").arg("-o").arg(&path).arg(binaries.join(name)))?;
        own.push((format!("/{name}"), path));
    }
    let image = Image {
        reference: format!("{}:{tag}", content.name),
        title: content.name,
        entrypoint: own.first().map(|(name, _)| name.clone()).context("an image runs something")?,
        user: content.user,
        layers: vec![base(own.iter().map(|(_, path)| path.as_path()))?, layer(&own)?],
    };
    let path = folder.join(format!("{}.tar", content.name));
    let written = image.write(&path)?;
    std::fs::remove_dir_all(stripped)?;
    Ok((path, written))
}

/// What is beside the binaries: their shared objects where they look for them, and what the C library reads.
fn base<'a>(binaries: impl Iterator<Item = &'a Path>) -> Result<Layer> {
    let mut objects = BTreeSet::new();
    for binary in binaries {
        let said = tools::output(Command::new("ldd").arg(binary))?;
        let needed = shared_objects(&said).with_context(|| format!("what {} needs", binary.display()))?;
        if binary.ends_with(PLUGIN) && !needed.is_empty() {
            bail!("{PLUGIN} needs {needed:?}, which a node may not have: it is to be linked statically");
        }
        objects.extend(needed);
    }
    let mut layer = Layer::default();
    for (path, text) in [
        ("/etc/passwd", ACCOUNTS),
        ("/etc/group", GROUPS),
        ("/etc/nsswitch.conf", NAME_SERVICES),
    ] {
        layer.file(path, 0o644, text.as_bytes().to_vec())?;
    }
    // Runtimes name a Pod's network namespace by the one, and the agent's folder is under the other.
    layer.folder("/run")?;
    layer.link("/var/run", "/run")?;
    for object in objects {
        // What is found by a link is a file in the image, under the name that is asked for.
        layer.file(&object, 0o755, std::fs::read(&object).with_context(|| object.clone())?)?;
    }
    Ok(layer)
}

/// From what ldd(1) prints: `libc.so.6 => /lib/…/libc.so.6 (0x…)`, and the loader, which has no name before its path. The kernel's own
/// object has no path.
fn shared_objects(said: &str) -> Result<Vec<String>> {
    let mut objects = Vec::new();
    for line in said.lines().map(str::trim) {
        let found = match line.split_once(" => ") {
            Some((name, "not found")) => bail!("{name} is not on this machine"),
            Some((_, path)) => path,
            None => line,
        };
        let path = found.split(' ').next().unwrap_or_default();
        if path.starts_with('/') {
            objects.push(path.to_owned());
        }
    }
    Ok(objects)
}

fn layer(files: &[(String, PathBuf)]) -> Result<Layer> {
    let mut layer = Layer::default();
    for (name, path) in files {
        let mode = std::fs::metadata(path)?.permissions().mode() & 0o755;
        layer.file(name, mode, std::fs::read(path)?)?;
    }
    Ok(layer)
}

fn mebibytes(bytes: u64) -> String {
    // Exact enough below 2^52 bytes.
    #[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
    let shown = bytes as f64 / (1024.0 * 1024.0);
    format!("{shown:.1}")
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    /// A Dockerfile's instructions, by stage.
    fn stages(dockerfile: &str) -> Vec<Vec<&str>> {
        let mut stages: Vec<Vec<&str>> = Vec::new();
        for line in dockerfile.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if line.starts_with("FROM ") {
                stages.push(Vec::new());
            }
            stages.last_mut().expect("FROM comes first").push(line);
        }
        stages
    }

    /// Whoever has an engine gets the same files, user and program.
    #[test]
    fn the_dockerfile_makes_these_images() {
        let dockerfile = include_str!("../../deploy/Dockerfile");
        let stages = stages(dockerfile);
        let (build, images) = stages.split_first().expect("stages");
        assert!(build[0].ends_with(" AS build"), "{build:?}");
        let run = build.iter().find_map(|line| line.strip_prefix("RUN cargo xtask "));
        let words = run.expect("it builds with xtask").split_whitespace();
        let parsed = crate::Arguments::try_parse_from(["cargo xtask"].into_iter().chain(words)).unwrap();
        let crate::Command::Images(arguments) = parsed.command else {
            panic!("it builds no images: {build:?}");
        };
        assert!(arguments.lay_out && !arguments.debug, "{build:?}");
        let out = arguments.out.expect("--out");
        let expected = IMAGES.map(|content| {
            let files = out.join(content.name);
            vec![
                format!("FROM scratch AS {}", content.name),
                format!("COPY --from=build {}/ /", files.display()),
                format!("USER {}", content.user),
                format!("ENTRYPOINT [\"/{}\"]", content.binaries[0]),
            ]
        });
        assert_eq!(images, expected.as_slice());
        for content in &IMAGES {
            let tag = format!("{}:{}", content.name, env!("CARGO_PKG_VERSION"));
            let told = dockerfile.lines().any(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                words.ends_with(&["--target", content.name, "-t", tag.as_str(), "."])
            });
            assert!(told, "its head does not tell how {tag} is built");
        }
    }

    #[test]
    fn what_ldd_says_is_read() {
        let said = "\tlinux-vdso.so.1 (0x00007ffc)\n\
                    \tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x00007f1)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f2)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f3)\n";
        assert_eq!(
            shared_objects(said).unwrap(),
            [
                "/lib/x86_64-linux-gnu/libgcc_s.so.1",
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2",
            ]
        );
        assert!(shared_objects("\tstatically linked\n").unwrap().is_empty());
        let error = shared_objects("\tlibbpf.so.1 => not found\n").unwrap_err().to_string();
        assert!(error.contains("libbpf.so.1"), "{error}");
    }

    /// A real binary: the one that runs this test. What is in the archive is what engines read.
    #[test]
    fn an_image_is_what_its_digests_say_and_is_the_same_each_time() {
        let folder = std::env::temp_dir().join(format!("culvert-images-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let made = |name: &str| {
            let own = vec![("/tested".to_owned(), std::env::current_exe().unwrap())];
            let image = Image {
                reference: "tested:1".to_owned(),
                title: "tested",
                entrypoint: "/tested".to_owned(),
                user: "65532:65532",
                layers: vec![
                    base(own.iter().map(|(_, path)| path.as_path())).unwrap(),
                    layer(&own).unwrap(),
                ],
            };
            let path = folder.join(name);
            image.write(&path).unwrap();
            path
        };
        let (one, two) = (made("one.tar"), made("two.tar"));
        let is_same = std::fs::read(&one).unwrap() == std::fs::read(&two).unwrap();
        let checked = check::archive(&one);
        // A byte of the binary that is another one.
        let mut bytes = std::fs::read(&two).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&two, bytes).unwrap();
        let damaged = check::archive(&two);
        let started = nix::unistd::geteuid()
            .is_root()
            .then(|| check::start(&one, &folder.join("root"), &["--list"]));
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(is_same);
        checked.unwrap();
        let error = format!("{:#}", damaged.unwrap_err());
        assert!(error.contains("is not what its name says"), "{error}");
        if let Some(started) = started {
            assert!(started.unwrap().contains("an_image_is_what_its_digests_say"));
        }
    }
}
