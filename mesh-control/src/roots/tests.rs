use super::*;

fn state() -> (tempfile::TempDir, StateDir) {
    let dir = tempfile::tempdir().expect("directory");
    let state = StateDir::open(&dir.path().join("state")).expect("state");
    (dir, state)
}

fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

fn signing(roots: &Roots) -> String {
    roots.in_force().authority.root_sha256()
}

#[test]
fn a_root_is_replaced_step_by_step() {
    let (_dir, state) = state();
    let roots = Roots::open(&state, "cluster.local", now()).expect("roots");
    let step = |step| rotate(&state, step, "cluster.local", now());
    let first = signing(&roots);
    assert!(step(Step::Activate).is_err(), "nothing is prepared");
    assert!(!roots.reload(now()).expect("the same"));

    step(Step::Prepare).expect("prepared");
    assert!(step(Step::Prepare).is_err(), "one at a time");
    assert!(step(Step::Retire).is_err(), "the next one would no longer be trusted");
    assert!(roots.reload(now()).expect("read"));
    assert_eq!((roots.in_force().bundle.len(), signing(&roots)), (2, first.clone()));

    step(Step::Activate).expect("activated");
    assert!(roots.reload(now()).expect("read"));
    let bundle = roots.in_force().bundle.clone();
    assert_eq!(bundle.len(), 2, "the former one stays trusted");
    assert_ne!(signing(&roots), first);
    assert_eq!(bundle[0], roots.in_force().authority.root_pem());

    step(Step::Retire).expect("retired");
    assert!(roots.reload(now()).expect("read"));
    assert_eq!(roots.in_force().bundle, [bundle[0].clone()]);
    // The same after a restart.
    let again = Roots::open(&state, "cluster.local", now()).expect("roots");
    assert_eq!(again.in_force().bundle, roots.in_force().bundle);
}

#[test]
fn there_are_only_so_many_roots_and_always_a_way_back() {
    let (_dir, state) = state();
    let roots = Roots::open(&state, "cluster.local", now()).expect("roots");
    let step = |step| rotate(&state, step, "cluster.local", now());
    for _ in 1..MAX_TRUSTED_ROOTS {
        step(Step::Prepare).expect("prepared");
        step(Step::Activate).expect("activated");
    }
    let refused = step(Step::Prepare).expect_err("one too many").to_string();
    assert!(refused.contains("retire"), "{refused}");
    assert!(roots.reload(now()).expect("read"));
    assert_eq!(roots.in_force().bundle.len(), MAX_TRUSTED_ROOTS);
    step(Step::Retire).expect("retired");
    step(Step::Prepare).expect("room again");
}

#[test]
fn what_cannot_be_read_leaves_in_force_what_was() {
    let (_dir, state) = state();
    let roots = Roots::open(&state, "cluster.local", now()).expect("roots");
    let before = roots.in_force().bundle.clone();
    let key_only = authority::new_root("cluster.local", now()).expect("root").key_pem;
    for broken in [
        "",
        "garbage",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        &key_only,
    ] {
        state.write(TRUSTED, broken.as_bytes()).expect("written");
        assert!(roots.reload(now()).is_err(), "{broken}");
        assert_eq!(roots.in_force().bundle, before);
    }
    let many: String = (0..MAX_TRUSTED_ROOTS)
        .map(|_| authority::new_root("cluster.local", now()).expect("root").pem())
        .collect();
    state.write(TRUSTED, many.as_bytes()).expect("written");
    assert!(roots.reload(now()).is_err(), "too many");
    state.remove(TRUSTED).expect("removed");
    assert!(!roots.reload(now()).expect("as before"));
    // A root that vanishes is not made anew under a running mesh.
    state.remove(authority::ROOT).expect("removed");
    assert!(roots.reload(now()).is_err());
    assert_eq!(roots.in_force().bundle, before);
}

#[test]
fn a_file_of_roots_is_bounded() {
    let (_dir, state) = state();
    let roots = Roots::open(&state, "cluster.local", now()).expect("roots");
    let before = roots.in_force().bundle.clone();
    let signing = state.read(authority::ROOT, MAX_PEM_BYTES).expect("read").expect("a root");
    let other = authority::new_root("cluster.local", now()).expect("root").pem().into_bytes();
    for (file, pem) in [(TRUSTED, other), (authority::ROOT, signing.clone())] {
        let padded = |bytes: u64| {
            let room = usize::try_from(bytes).expect("small") - pem.len();
            let content = [pem.clone(), vec![b'\n'; room]].concat();
            state.write(file, &content).expect("written");
        };
        padded(MAX_PEM_BYTES + 1);
        let refused = roots.reload(now()).expect_err("too large").to_string();
        assert!(
            refused.contains(file) && refused.contains("more than 65536 bytes"),
            "{refused}"
        );
        assert_eq!(roots.in_force().bundle, before, "{file}");
        padded(MAX_PEM_BYTES);
        roots.reload(now()).expect("exactly as many");
        state.remove(TRUSTED).expect("removed");
        state.write(authority::ROOT, &signing).expect("written");
        roots.reload(now()).expect("as before");
    }
}
