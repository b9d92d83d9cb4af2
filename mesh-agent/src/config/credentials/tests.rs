use clap::Parser as _;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

use super::*;
use crate::config::{Cli, Command};

/// Replaces a file as the kubelet does: by a rename.
fn put(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(&new, path).unwrap();
}

fn root() -> String {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
}

#[test]
fn the_newest_token_is_sent_and_the_last_one_while_there_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    let error = TokenFollower::open(&path).unwrap_err().to_string();
    assert!(
        error.contains("--service-account-token") && error.contains(path.to_str().unwrap()),
        "{error}"
    );
    put(&path, "first.s3cret.a\n");
    let token = TokenFollower::open(&path).unwrap();
    assert_eq!(token.newest().expose(), "first.s3cret.a");
    put(&path, "second.s3cret.b");
    assert_eq!(token.newest().expose(), "second.s3cret.b");
    for broken in ["", " \n", "two words", "\u{fc}", &"x".repeat(20_000)] {
        put(&path, broken);
        assert_eq!(token.newest().expose(), "second.s3cret.b", "{broken:.10}");
        let error = TokenFollower::open(&path).unwrap_err().to_string();
        assert!(broken.trim().is_empty() || !error.contains(broken), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    assert_eq!(token.newest().expose(), "second.s3cret.b");
    put(&path, "third.s3cret.c");
    assert_eq!(token.newest().expose(), "third.s3cret.c");
    assert!(!format!("{token:?}").contains("s3cret"));
}

#[test]
fn roots_are_waited_for_followed_and_kept_while_the_file_is_broken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roots.pem");
    let roots = RootsFollower::new(&path);
    let error = roots.newest().unwrap_err().to_string();
    assert!(
        error.contains("--control-roots") && error.contains(path.to_str().unwrap()),
        "{error}"
    );
    let (first, second) = (root(), root());
    put(&path, &first);
    assert_eq!(roots.newest().unwrap().len(), 1);
    put(&path, &(first.clone() + &second));
    let both = roots.newest().unwrap();
    assert_eq!(both.len(), 2);
    assert!(Arc::ptr_eq(&both, &roots.newest().unwrap()), "the same while nothing changes");
    let large = first.repeat(600);
    for broken in [
        "",
        "no PEM",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        &large,
    ] {
        put(&path, broken);
        assert_eq!(roots.newest().unwrap().len(), 2, "{broken:.10}");
        assert!(RootsFollower::new(&path).newest().is_err(), "{broken:.10}");
    }
    put(&path, &second);
    assert_eq!(roots.newest().unwrap().len(), 1);
}

fn run(arguments: &[&str]) -> Result<RunArgs, String> {
    let all = ["mesh-agent", "run"].iter().chain(arguments);
    match Cli::try_parse_from(all) {
        Ok(Cli {
            command: Command::Run(args),
        }) => Ok(*args),
        Ok(_) => panic!("not run"),
        Err(error) => Err(error.to_string()),
    }
}

const ACCOUNT: [&str; 8] = [
    "--service-account-token",
    "t",
    "--control-roots",
    "r",
    "--control",
    "mesh-control:15012",
    "--node",
    "node-a",
];

#[test]
fn an_agent_has_exactly_one_way_to_prove_itself() {
    assert!(run(&["--token-file", "f"]).is_ok());
    assert!(run(&["--token-file", "f", "--control", "a:1"]).is_ok());
    assert!(run(&ACCOUNT).is_ok());
    let error = run(&[]).unwrap_err();
    assert!(error.contains("--token-file"), "{error}");
    let both: Vec<&str> = ["--token-file", "f"].into_iter().chain(ACCOUNT).collect();
    let error = run(&both).unwrap_err();
    assert!(
        error.contains("--token-file") && error.contains("cannot be used with"),
        "{error}"
    );
    // Each part of a service account's way is asked for by its name.
    for (at, missing) in [(2, "--control-roots"), (4, "--control"), (6, "--node")] {
        let mut without = ACCOUNT.to_vec();
        without.drain(at..at + 2);
        let error = run(&without).unwrap_err();
        assert!(error.contains(missing), "{missing}: {error}");
    }
    for (flag, value) in [("--node", "node-a"), ("--control-roots", "r")] {
        assert!(run(&["--token-file", "f", flag, value]).is_err(), "{flag}");
    }
    let mut bad_name = ACCOUNT;
    bad_name[7] = "../node";
    assert!(run(&bad_name).unwrap_err().contains("--node"));
}

#[test]
fn a_service_accounts_credentials_are_read_and_start_without_roots() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    let mut arguments = ACCOUNT;
    arguments[1] = token.to_str().unwrap();
    let roots = folder.path().join("roots.pem");
    arguments[3] = roots.to_str().unwrap();
    let args = run(&arguments).unwrap();
    assert!(
        Credentials::read(&args)
            .unwrap_err()
            .to_string()
            .contains("--service-account-token")
    );
    put(&token, "a.s3cret.c");
    let credentials = Credentials::read(&args).unwrap();
    assert_eq!((credentials.node(), credentials.control()), ("node-a", "mesh-control:15012"));
    assert!(!format!("{credentials:?}").contains("s3cret"));
}

#[test]
fn a_token_that_is_over_is_known_by_its_own_word() {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let token = |claims: &str| format!("a.{}.c", URL_SAFE_NO_PAD.encode(claims));
    assert_eq!(super::over_for(&token(r#"{"exp": 100, "aud": ["culvert"]}"#), 160), Some(60));
    assert_eq!(super::over_for(&token(r#"{"exp": 100}"#), 100), Some(0));
    assert_eq!(super::over_for(&token(r#"{"exp": 100}"#), 99), None);
    for odd in [
        "",
        "a",
        "a.b.c",
        "a.!.c",
        &token("{}"),
        &token("nonsense"),
        &token(r#"{"exp": "soon"}"#),
    ] {
        assert_eq!(super::over_for(odd, u64::MAX), None, "{odd}");
    }
}
