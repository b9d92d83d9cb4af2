//! Asking for a certificate, and checking what comes back before anything uses it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::Identity;
use super::store::CertifiedKeyPair;

/// Certificates and roots of an answer together; a chain of four and a handful of roots is already unusual.
const MAX_CERTIFICATES: usize = 64;
/// A certificate that starts within this time from now is taken: clocks differ a little.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("cannot make a key or a request: {0}")]
    Request(#[from] rcgen::Error),
    #[error("the certificate authority answers {code:?}: {message}", code = .0.code(), message = .0.message())]
    Refused(#[from] Box<tonic::Status>),
    #[error("the certificate authority did not answer in time")]
    Timeout,
    #[error("the answer of the certificate authority is unusable: {0}")]
    Answer(String),
}

impl CertificateError {
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Request(_) => "request",
            Self::Refused(_) => "refused",
            Self::Timeout => "timeout",
            Self::Answer(_) => "answer",
        }
    }
}

/// A fresh key and the request that goes with it.
pub struct KeyAndRequest {
    pub csr_pem: String,
    key: KeyPair,
}

impl KeyAndRequest {
    /// ECDSA P-256, the identity as URI SAN.
    ///
    /// # Errors
    /// The key cannot be made.
    pub fn new(identity: &Identity) -> Result<Self, CertificateError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        let csr_pem = params.serialize_request(&key)?.pem()?;
        Ok(Self { csr_pem, key })
    }

    /// A key of before, whose certificate is to be checked as a new one's is.
    ///
    /// # Errors
    /// It is no such key.
    pub fn with_key(key_pkcs8: &[u8]) -> Result<Self, CertificateError> {
        let key = PrivatePkcs8KeyDer::from(key_pkcs8);
        Ok(Self {
            csr_pem: String::new(),
            key: KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256)?,
        })
    }

    /// Checks the answer (PEM: leaf, intermediates, and last all roots in one string) against what was asked for.
    ///
    /// # Errors
    /// It does not prove this identity for this key now.
    pub fn certify(
        self,
        identity: &Identity,
        cert_chain: &[String],
        now: SystemTime,
    ) -> Result<CertifiedKeyPair, CertificateError> {
        let answer = |text: &str| CertificateError::Answer(text.to_owned());
        let [certificates @ .., roots_pem] = cert_chain else {
            return Err(answer("it is empty"));
        };
        let chain = parse_pem(certificates.iter())?;
        let Some(leaf) = chain.first() else {
            return Err(answer("it has no certificate besides the roots"));
        };
        let mut roots = RootCertStore::empty();
        for root in parse_pem(std::iter::once(roots_pem))? {
            roots
                .add(root)
                .map_err(|e| CertificateError::Answer(format!("a root: {e}")))?;
        }
        let (not_before, not_after) = self.check_leaf(leaf, identity, now)?;
        let chain_error = |error: webpki::Error| CertificateError::Answer(format!("the chain: {error}"));
        // A certificate of a clock slightly ahead of ours is taken.
        let valid_at = now.max(not_before).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let end_entity = webpki::EndEntityCert::try_from(leaf).map_err(chain_error)?;
        end_entity
            .verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &roots.roots,
                &chain[1..],
                UnixTime::since_unix_epoch(valid_at),
                webpki::KeyUsage::server_auth(),
                None,
                None,
            )
            .map_err(chain_error)?;
        Ok(CertifiedKeyPair {
            identity: identity.clone(),
            chain,
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der())),
            roots: Arc::new(roots),
            not_before,
            not_after,
        })
    }

    fn check_leaf(
        &self,
        leaf: &CertificateDer<'_>,
        identity: &Identity,
        now: SystemTime,
    ) -> Result<(SystemTime, SystemTime), CertificateError> {
        let answer = |text: String| CertificateError::Answer(text);
        let (_, leaf) = X509Certificate::from_der(leaf).map_err(|e| answer(format!("the certificate does not parse: {e}")))?;
        if leaf.public_key().subject_public_key.data != self.key.public_key_raw() {
            return Err(answer("the certificate is for another key".to_owned()));
        }
        let names = leaf
            .subject_alternative_name()
            .map_err(|e| answer(format!("its names: {e}")))?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .collect();
        if uris != [identity.to_string()] {
            return Err(answer(format!("it names {uris:?}, not `{identity}`")));
        }
        let time = |t: x509_parser::time::ASN1Time| {
            u64::try_from(t.timestamp())
                .map(|s| SystemTime::UNIX_EPOCH + Duration::from_secs(s))
                .map_err(|_| answer("a date before 1970".to_owned()))
        };
        let (not_before, not_after) = (time(leaf.validity().not_before)?, time(leaf.validity().not_after)?);
        if let Err(problem) = check_validity(not_before, not_after, now) {
            return Err(answer(format!("it is not valid now: {problem}")));
        }
        Ok((not_before, not_after))
    }
}

fn parse_pem<'a>(texts: impl Iterator<Item = &'a String>) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let mut certificates = Vec::new();
    for text in texts {
        for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
            let certificate = certificate.map_err(|e| CertificateError::Answer(format!("its PEM: {e}")))?;
            if certificates.len() == MAX_CERTIFICATES {
                return Err(CertificateError::Answer(format!("more than {MAX_CERTIFICATES} certificates")));
            }
            certificates.push(certificate);
        }
    }
    Ok(certificates)
}

/// An authority's answer: its elements stand between zero bytes, `LEAF` and `ROOT` in them for a right certificate and its root. The
/// first three bytes change a character of the leaf's text; a leaf that is not as it was signed is never taken.
#[cfg(fuzzing)]
pub fn fuzz(bytes: &[u8]) {
    use std::sync::OnceLock;

    struct Right {
        key: Vec<u8>,
        leaf: String,
        root: String,
    }
    fn right() -> Result<Right, rcgen::Error> {
        let root_key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = params.self_signed(&root_key)?.pem();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![SanType::URI("spiffe://cluster.local/ns/shop/sa/web".try_into()?)];
        leaf.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = leaf.signed_by(&key, &rcgen::Issuer::new(params, root_key))?;
        Ok(Right {
            key: key.serialize_der(),
            leaf: leaf.pem(),
            root,
        })
    }
    static RIGHT: OnceLock<Right> = OnceLock::new();
    let right = RIGHT.get_or_init(|| right().unwrap_or_else(|error| panic!("no certificate to start from: {error}")));
    let [high, low, change, text @ ..] = bytes else { return };
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    // The lines between the first and the last; of the text's own last characters some have bits that do not count.
    let body = right.leaf.find('\n').unwrap_or(0)..right.leaf.rfind("\n-").unwrap_or(0).saturating_sub(4);
    let at = body.start + usize::from(u16::from_be_bytes([*high, *low])) % body.len();
    let (before, rest) = right.leaf.split_at(at);
    let is_text = rest.starts_with(|character: char| !character.is_ascii_whitespace());
    // 64 and more: as it was.
    let leaf = match ALPHABET.get(usize::from(*change)) {
        Some(character) if is_text => format!("{before}{}{}", char::from(*character), &rest[1..]),
        _ => right.leaf.clone(),
    };
    let elements: Vec<String> = String::from_utf8_lossy(text)
        .split('\0')
        .map(|element| element.replace("LEAF", &leaf).replace("ROOT", &right.root))
        .collect();
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let identity = Identity::new("cluster.local", "shop", "web");
    let request = KeyAndRequest::with_key(&right.key).unwrap_or_else(|error| panic!("the key is good: {error}"));
    if let Ok(pair) = request.certify(&identity, &elements, now) {
        assert!(leaf == right.leaf && pair.not_before <= now && now < pair.not_after && !pair.roots.is_empty());
    }
}

/// # Errors
/// How far the clocks are apart, and whose it is.
fn check_validity(not_before: SystemTime, not_after: SystemTime, now: SystemTime) -> Result<(), String> {
    let apart = |later: SystemTime, earlier: SystemTime| later.duration_since(earlier).unwrap_or_default().as_secs();
    if not_after <= not_before {
        return Err("it ends before it begins".to_owned());
    }
    if not_before > now + CLOCK_SKEW {
        let seconds = apart(not_before, now);
        return Err(format!(
            "it begins {seconds} s from now: this node's clock is behind the control plane's; set the clocks right"
        ));
    }
    if not_after <= now {
        let seconds = apart(now, not_after);
        return Err(format!(
            "it was over {seconds} s ago: this node's clock is ahead of the control plane's; set the clocks right"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer};

    struct Authority {
        issuer: Issuer<'static, KeyPair>,
        root_pem: String,
    }

    impl Authority {
        fn new() -> Self {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let root_pem = params.self_signed(&key).unwrap().pem();
            Self {
                issuer: Issuer::new(params, key),
                root_pem,
            }
        }

        fn sign(&self, csr: &str, change: impl FnOnce(&mut CertificateParams)) -> Vec<String> {
            let mut request = CertificateSigningRequestParams::from_pem(csr).unwrap();
            let now = time::OffsetDateTime::now_utc();
            request.params.not_before = now - time::Duration::MINUTE;
            request.params.not_after = now + time::Duration::HOUR;
            request.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            change(&mut request.params);
            vec![request.signed_by(&self.issuer).unwrap().pem(), self.root_pem.clone()]
        }
    }

    fn identity() -> Identity {
        Identity::new("cluster.local", "shop", "web")
    }

    fn error(result: Result<CertifiedKeyPair, CertificateError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn what_was_asked_for_is_taken() {
        let authority = Authority::new();
        let request = KeyAndRequest::new(&identity()).unwrap();
        let answer = authority.sign(&request.csr_pem, |_| {});
        let pair = request.certify(&identity(), &answer, SystemTime::now()).unwrap();
        assert_eq!((pair.chain.len(), pair.roots.len()), (1, 1));
        assert_eq!(
            pair.not_after.duration_since(pair.not_before).unwrap(),
            Duration::from_secs(3660)
        );
    }

    #[test]
    fn all_roots_are_in_the_last_element() {
        let (authority, other) = (Authority::new(), Authority::new());
        let request = KeyAndRequest::new(&identity()).unwrap();
        let mut answer = authority.sign(&request.csr_pem, |_| {});
        answer[1].push_str(&other.root_pem);
        assert_eq!(
            request.certify(&identity(), &answer, SystemTime::now()).unwrap().roots.len(),
            2
        );
    }

    #[test]
    fn another_identity_key_issuer_or_time_is_refused() {
        let authority = Authority::new();
        let now = SystemTime::now();
        let fresh = || KeyAndRequest::new(&identity()).unwrap();

        let request = fresh();
        let answer = authority.sign(&request.csr_pem, |p| {
            p.subject_alt_names = vec![SanType::URI("spiffe://cluster.local/ns/shop/sa/admin".try_into().unwrap())]
        });
        assert!(error(request.certify(&identity(), &answer, now)).contains("sa/admin"));

        let answer = authority.sign(&fresh().csr_pem, |_| {});
        assert!(error(fresh().certify(&identity(), &answer, now)).contains("another key"));

        let request = fresh();
        let mut answer = authority.sign(&request.csr_pem, |_| {});
        answer[1] = Authority::new().root_pem;
        assert!(error(request.certify(&identity(), &answer, now)).contains("the chain"));

        let request = fresh();
        let answer = authority.sign(&request.csr_pem, |_| {});
        let later = now + Duration::from_secs(7200);
        assert!(error(request.certify(&identity(), &answer, later)).contains("not valid now"));
    }

    #[test]
    fn a_wrong_clock_is_named_and_a_small_difference_is_none() {
        let now = SystemTime::now();
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        // As the control plane makes them: from a quarter of an hour ago, for a day.
        let check = |clock: SystemTime| check_validity(now - minutes(15), now + minutes(24 * 60), clock);
        for right in [now, now - minutes(5), now + minutes(5), now - minutes(16)] {
            assert_eq!(check(right), Ok(()));
        }
        let behind = check(now - minutes(24 * 60)).unwrap_err();
        assert!(
            behind.contains("this node's clock is behind") && behind.contains("85500 s"),
            "{behind}"
        );
        let ahead = check(now + minutes(2 * 24 * 60)).unwrap_err();
        assert!(
            ahead.contains("this node's clock is ahead") && ahead.contains("86400 s"),
            "{ahead}"
        );
        assert!(check_validity(now, now, now).is_err());
    }

    #[test]
    fn an_answer_has_so_many_certificates() {
        let authority = Authority::new();
        let certify = |roots: usize| {
            let request = KeyAndRequest::new(&identity()).unwrap();
            let mut answer = authority.sign(&request.csr_pem, |_| {});
            answer[1] = answer[1].repeat(roots);
            request.certify(&identity(), &answer, SystemTime::now())
        };
        certify(MAX_CERTIFICATES).unwrap();
        let refused = error(certify(MAX_CERTIFICATES + 1));
        assert!(refused.contains("more than 64 certificates"), "{refused}");
    }

    #[test]
    fn garbage_is_refused() {
        let root = Authority::new().root_pem;
        for garbage in [
            vec![],
            vec![root.clone()],
            vec![String::new(), root.clone()],
            vec![
                "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned(),
                root,
            ],
            vec!["\u{0}".to_owned(), "x".to_owned()],
        ] {
            assert_eq!(
                KeyAndRequest::new(&identity())
                    .unwrap()
                    .certify(&identity(), &garbage, SystemTime::now())
                    .unwrap_err()
                    .reason(),
                "answer"
            );
        }
    }
}
