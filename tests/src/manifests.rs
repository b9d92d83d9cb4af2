//! The folder of Kubernetes manifests that mesh-control reads, written as people write them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::app::ECHO_PORT;
use crate::topology::NodeName;

/// Namespace of the Pods in the mesh.
pub const MESHED: &str = "shop";
/// Namespace of the Pods outside it.
pub const UNMESHED: &str = "legacy";
/// Whose `MeshConfig` is the whole mesh's.
pub const ROOT_NAMESPACE: &str = "culvert-system";
pub const SERVICE_PORT: u16 = 80;
pub const TRUST_DOMAIN: &str = "cluster.local";

/// The SPIFFE id of a service account of a meshed Pod.
#[must_use]
pub fn spiffe_id(service_account: &str) -> String {
    format!("spiffe://{}", principal(service_account))
}

/// As policies name it.
#[must_use]
pub fn principal(service_account: &str) -> String {
    format!("{TRUST_DOMAIN}/ns/{MESHED}/sa/{service_account}")
}

#[derive(Clone, Debug)]
pub struct PodManifest<'a> {
    pub name: &'a str,
    pub namespace: &'a str,
    pub node: NodeName,
    pub addresses: &'a [IpAddr],
    /// Lines of `metadata.annotations`, in braces.
    pub annotations: &'a str,
}

impl PodManifest<'_> {
    #[must_use]
    pub fn uid(&self) -> String {
        pod_uid(self.name)
    }
}

/// `metadata.uid` of a Pod of the testbed.
#[must_use]
pub fn pod_uid(name: &str) -> String {
    format!("uid-{name}")
}

/// A policy on one Pod (by its label `app`), with the given rules.
#[must_use]
pub fn policy(name: &str, target: &str, action: &str, rules: &str) -> String {
    format!(
        "apiVersion: culvert.dev/v1alpha1\n\
         kind: AuthorizationPolicy\n\
         metadata: {{ name: {name}, namespace: {MESHED} }}\n\
         spec:\n\
         \x20 selector: {{ matchLabels: {{ app: {target} }} }}\n\
         \x20 action: {action}\n\
         \x20 rules: {rules}\n"
    )
}

/// A `MeshConfig`, for the whole mesh in [`ROOT_NAMESPACE`], else for its namespace.
#[must_use]
pub fn mesh_config(namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: culvert.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{ name: default, namespace: {namespace} }}\nspec: {spec}\n"
    )
}

/// A Service on port [`SERVICE_PORT`] over the Pods with the label, in front of their echo server.
#[must_use]
pub fn service(name: &str, v4: Ipv4Addr, v6: Ipv6Addr, selector: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: {MESHED} }}\n\
         spec:\n  clusterIP: {v4}\n  clusterIPs: [{v4}, \"{v6}\"]\n  ipFamilies: [IPv4, IPv6]\n\
         \x20 selector: {{ {selector} }}\n  ports: [{{ port: {SERVICE_PORT}, targetPort: {ECHO_PORT} }}]\n"
    )
}

#[derive(Debug)]
pub struct Registry {
    folder: PathBuf,
}

impl Registry {
    /// The folder with its namespaces and nodes.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(folder: PathBuf) -> Result<Self> {
        std::fs::create_dir(&folder)?;
        let registry = Self { folder };
        registry.write(
            "namespaces.yaml",
            &format!(
                "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {MESHED}\n  labels: {{ culvert.dev/mesh: enabled }}\n\
                 ---\napiVersion: v1\nkind: Namespace\nmetadata: {{ name: {UNMESHED} }}\n"
            ),
        )?;
        for node in NodeName::ALL {
            let name = node.as_str();
            let cidrs = node.pod_cidrs();
            let (v4, v6) = node.addresses();
            registry.write(
                &format!("{name}.yaml"),
                &format!(
                    "apiVersion: v1\nkind: Node\nmetadata: {{ name: {name} }}\n\
                     spec:\n  podCIDR: {}\n  podCIDRs: [\"{}\", \"{}\"]\n\
                     status:\n  addresses:\n    - {{ type: InternalIP, address: {v4} }}\n    - {{ type: InternalIP, address: \"{v6}\" }}\n",
                    cidrs[0], cidrs[0], cidrs[1]
                ),
            )?;
        }
        Ok(registry)
    }

    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a file as an editor or a git checkout does: whole, under another name first.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, file: &str, manifest: &str) -> Result<()> {
        let temporary = self.folder.join(format!(".{file}.new"));
        std::fs::write(&temporary, manifest).with_context(|| format!("writing {}", temporary.display()))?;
        std::fs::rename(&temporary, self.folder.join(file))?;
        Ok(())
    }

    /// # Errors
    /// There is no such file.
    pub fn remove(&self, file: &str) -> Result<()> {
        std::fs::remove_file(self.folder.join(file)).with_context(|| format!("removing {file}"))
    }

    /// A Pod and its service account, both of its own name, in a file of that name.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_pod(&self, pod: &PodManifest<'_>) -> Result<()> {
        let PodManifest {
            name,
            namespace,
            node,
            addresses,
            annotations,
        } = pod;
        let (node, uid) = (node.as_str(), pod.uid());
        let pod_ips: Vec<String> = addresses.iter().map(|ip| format!("{{ ip: \"{ip}\" }}")).collect();
        let first = addresses.first().context("a Pod without an address")?;
        self.write(
            &format!("pod-{name}.yaml"),
            &format!(
                "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{ name: {name}, namespace: {namespace} }}\n\
                 ---\napiVersion: v1\nkind: Pod\n\
                 metadata:\n  name: {name}\n  namespace: {namespace}\n  uid: {uid}\n  labels: {{ app: {name} }}\n\
                 \x20 annotations: {{ {annotations} }}\n\
                 spec:\n  nodeName: {node}\n  serviceAccountName: {name}\n\
                 \x20 containers:\n    - {{ name: app, image: none, ports: [{{ containerPort: 8080 }}] }}\n\
                 status:\n  phase: Running\n  podIP: \"{first}\"\n  podIPs: [{}]\n\
                 \x20 conditions: [{{ type: Ready, status: \"True\" }}]\n",
                pod_ips.join(", ")
            ),
        )
    }
}
