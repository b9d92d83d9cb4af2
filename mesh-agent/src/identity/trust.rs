//! The roots that the control plane names at present. A root that it names no longer proves nothing, whatever was proven by it before.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Roots, and what is verified by them.
#[derive(Clone)]
pub struct TrustBundle {
    certificates: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
}

impl PartialEq for TrustBundle {
    fn eq(&self, other: &Self) -> bool {
        self.certificates == other.certificates
    }
}

impl Eq for TrustBundle {}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustBundle({} roots)", self.certificates.len())
    }
}

impl TrustBundle {
    /// Of PEM texts, each with at least one certificate.
    ///
    /// # Errors
    /// One of them holds none, or something that is no root.
    pub fn from_pem(texts: &[String]) -> Result<Self, String> {
        let mut certificates = Vec::new();
        for text in texts {
            let before = certificates.len();
            for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
                certificates.push(certificate.map_err(|error| format!("its PEM: {error}"))?);
            }
            if certificates.len() == before {
                return Err("holds a text without a certificate".to_owned());
            }
        }
        Self::new(certificates)
    }

    /// # Errors
    /// One of them is no root.
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        for certificate in &certificates {
            roots.add(certificate.clone()).map_err(|error| format!("a root: {error}"))?;
        }
        Ok(Self {
            certificates,
            roots: Arc::new(roots),
        })
    }

    #[must_use]
    pub fn roots(&self) -> &Arc<RootCertStore> {
        &self.roots
    }

    #[must_use]
    pub fn contains(&self, root: &CertificateDer<'_>) -> bool {
        self.certificates.contains(root)
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.certificates.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.certificates.is_empty()
    }

    /// Whether a chain, leaf first, still ends at one of the roots. When it ends is not asked here: whoever accepted it has.
    #[must_use]
    pub fn vouches_for(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> bool {
        let Some((leaf, intermediates)) = chain.split_first() else {
            return false;
        };
        let Some(at) = within_its_life(leaf, now) else {
            return false;
        };
        let Ok(end_entity) = webpki::EndEntityCert::try_from(leaf) else {
            return false;
        };
        // The handshake has asked for the usage that it needs; a certificate may have been made for one side only.
        [webpki::KeyUsage::client_auth(), webpki::KeyUsage::server_auth()]
            .into_iter()
            .any(|usage| {
                end_entity
                    .verify_for_usage(
                        webpki::ALL_VERIFICATION_ALGS,
                        &self.roots.roots,
                        intermediates,
                        at,
                        usage,
                        None,
                        None,
                    )
                    .is_ok()
            })
    }
}

/// Now, or the moment of the leaf's life that is nearest to it.
fn within_its_life(leaf: &CertificateDer<'_>, now: SystemTime) -> Option<UnixTime> {
    let (_, leaf) = X509Certificate::from_der(leaf).ok()?;
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).ok();
    let (begins, ends) = (seconds(leaf.validity().not_before)?, seconds(leaf.validity().not_after)?);
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    Some(UnixTime::since_unix_epoch(Duration::from_secs(now.min(ends).max(begins))))
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

    use super::*;

    struct Root {
        issuer: Issuer<'static, KeyPair>,
        der: CertificateDer<'static>,
        pem: String,
    }

    impl Root {
        fn new() -> Self {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let certificate = params.self_signed(&key).unwrap();
            let (der, pem) = (certificate.der().clone(), certificate.pem());
            Self {
                issuer: Issuer::new(params, key),
                der,
                pem,
            }
        }

        fn leaf(&self, usage: ExtendedKeyUsagePurpose) -> CertificateDer<'static> {
            let mut params = CertificateParams::default();
            params.extended_key_usages = vec![usage];
            params.not_before = (SystemTime::now() - Duration::from_secs(7200)).into();
            params.not_after = (SystemTime::now() - Duration::from_secs(3600)).into();
            params
                .signed_by(&KeyPair::generate().unwrap(), &self.issuer)
                .unwrap()
                .der()
                .clone()
        }
    }

    #[test]
    fn a_chain_stands_and_falls_with_its_root() {
        let (first, second) = (Root::new(), Root::new());
        let now = SystemTime::now();
        let both = TrustBundle::from_pem(&[first.pem.clone(), second.pem.clone()]).unwrap();
        let only_second = TrustBundle::new(vec![second.der.clone()]).unwrap();
        for usage in [ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth] {
            // Over for an hour: that a certificate ends cuts nothing.
            let chain = [first.leaf(usage)];
            assert!(both.vouches_for(&chain, now));
            assert!(!only_second.vouches_for(&chain, now));
        }
        assert!(!both.vouches_for(&[], now));
        assert!(!both.vouches_for(&[CertificateDer::from(vec![1, 2, 3])], now));
        assert!(both.contains(&first.der) && !only_second.contains(&first.der));
    }

    #[test]
    fn what_is_no_root_is_refused() {
        for garbage in ["", "text", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            assert!(
                TrustBundle::from_pem(&[Root::new().pem, garbage.to_owned()]).is_err(),
                "{garbage}"
            );
        }
    }
}
