//! What the shipped objects say, line by line, so that none is lost in an edit of the templates. Why each is so, the templates tell.

/// Places in an object of deploy/culvert.yaml or deploy/uninstall.yaml, or of what Helm runs before it deletes.
pub struct Of {
    /// As `DaemonSet/mesh-agent`.
    pub object: &'static str,
    /// What the places begin with.
    pub under: &'static str,
    pub lines: &'static [(&'static str, Is)],
}

#[derive(Debug, PartialEq, Eq)]
pub enum Is {
    /// Exactly this, as YAML.
    Exactly(&'static str),
    /// Something: how much is for an operator to say.
    There,
    Absent,
}

use Is::{Absent, Exactly, There};

const POD: &str = "/spec/template/spec";

/// Of every Pod that is shipped.
pub const EVERY_POD: &[(&str, Is)] = &[
    ("/securityContext/seccompProfile", Exactly("{type: RuntimeDefault}")),
    ("/serviceAccountName", There),
    ("/hostIPC", Absent),
];

/// Of every container of them, those that run first included.
pub const EVERY_CONTAINER: &[(&str, Is)] = &[
    ("/securityContext/privileged", Absent),
    ("/securityContext/allowPrivilegeEscalation", Exactly("false")),
    ("/securityContext/readOnlyRootFilesystem", Exactly("true")),
    ("/securityContext/capabilities/drop", Exactly("[ALL]")),
    ("/securityContext/seccompProfile", Absent),
    ("/resources/requests/cpu", There),
    ("/resources/requests/memory", There),
];

pub const SHIPPED: &[Of] = &[
    Of {
        object: "DaemonSet/mesh-agent",
        under: "/spec",
        lines: &[(
            "/updateStrategy",
            Exactly("{type: RollingUpdate, rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}"),
        )],
    },
    Of {
        object: "DaemonSet/mesh-agent",
        under: POD,
        lines: &[
            ("/priorityClassName", Exactly("system-node-critical")),
            ("/tolerations", Exactly("[{operator: Exists}]")),
            ("/nodeSelector", Exactly("{kubernetes.io/os: linux}")),
            ("/hostNetwork", Exactly("true")),
            ("/dnsPolicy", Exactly("ClusterFirstWithHostNet")),
            ("/hostPID", Exactly("true")),
            ("/containers/0/ports", Absent),
            ("/automountServiceAccountToken", Exactly("false")),
            ("/terminationGracePeriodSeconds", Exactly("60")),
            ("/initContainers/0/name", Exactly("install-cni")),
            ("/initContainers/0/securityContext/capabilities/add", Absent),
            (
                "/volumes/0/projected/sources",
                Exactly("[{serviceAccountToken: {audience: culvert, expirationSeconds: 3600, path: token}}]"),
            ),
            (
                "/containers/0/volumeMounts/0",
                Exactly("{name: token, mountPath: /var/run/secrets/culvert, readOnly: true}"),
            ),
            (
                "/containers/0/volumeMounts/1",
                Exactly("{name: roots, mountPath: /var/run/culvert-roots, readOnly: true}"),
            ),
            // An agent that is killed for want of memory resets every tunnel of its node.
            ("/containers/0/resources/limits", Absent),
            (
                "/containers/0/startupProbe",
                Exactly(
                    "{exec: {command: [/mesh-agent, ready, --ready-socket=/var/run/culvert-own/ready.sock, --alive]}, \
                     periodSeconds: 1, failureThreshold: 120}",
                ),
            ),
            (
                "/containers/0/livenessProbe",
                Exactly(
                    "{exec: {command: [/mesh-agent, ready, --ready-socket=/var/run/culvert-own/ready.sock, --alive]}, \
                     periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 6}",
                ),
            ),
            (
                "/containers/0/readinessProbe",
                Exactly(
                    "{exec: {command: [/mesh-agent, ready, --ready-socket=/var/run/culvert-own/ready.sock]}, \
                     periodSeconds: 2, timeoutSeconds: 5}",
                ),
            ),
        ],
    },
    Of {
        object: "DaemonSet/mesh-uninstall",
        under: "/spec",
        lines: &[(
            "/updateStrategy",
            Exactly("{type: RollingUpdate, rollingUpdate: {maxUnavailable: 100%}}"),
        )],
    },
    Of {
        object: "DaemonSet/mesh-uninstall",
        under: POD,
        lines: &[
            ("/priorityClassName", Exactly("system-node-critical")),
            ("/tolerations", Exactly("[{operator: Exists}]")),
            ("/nodeSelector", Exactly("{kubernetes.io/os: linux}")),
            ("/hostNetwork", Exactly("true")),
            ("/hostPID", Exactly("true")),
            ("/containers/0/ports", Absent),
            ("/automountServiceAccountToken", Exactly("false")),
            ("/terminationGracePeriodSeconds", Exactly("35")),
            (
                "/containers/0/readinessProbe/exec/command",
                Exactly("[/mesh-agent, ready, --ready-socket=/var/run/culvert-own/ready.sock]"),
            ),
        ],
    },
    Of {
        object: "Job/mesh-uninstall-wait",
        under: POD,
        lines: &[
            ("/securityContext/runAsNonRoot", Exactly("true")),
            ("/securityContext/runAsUser", Exactly("65532")),
            ("/containers/0/securityContext/capabilities/add", Absent),
            ("/containers/0/resources/limits/memory", There),
            ("/restartPolicy", Exactly("Never")),
        ],
    },
    Of {
        object: "Deployment/mesh-control",
        under: "/spec",
        lines: &[
            ("/replicas", Exactly("2")),
            (
                "/strategy",
                Exactly("{type: RollingUpdate, rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}"),
            ),
            ("/template/metadata/labels/culvert.dev~1mesh", Exactly("disabled")),
        ],
    },
    Of {
        object: "Deployment/mesh-control",
        under: POD,
        lines: &[
            ("/priorityClassName", Exactly("system-cluster-critical")),
            (
                "/affinity/podAntiAffinity/preferredDuringSchedulingIgnoredDuringExecution",
                Exactly(
                    "[{weight: 100, podAffinityTerm: {topologyKey: kubernetes.io/hostname, \
                     labelSelector: {matchLabels: {app.kubernetes.io/name: mesh-control}}}}]",
                ),
            ),
            ("/hostNetwork", Absent),
            ("/hostPID", Absent),
            ("/volumes", Absent),
            ("/securityContext/runAsNonRoot", Exactly("true")),
            ("/securityContext/runAsUser", Exactly("65532")),
            ("/securityContext/runAsGroup", Exactly("65532")),
            ("/containers/0/securityContext/capabilities/add", Absent),
            ("/containers/0/resources/limits/memory", There),
            (
                "/containers/0/startupProbe",
                Exactly("{httpGet: {path: /metrics, port: metrics}, periodSeconds: 1, failureThreshold: 3600}"),
            ),
            (
                "/containers/0/livenessProbe",
                Exactly("{httpGet: {path: /metrics, port: metrics}, periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 6}"),
            ),
            (
                "/containers/0/readinessProbe",
                Exactly("{httpGet: {path: /healthz/ready, port: metrics}, periodSeconds: 2}"),
            ),
            (
                "/containers/0/ports",
                Exactly("[{name: grpc, containerPort: 15012}, {name: metrics, containerPort: 15014}]"),
            ),
        ],
    },
    Of {
        object: "PodDisruptionBudget/mesh-control",
        under: "/spec",
        lines: &[
            ("/maxUnavailable", Exactly("1")),
            ("/selector", Exactly("{matchLabels: {app.kubernetes.io/name: mesh-control}}")),
        ],
    },
    Of {
        object: "NetworkPolicy/mesh-control",
        under: "/spec",
        lines: &[
            (
                "/podSelector",
                Exactly("{matchLabels: {app.kubernetes.io/name: mesh-control}}"),
            ),
            ("/policyTypes", Exactly("[Ingress]")),
            ("/ingress", Exactly("[{ports: [{port: 15012}, {port: 15014}]}]")),
        ],
    },
    Of {
        object: "Service/mesh-control",
        under: "/spec",
        lines: &[
            ("/selector", Exactly("{app.kubernetes.io/name: mesh-control}")),
            ("/ipFamilyPolicy", Exactly("PreferDualStack")),
            ("/ports", Exactly("[{name: grpc, port: 15012, targetPort: grpc}]")),
        ],
    },
    Of {
        object: "ServiceAccount/mesh-agent",
        under: "",
        lines: &[("/automountServiceAccountToken", Exactly("false"))],
    },
    Of {
        object: "ServiceAccount/mesh-uninstall",
        under: "",
        lines: &[("/automountServiceAccountToken", Exactly("false"))],
    },
];
