//! Python's own web server, by its own client: nobody told them of a mesh.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::Process;
use mesh_tests::topology::NodeName;

pub fn serves(mesh: &mut Mesh) -> Result<()> {
    const PORT: u16 = 8088;
    const PAGE: &str = "what an ordinary server has to say\n";
    // More than fits into the buffers of a connection.
    const LARGE_BYTES: usize = 8 << 20;
    let python = Path::new("/usr/bin/python3");
    let folder = mesh.topology.folder().join("site");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("page.txt"), PAGE)?;
    std::fs::write(folder.join("large"), vec![b'x'; LARGE_BYTES])?;
    let path = folder.to_str().context("a path")?;
    let get = "import sys, urllib.request as r\n\
               get = lambda path: r.urlopen(sys.argv[1] + path, timeout=15).read()\n\
               sys.stdout.write(get('/page.txt').decode()); large = get('/large'); print(len(large), large.count(b'x'))";
    for (server, bind) in [("server", "::"), ("local", "0.0.0.0")] {
        let log = mesh.topology.folder().join(format!("site-of-{server}.log"));
        let arguments = [
            "-u",
            "-m",
            "http.server",
            &PORT.to_string(),
            "--bind",
            bind,
            "--directory",
            path,
        ];
        let place = mesh.pod(server).place();
        let mut process = Process::start("the web server", place.command(python, &arguments)?, log.clone())?;
        poll::until_true("the web server answers its own Pod", SOON, || {
            process.check_running()?;
            let url = format!("http://127.0.0.1:{PORT}");
            Ok(place.run(python, &["-c", get, &url], SOON)?.status.success())
        })?;
        let client = mesh.pod("client");
        let served = |address: &IpAddr| bind == "::" || address.to_canonical().is_ipv4();
        for address in mesh.pod(server).forms().into_iter().filter(served) {
            let access = mesh.access_log(NodeName::One);
            let position = access.position();
            let url = format!("http://{}", SocketAddr::new(address, PORT));
            let said = client.place().run(python, &["-c", get, &url], SOON)?.ok(&url)?;
            ensure!(
                said == format!("{PAGE}{LARGE_BYTES} {LARGE_BYTES}\n"),
                "{url} served {said:?}"
            );
            let fields = [("path", "tunnel"), ("result", "ok"), ("destination_workload", server)];
            access.wait_for(position, &fields, SOON)?;
            // As the server logs it: from the client itself.
            let own = client.own_address(address);
            let said = std::fs::read_to_string(&log)?;
            let line = |line: &str| line.contains(&format!("{own} - - ")) && line.contains("\"GET /large HTTP/1.1\" 200");
            ensure!(said.lines().any(line), "{url}: no request from {own} in:\n{said}");
        }
    }
    Ok(())
}
