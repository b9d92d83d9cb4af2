//! Puts the kernel programs' object, which `cargo xtask build-ebpf` made and the variable EBPF_OBJECT names, where
//! `capture::kernel` embeds it. Without the variable an empty file stands in: everything compiles and every test without a
//! kernel runs, and an agent without programs says so at its start.

use std::path::PathBuf;
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-env-changed=EBPF_OBJECT");
    let embedded = PathBuf::from(env::var("OUT_DIR")?).join("mesh-ebpf.o");
    match env::var_os("EBPF_OBJECT").filter(|path| !path.is_empty()) {
        None => fs::write(embedded, [])?,
        Some(path) => {
            let path = PathBuf::from(path);
            println!("cargo::rerun-if-changed={}", path.display());
            let object = fs::read(&path).map_err(|error| format!("EBPF_OBJECT={}: {error}", path.display()))?;
            fs::write(embedded, object)?;
        }
    }
    Ok(())
}
