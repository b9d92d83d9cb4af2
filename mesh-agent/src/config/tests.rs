use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;

use clap::{CommandFactory as _, Parser as _};

use super::*;

const TOKEN: &str = r#"{"node":"node-a","secret":"s3cret-value","root_sha256":"0101010101010101010101010101010101010101010101010101010101010101","address":"127.0.0.1:15012"}"#;

fn token_file(mode: u32, text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
    file
}

#[test]
fn the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_option_can_be_set_by_environment() {
    for command in Cli::command().get_subcommands().filter(|c| !c.is_hide_set()) {
        for argument in command
            .get_arguments()
            .filter(|a| !["help", "version"].contains(&a.get_id().as_str()))
        {
            let variable = argument
                .get_env()
                .unwrap_or_else(|| panic!("{} has no variable", argument.get_id()));
            assert!(variable.to_string_lossy().starts_with("CULVERT_"));
        }
    }
}

#[test]
fn the_admin_address_must_be_loopback() {
    let parse = |admin| Cli::try_parse_from(["mesh-agent", "run", "--token-file", "t", "--admin", admin]);
    assert!(parse("[::1]:15000").is_ok());
    let error = parse("0.0.0.0:15000").unwrap_err().to_string();
    assert!(error.contains("--admin") && error.contains("loopback"), "{error}");
}

#[test]
fn the_control_address_is_checked() {
    for good in ["control.example:15012", "10.0.0.1:1", "[2001:db8::1]:15012"] {
        assert!(host_and_port(good).is_ok(), "{good}");
    }
    for bad in ["control", "control:0", "control:x", ":15012", "a/b:1", "2001:db8::1:15012"] {
        assert!(host_and_port(bad).is_err(), "{bad}");
    }
}

#[test]
fn several_addresses_of_a_pod() {
    let Command::Enroll(args) = Cli::try_parse_from([
        "mesh-agent",
        "enroll",
        "--uid",
        "u",
        "--namespace",
        "n",
        "--name",
        "p",
        "--netns",
        "/x",
        "--address",
        "10.0.0.1",
        "--address",
        "fd00::1",
    ])
    .unwrap()
    .command
    else {
        panic!("not enroll")
    };
    assert_eq!(args.addresses.len(), 2);
    assert_eq!(args.service_account, "default");
}

#[test]
fn a_token_file_of_its_owner_is_read_and_its_secret_not_shown() {
    let token = NodeToken::read(token_file(0o600, TOKEN).path()).unwrap();
    assert_eq!(
        (token.node.as_str(), token.root_sha256[0], token.secret.expose()),
        ("node-a", 1, "s3cret-value")
    );
    assert!(!format!("{token:?}").contains("s3cret-value"));
}

#[test]
fn a_token_file_that_others_can_read_is_refused() {
    for mode in [0o640, 0o604, 0o660, 0o610] {
        assert!(matches!(NodeToken::read(token_file(mode, TOKEN).path()), Err(TokenError::Permissions(m)) if m == mode));
    }
}

#[test]
fn a_broken_token_file_is_refused_without_its_contents() {
    for (broken, names) in [
        (TOKEN.replace("0101", "01"), "root_sha256"),
        (TOKEN.replace("127.0.0.1:15012", "127.0.0.1"), "address"),
        (TOKEN.replace("node-a", ""), "node"),
        (TOKEN.replace("\"s3cret-value\"", "5"), "token file"),
        ("s3cret-value".to_owned(), "token file"),
    ] {
        let error = NodeToken::read(token_file(0o600, &broken).path()).unwrap_err().to_string();
        assert!(error.contains(names) && !error.contains("s3cret"), "{error}");
    }
}

#[test]
fn a_token_file_has_a_size() {
    let padded = |bytes: usize| TOKEN.to_owned() + &" ".repeat(bytes - TOKEN.len());
    NodeToken::read(token_file(0o600, &padded(16 * 1024)).path()).unwrap();
    let refused = NodeToken::read(token_file(0o600, &padded(16 * 1024 + 1)).path()).unwrap_err();
    assert!(refused.to_string().contains("more than 16384 bytes"), "{refused}");
}
