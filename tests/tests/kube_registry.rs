//! The registry over a real API server: a control plane in this process, with no more rights than it needs, follows it.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

#[path = "kube_registry/captures.rs"]
mod captures;
#[path = "kube_registry/endpoints.rs"]
mod endpoints;
#[path = "kube_registry/large.rs"]
mod large;
#[path = "kube_registry/network_policies.rs"]
mod network_policies;
#[path = "kube_registry/notices.rs"]
mod notices;
#[path = "kube_registry/outages.rs"]
mod outages;
#[path = "kube_registry/program.rs"]
mod program;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use mesh_control::compile::{EndpointSource, Parameters, Snapshot};
use mesh_control::control_plane::{ControlPlane, Shared};
use mesh_control::kubernetes::{Following, deleted_accounts};
use mesh_control::limits::Bounds;
use mesh_control::metrics::Metrics;
use mesh_control::registry::{Registry, Scan};
use mesh_tests::kube::{ApiServer, client};
use mesh_tests::poll::{self, SOON};
use mesh_tests::suite;
use serde_json::Value;
use tokio::runtime::{Handle, Runtime};

const NAMESPACE: &str = "culvert-system";
pub const ADDRESSES: &str = mesh_proto::ADDRESS_TYPE_URL;
pub const POLICIES: &str = mesh_proto::AUTHORIZATION_TYPE_URL;

/// What the control plane may, and nothing else.
const RIGHTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: culvert-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: culvert-registry}
rules:
- {apiGroups: [""], resources: [namespaces, nodes, pods, services, serviceaccounts], verbs: [list, watch]}
- {apiGroups: [""], resources: [pods], verbs: [patch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
- {apiGroups: [networking.k8s.io], resources: [networkpolicies], verbs: [list, watch]}
- {apiGroups: [events.k8s.io], resources: [events], verbs: [create, patch]}
- {apiGroups: [culvert.dev], resources: [authorizationpolicies, meshconfigs], verbs: [list, watch]}
- {apiGroups: [culvert.dev], resources: [authorizationpolicies/status, meshconfigs/status], verbs: [patch]}
- apiGroups: [apiextensions.k8s.io]
  resources: [customresourcedefinitions]
  resourceNames: [authorizationpolicies.culvert.dev, meshconfigs.culvert.dev]
  verbs: [get]
# The program itself also asks who calls, and keeps its root of trust there.
- {apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: culvert-registry}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-registry}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: mesh-control}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: culvert-registry, namespace: culvert-system}
rules:
- {apiGroups: [""], resources: [configmaps, secrets], verbs: [create]}
- {apiGroups: [""], resources: [configmaps], resourceNames: [culvert-deleted-accounts], verbs: [get, update]}
- {apiGroups: [""], resources: [secrets], resourceNames: [culvert-root], verbs: [get, list, watch, update]}
- {apiGroups: [""], resources: [configmaps], resourceNames: [culvert-roots], verbs: [patch]}
- {apiGroups: [coordination.k8s.io], resources: [leases], verbs: [get, list, create, patch, delete]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-registry, namespace: culvert-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: culvert-registry}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: mesh-control}]
"#;

fn main() -> ExitCode {
    suite::run(
        "kube_registry",
        Bench::set_up,
        |bench, error| error.context(mesh_tests::process::tail(&bench.server.log(), 20)),
        &[
            // First: then the cluster does not have the mesh's own kinds yet.
            ("a_cluster_without_the_meshs_kinds_is_followed", without_kinds),
            ("a_world_in_the_cluster_is_the_same_as_in_a_folder", same_as_folder),
            ("a_broken_policy_keeps_its_last_good_form", broken_policy),
            ("an_endpoint_that_is_not_ready_leaves", endpoints::unready),
            (
                "a_service_without_a_selector_has_the_endpoints_of_its_slices",
                endpoints::by_hand,
            ),
            ("a_proof_told_to_one_replica_is_known_to_the_other", captures::two_replicas),
            ("a_restart_forgets_no_proof", captures::restart),
            ("a_pod_made_anew_has_proven_nothing", captures::made_anew),
            ("a_copied_proof_proves_nothing", captures::copied),
            ("a_forged_proof_touches_no_other_pod", captures::forged),
            ("a_pod_that_leaves_the_mesh_keeps_no_annotation", captures::leaves),
            ("a_deleted_account_stays_deleted_over_a_restart", captures::accounts),
            ("a_network_policy_without_the_meshs_port_is_named", network_policies::named),
            ("owners_of_pods_are_told_what_is_wrong", notices::told),
            ("the_end_of_a_pod_is_told_as_no_loss", notices::ended),
            ("what_all_replicas_see_is_told_by_one_and_once", notices::refused),
            ("a_network_policy_in_the_way_is_told_once_in_each_form", notices::blocked),
            ("many_objects_are_few_lists_and_few_compilations", large::many),
            ("the_control_planes_benchmark_measures_what_it_says", program::benchmark),
            ("an_api_server_that_is_lost_takes_nothing_out_of_force", outages::lost),
            ("the_program_serves_from_a_cluster", program::serves),
            ("rights_that_are_missing_are_said", outages::forbidden),
        ],
    )
}

/// What the checks share.
struct Bench {
    server: ApiServer,
    /// The control plane's own.
    kubeconfig: PathBuf,
    runtime: Runtime,
}

/// A replica of the control plane, as far as the registry goes.
struct Replica {
    control: Arc<ControlPlane>,
    following: Option<Following>,
    runtime: Handle,
}

impl Drop for Replica {
    fn drop(&mut self) {
        if let Some(following) = self.following.take() {
            self.runtime.block_on(following.stop());
        }
    }
}

impl Bench {
    fn set_up() -> Result<Self> {
        let server = ApiServer::start()?;
        let kubeconfig = server.kubeconfig_of("mesh-control", &[])?;
        server.kubectl().apply(RIGHTS)?;
        let by_control = server.kubectl().by(kubeconfig.clone());
        // The API server learns of rights a moment later.
        poll::until_true("the control plane may read and write", SOON, || {
            let may = |what: &[&str]| -> Result<bool> {
                let mut all = vec!["-n", NAMESPACE, "auth", "can-i"];
                all.extend(what);
                Ok(by_control.output(&all)?.status.success())
            };
            Ok(may(&["patch", "pods"])? && may(&["create", "secrets"])?)
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        Ok(Self {
            server,
            kubeconfig,
            runtime,
        })
    }

    /// One that has read everything.
    fn replica(&self) -> Result<Replica> {
        let replica = self.replica_by(&self.kubeconfig)?;
        poll::until_true("the control plane is ready", SOON, || Ok(replica.control.is_ready()))?;
        Ok(replica)
    }

    fn replica_by(&self, kubeconfig: &std::path::Path) -> Result<Replica> {
        let (control, following) = self.runtime.block_on(async {
            let client = client(kubeconfig).await?;
            // Somebody without rights waits in vain: what follows is what that test is about.
            let deleted = tokio::time::timeout(SOON, deleted_accounts(&client, NAMESPACE)).await;
            let deleted = deleted.unwrap_or_default();
            let shared = Arc::new(Shared::default());
            let metrics = Arc::new(Metrics::new()?);
            let control = ControlPlane::shared(
                parameters(EndpointSource::Slices),
                deleted,
                Arc::clone(&shared),
                metrics,
                Bounds::default(),
            );
            let control = Arc::new(control);
            tokio::spawn(Arc::clone(&control).publish_when_due());
            let following = Following::start(&client, NAMESPACE, &control, &shared);
            anyhow::Ok((control, following))
        })?;
        Ok(Replica {
            control,
            following: Some(following),
            runtime: self.runtime.handle().clone(),
        })
    }

    fn apply(&self, manifests: &str) -> Result<()> {
        self.server.kubectl().apply(manifests).map(drop)
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        self.server.kubectl().run(arguments)
    }

    /// The status of a thing, as its controller would write it.
    fn set_status(&self, namespace: &str, thing: &str, name: &str, status: &Value) -> Result<()> {
        let patch = serde_json::json!({"status": status}).to_string();
        self.run(&[
            "-n",
            namespace,
            "patch",
            thing,
            name,
            "--subresource=status",
            "--type=merge",
            "-p",
            &patch,
        ])
        .map(drop)
    }

    /// A Pod that runs and has addresses.
    fn pod(&self, namespace: &str, name: &str, ips: &[&str]) -> Result<()> {
        self.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
             spec:\n  nodeName: node-a\n  serviceAccountName: web\n  containers:\n  - name: main\n    image: nowhere.test/a:1\n    \
             ports: [{{name: http, containerPort: 8080}}]\n"
        ))?;
        self.set_ready(namespace, name, ips, true)
    }

    fn set_ready(&self, namespace: &str, name: &str, ips: &[&str], ready: bool) -> Result<()> {
        let status = serde_json::json!({
            "phase": "Running",
            "podIP": ips[0],
            "podIPs": ips.iter().map(|ip| serde_json::json!({"ip": ip})).collect::<Vec<_>>(),
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
        });
        self.set_status(namespace, "pod", name, &status)
    }

    /// A namespace in the mesh, with the account of its Pods.
    fn namespace(&self, name: &str) -> Result<()> {
        self.apply(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{culvert.dev/mesh: enabled}}}}\n---\n\
             apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: web, namespace: {name}}}\n"
        ))
    }

    /// Without their schemas: so that what no schema lets in is tried, too.
    fn install_kinds(&self) -> Result<()> {
        let mut all = String::new();
        for definition in mesh_api::custom_resource_definitions() {
            let mut definition = serde_json::to_value(definition)?;
            for version in definition["spec"]["versions"].as_array_mut().context("versions")? {
                version["schema"]["openAPIV3Schema"] =
                    serde_json::json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
                if let Some(version) = version.as_object_mut() {
                    version.remove("additionalPrinterColumns");
                }
            }
            all += &format!("---\n{definition}\n");
        }
        self.apply(&all)?;
        self.run(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"])
            .map(drop)
    }
}

fn parameters(endpoints: EndpointSource) -> Parameters {
    Parameters {
        trust_domain: "cluster.local".into(),
        cluster: "Kubernetes".into(),
        pod_ranges: vec![],
        trust_bundle: vec![],
        revoked: std::collections::BTreeSet::new(),
        endpoints,
    }
}

/// The resource's bytes.
fn resource(control: &ControlPlane, kind: &str, name: &str) -> Option<Vec<u8>> {
    let snapshot = control.snapshot();
    snapshot
        .types
        .get(kind)?
        .resources
        .get(name)
        .map(|resource| resource.value.clone())
}

fn without_kinds(bench: &mut Bench) -> Result<()> {
    let replica = bench.replica()?;
    ensure!(
        replica.control.registry_problem().is_none(),
        "{:?}",
        replica.control.registry_problem()
    );
    ensure!(resource(&replica.control, POLICIES, "early/deny").is_none());
    bench.install_kinds()?;
    bench.namespace("early")?;
    bench.apply(&policy("early", "deny", "80"))?;
    poll::until_true("a policy of a kind that was installed later is in force", SOON, || {
        Ok(resource(&replica.control, POLICIES, "early/deny").is_some())
    })
}

fn policy(namespace: &str, name: &str, port: &str) -> String {
    format!(
        "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{action: Deny, rules: [{{to: [{{ports: [{port}]}}]}}]}}\n"
    )
}

fn same_as_folder(bench: &mut Bench) -> Result<()> {
    bench.install_kinds()?;
    bench.namespace("same")?;
    bench.apply("apiVersion: v1\nkind: Node\nmetadata: {name: node-a, labels: {topology.kubernetes.io/zone: z1}}\nspec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24, \"fd00:1::/64\"]}\n")?;
    bench.pod("same", "web", &["10.244.1.10", "fd00:1::10"])?;
    bench.pod("same", "other", &["10.244.1.11", "fd00:1::11"])?;
    bench.apply(&policy("same", "deny", "81"))?;
    bench.apply(
        "apiVersion: culvert.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: same}\nspec: {mtls: Strict}\n",
    )?;
    bench.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: same}\nspec:\n  selector: {app: web}\n  ports:\n  \
         - {name: http, port: 80, targetPort: http}\n  - {name: raw, port: 9000, targetPort: 9001}\n",
    )?;
    bench.apply(&endpoints::slice(
        "same",
        "web-4",
        "web",
        "IPv4",
        &[("10.244.1.10", Some("web"), true)],
    ))?;
    bench.apply(&endpoints::slice(
        "same",
        "web-6",
        "web",
        "IPv6",
        &[("fd00:1::10", Some("web"), true)],
    ))?;
    let replica = bench.replica()?;

    let kinds = "namespaces,nodes,pods,services,serviceaccounts,authorizationpolicies,meshconfigs";
    let list = bench.run(&["get", kinds, "-A", "-o", "json"])?;
    let mut folder = Registry::default();
    folder.apply(&Scan::from([("all.json".to_owned(), Ok(Arc::from(list)))]));
    ensure!(folder.rejections().is_empty(), "{:?}", folder.rejections());
    let state = tempfile::tempdir()?;
    let state = mesh_control::state_dir::StateDir::open(&state.path().join("state"))?;
    let by_folder = ControlPlane::new(
        parameters(EndpointSource::Selectors),
        state,
        Arc::new(Metrics::new()?),
        Bounds::default(),
    )?;
    by_folder.set_world(&folder);
    let expected = told(&by_folder.snapshot());
    ensure!(expected.len() > 5, "{:?}", expected.keys());
    poll::until_true("the cluster says what the folder says", SOON, || {
        Ok(told(&replica.control.snapshot()) == expected)
    })?;
    ensure!(replica.control.snapshot().identities == by_folder.snapshot().identities);
    ensure!(replica.control.snapshot().pod_ranges == by_folder.snapshot().pod_ranges);
    Ok(())
}

/// All resources but for endpoints that are no Pods: the API server's own, of which no folder tells.
fn told(snapshot: &Snapshot) -> std::collections::BTreeMap<(&'static str, String), Vec<u8>> {
    let of_type = snapshot.types.iter().flat_map(|(url, of_type)| {
        let resources = of_type.resources.values();
        resources.map(|resource| ((*url, resource.name.clone()), resource.value.clone()))
    });
    of_type
        .filter(|((_, name), _)| !name.contains("/discovery.k8s.io/EndpointSlice/"))
        .collect()
}

fn broken_policy(bench: &mut Bench) -> Result<()> {
    bench.install_kinds()?;
    bench.namespace("broken")?;
    bench.apply(&policy("broken", "deny", "80"))?;
    let replica = bench.replica()?;
    let before = resource(&replica.control, POLICIES, "broken/deny").context("the policy is in force")?;
    bench.apply(&policy("broken", "deny", "0"))?;
    poll::until_true("the broken one is said", SOON, || {
        let status = replica.control.status();
        let rejected = status["rejected_manifests"].as_array().context("a list")?;
        Ok(rejected.iter().any(|rejected| {
            rejected["object"] == "AuthorizationPolicy broken/deny"
                && rejected["last_good_in_force"] == true
                && rejected["message"].as_str().is_some_and(|text| text.contains("ports"))
        }))
    })?;
    ensure!(resource(&replica.control, POLICIES, "broken/deny") == Some(before.clone()));
    // No policy at all, as far as JSON goes; and another one goes on.
    bench.run(&[
        "-n",
        "broken",
        "patch",
        "authorizationpolicy",
        "deny",
        "--type=merge",
        "-p",
        r#"{"spec": "nonsense"}"#,
    ])?;
    bench.apply(&policy("broken", "more", "81"))?;
    poll::until_true("another policy comes into force", SOON, || {
        Ok(resource(&replica.control, POLICIES, "broken/more").is_some())
    })?;
    ensure!(resource(&replica.control, POLICIES, "broken/deny") == Some(before.clone()));
    bench.run(&["-n", "broken", "delete", "authorizationpolicy", "deny"])?;
    poll::until_true("what is deleted is gone", SOON, || {
        Ok(resource(&replica.control, POLICIES, "broken/deny").is_none())
    })?;
    let rejected = replica.control.status()["rejected_manifests"].clone();
    ensure!(rejected.as_array().is_some_and(Vec::is_empty), "{rejected}");
    Ok(())
}
