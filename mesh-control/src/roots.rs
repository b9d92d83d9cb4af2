//! The roots that the mesh trusts: the one that signs, and those beside it while one takes the place of another. The files in the state
//! directory are followed, so that a root that an operator takes away is taken from every agent within seconds.

use std::sync::Arc;

use parking_lot::RwLock;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use time::OffsetDateTime;

use crate::authority::{self, Authority, AuthorityError};
use crate::limits::{MAX_PEM_BYTES, MAX_TRUSTED_ROOTS};
use crate::state_dir::StateDir;

#[cfg(test)]
mod tests;

/// Certificates that are trusted beside the signing root's, PEM. None when it is missing.
const TRUSTED: &str = "trusted-roots.pem";
/// The root that is to sign next, as the signing one is kept.
const NEXT: &str = "next-root.pem";

/// What is in force.
pub struct InForce {
    pub authority: Authority,
    /// PEM of every trusted root, each once, the signing one first.
    pub bundle: Vec<String>,
}

impl InForce {
    /// The signing root and those that are trusted beside it.
    pub(crate) fn new(authority: Authority, trusted: &[CertificateDer<'_>]) -> Result<Self, String> {
        let mut bundle = vec![authority.root_pem().to_owned()];
        for der in trusted {
            let pem = authority::certificate_pem(der);
            if !bundle.contains(&pem) {
                bundle.push(pem);
            }
        }
        if bundle.len() > MAX_TRUSTED_ROOTS {
            return Err(format!("more than {MAX_TRUSTED_ROOTS} roots"));
        }
        Ok(Self { authority, bundle })
    }

    fn is_as(&self, other: &Self) -> bool {
        self.bundle == other.bundle
            && self.authority.signer() == other.authority.signer()
            && self.authority.intermediates() == other.authority.intermediates()
    }
}

pub struct Roots {
    /// Where they are read from; none where somebody else follows them.
    files: Option<Files>,
    in_force: RwLock<Arc<InForce>>,
}

struct Files {
    state: StateDir,
    trust_domain: String,
}

impl Roots {
    /// # Errors
    /// As [`Authority::open`]; the trusted roots cannot be read.
    pub fn open(state: &StateDir, trust_domain: &str, now: OffsetDateTime) -> Result<Self, AuthorityError> {
        let in_force = read(state, trust_domain, now)?;
        Ok(Self {
            files: Some(Files {
                state: state.clone(),
                trust_domain: trust_domain.to_owned(),
            }),
            in_force: RwLock::new(Arc::new(in_force)),
        })
    }

    /// Of those that somebody has read, and will replace.
    #[must_use]
    pub fn new(in_force: InForce) -> Self {
        Self {
            files: None,
            in_force: RwLock::new(Arc::new(in_force)),
        }
    }

    #[must_use]
    pub fn in_force(&self) -> Arc<InForce> {
        self.in_force.read().clone()
    }

    /// Reads the files again; whether they say something else.
    ///
    /// # Errors
    /// They cannot be read: what was in force stays so.
    pub fn reload(&self, now: OffsetDateTime) -> Result<bool, AuthorityError> {
        let Some(files) = &self.files else { return Ok(false) };
        // A root that vanished is no reason to make another.
        if !files.state.path().join(authority::ROOT).exists() {
            return Err(AuthorityError::Root(format!("{}: vanished", authority::ROOT)));
        }
        Ok(self.replace(read(&files.state, &files.trust_domain, now)?))
    }

    /// Whether these are others than those in force; they are now.
    pub fn replace(&self, read: InForce) -> bool {
        if read.is_as(&self.in_force()) {
            return false;
        }
        tracing::warn!(
            signing = read.authority.root_sha256(),
            trusted = read.bundle.len(),
            "the trusted roots, or who signs, have changed"
        );
        *self.in_force.write() = Arc::new(read);
        true
    }
}

fn read(state: &StateDir, trust_domain: &str, now: OffsetDateTime) -> Result<InForce, AuthorityError> {
    let authority = Authority::open(state, trust_domain, now)?;
    InForce::new(authority, &trusted(state)?).map_err(|problem| bad(state, TRUSTED, &problem))
}

fn bad(state: &StateDir, file: &str, problem: &str) -> AuthorityError {
    AuthorityError::Root(format!("{}: {problem}", state.path().join(file).display()))
}

/// The certificates in the file of trusted roots.
fn trusted(state: &StateDir) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let Some(pem) = state.read(TRUSTED, MAX_PEM_BYTES)? else {
        return Ok(Vec::new());
    };
    authorities(&pem).map_err(|problem| bad(state, TRUSTED, &problem))
}

/// The certificates of a PEM text, each an authority's. An empty or garbled text is an error, and no wish to trust nobody.
pub(crate) fn authorities(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| error.to_string())?;
    if certificates.is_empty() {
        return Err("no certificate in it; remove it to trust the signing root alone".to_owned());
    }
    for der in &certificates {
        let (rest, parsed) = x509_parser::parse_x509_certificate(der).map_err(|error| format!("a certificate: {error}"))?;
        if !rest.is_empty() || !parsed.is_ca() {
            return Err("a certificate in it is no authority's".to_owned());
        }
    }
    Ok(certificates.into_iter().map(CertificateDer::into_owned).collect())
}

/// The file of trusted roots, and one with a root that signs. What is taken is never nobody, and is told to agents as it was read.
#[cfg(fuzzing)]
pub(crate) fn fuzz(pem: &[u8]) {
    if let Ok(trusted) = authorities(pem) {
        let told: String = trusted.iter().map(|der| authority::certificate_pem(der)).collect();
        assert!(!trusted.is_empty() && authorities(told.as_bytes()) == Ok(trusted));
    }
    if let Ok(authority) = Authority::from_pem(pem, OffsetDateTime::UNIX_EPOCH) {
        assert_eq!(authority.root_sha256().len(), 64);
    }
}

/// A step of a root's replacement. Each is done by a running control plane within seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Step {
    /// Make the next root. It is trusted, and does not sign yet.
    Prepare,
    /// Let the next root sign. The former one stays trusted.
    Activate,
    /// Trust the signing root alone. What still depends on another is cut off.
    Retire,
}

/// Makes one step; returns what an operator should know.
///
/// # Errors
/// The steps before it are missing, or the disk's.
pub fn rotate(state: &StateDir, step: Step, trust_domain: &str, now: OffsetDateTime) -> Result<String, AuthorityError> {
    let current = read(state, trust_domain, now)?;
    let next = state.read(NEXT, MAX_PEM_BYTES)?;
    let trust = |roots: &[String]| state.write(TRUSTED, roots.concat().as_bytes());
    match (step, next) {
        (Step::Prepare, Some(_)) => Err(bad(state, NEXT, "a next root is there already; activate it")),
        (Step::Prepare, None) => {
            let made = authority::new_root(trust_domain, now)?.pem();
            let next = Authority::from_pem(made.as_bytes(), now).map_err(|problem| bad(state, NEXT, &problem))?;
            if current.bundle.len() >= MAX_TRUSTED_ROOTS {
                return Err(bad(
                    state,
                    TRUSTED,
                    &format!(
                        "{MAX_TRUSTED_ROOTS} roots are trusted already, which is the most; retire those that do not sign first"
                    ),
                ));
            }
            // Trusted before it can sign.
            trust(&[current.bundle, vec![next.root_pem().to_owned()]].concat())?;
            state.write(NEXT, made.as_bytes())?;
            Ok(format!(
                "the next root, SHA-256 {}, is trusted; activate it once every agent has heard of it: `trusted_roots` of its config_dump",
                next.root_sha256()
            ))
        }
        (Step::Activate, None) => Err(bad(state, NEXT, "there is no next root; prepare one")),
        (Step::Activate, Some(made)) => {
            let next = Authority::from_pem(&made, now).map_err(|problem| bad(state, NEXT, &problem))?;
            trust(&[current.bundle, vec![next.root_pem().to_owned()]].concat())?;
            state.write(authority::ROOT, &made)?;
            state.remove(NEXT)?;
            Ok(format!(
                "the root with SHA-256 {} signs; give the nodes new tokens (node-token --rotate), and retire the former root once \
                 every certificate was renewed, which takes half of its lifetime",
                next.root_sha256()
            ))
        }
        (Step::Retire, Some(_)) => Err(bad(state, NEXT, "a next root is there; activate it first")),
        (Step::Retire, None) => {
            state.remove(TRUSTED)?;
            Ok(format!(
                "only the root with SHA-256 {} is trusted",
                current.authority.root_sha256()
            ))
        }
    }
}
