//! The kernel programs, tried by unprivileged processes in a Pod of the hook tests.

use super::{Edit, Group, Mutant, Noticed, Suite};

pub const CAPTURE: Group = Group {
    name: "capture",
    mutants: &[
        Mutant {
            name: "bound-device",
            attacks: &["SO_BINDTODEVICE"],
            without: "the refusal of sockets bound to another interface",
            edits: &[Edit {
                file: "mesh-ebpf/src/connect.rs",
                from: "interface != 0 && interface != LOOPBACK_INTERFACE",
                to: "false",
            }],
            noticed_by: &[Noticed {
                suite: Suite::Hooks,
                test: "bounds::a_socket_bound_to_another_interface_is_refused_and_holds_nothing",
                says: "EINPROGRESS",
            }],
        },
        Mutant {
            name: "bind",
            attacks: &["agent ports"],
            without: "the refusal to bind the agent's ports",
            edits: &[Edit {
                file: "mesh-ebpf/src/bind.rs",
                from: "if AGENT_SOCKETS.of(socket).is_some_and(|mark| mark.kind != 0) {",
                to: "if socket.is_null() || AGENT_SOCKETS.of(socket).is_none_or(|mark| mark.kind < 99) {",
            }],
            noticed_by: &[Noticed {
                suite: Suite::Hooks,
                test: "ports::an_application_cannot_have_a_port_of_the_agent",
                says: "listens",
            }],
        },
    ],
    controls: &[(Suite::Hooks, "link_local_is_left_alone_and_counted")],
};
