//! Maps of another ABI version beside this one's: what is taken over from them, before a program looks, and when they go.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapData, PerCpuArray, PerCpuValues};
use mesh_agent::capture::kernel::Kernel;
use mesh_common::{ABI_VERSION, AddressBytes, Counter, PodValue};

use super::testbed::*;

const LATER: u32 = ABI_VERSION + 1;

/// A Pod as a later version has it.
type LaterPod = [u8; size_of::<PodValue>() + 24];
/// As an earlier one had it, with two addresses.
type EarlierPod = [u8; 8 + 2 * 16];

/// The bytes of a Pod's value, zeros or nothing where another version's is longer or shorter.
fn bytes_of<const N: usize>(value: &PodValue) -> [u8; N] {
    let mut bytes = Vec::new();
    bytes.extend(value.slot.to_ne_bytes());
    bytes.extend(value.address_count.to_ne_bytes());
    bytes.extend(value.addresses.iter().flatten());
    bytes.resize(N, 0xee);
    bytes.try_into().unwrap()
}

fn make_pods<V: aya::Pod>(folder: &Path, pods: &[(u64, V)]) {
    let mut map = HashMap::<MapData, u64, V>::create(1024, 0).unwrap();
    for (cookie, value) in pods {
        map.insert(cookie, value, 0).unwrap();
    }
    map.pin(folder.join("PODS")).unwrap();
}

fn redirects(testbed: &Testbed, kernel: &Kernel) -> bool {
    let before = counter(kernel, "redirected") + counter(kernel, "refused_no_listener");
    let _ = testbed.connect("4", OUTSIDER_V4, 8080).said();
    counter(kernel, "redirected") + counter(kernel, "refused_no_listener") > before
}

hook_test! {
    fn maps_of_another_version_are_taken_over_before_a_program_looks(testbed) {
        // Of a later one, with all that it has; nothing of it but the maps: the programs before are this version's own.
        let kernel = testbed.enrolled();
        kernel.attach_lookup(SLOT, "pod.uid", netns_file(&testbed.pod()).as_fd()).unwrap();
        let before = counter(&kernel, "redirected") + counter(&kernel, "refused_no_listener");
        drop(kernel);
        let later = testbed.pins_of_abi(LATER);
        fs::remove_dir_all(testbed.pins_of_abi(ABI_VERSION)).unwrap();
        fs::create_dir(&later).unwrap();
        make_pods::<LaterPod>(&later, &[(testbed.cookie(), bytes_of(&pod_value())), (77, bytes_of(&value_of(9, [POD_V4, POD_V6])))]);
        // BPF_F_NO_PREALLOC, which the kernel asks for.
        let mut prefixes = LpmTrie::<MapData, AddressBytes, u8>::create(64, 1).unwrap();
        prefixes.insert(&Key::new(104, [5; 16]), 1, 0).unwrap();
        prefixes.pin(later.join("MESH_DESTINATIONS")).unwrap();
        let mut counters = PerCpuArray::<MapData, u64>::create(Counter::COUNT + 3, 0).unwrap();
        let cpus = aya::util::nr_cpus().unwrap();
        counters.set(0, PerCpuValues::try_from(vec![1_000_u64; cpus]).unwrap(), 0).unwrap();
        counters.pin(later.join("COUNTERS")).unwrap();

        let kernel = testbed.loaded();
        let mut pods = kernel.pods().unwrap();
        pods.sort_unstable_by_key(|(cookie, _)| *cookie);
        let mut wanted = vec![(testbed.cookie(), pod_value()), (77, value_of(9, [POD_V4, POD_V6]))];
        wanted.sort_unstable_by_key(|(cookie, _)| *cookie);
        assert_eq!(pods, wanted);
        assert_eq!(counter(&kernel, "redirected"), 1_000 * cpus as u64, "counters go on");
        assert!(before < 1_000);
        let map = Map::LpmTrie(MapData::from_pin(testbed.pins_of_abi(ABI_VERSION).join("MESH_DESTINATIONS")).unwrap());
        let map: LpmTrie<MapData, AddressBytes, u8> = map.try_into().unwrap();
        assert_eq!(map.get(&Key::new(104, [5; 16]), 0).unwrap(), 1);
        testbed.live();
        assert!(redirects(&testbed, &kernel), "the Pod is open");
        assert_eq!(kernel.attached_pods().unwrap(), ["pod.uid"], "links are of all versions");

        // What others left goes once this one is alone, and when it comes back.
        assert!(later.exists());
        kernel.stand_alone().unwrap();
        assert!(!later.exists());
        fs::create_dir(&later).unwrap();
        assert_eq!(kernel.repair().unwrap(), Vec::<String>::new());
        assert!(!later.exists());
        assert!(redirects(&testbed, &kernel), "the Pod is open");
    }
}

hook_test! {
    fn a_half_made_or_earlier_version_takes_nothing_away(testbed) {
        let kernel = testbed.enrolled();
        drop(kernel);
        // It ended while it filled its maps: one of them, without the Pod, and with one more.
        let other = testbed.pins_of_abi(ABI_VERSION - 1);
        fs::create_dir(&other).unwrap();
        make_pods::<EarlierPod>(&other, &[(78, bytes_of(&value_of(3, [POD_V4, POD_V6])))]);
        let kernel = testbed.loaded();
        let pods = kernel.pods().unwrap();
        assert_eq!(pods.iter().find(|(cookie, _)| *cookie == testbed.cookie()).unwrap().1, pod_value());
        assert_eq!(pods.iter().find(|(cookie, _)| *cookie == 78).unwrap().1, value_of(3, [POD_V4, POD_V6]));
        drop(kernel);

        // Keys that are others: it says so, and changes nothing that is attached.
        fs::remove_file(other.join("PODS")).unwrap();
        HashMap::<MapData, u32, u64>::create(8, 0).unwrap().pin(other.join("PODS")).unwrap();
        let error = Kernel::load(&testbed.config()).unwrap_err().to_string();
        assert!(error.contains("PODS") && error.contains("its keys are others"), "{error}");
        fs::remove_dir_all(&other).unwrap();
        let kernel = testbed.loaded();
        testbed.live();
        assert!(redirects(&testbed, &kernel), "the Pod is open");
    }
}

hook_test! {
    fn a_program_of_another_agent_in_a_link_is_exchanged(testbed) {
        let first = testbed.enrolled();
        first.attach_lookup(SLOT, "pod.uid", netns_file(&testbed.pod()).as_fd()).unwrap();
        assert_eq!(first.repair().unwrap(), Vec::<String>::new());
        assert!(first.has_own_lookup("pod.uid").unwrap());
        // Another agent begins to take over, and ends.
        let second = testbed.loaded();
        second.attach_lookup(SLOT, "pod.uid", netns_file(&testbed.pod()).as_fd()).unwrap();
        drop(second);
        assert!(!first.has_own_lookup("pod.uid").unwrap());
        let mut exchanged = first.repair().unwrap();
        exchanged.sort_unstable();
        assert_eq!(exchanged.len(), 10, "{exchanged:?}");
        assert_eq!(first.repair().unwrap(), Vec::<String>::new());
        first.attach_lookup(SLOT, "pod.uid", netns_file(&testbed.pod()).as_fd()).unwrap();
        assert!(first.has_own_lookup("pod.uid").unwrap());
    }
}
