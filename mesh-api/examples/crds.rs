//! Writes the custom resource definitions into a folder, a file each: `cargo xtask generate` calls it.

use std::error::Error;
use std::path::Path;

/// What every generated file begins with.
const HEAD: &str = "# Generated from mesh-api by `cargo xtask generate`.\n";

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).ok_or("give the folder to write to")?;
    for definition in mesh_api::custom_resource_definitions() {
        let name = format!("{}.yaml", definition.metadata.name.as_deref().unwrap_or_default());
        let text = format!("{HEAD}{}", serde_norway::to_string(&definition)?);
        std::fs::write(Path::new(&folder).join(name), text)?;
    }
    Ok(())
}
