use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use std::time::Duration;

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

fn text(data: &Data, key: &str) -> String {
    String::from_utf8(data[key].0.clone()).expect("text")
}

fn signing(data: &Data) -> String {
    read(data, now()).expect("read").authority.root_sha256()
}

fn trusted(data: &Data) -> usize {
    read(data, now()).expect("read").bundle.len()
}

fn problem(data: &Data) -> RootError {
    read(data, now()).err().expect("refused")
}

/// Authorities as another program makes them: a root, and an intermediate that it has signed.
struct Made {
    root_pem: String,
    intermediate_pem: String,
    key_pem: String,
}

fn authority(depth: BasicConstraints) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(depth);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn named(mut params: CertificateParams, name: &str) -> CertificateParams {
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params
}

fn with_intermediate(change: impl FnOnce(&mut CertificateParams)) -> Made {
    let root_key = KeyPair::generate().expect("key");
    let root = named(authority(BasicConstraints::Unconstrained), "their root");
    let root_pem = root.self_signed(&root_key).expect("root").pem();
    let key = KeyPair::generate().expect("key");
    let mut intermediate = named(authority(BasicConstraints::Constrained(0)), "the mesh");
    change(&mut intermediate);
    let intermediate = intermediate
        .signed_by(&key, &Issuer::new(root, root_key))
        .expect("intermediate");
    Made {
        root_pem,
        intermediate_pem: intermediate.pem(),
        key_pem: key.serialize_pem(),
    }
}

fn data(key: &str, chain: &str, roots: &str) -> Data {
    let mut data = Data::new();
    put(&mut data, KEY, key);
    put(&mut data, CERTIFICATE, chain);
    put(&mut data, ROOTS, roots);
    data
}

#[test]
fn a_root_is_replaced_step_by_step() {
    let mut data = made("cluster.local", now()).expect("made");
    let first = signing(&data);
    assert_eq!(trusted(&data), 1);
    let step = |data: &mut Data, step| rotate(data, step, "cluster.local", now());
    assert_eq!(step(&mut data, Step::Activate).expect_err("nothing is prepared").key, NEXT);

    step(&mut data, Step::Prepare).expect("prepared");
    assert_eq!(
        (trusted(&data), signing(&data)),
        (2, first.clone()),
        "trusted before it signs"
    );
    assert!(step(&mut data, Step::Prepare).is_err(), "one at a time");
    assert!(
        step(&mut data, Step::Retire).is_err(),
        "the next one would no longer be trusted"
    );

    step(&mut data, Step::Activate).expect("activated");
    let second = signing(&data);
    assert_ne!(first, second);
    assert_eq!(trusted(&data), 2, "the former one stays trusted");
    assert!(!data.contains_key(NEXT));

    step(&mut data, Step::Retire).expect("retired");
    assert_eq!((trusted(&data), signing(&data)), (1, second));
    assert_eq!(data.keys().map(String::as_str).collect::<Vec<_>>(), [ROOTS, CERTIFICATE, KEY]);
}

#[test]
fn roots_are_bounded() {
    let mut data = made("cluster.local", now()).expect("made");
    for _ in 1..MAX_TRUSTED_ROOTS {
        let bundle = read(&data, now()).expect("read").bundle.concat();
        let more = new_root("cluster.local", now()).expect("root").certificate_pem;
        put(&mut data, TRUSTED, &(bundle + &more));
    }
    assert_eq!(trusted(&data), MAX_TRUSTED_ROOTS);
    let before = data.clone();
    let refused = rotate(&mut data, Step::Prepare, "cluster.local", now()).expect_err("full");
    assert_eq!((refused.key, &data), (TRUSTED, &before));
    let more = text(&data, TRUSTED) + &new_root("cluster.local", now()).expect("root").certificate_pem;
    put(&mut data, TRUSTED, &more);
    assert_eq!(problem(&data).key, TRUSTED);
}

#[test]
fn an_intermediate_signs_and_its_root_is_trusted() {
    let made = with_intermediate(|_| {});
    // The key in each of the forms that cert-manager writes is tried on the API server's test; PKCS #8 here.
    let read = read(&data(&made.key_pem, &made.intermediate_pem, &made.root_pem), now()).expect("read");
    assert_eq!(read.bundle, [read.authority.root_pem().to_owned()]);
    assert_eq!(read.authority.intermediates().len(), 1);
    assert_ne!(read.authority.signer(), read.authority.root_der());
    let sent = authority::certificate_pem(&read.authority.intermediates()[0]);
    assert_eq!(certificate_of(&sent), certificate_of(&made.intermediate_pem));
    assert_eq!(certificate_of(read.authority.root_pem()), certificate_of(&made.root_pem));
}

fn certificate_of(pem: &str) -> CertificateDer<'static> {
    authorities(pem.as_bytes()).expect("certificate").remove(0)
}

#[test]
fn what_an_intermediate_signs_ends_with_it() {
    let made = with_intermediate(|params| params.not_after = now() + DAY);
    let data = data(&made.key_pem, &made.intermediate_pem, &made.root_pem);
    let authority = read(&data, now()).expect("read").authority;
    let (_, _, not_after) = authority.sign_serving(&["localhost".to_owned()], now()).expect("signed");
    assert!(not_after <= now() + DAY, "{not_after}");
    let later = read(&data, now() + 2 * DAY).err().expect("over");
    assert!(later.key == CERTIFICATE && later.problem.contains("has expired"), "{later}");
}

#[test]
fn what_cannot_be_used_is_refused_by_the_name_of_its_key() {
    let good = with_intermediate(|_| {});
    let other = with_intermediate(|_| {});
    let with = |key: &str, chain: &str, roots: &str| problem(&data(key, chain, roots));
    let garbled = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (refused, key, says) in [
        (with("", &good.intermediate_pem, &good.root_pem), KEY, ""),
        (with(garbled, &good.intermediate_pem, &good.root_pem), KEY, ""),
        (
            with(&other.key_pem, &good.intermediate_pem, &good.root_pem),
            KEY,
            "do not belong together",
        ),
        (with(&good.key_pem, "", &good.root_pem), CERTIFICATE, "no certificate"),
        (with(&good.key_pem, garbled, &good.root_pem), CERTIFICATE, ""),
        (with(&good.key_pem, &good.intermediate_pem, ""), ROOTS, "no certificate"),
        (with(&good.key_pem, &good.intermediate_pem, garbled), ROOTS, ""),
        (
            with(&good.key_pem, &good.intermediate_pem, &other.root_pem),
            ROOTS,
            "not verified by it",
        ),
    ] {
        assert!(refused.key == key && refused.problem.contains(says), "{refused}");
        assert!(!refused.to_string().contains("PRIVATE"), "{refused}");
    }
    let mut missing = data(&good.key_pem, &good.intermediate_pem, &good.root_pem);
    missing.remove(ROOTS);
    assert_eq!(problem(&missing), bad(ROOTS, "is missing"));
    let large = "x".repeat(usize::try_from(MAX_PEM_BYTES).expect("size") + 1);
    let refused = with(&large, &good.intermediate_pem, &good.root_pem);
    assert!(refused.key == KEY && refused.problem.contains("larger"), "{refused}");
    let mut trusted = data(&good.key_pem, &good.intermediate_pem, &good.root_pem);
    put(&mut trusted, TRUSTED, "");
    assert_eq!(problem(&trusted).key, TRUSTED);
}

#[test]
fn a_certificate_that_may_not_sign_is_refused() {
    let leaf = with_intermediate(|params| params.is_ca = IsCa::ExplicitNoCa);
    let refused = problem(&data(&leaf.key_pem, &leaf.intermediate_pem, &leaf.root_pem));
    assert!(
        refused.key == CERTIFICATE && refused.problem.contains("no authority's"),
        "{refused}"
    );
}
