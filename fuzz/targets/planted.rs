//! A bug to be found, before anything is believed that finds none: `cargo xtask fuzz` fails if this does not.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let [first, second, rest @ ..] = bytes else { return };
    // By chance: one in 2^48 inputs. The coverage leads to it, and the comparison of `rest` tells the fuzzer what is wanted.
    assert!(*first != b'b' || *second != b'u' || rest.first_chunk() != Some(b"gged"), "the planted bug");
});
