//! The cluster's own certificate authority: its parts know each other, and the administrator, by certificates alone.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

#[derive(Debug)]
pub(super) struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

#[derive(Clone, Debug)]
pub(super) struct KeyFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    /// A new one, with its files in `folder`.
    pub(super) fn create(folder: PathBuf) -> Result<Self> {
        std::fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named("the test cluster's authority", &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key)?;
        std::fs::write(folder.join("ca.crt"), certificate.pem())?;
        std::fs::write(folder.join("ca.key"), key.serialize_pem())?;
        // What signs service accounts' tokens, and what verifies them.
        let accounts = KeyPair::generate()?;
        std::fs::write(folder.join("accounts.key"), accounts.serialize_pem())?;
        std::fs::write(folder.join("accounts.pub"), accounts.public_key_pem())?;
        Ok(Self {
            folder,
            issuer: Issuer::new(params, key),
        })
    }

    pub(super) fn certificate(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// Signs the tokens of service accounts.
    pub(super) fn accounts_key(&self) -> PathBuf {
        self.folder.join("accounts.key")
    }

    pub(super) fn accounts_public_key(&self) -> PathBuf {
        self.folder.join("accounts.pub")
    }

    /// A server with these names and addresses.
    pub(super) fn serving(&self, name: &str, names: Vec<String>) -> Result<KeyFiles> {
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = named(name, &[]);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(name, params)
    }

    /// A user in groups, as Kubernetes reads them from the subject.
    fn client(&self, name: &str, user: &str, groups: &[&str]) -> Result<KeyFiles> {
        let mut params = CertificateParams::default();
        params.distinguished_name = named(user, groups);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(name, params)
    }

    fn issue(&self, name: &str, mut params: CertificateParams) -> Result<KeyFiles> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let files = KeyFiles {
            certificate: self.folder.join(format!("{name}.crt")),
            key: self.folder.join(format!("{name}.key")),
        };
        std::fs::write(&files.certificate, params.signed_by(&key, &self.issuer)?.pem())?;
        std::fs::write(&files.key, key.serialize_pem())?;
        Ok(files)
    }

    /// A kubeconfig by which a user speaks to the API server.
    pub(super) fn kubeconfig(&self, name: &str, server: &str, user: &str, groups: &[&str]) -> Result<PathBuf> {
        let path = self.folder.join(format!("{name}.kubeconfig"));
        let files = self.client(name, user, groups)?;
        let text = kubeconfig(server, &self.certificate(), &files);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }
}

fn named(name: &str, groups: &[&str]) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    for group in groups {
        subject.push(DnType::OrganizationName, *group);
    }
    subject.push(DnType::CommonName, name);
    subject
}

fn kubeconfig(server: &str, authority: &Path, files: &KeyFiles) -> String {
    serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority": authority}}],
        "users": [{"name": "test", "user": {"client-certificate": files.certificate, "client-key": files.key}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    })
    .to_string()
}
