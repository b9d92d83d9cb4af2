//! A peer that shares nothing with the mesh: Python's `h2` over OpenSSL, with certificates by openssl and the mesh's own root key.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::app::ECHO_PORT;
use crate::manifests::spiffe_id;
use crate::mesh::{Mesh, PodSpec};
use crate::topology::NodeName;

/// Debian's own, which has python3-h2; another python in the PATH may not.
pub const PYTHON: &str = "/usr/bin/python3";

/// In the mesh by another maker's agent, which says so by the annotation.
pub const FOREIGN: PodSpec = PodSpec {
    name: "foreign",
    node: NodeName::One,
    host: 40,
    meshed: true,
    annotations: "ambient.istio.io/redirection: enabled",
};

/// What the client says of itself and wants; by default all is as it should be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Claims<'a> {
    /// Instead of the address that it connects to, with the echo server's port.
    pub authority: Option<SocketAddr>,
    pub forwarded: Option<&'a str>,
    pub without_certificate: bool,
    pub without_alpn: bool,
    pub tls12: bool,
}

/// Where unprivileged users can read it.
///
/// # Errors
/// It cannot be copied.
pub fn script(mesh: &Mesh) -> Result<String> {
    let target = mesh.topology.folder().join("peer.py");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("foreign/peer.py"), &target)?;
    Ok(target.display().to_string())
}

/// A CONNECT from the foreign Pod with these files; the client's report, of a refusal as well. A client that crashes has not
/// been refused.
///
/// # Errors
/// The client crashed.
pub fn connect(mesh: &Mesh, files: &Files, to: IpAddr, claims: &Claims<'_>) -> Result<Value> {
    let (script, host) = (script(mesh)?, to.to_string());
    let authority = claims
        .authority
        .unwrap_or(SocketAddr::new(to.to_canonical(), ECHO_PORT))
        .to_string();
    let claims = json!({
        "forwarded": claims.forwarded,
        "certificate": !claims.without_certificate,
        "alpn": !claims.without_alpn,
        "tls12": claims.tls12,
    });
    let arguments = [
        script.as_str(),
        "client",
        files.certificate()?,
        files.key()?,
        files.root()?,
        host.as_str(),
        authority.as_str(),
        &claims.to_string(),
    ];
    let place = mesh.pod(FOREIGN.name).place();
    let output = place.run(Path::new(PYTHON), &arguments, Duration::from_secs(30))?;
    let report = output.ok("the foreign client")?;
    serde_json::from_str(&report).with_context(|| format!("the foreign client said {report}"))
}

/// As openssl writes dates: YYYYMMDDHHMMSSZ.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    pub from: &'static str,
    pub until: &'static str,
}

/// Signs with the root key in the control plane's state folder, by openssl.
#[derive(Debug)]
pub struct Certificates {
    folder: PathBuf,
    root: PathBuf,
}

#[derive(Debug)]
pub struct Files {
    certificate: PathBuf,
    key: PathBuf,
    root: PathBuf,
}

impl Files {
    /// # Errors
    /// Its path is no UTF-8.
    pub fn certificate(&self) -> Result<&str> {
        self.certificate.to_str().context("a path")
    }
    /// # Errors
    /// Its path is no UTF-8.
    pub fn key(&self) -> Result<&str> {
        self.key.to_str().context("a path")
    }
    /// # Errors
    /// Its path is no UTF-8.
    pub fn root(&self) -> Result<&str> {
        self.root.to_str().context("a path")
    }
}

impl Certificates {
    /// # Errors
    /// openssl fails.
    pub fn new(mesh: &Mesh) -> Result<Self> {
        let folder = mesh.topology.folder().join("foreign");
        std::fs::create_dir(&folder)?;
        let root = mesh.control_state_dir().join("root.pem");
        // What peers may read is the certificate alone.
        openssl(&[
            "x509",
            "-in",
            path(&root)?,
            "-out",
            path(&folder.join("root-certificate.pem"))?,
        ])?;
        Ok(Self { folder, root })
    }

    /// As the control plane would, for an hour or more.
    ///
    /// # Errors
    /// openssl fails.
    pub fn issue(&self, service_account: &str) -> Result<Files> {
        self.sign(service_account, &spiffe_id(service_account), &self.root)
    }

    /// Of our root, with a name of another trust domain.
    ///
    /// # Errors
    /// openssl fails.
    pub fn of_another_trust_domain(&self, service_account: &str) -> Result<Files> {
        let id = spiffe_id(service_account).replace("cluster.local", "elsewhere.test");
        self.sign("elsewhere", &id, &self.root)
    }

    /// Good but for its time.
    ///
    /// # Errors
    /// openssl fails.
    pub fn dated(&self, service_account: &str, validity: &Validity) -> Result<Files> {
        let name = format!("{service_account}-{}", validity.from);
        let at = |ending: &str| self.folder.join(format!("{name}{ending}"));
        let files = self.request(&name, &spiffe_id(service_account), "/O=dated")?;
        let folder = self.folder.display();
        std::fs::write(at(".index"), "")?;
        std::fs::write(
            at(".conf"),
            format!(
                "[ca]\ndefault_ca=one\n[one]\ndatabase={folder}/{name}.index\nnew_certs_dir={folder}\nrand_serial=yes\n\
                 default_md=sha256\npolicy=any\nunique_subject=no\n[any]\norganizationName=optional\n"
            ),
        )?;
        openssl(&[
            "ca",
            "-batch",
            "-notext",
            "-config",
            path(&at(".conf"))?,
            "-in",
            path(&at(".csr"))?,
            "-cert",
            path(&self.root)?,
            "-keyfile",
            path(&self.root)?,
            "-startdate",
            validity.from,
            "-enddate",
            validity.until,
            "-extfile",
            path(&at(".ext"))?,
            "-out",
            files.certificate()?,
        ])?;
        Ok(files)
    }

    /// # Errors
    /// openssl fails.
    pub fn of_another_authority(&self, service_account: &str) -> Result<Files> {
        let (key, certificate) = (self.folder.join("other-root.key"), self.folder.join("other-root.crt"));
        openssl(&[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/O=another",
            "-keyout",
            path(&key)?,
            "-out",
            path(&certificate)?,
        ])?;
        let both = self.folder.join("other-root.pem");
        std::fs::write(&both, [std::fs::read(&key)?, std::fs::read(&certificate)?].concat())?;
        self.sign("other", &spiffe_id(service_account), &both)
    }

    fn sign(&self, name: &str, id: &str, root: &Path) -> Result<Files> {
        let at = |ending: &str| self.folder.join(format!("{name}{ending}"));
        let files = self.request(name, id, "/")?;
        openssl(&[
            "x509",
            "-req",
            "-in",
            path(&at(".csr"))?,
            "-CA",
            path(root)?,
            "-CAkey",
            path(root)?,
            "-CAcreateserial",
            "-CAserial",
            path(&at(".srl"))?,
            "-days",
            "1",
            "-extfile",
            path(&at(".ext"))?,
            "-out",
            files.certificate()?,
        ])?;
        Ok(files)
    }

    /// A key, a request and the extensions that are asked for; the certificate is to be made.
    fn request(&self, name: &str, id: &str, subject: &str) -> Result<Files> {
        let at = |ending: &str| self.folder.join(format!("{name}{ending}"));
        let (key, request, extensions) = (at(".key"), at(".csr"), at(".ext"));
        std::fs::write(
            &extensions,
            format!(
                "subjectAltName=critical,URI:{}\nextendedKeyUsage=serverAuth,clientAuth\n\
                 keyUsage=critical,digitalSignature\nbasicConstraints=critical,CA:FALSE\n",
                id
            ),
        )?;
        openssl(&[
            "req",
            "-new",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            subject,
            "-keyout",
            path(&key)?,
            "-out",
            path(&request)?,
        ])?;
        // The peer runs unprivileged.
        std::os::unix::fs::chown(&key, Some(65_534), None)?;
        Ok(Files {
            certificate: at(".crt"),
            key,
            root: self.folder.join("root-certificate.pem"),
        })
    }
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is UTF-8")
}

fn openssl(arguments: &[&str]) -> Result<()> {
    let output = Command::new("openssl").args(arguments).output().context("starting openssl")?;
    if !output.status.success() {
        bail!("openssl {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
