//! An image as a file: an OCI layout (what registries have) with the manifest of a docker-archive beside it, over the same blobs.
//! containerd, Docker, podman and kind each read one or the other.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::layer::Layer;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// What container engines read before a name without a registry.
const DEFAULT_REGISTRY: &str = "docker.io/library/";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

pub struct Image<'a> {
    /// `name:tag`
    pub reference: String,
    pub title: &'a str,
    pub entrypoint: String,
    pub user: &'a str,
    pub layers: Vec<Layer>,
}

/// Bytes, of the file and of each layer.
#[derive(Debug)]
pub struct Written {
    pub bytes: u64,
    pub layers: Vec<u64>,
}

struct Blob {
    digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        let digest = hex::encode(Sha256::digest(&bytes));
        Self { digest, bytes }
    }

    fn of(value: &Value) -> Self {
        Self::new(value.to_string().into_bytes())
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.digest)
    }

    fn id(&self) -> String {
        format!("sha256:{}", self.digest)
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.id(), "size": self.bytes.len()})
    }
}

impl Image<'_> {
    pub fn write(&self, path: &Path) -> Result<Written> {
        let layers = self
            .layers
            .iter()
            .map(|layer| layer.bytes().map(Blob::new))
            .collect::<Result<Vec<Blob>>>()?;
        let sizes = layers.iter().map(|layer| layer.bytes.len() as u64).collect();
        // Layers are not compressed, so what identifies a layer is what identifies its content. No time of making: the same binary
        // gives the same image.
        let config = Blob::of(&json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "User": self.user,
                "Entrypoint": [self.entrypoint],
                "WorkingDir": "/",
                "Labels": {
                    "org.opencontainers.image.title": self.title,
                    "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
                    "org.opencontainers.image.licenses": "Apache-2.0",
                },
            },
            "rootfs": {"type": "layers", "diff_ids": layers.iter().map(Blob::id).collect::<Vec<_>>()},
        }));
        let manifest = Blob::of(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor(CONFIG),
            "layers": layers.iter().map(|layer| layer.descriptor(LAYER)).collect::<Vec<_>>(),
        }));
        let mut descriptor = manifest.descriptor(MANIFEST);
        let (_, tag) = self.reference.split_once(':').unwrap_or(("", "latest"));
        descriptor["annotations"] = json!({
            // containerd takes it as it is, and the kubelet then asks for the whole name.
            "io.containerd.image.name": format!("{DEFAULT_REGISTRY}{}", self.reference),
            "org.opencontainers.image.ref.name": tag,
        });
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor]});
        let docker = json!([{
            "Config": config.path(),
            "RepoTags": [self.reference],
            "Layers": layers.iter().map(Blob::path).collect::<Vec<_>>(),
        }]);
        let mut archive = Layer::default();
        archive.file(
            "oci-layout",
            0o644,
            json!({"imageLayoutVersion": "1.0.0"}).to_string().into_bytes(),
        )?;
        archive.file("index.json", 0o644, index.to_string().into_bytes())?;
        archive.file("manifest.json", 0o644, docker.to_string().into_bytes())?;
        for blob in layers.into_iter().chain([config, manifest]) {
            archive.file(&blob.path(), 0o644, blob.bytes)?;
        }
        let bytes = archive.bytes()?;
        std::fs::write(path, &bytes)?;
        Ok(Written {
            bytes: bytes.len() as u64,
            layers: sizes,
        })
    }
}

/// As images call it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
