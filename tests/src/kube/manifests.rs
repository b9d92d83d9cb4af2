//! What more than one suite applies.

use super::APP_IMAGE;

/// A Pod of the test application, with a service account of its name. `labels`: a YAML mapping's inside; `spec`: more lines of its spec,
/// indented by two.
#[must_use]
pub fn pod(namespace: &str, name: &str, node: u8, labels: &str, command: &str, spec: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}
spec:
  serviceAccountName: {name}
  nodeSelector: {{kubernetes.io/hostname: node-{node}}}
  terminationGracePeriodSeconds: 1
{spec}
  containers:
    - name: app
      image: {APP_IMAGE}
      command: {command}
      resources: {{requests: {{cpu: 1m, memory: 4Mi}}, limits: {{memory: 64Mi}}}}
---
"#
    )
}
