use std::os::unix::fs::PermissionsExt as _;

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SignatureAlgorithm};
use x509_parser::extensions::{GeneralName, ParsedExtension};

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);
const ID: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn authority() -> (tempfile::TempDir, StateDir, Authority) {
    let dir = tempfile::tempdir().expect("directory");
    let state = StateDir::open(&dir.path().join("state")).expect("state");
    let authority = Authority::open(&state, "cluster.local", OffsetDateTime::now_utc()).expect("authority");
    (dir, state, authority)
}

/// A request that asks for much that it must not get.
fn request(algorithm: &'static SignatureAlgorithm) -> String {
    let key = KeyPair::generate_for(algorithm).expect("key");
    let mut params = CertificateParams::new(vec!["mesh-control".to_owned()]).expect("params");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name.push(DnType::CommonName, "root");
    params.serialize_request(&key).expect("request").pem().expect("PEM")
}

#[test]
fn only_the_key_of_a_request_is_used() {
    let (_dir, _state, authority) = authority();
    let now = OffsetDateTime::now_utc();
    let signed = authority
        .sign_workload(&request(&PKCS_ECDSA_P256_SHA256), ID, DAY, now)
        .expect("signed");
    let der = CertificateDer::from_pem_slice(signed.leaf_pem.as_bytes()).expect("PEM");
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).expect("certificate");
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = &leaf
        .subject_alternative_name()
        .expect("SAN")
        .expect("SAN")
        .value
        .general_names;
    assert!(matches!(names.as_slice(), [GeneralName::URI(ID)]), "{names:?}");
    assert!(!leaf.is_ca());
    let usage = leaf.extended_key_usage().expect("EKU").expect("EKU").value;
    assert!(usage.client_auth && usage.server_auth && !usage.any && usage.other.is_empty());
    let usage = leaf.key_usage().expect("usage").expect("usage").value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let validity = leaf.validity();
    assert_eq!(validity.not_before.timestamp(), (now - CLOCK_SKEW).unix_timestamp());
    assert_eq!(validity.not_after.timestamp(), (now + DAY).unix_timestamp());
    let (_, root) = x509_parser::parse_x509_certificate(authority.root_der()).expect("root");
    leaf.verify_signature(Some(root.public_key())).expect("signed by the root");
    assert!(root.extensions().iter().any(
        |extension| matches!(extension.parsed_extension(), ParsedExtension::BasicConstraints(limits) if limits.ca && limits.path_len_constraint == Some(0))
    ));
}

#[test]
fn lifetimes_are_bounded() {
    let (_dir, _state, authority) = authority();
    let now = OffsetDateTime::now_utc();
    for (wanted, given) in [
        (Duration::ZERO, MIN_CERTIFICATE_LIFETIME),
        (DAY * 4000, MAX_CERTIFICATE_LIFETIME),
    ] {
        let signed = authority
            .sign_workload(&request(&PKCS_ECDSA_P256_SHA256), ID, wanted, now)
            .expect("signed");
        assert_eq!(signed.not_after, now + given);
    }
    // Nothing outlives the root.
    let late = now + ROOT_LIFETIME - DAY;
    let signed = authority
        .sign_workload(&request(&PKCS_ECDSA_P256_SHA256), ID, DAY * 2, late)
        .expect("signed");
    assert_eq!(signed.not_after, authority.not_after);
}

#[test]
fn requests_that_cannot_stand_are_refused() {
    let (_dir, _state, authority) = authority();
    let now = OffsetDateTime::now_utc();
    let refused = |pem: &str| match authority.sign_workload(pem, ID, DAY, now) {
        Err(AuthorityError::Request(problem)) => problem,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("signed"),
    };
    assert_eq!(refused(&request(&PKCS_ECDSA_P384_SHA384)), "its key is not ECDSA P-256");
    assert_eq!(refused(&request(&PKCS_ED25519)), "its key is not ECDSA P-256");
    for garbage in [
        "",
        "x",
        "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
    ] {
        refused(garbage);
    }
    assert_eq!(refused(&"x".repeat(MAX_CSR_BYTES + 1)), "it is too large");
    // Another signature than the key's: flip a bit in the last byte.
    let der = CertificateSigningRequestDer::from_pem_slice(request(&PKCS_ECDSA_P256_SHA256).as_bytes()).expect("PEM");
    let mut bytes = der.to_vec();
    *bytes.last_mut().expect("bytes") ^= 1;
    let base64 = base64::engine::general_purpose::STANDARD.encode(&bytes);
    let forged = format!("-----BEGIN CERTIFICATE REQUEST-----\n{base64}\n-----END CERTIFICATE REQUEST-----\n");
    assert_eq!(refused(&forged), "its signature is not by its key");
}

#[test]
fn the_root_is_kept_private_and_never_replaced() {
    let (_dir, state, first) = authority();
    let path = state.path().join(ROOT);
    let mode = |path: &std::path::Path| std::fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(state.path())), (0o600, 0o700));
    let now = OffsetDateTime::now_utc();
    let again = Authority::open(&state, "cluster.local", now).expect("read back");
    assert_eq!(first.root_sha256(), again.root_sha256());
    assert_eq!(first.root_sha256().len(), 64);

    let error = |state: &StateDir, now| {
        Authority::open(state, "cluster.local", now)
            .err()
            .expect("refused")
            .to_string()
    };
    assert!(error(&state, now + ROOT_LIFETIME + DAY).contains("has expired"));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("chmod");
    assert!(error(&state, now).contains("mode 640"), "{}", error(&state, now));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    let whole = std::fs::read(&path).expect("root");
    for broken in [&b""[..], b"nonsense", &whole[..whole.len() / 2]] {
        std::fs::write(&path, broken).expect("write");
        assert!(error(&state, now).contains("root.pem"));
        assert_eq!(std::fs::read(&path).expect("root"), broken, "never overwritten");
    }
    std::fs::set_permissions(state.path(), std::fs::Permissions::from_mode(0o755)).expect("chmod");
    assert!(
        StateDir::open(state.path())
            .expect_err("refused")
            .to_string()
            .contains("chmod 700")
    );
}

#[test]
fn a_serving_certificate_has_names_and_serves_only() {
    let (_dir, _state, authority) = authority();
    let names = ["localhost".to_owned(), "10.0.0.1".to_owned(), "::1".to_owned()];
    let (leaf, _key, _) = authority.sign_serving(&names, OffsetDateTime::now_utc()).expect("signed");
    let (_, leaf) = x509_parser::parse_x509_certificate(&leaf).expect("certificate");
    assert_eq!(
        leaf.subject_alternative_name()
            .expect("SAN")
            .expect("SAN")
            .value
            .general_names
            .len(),
        3
    );
    let usage = leaf.extended_key_usage().expect("EKU").expect("EKU").value;
    assert!(usage.server_auth && !usage.client_auth);
}
