#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_agent::fuzz::node_pods(bytes));
