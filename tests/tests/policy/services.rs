//! Services of one family of addresses, and ranges of addresses that the mesh leaves alone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::manifests::{MESHED, PodManifest, ROOT_NAMESPACE, SERVICE_PORT, service};
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::SOON;
use mesh_tests::topology::NodeName;

use crate::{QUICKLY, configure, outsider_gets_in, unconfigure};

const ONLY_V4: Ipv4Addr = Ipv4Addr::new(10, 96, 9, 40);
const ONLY_V6: Ipv6Addr = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 9, 0x60);

pub fn one_family(mesh: &mut Mesh) -> Result<()> {
    let server = mesh.pod("server");
    for (name, vip, family, endpoint) in [
        ("only4", IpAddr::from(ONLY_V4), "IPv4", IpAddr::from(server.v4)),
        ("only6", IpAddr::from(ONLY_V6), "IPv6", IpAddr::from(server.v6)),
    ] {
        let manifest = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: {MESHED} }}\n\
             spec:\n  clusterIP: \"{vip}\"\n  clusterIPs: [\"{vip}\"]\n  ipFamilies: [{family}]\n\
             \x20 selector: {{ app: server }}\n  ports: [{{ port: {SERVICE_PORT}, targetPort: {ECHO_PORT} }}]\n"
        );
        mesh.add_service(NodeName::One, name, &manifest)?;
        mesh.wait_for_outcome("client", vip, SERVICE_PORT, true)?;
        let log = mesh.access_log(NodeName::One);
        let position = log.position();
        let attempt = mesh.app.connect(&mesh.pod("client").place(), vip, SERVICE_PORT)?;
        let wanted = SocketAddr::new(vip, SERVICE_PORT).to_string();
        ensure!(attempt.expect_ok()?.report["peer"] == wanted.as_str(), "{}", attempt.report);
        let (service, at) = (
            format!("{name}.{MESHED}.svc.cluster.local"),
            SocketAddr::new(endpoint, ECHO_PORT).to_string(),
        );
        let fields = [
            ("direction", "outbound"),
            ("path", "tunnel"),
            ("destination_service", service.as_str()),
            ("destination_address", at.as_str()),
        ];
        log.wait_for(position, &fields, SOON)?;
        mesh.registry.remove(&format!("{name}.yaml"))?;
    }
    Ok(())
}

/// The server's Pod, as its manifest tells with these addresses.
fn announce_server(mesh: &Mesh, addresses: &[IpAddr]) -> Result<()> {
    mesh.registry.write_pod(&PodManifest {
        name: "server",
        namespace: MESHED,
        node: mesh.pod("server").node,
        addresses,
        annotations: "",
    })
}

pub fn endpoint_of_one_family(mesh: &mut Mesh) -> Result<()> {
    mesh.add_service(NodeName::One, "both", &service("both", ONLY_V4, ONLY_V6, "app: server"))?;
    let (v4, v6): (IpAddr, IpAddr) = (ONLY_V4.into(), ONLY_V6.into());
    let addresses = mesh.pod("server").addresses();
    for (has, works, refused) in [(addresses[0], v4, v6), (addresses[1], v6, v4)] {
        announce_server(mesh, &[has])?;
        mesh.wait_for_outcome("client", refused, SERVICE_PORT, false)?;
        let log = mesh.access_log(NodeName::One);
        let position = log.position();
        let attempt = mesh.app.connect(&mesh.pod("client").place(), refused, SERVICE_PORT)?;
        attempt.expect_refused(QUICKLY)?;
        log.wait_for(position, &[("reason", "no_healthy_endpoint")], SOON)?;
        mesh.wait_for_outcome("client", works, SERVICE_PORT, true)
            .with_context(|| format!("the server has {has} alone"))?;
    }
    announce_server(mesh, &addresses)?;
    for address in [v4, v6] {
        mesh.wait_for_outcome("client", address, SERVICE_PORT, true)?;
    }
    mesh.registry.remove("both.yaml")?;
    mesh.wait_for_tunnel("client", "server")
}

pub fn excluded_range(mesh: &mut Mesh) -> Result<()> {
    let (v4, v6): (IpAddr, IpAddr) = (mesh.pod("server").v4.into(), mesh.pod("server").v6.into());
    let labels = [("destination", "excluded")];
    let passed = |mesh: &Mesh| mesh.metric(NodeName::One, "mesh_passthrough_connections_total", &labels);
    let before = passed(mesh)?;
    configure(
        mesh,
        ROOT_NAMESPACE,
        &format!("{{ mtls: Strict, excludedCidrs: [\"{v4}/32\"] }}"),
    )?;
    mesh.wait_for_outcome("outsider", v6, ECHO_PORT, false)
        .context("beside the range STRICT holds")?;
    mesh.wait_for_path("client", v4, "excluded")?;
    mesh.wait_for_path("client", v6, "tunnel")?;
    mesh.wait_for_outcome("outsider", v4, ECHO_PORT, true)
        .context("plaintext into the range, under STRICT")?;
    mesh.app
        .connect(&mesh.pod("outsider").place(), v6, ECHO_PORT)?
        .expect_refused(QUICKLY)?;
    for node in NodeName::ALL {
        let state = mesh.agent_state(node)?;
        ensure!(
            state["mtls"] == "Strict" && state["excluded_ranges"] == serde_json::json!([format!("{v4}/32")]),
            "{state}"
        );
        let excluded = mesh.metric(node, "mesh_exclusions", &[("kind", "range")])?;
        ensure!(
            excluded == 1.0,
            "expected that the metric tells of one excluded range, saw {excluded}"
        );
    }
    ensure!(passed(mesh)? > before, "expected that what goes in clear is counted");
    unconfigure(mesh, ROOT_NAMESPACE)?;
    mesh.wait_for_path("client", v4, "tunnel")?;
    outsider_gets_in(mesh, true)
}
