//! What `deploy` installs, on a real API server: its definitions refuse nonsense at admission with the field's name, and accept exactly
//! what the mesh's own validation accepts.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

#[path = "kube_admission/corpus.rs"]
mod corpus;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, stream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use mesh_api::{AuthorizationPolicy, AuthorizationPolicySpec, MeshConfig, MeshConfigScope, MeshConfigSpec, Status, Verdict};
use mesh_tests::kube::ApiServer;
use mesh_tests::suite;
use serde::Deserialize;
use serde_json::{Value, json};

/// The mesh's own, and one of its users'.
const ROOT: &str = "culvert-system";
const SHOP: &str = "shop";
/// Enough that each value of the corpus has its turn in each field.
const OBJECTS: usize = 1_200;
const AT_ONCE: usize = 8;

struct Bed {
    server: ApiServer,
    runtime: tokio::runtime::Runtime,
    client: kube::Client,
}

/// Of mesh-api/admission.yaml.
#[derive(Deserialize)]
struct Case {
    what: String,
    kind: String,
    #[serde(default)]
    scope: Option<String>,
    spec: Value,
    names: Vec<String>,
}

fn main() -> ExitCode {
    suite::run(
        "kube_admission",
        Bed::start,
        |bed, error| error.context(mesh_tests::process::tail(&bed.server.log(), 20)),
        &[
            ("the_definitions_are_established", established),
            ("each_nonsense_is_refused_with_its_field", nonsense),
            ("the_api_server_and_validation_agree", agreement),
            ("a_policy_at_its_bounds_is_affordable", bounds),
            ("unknown_fields_and_other_names_are_refused", unknown),
            ("a_status_is_written_back_and_shown", status),
            ("kubectl_explains", explain),
            ("the_agent_may_nothing_and_the_control_plane_little", rights),
            ("the_manifests_are_what_a_rollout_needs", manifests),
        ],
    )
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

impl Bed {
    /// As the README installs it, without Pods: there is nobody to start them.
    fn start() -> Result<Self> {
        let server = ApiServer::start()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let client = runtime.block_on(server.client())?;
        let (definitions, manifests) = (repository("deploy/crds"), repository("deploy/culvert.yaml"));
        let path = |path: &Path| path.to_str().map(str::to_owned).context("a path");
        server
            .kubectl()
            .run(&["apply", "--server-side", "-f", &path(&definitions)?, "-f", &path(&manifests)?])?;
        server.kubectl().run(&["create", "namespace", SHOP])?;
        for kind in ["authorizationpolicies", "meshconfigs"] {
            let name = format!("crd/{kind}.culvert.dev");
            server
                .kubectl()
                .run(&["wait", "--for=condition=Established", "--timeout=60s", &name])?;
        }
        let bed = Self { server, runtime, client };
        // A policy of admission counts some moments after it was written.
        let object = object("MeshConfig", &json!({}));
        mesh_tests::poll::until_true("the admission policy is in force", mesh_tests::poll::SOON, || {
            Ok(bed.create(SHOP, &object)?.is_some())
        })?;
        Ok(bed)
    }

    /// Why the API server refuses it, if it does. Nothing is stored.
    fn create(&self, namespace: &str, object: &DynamicObject) -> Result<Option<String>> {
        self.runtime.block_on(create(&self.client, namespace, object))
    }
}

async fn create(client: &kube::Client, namespace: &str, object: &DynamicObject) -> Result<Option<String>> {
    let types = object.types.as_ref().context("types")?;
    let resource = match types.kind.as_str() {
        "MeshConfig" => ApiResource::erase::<MeshConfig>(&()),
        _ => ApiResource::erase::<AuthorizationPolicy>(&()),
    };
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &resource);
    let dry_run = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    match api.create(&dry_run, object).await {
        Ok(_) => Ok(None),
        Err(kube::Error::Api(status)) if status.code == 422 => Ok(Some(status.message.clone())),
        Err(error) => Err(error).context("the API server's answer"),
    }
}

fn object(kind: &str, spec: &Value) -> DynamicObject {
    let object = json!({
        "apiVersion": mesh_api::API_VERSION,
        "kind": kind,
        "metadata": {"name": "default"},
        "spec": spec,
    });
    serde_json::from_value(object).expect("an object")
}

fn established(bed: &mut Bed) -> Result<()> {
    for name in ["authorizationpolicies.culvert.dev", "meshconfigs.culvert.dev"] {
        let definition = bed.server.kubectl().get(&["crd", name])?;
        let conditions = definition["status"]["conditions"].as_array().context("no conditions")?;
        let is = |kind: &str| conditions.iter().any(|one| one["type"] == kind && one["status"] == "True");
        ensure!(is("Established") && is("NamesAccepted"), "{name}: {conditions:?}");
        ensure!(!is("NonStructuralSchema"), "{name}: {conditions:?}");
    }
    Ok(())
}

/// `{repeat: X, times: N}` is a list.
fn repeat(value: &mut Value) {
    if let (Some(item), Some(times)) = (value.get("repeat"), value.get("times").and_then(Value::as_u64)) {
        *value = (0..times).map(|_| item.clone()).collect();
    }
    match value {
        Value::Array(items) => items.iter_mut().for_each(repeat),
        Value::Object(fields) => fields.values_mut().for_each(repeat),
        _ => {}
    }
}

fn nonsense(bed: &mut Bed) -> Result<()> {
    let text = std::fs::read_to_string(repository("mesh-api/admission.yaml"))?;
    let cases: Vec<Case> = serde_norway::from_str(&text)?;
    ensure!(cases.len() > 20, "{} cases", cases.len());
    for mut case in cases {
        repeat(&mut case.spec);
        let namespace = if case.scope.is_some() { SHOP } else { ROOT };
        let refused = bed.create(namespace, &object(&case.kind, &case.spec))?;
        let refused = refused.with_context(|| format!("{}: accepted", case.what))?;
        for name in &case.names {
            ensure!(
                refused.contains(name.as_str()),
                "{}: {name:?} is not in {refused:?}",
                case.what
            );
        }
    }
    Ok(())
}

/// Whatever the one accepts the other accepts, and the other way round.
fn agreement(bed: &mut Bed) -> Result<()> {
    let seed = rand::random();
    suite::say(&format!("the corpus of seed {seed}"));
    let corpus = corpus::Corpus::new(seed).take(OBJECTS);
    let client = &bed.client;
    let answers = bed.runtime.block_on(async {
        let asked = corpus.map(|(kind, namespace_only, spec)| async move {
            let namespace = if namespace_only { SHOP } else { ROOT };
            let refused = create(client, namespace, &object(kind, &spec)).await?;
            Ok::<_, anyhow::Error>((kind, namespace_only, spec, refused))
        });
        stream::iter(asked).buffer_unordered(AT_ONCE).collect::<Vec<_>>().await
    });
    let mut accepted = 0;
    for answer in answers {
        let (kind, namespace_only, spec, at_admission) = answer?;
        let by_validation = validate(kind, namespace_only, &spec);
        ensure!(
            at_admission.is_none() == by_validation.is_ok(),
            "seed {seed}: {kind} {spec}\n  the API server: {at_admission:?}\n  validation: {by_validation:?}"
        );
        accepted += usize::from(at_admission.is_none());
    }
    // Neither is trivial.
    ensure!(
        (OBJECTS / 20..OBJECTS * 19 / 20).contains(&accepted),
        "{accepted} of {OBJECTS} accepted"
    );
    Ok(())
}

fn validate(kind: &str, namespace_only: bool, spec: &Value) -> Result<(), String> {
    let said = |error: &dyn std::fmt::Display| error.to_string();
    if kind == "MeshConfig" {
        let scope = if namespace_only {
            MeshConfigScope::Namespace
        } else {
            MeshConfigScope::Mesh
        };
        let spec: MeshConfigSpec = serde_json::from_value(spec.clone()).map_err(|error| said(&error))?;
        spec.validate(scope).map(drop).map_err(|error| said(&error))
    } else {
        let spec: AuthorizationPolicySpec = serde_json::from_value(spec.clone()).map_err(|error| said(&error))?;
        spec.validate().map(drop).map_err(|error| said(&error))
    }
}

/// What the API server spends on CEL is bounded, for all expressions of an object together.
fn bounds(bed: &mut Bed) -> Result<()> {
    let many = |of: fn(usize) -> Value| (0..128).map(of).collect::<Vec<_>>();
    let source = json!({
        "principals": many(|i| json!(format!("cluster.local/ns/shop/sa/account-{i}"))),
        "namespaces": many(|i| json!(format!("shop-{i}*"))),
        "ipBlocks": many(|i| json!(format!("10.{i}.0.0/16"))),
        "notIpBlocks": many(|i| json!(format!("2001:db8:{i:x}::/48"))),
    });
    let rule = json!({
        "from": vec![source; 16],
        "to": vec![json!({"ports": (1..129).collect::<Vec<_>>()}); 16],
    });
    let spec = json!({"action": "Allow", "rules": vec![rule; 6]});
    ensure!(spec.to_string().len() > 900_000, "{} bytes", spec.to_string().len());
    let refused = bed.create(ROOT, &object("AuthorizationPolicy", &spec))?;
    ensure!(refused.is_none(), "{refused:?}");
    validate("AuthorizationPolicy", false, &spec).map_err(anyhow::Error::msg)?;
    let spec = json!({"action": "Allow", "rules": vec![json!({}); 64]});
    ensure!(bed.create(ROOT, &object("AuthorizationPolicy", &spec))?.is_none());
    Ok(())
}

fn unknown(bed: &mut Bed) -> Result<()> {
    let kubectl = bed.server.kubectl();
    for (manifest, said) in [
        (
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: {action: Allow, rule: []}\n",
            "unknown field \"spec.rule\"",
        ),
        (
            "apiVersion: culvert.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: other, namespace: shop}\nspec: {mtls: Strict}\n",
            "metadata.name must be default",
        ),
        (
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: {action: Permit}\n",
            "spec.action: Unsupported value: \"Permit\": supported values: \"Allow\", \"Deny\"",
        ),
        (
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n",
            "spec: Required value",
        ),
    ] {
        let error = kubectl
            .apply(manifest)
            .err()
            .with_context(|| format!("accepted: {manifest}"))?;
        let error = format!("{error:#}");
        ensure!(error.contains(said), "{said:?} is not in {error:?}");
    }
    Ok(())
}

fn status(bed: &mut Bed) -> Result<()> {
    let kubectl = bed.server.kubectl();
    kubectl.apply(
        "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: shown, namespace: shop}\nspec: {action: Deny, rules: [{}]}\n",
    )?;
    let written = bed.runtime.block_on(async {
        let api: Api<AuthorizationPolicy> = Api::namespaced(bed.client.clone(), SHOP);
        let found = api.get("shown").await?;
        let generation = found.metadata.generation.context("a generation")?;
        let now = Time(Timestamp::from_second(1_700_000_000)?);
        let verdict = Verdict::InForce {
            workloads: 7,
            nodes: Some(3),
            rejecting: &[],
        };
        let status = Status::next(found.status.as_ref(), generation, verdict, &now);
        let patch = Patch::Merge(json!({"status": status}));
        let written = api.patch_status("shown", &PatchParams::default(), &patch).await?;
        ensure!(written.status.as_ref() == Some(&status), "{:?}", written.status);
        // A change of status is none of the object.
        ensure!(written.metadata.generation == Some(generation), "{:?}", written.metadata);
        Ok(written)
    })?;
    ensure!(
        written.spec.mode == mesh_api::Mode::Enforce,
        "the default: {:?}",
        written.spec
    );
    expect_table(
        bed,
        "culvert",
        &["NAME", "ACTION", "MODE", "ACCEPTED", "REASON", "WORKLOADS", "NODES", "AGE"],
        &["Deny", "Enforce", "True", "Accepted", "7", "3"],
    )?;
    mesh_config_shown(bed)
}

fn mesh_config_shown(bed: &Bed) -> Result<()> {
    let kubectl = bed.server.kubectl();
    let config =
        "apiVersion: culvert.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: shop}\nspec: {mtls: Strict}\n";
    kubectl.apply(config)?;
    let verdict = Verdict::InForce {
        workloads: 5,
        nodes: Some(2),
        rejecting: &[],
    };
    let status = Status::next(None, 1, verdict, &Time(Timestamp::from_second(1_700_000_000)?));
    let patch = json!({"status": status}).to_string();
    kubectl.run(&[
        "-n",
        SHOP,
        "patch",
        "meshconfig",
        "default",
        "--subresource=status",
        "--type=merge",
        "--patch",
        &patch,
    ])?;
    expect_table(
        bed,
        "meshconfigs",
        &["NAME", "MTLS", "ACCEPTED", "REASON", "WORKLOADS", "NODES", "AGE"],
        &["default", "Strict", "True", "Accepted", "5", "2"],
    )?;
    kubectl.delete(config).map(drop)
}

/// What `kubectl get` shows of the only one: the end of its row, but for its age, which is the clock's.
fn expect_table(bed: &Bed, what: &str, header: &[&str], row: &[&str]) -> Result<()> {
    let table = bed.server.kubectl().run(&["-n", SHOP, "get", what])?;
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    ensure!(rows.first().is_some_and(|first| first.as_slice() == header), "{table}");
    let only = rows.get(1).and_then(|only| only.split_last());
    ensure!(only.is_some_and(|(_, shown)| shown.ends_with(row)), "{table}");
    Ok(())
}

fn explain(bed: &mut Bed) -> Result<()> {
    let explain = |what: &str| -> Result<String> {
        let said = bed.server.kubectl().run(&["explain", what])?;
        Ok(said.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    for (what, said) in [
        ("authorizationpolicy", "A connection that any Deny policy matches is refused."),
        (
            "authorizationpolicy.spec.rules",
            "an Allow policy without rules allows nothing",
        ),
        ("authorizationpolicy.spec.rules.from.principals", "as mutual TLS proved them"),
        ("authorizationpolicy.status.workloadsSelected", "0: it selects nothing"),
        ("meshconfig.spec.mtls", "ENUM: Permissive Strict"),
    ] {
        let found = explain(what)?;
        ensure!(found.to_lowercase().contains(&said.to_lowercase()), "{what}: {found}");
        ensure!(!found.contains('`'), "{what}: {found}");
    }
    Ok(())
}

fn rights(bed: &mut Bed) -> Result<()> {
    let may = |account: &str, arguments: &[&str]| -> Result<bool> {
        let user = format!("--as=system:serviceaccount:{ROOT}:{account}");
        let group = format!("--as-group=system:serviceaccounts:{ROOT}");
        let mut all = vec!["auth", "can-i", &user, &group];
        all.extend(arguments);
        Ok(bed.server.kubectl().output(&all)?.stdout.trim() == "yes")
    };
    let everywhere = ["--all-namespaces"];
    for (verb, of, expected) in [
        ("list", "pods", true),
        ("watch", "endpointslices.discovery.k8s.io", true),
        ("patch", "pods", true),
        ("update", "pods", false),
        ("delete", "pods", false),
        ("create", "pods", false),
        ("list", "secrets", false),
        ("get", "secrets", false),
        ("list", "configmaps", false),
        ("create", "tokenreviews.authentication.k8s.io", true),
        ("create", "serviceaccounts/token", false),
        ("update", "authorizationpolicies.culvert.dev", false),
    ] {
        let arguments = [&[verb, of][..], &everywhere].concat();
        ensure!(may("mesh-control", &arguments)? == expected, "mesh-control: {verb} {of}");
        ensure!(!may("mesh-agent", &arguments)?, "mesh-agent: {verb} {of}");
    }
    for (verb, of, expected) in [
        ("get", "secrets/culvert-root", true),
        ("update", "secrets/culvert-root", true),
        ("get", "secrets/another", false),
        ("delete", "secrets/culvert-root", false),
        ("patch", "configmaps/culvert-roots", true),
        ("patch", "configmaps/another", false),
    ] {
        ensure!(
            may("mesh-control", &["-n", ROOT, verb, of])? == expected,
            "mesh-control: {verb} {of}"
        );
        ensure!(
            !may("mesh-control", &["-n", SHOP, verb, of])?,
            "mesh-control elsewhere: {verb} {of}"
        );
    }
    Ok(())
}

/// What would only be noticed in the middle of a rollout.
fn manifests(bed: &mut Bed) -> Result<()> {
    let agent = bed.server.kubectl().get(&["-n", ROOT, "daemonset", "mesh-agent"])?;
    let update = &agent["spec"]["updateStrategy"]["rollingUpdate"];
    ensure!(update["maxSurge"] == 1 && update["maxUnavailable"] == 0, "{update}");
    let pod = &agent["spec"]["template"]["spec"];
    ensure!(
        pod["hostNetwork"] == true && pod["priorityClassName"] == "system-node-critical",
        "{pod}"
    );
    let both = ["initContainers", "containers"]
        .iter()
        .filter_map(|field| pod[field].as_array())
        .flatten();
    for container in both {
        // The API server would make host ports of them, and no second agent would fit on the node.
        ensure!(container["ports"].is_null(), "{container}");
        let security = &container["securityContext"];
        ensure!(
            security["privileged"].is_null() && security["readOnlyRootFilesystem"] == true,
            "{security}"
        );
        ensure!(security["capabilities"]["drop"] == json!(["ALL"]), "{security}");
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            ensure!(container[probe]["httpGet"].is_null(), "{probe} asks whoever has the port");
        }
    }
    let control = bed.server.kubectl().get(&["-n", ROOT, "deployment", "mesh-control"])?;
    let pod = &control["spec"]["template"]["spec"];
    ensure!(
        control["spec"]["replicas"] == 2 && pod["securityContext"]["runAsNonRoot"] == true,
        "{control}"
    );
    Ok(())
}
