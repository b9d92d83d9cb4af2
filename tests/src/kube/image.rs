//! Container images from programs on this machine, without a container engine or a registry: one layer, in the form that
//! `docker save` writes and container runtimes import.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::tools::Tools;

/// What the shell of an image answers to.
const BUSYBOX_APPLETS: [&str; 23] = [
    "cat", "cp", "echo", "env", "grep", "head", "hostname", "id", "ip", "kill", "ln", "ls", "mkdir", "mv", "nc", "nslookup",
    "ps", "rm", "sh", "sleep", "tail", "touch", "true",
];
/// Every image has these folders; a runtime mounts on some of them.
const FOLDERS: [&str; 6] = ["bin", "dev", "etc", "proc", "sys", "tmp"];

/// An image to be made.
#[derive(Debug)]
pub struct Image {
    name: String,
    entrypoint: Vec<String>,
    files: Vec<(String, PathBuf)>,
    links: Vec<(String, String)>,
    user: Option<u32>,
}

impl Image {
    /// Named as Pods ask for it, with a tag other than `latest`: "culvert.test/agent:1".
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            entrypoint: Vec::new(),
            files: Vec::new(),
            links: Vec::new(),
            user: None,
        }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a container runs, unless its Pod says otherwise.
    #[must_use]
    pub fn entrypoint(mut self, command: &[&str]) -> Self {
        self.entrypoint = command.iter().map(ToString::to_string).collect();
        self
    }

    /// Whom it runs as, unless its Pod says otherwise; without it, root.
    #[must_use]
    pub fn user(mut self, id: u32) -> Self {
        self.user = Some(id);
        self
    }

    /// A file of this machine at an absolute path in the image.
    #[must_use]
    pub fn file(mut self, from: &Path, to: &str) -> Self {
        self.files.push((to.trim_start_matches('/').to_owned(), from.to_owned()));
        self
    }

    /// A program, with the shared libraries that it is linked to.
    ///
    /// # Errors
    /// It is not there, or `ldd` does not understand it.
    pub fn program(mut self, from: &Path, to: &str) -> Result<Self> {
        for library in libraries_of(from)? {
            let to = library.to_str().context("a library's path")?.to_owned();
            self = self.file(&library, &to);
        }
        Ok(self.file(from, to))
    }

    /// A shell and what goes with it, in /bin.
    #[must_use]
    pub fn shell(mut self, tools: &Tools) -> Self {
        self = self.file(&tools.debian("bin/busybox"), "/bin/busybox");
        let applets = BUSYBOX_APPLETS
            .iter()
            .map(|applet| (format!("bin/{applet}"), "busybox".to_owned()));
        self.links.extend(applets);
        self
    }

    /// Writes the archive, for [`super::Cluster::load_image`].
    ///
    /// # Errors
    /// A file is missing, or the disk is full.
    pub fn write(&self, to: &Path) -> Result<()> {
        let layer_path = to.with_extension("layer");
        self.write_layer(&layer_path)?;
        let layer = digest(&layer_path)?;
        let mut container = serde_json::json!({ "Env": ["PATH=/bin:/usr/bin"], "WorkingDir": "/" });
        if !self.entrypoint.is_empty() {
            container["Entrypoint"] = self.entrypoint.clone().into();
        }
        if let Some(user) = self.user {
            container["User"] = user.to_string().into();
        }
        let config = serde_json::json!({
            "architecture": architecture(),
            "os": "linux",
            "config": container,
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer}")] },
            "history": [{ "created_by": "the test suites" }],
        })
        .to_string();
        let config_name = format!("{}.json", hex::encode(Sha256::digest(&config)));
        let layer_name = format!("{layer}/layer.tar");
        let manifest =
            serde_json::json!([{ "Config": config_name, "RepoTags": [self.name], "Layers": [layer_name] }]).to_string();
        let mut archive = archive(to)?;
        add_file(&mut archive, &layer_name, &layer_path, 0o644)?;
        add(&mut archive, &config_name, EntryType::Regular, 0o644, config.as_bytes())?;
        add(&mut archive, "manifest.json", EntryType::Regular, 0o644, manifest.as_bytes())?;
        archive.into_inner()?.flush()?;
        Ok(std::fs::remove_file(layer_path)?)
    }

    fn write_layer(&self, path: &Path) -> Result<()> {
        let mut archive = archive(path)?;
        let mut folders: BTreeSet<String> = FOLDERS.iter().map(ToString::to_string).collect();
        for (to, _) in &self.files {
            folders.extend(Path::new(to).ancestors().skip(1).filter_map(Path::to_str).map(str::to_owned));
        }
        for folder in folders.iter().filter(|folder| !folder.is_empty()) {
            let mode = if folder == "tmp" { 0o1777 } else { 0o755 };
            add(&mut archive, &format!("{folder}/"), EntryType::Directory, mode, &[])?;
        }
        add(
            &mut archive,
            "etc/passwd",
            EntryType::Regular,
            0o644,
            b"root:x:0:0::/:/bin/sh\n",
        )?;
        let mut written = BTreeSet::new();
        for (to, from) in self.files.iter().filter(|(to, _)| written.insert(to)) {
            let mode = std::fs::metadata(from)
                .with_context(|| format!("reading {}", from.display()))?
                .permissions()
                .mode();
            add_file(&mut archive, to, from, mode & 0o777)?;
        }
        for (at, to) in &self.links {
            archive.append_link(&mut header(EntryType::Symlink, 0o777, 0), at, to)?;
        }
        Ok(archive.into_inner()?.flush()?)
    }
}

fn archive(path: &Path) -> Result<Builder<BufWriter<File>>> {
    let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
    Ok(Builder::new(BufWriter::new(file)))
}

/// Owned by root, made in 1970: the same content gives the same bytes.
fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

fn add(archive: &mut Builder<BufWriter<File>>, name: &str, kind: EntryType, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut header = header(kind, mode, bytes.len() as u64);
    archive.append_data(&mut header, name, bytes).with_context(|| name.to_owned())
}

fn add_file(archive: &mut Builder<BufWriter<File>>, name: &str, path: &Path, mode: u32) -> Result<()> {
    let file = File::open(path).with_context(|| format!("reading {}", path.display()))?;
    let size = file.metadata()?.len();
    let mut header = header(EntryType::Regular, mode, size);
    // No more than was announced, should it grow.
    archive
        .append_data(&mut header, name, file.take(size))
        .with_context(|| name.to_owned())
}

/// As images call it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn digest(path: &Path) -> Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hex::encode(hash.finalize())),
            length => hash.write_all(&chunk[..length])?,
        }
    }
}

/// By `ldd`: the loader, and each library at the path at which the loader will look. None, for a static program.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("starting ldd")?;
    let (said, complaint) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    let is_static = said.contains("statically linked") || complaint.contains("not a dynamic executable");
    ensure!(
        output.status.success() || is_static,
        "ldd {}: {said}{complaint}",
        program.display()
    );
    let paths = libraries_in(&said);
    if !is_static {
        ensure!(!paths.is_empty(), "ldd {}: no libraries in {said}", program.display());
    }
    Ok(paths)
}

fn libraries_in(said: &str) -> Vec<PathBuf> {
    said.lines()
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once(" => ").map_or(line, |(_, path)| path);
            path.starts_with('/').then(|| path.split(' ').next().map(PathBuf::from))?
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let said = "\tlinux-vdso.so.1 (0x00007fce)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007fce)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007fcf)\n";
        let wanted = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(libraries_in(said), wanted);
        assert_eq!(libraries_in("\tstatically linked\n"), Vec::<PathBuf>::new());
    }

    #[test]
    fn an_image_names_its_layer_by_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let (program, image) = (folder.path().join("program"), folder.path().join("image.tar"));
        std::fs::write(&program, "#!/bin/sh\n").unwrap();
        Image::new("culvert.test/x:1")
            .file(&program, "/usr/bin/x")
            .entrypoint(&["/usr/bin/x"])
            .write(&image)
            .unwrap();
        let tar = |arguments: &[&str]| {
            let output = Command::new("tar")
                .args(arguments)
                .current_dir(folder.path())
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        tar(&["-xf", "image.tar"]);
        let manifest: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.path().join("manifest.json")).unwrap()).unwrap();
        assert_eq!(manifest[0]["RepoTags"][0], "culvert.test/x:1");
        let layer = manifest[0]["Layers"][0].as_str().unwrap();
        assert_eq!(layer, format!("{}/layer.tar", digest(&folder.path().join(layer)).unwrap()));
        let config = std::fs::read_to_string(folder.path().join(manifest[0]["Config"].as_str().unwrap())).unwrap();
        assert!(
            config.contains("/usr/bin/x") && config.contains(layer.split('/').next().unwrap()),
            "{config}"
        );
        let listed = tar(&["-tf", layer]);
        for file in ["usr/bin/x", "usr/bin/", "tmp/", "etc/passwd"] {
            assert!(listed.lines().any(|line| line == file), "{file} in {listed}");
        }
    }
}
