//! A control plane whose API server misbehaves: a proxy before a real one answers what it should not. What was read stays in force, agents
//! keep their streams, it is said and counted, the API server is not stormed, and all is well again by itself.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

#[path = "kube_faults/callers.rs"]
mod callers;
#[path = "kube_faults/captures.rs"]
mod captures;
#[path = "kube_faults/control.rs"]
mod control;
#[path = "kube_faults/large.rs"]
mod large;
#[path = "kube_faults/notices.rs"]
mod notices;
#[path = "kube_faults/statuses.rs"]
mod statuses;
#[path = "kube_faults/watches.rs"]
mod watches;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use mesh_tests::kube::ApiServer;
use mesh_tests::suite;
use tokio::runtime::Runtime;

const NAMESPACE: &str = "culvert-system";

fn main() -> ExitCode {
    suite::run(
        "kube_faults",
        Bench::set_up,
        |bench, error| error.context(mesh_tests::process::tail(&bench.server.log(), 20)),
        &[
            ("a_watch_that_is_too_old_is_no_storm_of_lists", watches::gone),
            ("an_api_server_that_asks_for_patience_gets_it", watches::patience),
            ("an_api_server_in_trouble_is_not_made_more_of", watches::trouble),
            ("an_api_server_that_hangs_is_noticed", watches::hang),
            ("a_watch_that_falls_silent_is_noticed", watches::silent),
            ("a_watch_that_is_cut_within_an_event_loses_none", watches::cut),
            ("an_event_without_an_end_takes_bounded_memory", watches::endless),
            ("a_slow_api_server_is_waited_for", watches::slow),
            ("a_start_waits_for_an_api_server_in_trouble", watches::start),
            ("large_objects_keep_no_list_from_being_read", large::objects),
            ("statuses_wait_as_long_as_the_api_server_asks", statuses::patience),
            (
                "a_status_that_is_refused_keeps_no_other_from_being_written",
                statuses::refused,
            ),
            ("leases_are_written_at_their_pace_whatever_changes", statuses::leases),
            ("captures_are_written_at_their_pace", captures::pace),
            ("events_wait_as_long_as_the_api_server_asks", notices::patience),
            (
                "an_event_that_is_forbidden_keeps_no_other_from_being_told",
                notices::forbidden,
            ),
            ("reviews_that_fail_or_hang_cut_no_stream", callers::reviews),
            ("a_token_that_is_over_is_refused_until_its_file_is_new", callers::expired),
        ],
    )
}

/// What the checks share.
struct Bench {
    server: ApiServer,
    kubeconfig: PathBuf,
    runtime: Runtime,
}

impl Bench {
    fn set_up() -> Result<Self> {
        let server = ApiServer::start()?;
        let kubeconfig = server.kubeconfig().to_owned();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let bench = Self {
            server,
            kubeconfig,
            runtime,
        };
        let kubectl = bench.server.kubectl();
        for definition in mesh_api::custom_resource_definitions() {
            kubectl.apply(&serde_json::to_string(&definition)?)?;
        }
        kubectl.run(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"])?;
        kubectl.apply(
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: culvert-system}\n---\n\
             apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: mesh-agent, namespace: culvert-system}\n---\n\
             apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\n---\n\
             apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {culvert.dev/mesh: enabled}}\n---\n\
             apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: web, namespace: shop}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop}\n\
             spec: {nodeName: node-a, serviceAccountName: web, containers: [{name: c, image: 'nowhere.test/app:1'}]}\n",
        )?;
        Ok(bench)
    }

    fn policy(&self, name: &str) -> Result<()> {
        let policy = format!(
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{action: Deny, rules: [{{to: [{{ports: [81]}}]}}]}}\n"
        );
        self.server.kubectl().apply(&policy).map(drop)
    }

    /// Of an agent on node-a, whose Pod it makes.
    fn token(&self, pod: &str) -> Result<String> {
        self.server.kubectl().apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {pod}, namespace: {NAMESPACE}}}\n\
             spec: {{nodeName: node-a, serviceAccountName: mesh-agent, containers: [{{name: c, image: 'nowhere.test/agent:1'}}]}}\n"
        ))?;
        self.server.token(NAMESPACE, "mesh-agent", "culvert", Some(pod))
    }
}
