//! An archive read as an engine reads it, by tar(1) and the digests in it; and the start of its binary in a root folder of exactly its
//! layers.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::tools;

/// Every blob is what its name says, and both manifests lead to the same ones.
pub fn archive(path: &Path) -> Result<()> {
    let unpacked = unpack(path)?;
    let result = layers(&unpacked.0).map(drop);
    result.with_context(|| path.display().to_string())
}

/// Lays out the image's files, and answers its configuration.
pub fn lay_out(path: &Path, root: &Path) -> Result<Value> {
    let unpacked = unpack(path)?;
    let (layers, config) = layers(&unpacked.0)?;
    std::fs::create_dir_all(root)?;
    for layer in layers {
        tools::run(Command::new("tar").arg("-xf").arg(layer).arg("-C").arg(root))?;
    }
    Ok(config)
}

/// Starts what the image runs, with arguments, where nothing is but the image (root); what it says on its standard output.
pub fn start(path: &Path, root: &Path, arguments: &[&str]) -> Result<String> {
    let config = lay_out(path, root)?;
    let program = config["config"]["Entrypoint"][0].as_str().context("no entrypoint")?;
    let user = config["config"]["User"].as_str().context("no user")?;
    let chroot = tools::find_command("chroot").context("no chroot")?;
    let mut command = Command::new(chroot);
    command
        .arg(format!("--userspec={user}"))
        .arg(root)
        .arg(program)
        .args(arguments);
    let said = tools::output(command.env_clear());
    std::fs::remove_dir_all(root)?;
    said
}

/// Goes with its owner.
struct Unpacked(PathBuf);

impl Drop for Unpacked {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn unpack(path: &Path) -> Result<Unpacked> {
    let unpacked = Unpacked(path.with_extension("unpacked"));
    std::fs::create_dir_all(&unpacked.0)?;
    tools::run(Command::new("tar").arg("-xf").arg(path).arg("-C").arg(&unpacked.0))?;
    Ok(unpacked)
}

/// The layers, in their order, and the image's configuration.
fn layers(folder: &Path) -> Result<(Vec<PathBuf>, Value)> {
    let index = json(&folder.join("index.json"))?;
    let manifest = json(&blob(folder, &index["manifests"][0])?)?;
    let config = blob(folder, &manifest["config"])?;
    let described = manifest["layers"].as_array().context("no layers")?;
    let layers = described
        .iter()
        .map(|layer| blob(folder, layer))
        .collect::<Result<Vec<_>>>()?;
    let docker = json(&folder.join("manifest.json"))?;
    let named = docker[0]["Layers"].as_array().context("no layers")?;
    let named = named.iter().map(|name| folder.join(name.as_str().unwrap_or_default()));
    if !named.eq(layers.iter().cloned()) || docker[0]["Config"].as_str().map(|name| folder.join(name)).as_ref() != Some(&config) {
        bail!("the two manifests are of different images");
    }
    let config = json(&config)?;
    let contents = config["rootfs"]["diff_ids"].as_array().context("no diff_ids")?;
    let digests = described.iter().map(|layer| &layer["digest"]);
    if !contents.iter().eq(digests) {
        bail!("the layers are not those of the configuration");
    }
    Ok((layers, config))
}

/// The file that a descriptor leads to, if it is the one.
fn blob(folder: &Path, descriptor: &Value) -> Result<PathBuf> {
    let digest = descriptor["digest"]
        .as_str()
        .and_then(|digest| digest.strip_prefix("sha256:"));
    let digest = digest.context("no digest")?;
    let path = folder.join("blobs/sha256").join(digest);
    let bytes = std::fs::read(&path).with_context(|| format!("blob {digest}"))?;
    if hex::encode(Sha256::digest(&bytes)) != digest || Some(bytes.len() as u64) != descriptor["size"].as_u64() {
        bail!("blob {digest} is not what its name says");
    }
    Ok(path)
}

fn json(path: &Path) -> Result<Value> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}
