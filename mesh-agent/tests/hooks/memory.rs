//! The memory of every map, as `mesh_common::limits` states it and as the kernel reports it; and a socket that has none left.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};

use aya::maps::{HashMap, HashOfMaps, LpmTrie, Map, MapData, lpm_trie};
use mesh_common::{
    ABI_VERSION, AddressBytes, OUTBOUND_PORT, OriginalDestinationValue, ProbePortKey, RedirectedConnectionKey,
    UpstreamConnectionKey, limits,
};

use super::FAMILIES;
use super::testbed::*;

/// As the kernel reports it since 6.4, by what is allocated; before, by what might be.
fn reported(map: &MapData) -> u64 {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd())).unwrap();
    let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:")).unwrap();
    bytes.trim().parse().unwrap()
}

/// What is wrong with what is stated. Far too much is wrong, too; the kernel counts neither the inner nodes of a tree nor what an
/// allocator rounds up.
fn fault(name: &str, map: &MapData) -> Option<String> {
    // "0-7": those that might be.
    let possible = fs::read_to_string("/sys/devices/system/cpu/possible").unwrap();
    let cpus = possible.trim().rsplit(['-', ',']).next().unwrap().parse::<u64>().unwrap() + 1;
    let stated = limits::MAP_MEMORY.iter().find(|memory| memory.name == name);
    let stated = stated.map(|memory| memory.bytes + cpus * memory.bytes_per_cpu);
    let reported = reported(map);
    (!stated.is_some_and(|stated| reported <= stated && stated <= 4 * reported))
        .then(|| format!("{name}: {stated:?} bytes are stated, the kernel reports {reported}"))
}

hook_test! {
    fn every_map_takes_the_memory_that_is_stated(testbed) {
        let _kernel = testbed.enrolled();
        let cookie = testbed.cookie();
        let mut upstreams = upstreams(&testbed);
        for slot in 0..limits::MAX_UPSTREAM_CONNECTIONS {
            let key = UpstreamConnectionKey {
                slot,
                client_port: 1,
                application_port: 2,
                client_address: [1; 16],
                application_address: [2; 16],
            };
            upstreams.insert(key, u64::MAX, 0).unwrap();
        }
        let mut of_pod = destinations(&testbed, cookie);
        for port in 0..limits::MAX_ORIGINAL_DESTINATIONS_PER_POD {
            let key = RedirectedConnectionKey {
                netns_cookie: cookie,
                client_address: [1; 16],
                listener_address: [2; 16],
                client_port: port as u16,
                listener_port: OUTBOUND_PORT,
                _pad: 0,
            };
            let value = OriginalDestinationValue { connected_at_ns: u64::MAX, address: [3; 16], port: 4, _pad: [0; 3] };
            of_pod.insert(key, value, 0).unwrap();
        }
        let ports = MapData::from_pin(testbed.pins().join("PROBE_PORTS")).unwrap();
        let mut ports: HashMap<MapData, ProbePortKey, u32> = Map::HashMap(ports).try_into().unwrap();
        for i in 0..limits::MAX_PROBE_PORTS {
            let key = ProbePortKey { address: u128::from(i).to_be_bytes(), port: 1, _pad: 0 };
            ports.insert(key, 0, 0).unwrap();
        }
        let outer = MapData::from_pin(testbed.pins().join("PROBE_VOUCHES")).unwrap();
        let outer: HashOfMaps<_, u32, MapData> = Map::HashOfMaps(outer).try_into().unwrap();
        let of_pod = MapData::from_pin(testbed.pins().join("PROBE_VOUCHES")).unwrap();
        let of_pod: HashOfMaps<_, u32, HashMap<MapData, UpstreamConnectionKey, u64>> = Map::HashOfMaps(of_pod).try_into().unwrap();
        let mut vouches = of_pod.get(&SLOT, 0).unwrap();
        for port in 0..limits::MAX_PROBE_VOUCHES_PER_POD {
            let key = UpstreamConnectionKey {
                slot: SLOT,
                client_port: port as u16,
                application_port: 2,
                client_address: [1; 16],
                application_address: [2; 16],
            };
            vouches.insert(key, u64::MAX, 0).unwrap();
        }
        let of_vouches = fault("VOUCHES_OF_POD", &outer.get(&SLOT, 0).unwrap());
        let outer = MapData::from_pin(testbed.pins().join("ORIGINAL_DESTINATIONS")).unwrap();
        let outer: HashOfMaps<_, u64, MapData> = Map::HashOfMaps(outer).try_into().unwrap();
        let mut faults = vec![of_vouches, fault("POD", &outer.get(&cookie, 0).unwrap())];
        for entry in fs::read_dir(testbed.pins()).unwrap().chain(fs::read_dir(testbed.pins_of_abi(ABI_VERSION)).unwrap()) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue;
            }
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if name == "MESH_DESTINATIONS" {
                let map = Map::LpmTrie(MapData::from_pin(&path).unwrap());
                let mut map: LpmTrie<MapData, AddressBytes, u8> = map.try_into().unwrap();
                // The prefix that has it all is in it from the start.
                for i in 1..limits::MAX_MESH_DESTINATIONS {
                    map.insert(&lpm_trie::Key::new(128, (u128::from(i) * 7919).to_be_bytes()), 1, 0).unwrap();
                }
            }
            faults.push(fault(&name, &MapData::from_pin(&path).unwrap()));
        }
        assert!(faults.len() >= 14, "{faults:?}");
        let faults: Vec<String> = faults.into_iter().flatten().collect();
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    }
}

hook_test! {
    fn a_socket_without_memory_for_its_destination_is_refused_and_counted(testbed) {
        const SETTING: &str = "/proc/sys/net/core/optmem_max";
        let kernel = testbed.enrolled();
        let listener = listen_as_agent(&kernel, &testbed.pod(), OUTBOUND_PORT);
        let before = match within(&testbed.pod(), || fs::read_to_string(SETTING)) {
            Ok(before) => before,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                println!("SKIPPED: hooks::a_socket_without_memory: {SETTING} is not of each network namespace on this kernel");
                return;
            }
            Err(error) => panic!("{SETTING}: {error}"),
        };
        let set = |value: &str| within(&testbed.pod(), || fs::write(SETTING, value).unwrap());
        for (refused, (family, address, _, own)) in (1..).zip(FAMILIES) {
            set("1");
            assert_eq!(testbed.connect(family, address, 80).said(), "ECONNREFUSED");
            assert_eq!(counter(&kernel, "refused_no_storage"), refused);
            assert_eq!(destinations(&testbed, testbed.cookie()).iter().count(), 0);
            set(&before);
            assert_eq!(testbed.connect(family, address, 80).said(), format!("{address} 80 from {own}"));
            let (_stream, key) = accept(&listener, testbed.cookie());
            assert_eq!(kernel.take_original_destination(&key).unwrap().unwrap().port, 80);
        }
    }
}
