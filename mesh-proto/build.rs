//! Generates the wire types. protox is a protobuf compiler in Rust: no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "envoy/discovery.proto",
        "istio/workload.proto",
        "istio/security.proto",
        "istio/ca.proto",
        "culvert/mesh.proto",
        "culvert/node.proto",
        "culvert/local.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    // Versions of discovery resources are hashes of their encoding: a map's order must not be left to chance.
    tonic_prost_build::configure()
        .btree_map(".istio.workload.Workload.services")
        .compile_fds(descriptors)?;
    Ok(())
}
