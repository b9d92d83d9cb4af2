//! NetworkPolicies that would keep the mesh's own connections out.

use anyhow::{Result, ensure};
use mesh_tests::poll::{self, SOON};

use crate::{Bench, Replica};

pub fn named(bench: &mut Bench) -> Result<()> {
    bench.namespace("walled")?;
    bench.pod("walled", "a", &["10.244.3.21"])?;
    let policy = |ports: &str| {
        bench.apply(&format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: only-http, namespace: walled}}\n\
             spec: {{podSelector: {{matchLabels: {{app: a}}}}, ingress: [{{ports: [{ports}]}}]}}\n"
        ))
    };
    let replica = bench.replica()?;
    let found = |replica: &Replica| {
        let status = replica.control.status();
        let found = status["network_policies_in_the_way"].as_array().cloned().unwrap_or_default();
        found.into_iter().find(|finding| finding["policy"] == "walled/only-http")
    };
    policy("{port: 8080}")?;
    let finding = poll::until("the policy is found", SOON, || Ok(found(&replica)))?;
    ensure!(finding["pods"] == 1 && finding["direction"] == "ingress", "{finding}");
    let advice = finding["advice"].as_str().unwrap_or_default();
    ensure!(advice.contains("15008") && advice.contains("walled/only-http"), "{advice}");
    let page = replica.control.metrics.text()?;
    ensure!(
        page.lines()
            .any(|line| line == "mesh_control_network_policies_in_the_way{direction=\"ingress\"} 1"),
        "{page}"
    );
    policy("{port: 8080}, {port: 15008}")?;
    poll::until_true("it is mended", SOON, || Ok(found(&replica).is_none()))?;
    bench.run(&["-n", "walled", "delete", "networkpolicy", "only-http"]).map(drop)
}
