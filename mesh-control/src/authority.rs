//! The certificate authority: its root, and the signing of workload and serving certificates.

use std::net::IpAddr;
use std::time::Duration;

use base64::Engine as _;
use rand::TryRngCore as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, UnixTime};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY};
use x509_parser::prelude::FromDer as _;

use crate::limits::{
    CLOCK_SKEW, MAX_CERTIFICATE_LIFETIME, MAX_CSR_BYTES, MAX_PEM_BYTES, MIN_CERTIFICATE_LIFETIME, ROOT_LIFETIME, SERVING_LIFETIME,
};
use crate::state_dir::{StateDir, StateError};

#[cfg(test)]
mod tests;

/// Key and certificate in one file, so that there is never half a root.
pub(crate) const ROOT: &str = "root.pem";

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("{0}")]
    Root(String),
    #[error("the certificate request is none that can be signed: {0}")]
    Request(String),
    #[error("signing: {0}")]
    Signing(String),
}

impl AuthorityError {
    fn signing(error: impl ToString) -> Self {
        Self::Signing(error.to_string())
    }
}

/// A signed certificate, PEM.
pub struct Signed {
    pub leaf_pem: String,
    pub not_after: OffsetDateTime,
}

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Whoever signs: the root, or an intermediate.
    signer: CertificateDer<'static>,
    /// The signer first; empty where it is a root itself.
    intermediates: Vec<CertificateDer<'static>>,
    root_pem: String,
    root_der: CertificateDer<'static>,
    /// The first end on the way from the signer to the root.
    not_after: OffsetDateTime,
}

/// What is wrong with a signer, by the part that has to be mended.
#[derive(Debug)]
pub(crate) enum SignerError {
    Key(String),
    Chain(String),
    Roots(String),
}

impl Authority {
    /// Reads the root from the state folder, and makes it where there is none at all. A root that is there and cannot be read
    /// is an error: a new one would cut off every node.
    ///
    /// # Errors
    /// The disk's; key and certificate that do not belong together; an expired root.
    pub fn open(state: &StateDir, trust_domain: &str, now: OffsetDateTime) -> Result<Self, AuthorityError> {
        let path = state.path().join(ROOT).display().to_string();
        if state.read(ROOT, MAX_PEM_BYTES)?.is_none() && state.write_new(ROOT, new_root(trust_domain, now)?.pem().as_bytes())? {
            tracing::info!(file = %path, "made a new root");
        }
        // Read back: of two processes that start at once, both go on with what the first wrote.
        let pem = state
            .read(ROOT, MAX_PEM_BYTES)?
            .ok_or_else(|| AuthorityError::Root(format!("{path}: vanished")))?;
        Self::from_pem(&pem, now).map_err(|problem| AuthorityError::Root(format!("{path}: {problem}")))
    }

    /// Of one text that holds key and certificate of a root.
    pub(crate) fn from_pem(pem: &[u8], now: OffsetDateTime) -> Result<Self, String> {
        let root = CertificateDer::from_pem_slice(pem)
            .map_err(|error| format!("the certificate: {error}"))?
            .into_owned();
        Self::from_parts(pem, vec![root.clone()], &[root], now).map_err(|error| match error {
            SignerError::Key(problem) => format!("the key: {problem}"),
            SignerError::Chain(problem) | SignerError::Roots(problem) => format!("the certificate: {problem}"),
        })
    }

    /// The signer's certificate first in `chain`, then what leads from it to one of the roots; which of them is found out by signing.
    pub(crate) fn from_parts(
        key_pem: &[u8],
        chain: Vec<CertificateDer<'static>>,
        roots: &[CertificateDer<'static>],
        now: OffsetDateTime,
    ) -> Result<Self, SignerError> {
        let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|error| SignerError::Key(error.to_string()))?;
        let key = KeyPair::try_from(&key).map_err(|error| SignerError::Key(error.to_string()))?;
        let bad = |error: &dyn ToString| SignerError::Chain(error.to_string());
        let signer = chain.first().cloned().ok_or_else(|| bad(&"no certificate in it"))?;
        let mut not_after: Option<OffsetDateTime> = None;
        for (index, certificate) in chain.iter().enumerate() {
            let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|error| bad(&error))?;
            if index == 0 && parsed.public_key().raw != key.subject_public_key_info() {
                return Err(SignerError::Key("key and certificate do not belong together".to_owned()));
            }
            if !parsed.is_ca() {
                return Err(bad(&"it is no authority's (CA:TRUE is missing)"));
            }
            let end = parsed.validity().not_after.to_datetime();
            if end <= now {
                return Err(bad(&format!("it has expired at {end}")));
            }
            not_after = Some(not_after.map_or(end, |earlier| earlier.min(end)));
        }
        let not_after = not_after.ok_or_else(|| bad(&"no certificate in it"))?;
        let issuer = Issuer::from_ca_cert_der(&signer, key).map_err(|error| bad(&error))?;
        let mut made = Self {
            issuer,
            intermediates: if roots.contains(&signer) { Vec::new() } else { chain },
            root_pem: String::new(),
            root_der: signer.clone(),
            signer,
            not_after,
        };
        let root = made.root_among(roots, now)?.clone();
        let (_, parsed) = x509_parser::parse_x509_certificate(&root).map_err(|error| SignerError::Roots(error.to_string()))?;
        let end = parsed.validity().not_after.to_datetime();
        if end <= now {
            return Err(SignerError::Roots(format!("the root has expired at {end}")));
        }
        made.not_after = not_after.min(end);
        made.root_pem = certificate_pem(&root);
        made.root_der = root;
        Ok(made)
    }

    /// The root that a certificate of this signer is verified by, as agents will do it.
    fn root_among<'a>(
        &self,
        roots: &'a [CertificateDer<'static>],
        now: OffsetDateTime,
    ) -> Result<&'a CertificateDer<'static>, SignerError> {
        let bad = |error: &dyn ToString| SignerError::Chain(error.to_string());
        let mut params = leaf(now, MIN_CERTIFICATE_LIFETIME, self.not_after).map_err(|error| bad(&error))?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|error| bad(&error))?;
        let leaf = params.signed_by(&key, &self.issuer).map_err(|error| bad(&error))?;
        let leaf = webpki::EndEntityCert::try_from(leaf.der()).map_err(|error| bad(&error))?;
        let seconds = u64::try_from(now.unix_timestamp()).unwrap_or_default();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let mut problem = "no certificate in it".to_owned();
        // The signer itself, where it is one of them.
        let (first, others): (Vec<_>, Vec<_>) = roots.iter().partition(|root| **root == self.signer);
        for root in first.into_iter().chain(others) {
            let anchor = [webpki::anchor_from_trusted_cert(root).map_err(|error| SignerError::Roots(error.to_string()))?];
            let verified = leaf.verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &anchor,
                &self.intermediates,
                now,
                webpki::KeyUsage::server_auth(),
                None,
                None,
            );
            match verified {
                Ok(_) => return Ok(root),
                Err(error) => problem = format!("what the signer signs is not verified by it: {error}"),
            }
        }
        Err(SignerError::Roots(problem))
    }

    /// The certificate whose key signs.
    #[must_use]
    pub fn signer(&self) -> &CertificateDer<'static> {
        &self.signer
    }

    /// What is sent after a certificate, so that it leads to the root.
    #[must_use]
    pub fn intermediates(&self) -> &[CertificateDer<'static>] {
        &self.intermediates
    }

    #[must_use]
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    #[must_use]
    pub fn root_der(&self) -> &CertificateDer<'static> {
        &self.root_der
    }

    /// Hex of the SHA-256 of the root's DER.
    #[must_use]
    pub fn root_sha256(&self) -> String {
        hex::encode(Sha256::digest(&self.root_der))
    }

    /// Signs a workload's certificate. Of the request only the public key is used.
    ///
    /// # Errors
    /// The request is no ECDSA P-256 request, or its signature is wrong.
    pub fn sign_workload(
        &self,
        request_pem: &str,
        spiffe_id: &str,
        lifetime: Duration,
        now: OffsetDateTime,
    ) -> Result<Signed, AuthorityError> {
        let key = request_key(request_pem)?;
        let lifetime = lifetime.clamp(MIN_CERTIFICATE_LIFETIME, MAX_CERTIFICATE_LIFETIME);
        let mut params = leaf(now, lifetime, self.not_after)?;
        let uri: rcgen::string::Ia5String = spiffe_id.try_into().map_err(AuthorityError::signing)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let not_after = params.not_after;
        let certificate = params.signed_by(&key, &self.issuer).map_err(AuthorityError::signing)?;
        Ok(Signed {
            leaf_pem: certificate.pem(),
            not_after,
        })
    }

    /// A serving certificate of this control plane and its key (PKCS#8 DER). Its names are what tells it from a workload's.
    ///
    /// # Errors
    /// A name that no certificate can carry.
    pub fn sign_serving(
        &self,
        names: &[String],
        now: OffsetDateTime,
    ) -> Result<(CertificateDer<'static>, Vec<u8>, OffsetDateTime), AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(AuthorityError::signing)?;
        let mut params = leaf(now, SERVING_LIFETIME, self.not_after)?;
        params.subject_alt_names = names
            .iter()
            .map(|name| match name.parse::<IpAddr>() {
                Ok(ip) => Ok(SanType::IpAddress(ip)),
                Err(_) => Ok(SanType::DnsName(name.as_str().try_into()?)),
            })
            .collect::<Result<_, rcgen::Error>>()
            .map_err(AuthorityError::signing)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let not_after = params.not_after;
        let certificate = params.signed_by(&key, &self.issuer).map_err(AuthorityError::signing)?;
        Ok((certificate.der().clone(), key.serialize_der(), not_after))
    }
}

fn random_serial() -> Result<SerialNumber, AuthorityError> {
    let mut bytes = [0; 16];
    rand::rngs::OsRng
        .try_fill_bytes(&mut bytes)
        .map_err(AuthorityError::signing)?;
    // Positive and not zero (RFC 5280, 4.1.2.2).
    bytes[0] = (bytes[0] & 0x7f) | 0x01;
    Ok(SerialNumber::from_slice(&bytes))
}

fn leaf(now: OffsetDateTime, lifetime: Duration, at_most: OffsetDateTime) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = (now + lifetime).min(at_most);
    params.serial_number = Some(random_serial()?);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// A root that was just made.
pub(crate) struct NewRoot {
    pub key_pem: String,
    pub certificate_pem: String,
}

impl NewRoot {
    /// Both, as the state folder keeps them.
    pub fn pem(&self) -> String {
        format!("{}{}", self.key_pem, self.certificate_pem)
    }
}

pub(crate) fn new_root(trust_domain: &str, now: OffsetDateTime) -> Result<NewRoot, AuthorityError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(AuthorityError::signing)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain);
    params.distinguished_name.push(DnType::CommonName, "culvert root");
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + ROOT_LIFETIME;
    params.serial_number = Some(random_serial()?);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(AuthorityError::signing)?;
    Ok(NewRoot {
        key_pem: key.serialize_pem(),
        certificate_pem: certificate.pem(),
    })
}

pub(crate) fn certificate_pem(der: &CertificateDer<'_>) -> String {
    let base64 = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for (index, character) in base64.chars().enumerate() {
        if index > 0 && index % 64 == 0 {
            pem.push('\n');
        }
        pem.push(character);
    }
    pem + "\n-----END CERTIFICATE-----\n"
}

/// The key of a request, which its signature proves to be the caller's.
fn request_key(pem: &str) -> Result<SubjectPublicKeyInfo, AuthorityError> {
    let bad = |problem: &str| AuthorityError::Request(problem.to_owned());
    if pem.len() > MAX_CSR_BYTES {
        return Err(bad("it is too large"));
    }
    let der =
        CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(|_| bad("it is no PEM of a certificate request"))?;
    let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|_| bad("it is no certificate request"))?;
    if !rest.is_empty() {
        return Err(bad("something follows it"));
    }
    let key = &request.certification_request_info.subject_pki;
    let curve = key
        .algorithm
        .parameters
        .as_ref()
        .and_then(|parameters| parameters.as_oid().ok());
    if key.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve.is_none_or(|curve| curve != OID_EC_P256) {
        return Err(bad("its key is not ECDSA P-256"));
    }
    request
        .verify_signature()
        .map_err(|_| bad("its signature is not by its key"))?;
    SubjectPublicKeyInfo::from_der(key.raw).map_err(|error| bad(&error.to_string()))
}

/// What is taken is a key of the one kind that is signed for.
#[cfg(fuzzing)]
pub(crate) fn fuzz(pem: &str) {
    if let Ok(key) = request_key(pem) {
        assert_eq!(key.der_bytes().len(), 65, "an uncompressed point of P-256");
    }
}
