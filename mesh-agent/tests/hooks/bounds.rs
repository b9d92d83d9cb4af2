//! What one Pod can hold of the node's memory for connections, and that others do not notice.

use mesh_common::limits::MAX_ORIGINAL_DESTINATIONS_PER_POD;
use mesh_common::{OUTBOUND_PORT, OriginalDestinationValue, RedirectedConnectionKey};

use super::FAMILIES;
use super::testbed::*;

hook_test! {
    fn a_pod_that_fills_its_destinations_is_refused_alone(testbed) {
        let kernel = testbed.enrolled();
        let cookie = testbed.cookie();
        let neighbour = testbed.client(&testbed.outsider(), &["cookie"]).said().parse().unwrap();
        kernel.add_pod(neighbour, &value_of(SLOT + 1, [OUTSIDER_V4, OUTSIDER_V6])).unwrap();
        let mut map = destinations(&testbed, cookie);
        let key = |port| RedirectedConnectionKey {
            netns_cookie: cookie,
            client_address: [1; 16],
            listener_address: [2; 16],
            client_port: port,
            listener_port: OUTBOUND_PORT,
            _pad: 0,
        };
        // Of the future: no sweep takes them.
        let value = OriginalDestinationValue { connected_at_ns: u64::MAX, address: [3; 16], port: 4, _pad: [0; 3] };
        for port in 0..MAX_ORIGINAL_DESTINATIONS_PER_POD {
            map.insert(key(port as u16), value, 0).unwrap();
        }
        let listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        // The neighbour connects as ever.
        let neighbours = listen_as_agent(&kernel, &testbed.outsider(), OUTBOUND_PORT);
        for (full, (family, address, _, _)) in (1..).zip(FAMILIES) {
            let _refused = testbed.connect(family, address, 80);
            let (_stream, accepted) = accept(&listener, cookie);
            assert_eq!(kernel.take_original_destination(&accepted).unwrap(), None);
            assert_eq!(counter(&kernel, "destinations_full"), full);
            let _client = testbed.client(&testbed.outsider(), &["connect", family, &format!("{address}|80")]);
            let (_stream, accepted) = accept(&neighbours, neighbour);
            assert_eq!(kernel.take_original_destination(&accepted).unwrap().unwrap().port, 80);
        }
        // Another agent knows the map, and what is taken makes room.
        drop(kernel);
        let kernel = testbed.loaded();
        assert_eq!(kernel.take_original_destination(&key(5)).unwrap(), Some(value));
        for (family, address, _, _) in FAMILIES {
            let _client = testbed.connect(family, address, 81);
            let (_stream, accepted) = accept(&listener, cookie);
            assert_eq!(kernel.take_original_destination(&accepted).unwrap().unwrap().port, 81);
        }
        assert_eq!(counter(&kernel, "destinations_full"), 3);
        // Released, nothing is left of it, also for an agent that did not release it.
        let other = testbed.loaded();
        kernel.remove_pod(cookie).unwrap();
        assert_eq!(kernel.take_original_destination(&key(6)).unwrap(), None);
        kernel.add_pod(cookie, &pod_value()).unwrap();
        let _client = testbed.connect("4", "203.0.113.9", 82);
        let (_stream, accepted) = accept(&listener, cookie);
        assert_eq!(other.take_original_destination(&accepted).unwrap().unwrap().port, 82);
    }
}

hook_test! {
    fn a_socket_bound_to_another_interface_is_refused_and_holds_nothing(testbed) {
        let kernel = testbed.enrolled();
        let listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        let connect = |interface: &str, family: &str, address: &str| {
            testbed.script(&format!(
                "s = stream('{family}'); s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'{interface}\\0')
s.connect(('{address}', 80)); ends(s)"
            ))
        };
        for (refused, (family, address, _, _)) in (1..).zip(FAMILIES) {
            assert_eq!(connect("eth0", family, address).said(), "ECONNREFUSED");
            assert_eq!(counter(&kernel, "refused_bound_device"), refused);
        }
        assert_eq!(destinations(&testbed, testbed.cookie()).iter().count(), 0);
        for (family, address, _, own) in FAMILIES {
            let client = connect("lo", family, address);
            assert_eq!(client.said(), format!("{address} 80 from {own}"));
            let (_stream, key) = accept(&listener, testbed.cookie());
            assert_eq!(kernel.take_original_destination(&key).unwrap().unwrap().port, 80);
        }
    }
}

hook_test! {
    fn an_entry_that_nobody_ends_is_swept(testbed) {
        let kernel = testbed.enrolled();
        let old = mesh_common::UpstreamConnectionKey {
            slot: SLOT,
            client_port: 1,
            application_port: 2,
            client_address: [1; 16],
            application_address: [2; 16],
        };
        let young = mesh_common::UpstreamConnectionKey { client_port: 2, ..old };
        upstreams(&testbed).insert(old, 1, 0).unwrap();
        upstreams(&testbed).insert(young, u64::MAX, 0).unwrap();
        let cookie = testbed.cookie();
        let key = RedirectedConnectionKey {
            netns_cookie: cookie,
            client_address: [1; 16],
            listener_address: [2; 16],
            client_port: 1,
            listener_port: 2,
            _pad: 0,
        };
        let value = OriginalDestinationValue { connected_at_ns: 1, address: [3; 16], port: 4, _pad: [0; 3] };
        destinations(&testbed, cookie).insert(key, value, 0).unwrap();
        // A minute's beats.
        for _ in 0..120 {
            kernel.beat().unwrap();
        }
        assert_eq!(kernel.take_original_destination(&key).unwrap(), None);
        let left: Vec<_> = upstreams(&testbed).keys().map(Result::unwrap).collect();
        assert_eq!(left, [young]);
    }
}
