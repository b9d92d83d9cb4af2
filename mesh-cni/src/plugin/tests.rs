use std::cell::RefCell;
use std::io;
use std::path::Path;

use super::*;

/// An agent that answers, or not, and its list.
struct Fake {
    list: Result<Option<NamespaceList>, ()>,
    answer: Option<Answer>,
    asked: RefCell<Vec<(Request, Patience)>>,
}

impl Node for Fake {
    fn list(&self, _path: &Path) -> io::Result<Option<NamespaceList>> {
        self.list.clone().map_err(|()| io::Error::other("damaged"))
    }

    fn ask(&self, _socket: &Path, request: &Request, patience: Patience) -> io::Result<Answer> {
        self.asked.borrow_mut().push((request.clone(), patience));
        self.answer
            .clone()
            .ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionRefused))
    }
}

fn node(answer: Option<Answer>) -> Fake {
    let namespaces = [("shop".to_owned(), false), ("batch".to_owned(), true)].into();
    Fake {
        list: Ok(Some(NamespaceList { namespaces })),
        answer,
        asked: RefCell::default(),
    }
}

fn environment(command: &str, namespace: &str) -> BTreeMap<String, String> {
    [
        ("CNI_COMMAND", command.to_owned()),
        ("CNI_CONTAINERID", "c0ffee".to_owned()),
        ("CNI_IFNAME", "eth0".to_owned()),
        ("CNI_NETNS", "/run/netns/x".to_owned()),
        (
            "CNI_ARGS",
            format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u-1"
            ),
        ),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

fn input() -> Vec<u8> {
    json!({
        "cniVersion": "1.0.0", "name": "net", "type": "mesh-cni",
        "prevResult": {
            "cniVersion": "0.4.0", "interfaces": [{"name": "eth0"}], "dns": {},
            "ips": [{"address": "10.1.0.5/24", "interface": 0}, {"address": "fd00::5/64"}],
        },
    })
    .to_string()
    .into_bytes()
}

fn code(outcome: &Outcome) -> Option<u64> {
    assert_eq!(
        outcome.failed,
        outcome.result.as_ref().is_some_and(|result| result.get("code").is_some())
    );
    outcome.result.as_ref()?.get("code")?.as_u64()
}

#[test]
fn networks_of_older_versions_are_served_and_those_before_them_refused() {
    let input = |version: &str| {
        let mut input: Value = serde_json::from_slice(&input()).unwrap();
        input["cniVersion"] = version.into();
        // As that version writes addresses.
        input["prevResult"]["ips"][0]["version"] = "4".into();
        input.to_string().into_bytes()
    };
    for version in ["0.3.0", "0.3.1"] {
        let node = node(Some(Answer::Done));
        let outcome = run(&environment("ADD", "shop"), &input(version), &node);
        let result = outcome.result.clone().unwrap();
        assert_eq!((code(&outcome), &result["cniVersion"]), (None, &json!(version)));
        assert_eq!(result["ips"][0]["version"], "4");
        assert_eq!(node.asked.borrow().len(), 1);
    }
    let node = node(Some(Answer::Done));
    assert_eq!(code(&run(&environment("ADD", "shop"), &input("0.2.0"), &node)), Some(1));
}

#[test]
fn an_enrolled_pod_starts_with_what_the_plugins_before_have_made() {
    let node = node(Some(Answer::Done));
    let outcome = run(&environment("ADD", "shop"), &input(), &node);
    let result = outcome.result.as_ref().unwrap();
    assert!(!outcome.failed && outcome.remark.is_none());
    assert_eq!(
        (&result["cniVersion"], &result["ips"][1]["address"]),
        (&json!("1.0.0"), &json!("fd00::5/64"))
    );
    assert_eq!(result["interfaces"], json!([{"name": "eth0"}]));
    let asked = node.asked.borrow();
    let addresses: Vec<IpAddr> = vec!["10.1.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
    assert_eq!(
        (asked[0].0.uid.as_str(), &asked[0].0.addresses, asked[0].1),
        ("u-1", &addresses, OF_THE_MESH)
    );
}

#[test]
fn without_an_agent_only_pods_of_the_mesh_wait_and_not_those_that_need_not() {
    for (namespace, expected) in [("shop", Some(11)), ("batch", None), ("kube-system", None)] {
        let outcome = run(&environment("ADD", namespace), &input(), &node(None));
        assert_eq!(code(&outcome), expected, "{namespace}");
        let said = outcome
            .remark
            .or_else(|| outcome.result.map(|result| result["msg"].to_string()));
        assert!(said.is_some_and(|said| said.contains("does not answer")), "{namespace}");
    }
    // Nor is anybody but them kept waiting.
    let other = node(None);
    let _ = run(&environment("ADD", "kube-system"), &input(), &other);
    assert_eq!(other.asked.borrow()[0].1, OF_OTHERS);
}

#[test]
fn without_a_list_or_with_a_damaged_one_every_pod_starts_and_it_is_said() {
    for (list, word) in [(Ok(None), "no agent has left"), (Err(()), "damaged")] {
        let node = Fake { list, ..node(None) };
        let outcome = run(&environment("ADD", "shop"), &input(), &node);
        assert_eq!(code(&outcome), None);
        assert!(
            outcome.remark.as_ref().is_some_and(|remark| remark.contains(word)),
            "{outcome:?}"
        );
    }
}

#[test]
fn what_the_agent_answers_decides() {
    let failed = || {
        Some(Answer::Failed {
            why: "no certificate".to_owned(),
        })
    };
    for (namespace, answer, expected) in [
        ("shop", failed(), Some(100)),
        ("batch", failed(), None),
        ("legacy", failed(), None),
        (
            "shop",
            Some(Answer::NotAMember {
                why: "it opts out".to_owned(),
            }),
            None,
        ),
    ] {
        let outcome = run(&environment("ADD", namespace), &input(), &node(answer));
        assert_eq!(code(&outcome), expected, "{namespace}");
        let said = outcome
            .remark
            .or_else(|| outcome.result.map(|result| result["msg"].to_string()));
        assert!(said.is_some_and(|said| said.contains("no certificate") || said.contains("opts out")));
    }
}

#[test]
fn a_del_always_succeeds_and_says_what_it_could_not_do() {
    for answer in [None, Some(Answer::Done), Some(Answer::Failed { why: "busy".to_owned() })] {
        let outcome = run(&environment("DEL", "shop"), &input(), &node(answer));
        assert_eq!((outcome.failed, outcome.result), (false, None));
    }
    let outcome = run(&environment("DEL", "shop"), b"nonsense", &node(None));
    assert!(!outcome.failed && outcome.remark.is_some());
}

#[test]
fn check_tells_whether_it_still_stands() {
    let checked = |answer| code(&run(&environment("CHECK", "shop"), &input(), &node(answer)));
    assert_eq!(checked(Some(Answer::Done)), None);
    assert_eq!(
        checked(Some(Answer::Failed {
            why: "not proven".to_owned()
        })),
        Some(100)
    );
}

#[test]
fn versions_are_told_and_others_refused() {
    let outcome = run(&environment("VERSION", ""), br#"{"cniVersion":"1.1.0"}"#, &node(None));
    let told = outcome.result.unwrap();
    assert_eq!(
        (&told["cniVersion"], &told["supportedVersions"]),
        (&json!("1.1.0"), &json!(SUPPORTED_VERSIONS))
    );
    let old = input()
        .iter()
        .map(|byte| *byte as char)
        .collect::<String>()
        .replace("1.0.0", "0.2.0");
    assert_eq!(code(&run(&environment("ADD", "shop"), old.as_bytes(), &node(None))), Some(1));
}

#[test]
fn what_is_malformed_has_an_error_of_its_own() {
    let add = environment("ADD", "shop");
    assert_eq!(code(&run(&add, b"{", &node(None))), Some(6));
    assert_eq!(code(&run(&add, br#"{"cniVersion":"1.0.0"}"#, &node(None))), Some(7));
    let address = br#"{"cniVersion":"1.0.0","prevResult":{"ips":[{"address":"nonsense"}]}}"#;
    assert_eq!(code(&run(&add, address, &node(None))), Some(6));
    assert_eq!(code(&run(&environment("DANCE", "shop"), &input(), &node(None))), Some(4));
    let mut without = add.clone();
    without.remove("CNI_NETNS");
    assert_eq!(code(&run(&without, &input(), &node(None))), Some(4));
    // Nobody's Pod is nobody's business.
    let mut of_none = add;
    of_none.insert("CNI_ARGS".to_owned(), "IgnoreUnknown=1".to_owned());
    let outcome = run(&of_none, &input(), &node(None));
    assert!(!outcome.failed && outcome.result.is_some() && outcome.remark.is_some());
}
