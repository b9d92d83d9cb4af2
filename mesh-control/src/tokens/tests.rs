use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn tokens() -> (tempfile::TempDir, Tokens) {
    let dir = tempfile::tempdir().expect("directory");
    let state = StateDir::open(&dir.path().join("state")).expect("state");
    let tokens = Tokens::open(&state).expect("tokens");
    (dir, tokens)
}

#[test]
fn a_secret_opens_its_node_only_and_is_not_stored() {
    let (dir, tokens) = tokens();
    let a = tokens.issue("node-a", "10.0.0.1:15012", "00", false).expect("token");
    let b = tokens.issue("node-b", "[2001:db8::1]:15012", "00", false).expect("token");
    assert_eq!(tokens.authenticate(&a.secret).as_deref(), Ok("node-a"));
    assert_eq!(tokens.authenticate(&b.secret).as_deref(), Ok("node-b"));
    let random = a.secret.rsplit_once('.').expect("two parts").1;
    let stored = std::fs::read_to_string(dir.path().join("state/nodes/node-a.json")).expect("record");
    assert!(!stored.contains(random));
    let mode = std::fs::metadata(dir.path().join("state/nodes/node-a.json"))
        .expect("record")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    for wrong in [
        format!("node-b.{random}"),
        "node-a.".into(),
        "node-a".into(),
        String::new(),
        format!("../node-a.{random}"),
    ] {
        assert_eq!(tokens.authenticate(&wrong), Err(Refusal::Unknown), "{wrong}");
    }
    assert_eq!(tokens.hosts().expect("hosts"), ["10.0.0.1", "2001:db8::1"]);
}

#[test]
fn a_second_token_needs_rotate_and_ends_the_first() {
    let (_dir, tokens) = tokens();
    let first = tokens.issue("node-a", "localhost:15012", "00", false).expect("token");
    assert!(matches!(
        tokens.issue("node-a", "localhost:15012", "00", false),
        Err(TokenError::Exists(_))
    ));
    assert!(
        tokens.authenticate(&first.secret).is_ok(),
        "a refused command changes nothing"
    );
    let second = tokens.issue("node-a", "localhost:15012", "00", true).expect("rotated");
    assert_eq!(tokens.authenticate(&first.secret), Err(Refusal::Unknown));
    assert!(tokens.authenticate(&second.secret).is_ok());
}

#[test]
fn names_and_addresses_are_checked() {
    let (_dir, tokens) = tokens();
    for name in ["", "../x", "A", "a/b", "-a", "a."] {
        assert!(
            matches!(tokens.issue(name, "h:1", "00", false), Err(TokenError::NodeName(_))),
            "{name}"
        );
    }
    for address in ["", "host", "host:0", "host:65536", "a b:1", "2001:db8::1:1x", ":1"] {
        assert!(
            matches!(tokens.issue("a", address, "00", false), Err(TokenError::Address(_))),
            "{address}"
        );
    }
}

#[test]
fn the_nodes_are_bounded_and_a_token_of_the_last_is_still_changed() {
    let (dir, tokens) = tokens();
    tokens.issue("node-a", "localhost:15012", "00", false).expect("token");
    for number in 2..MAX_NODES {
        std::fs::write(dir.path().join(format!("state/nodes/n{number}.json")), "").expect("record");
    }
    tokens.issue("node-b", "localhost:15012", "00", false).expect("the last one");
    let beyond = tokens.issue("node-c", "localhost:15012", "00", false);
    assert!(matches!(beyond, Err(TokenError::TooMany)));
    tokens.issue("node-a", "localhost:15012", "00", true).expect("no further one");
}

#[test]
fn a_record_that_is_too_large_opens_nothing() {
    let (dir, tokens) = tokens();
    let token = tokens.issue("node-a", "localhost:15012", "00", false).expect("token");
    let path = dir.path().join("state/nodes/node-a.json");
    let record = std::fs::read_to_string(&path).expect("record");
    let padded = |bytes: u64| {
        let room = usize::try_from(bytes).expect("small") - record.len();
        std::fs::write(&path, record.clone() + &" ".repeat(room)).expect("written");
    };
    padded(MAX_TOKEN_BYTES);
    assert_eq!(tokens.authenticate(&token.secret).as_deref(), Ok("node-a"), "exactly as many");
    padded(MAX_TOKEN_BYTES + 1);
    assert_eq!(tokens.authenticate(&token.secret), Err(Refusal::Unreadable));
    assert!(tokens.hosts().expect("hosts").is_empty());
}
