use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;

async fn get(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn pages_are_served_and_everything_else_is_refused() {
    let listener = listen("--ready", "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let pages: Pages = Arc::new(|path| match path {
        "/there" => Some(Page::text(StatusCode::SERVICE_UNAVAILABLE, "missing: x\n".to_owned())),
        _ => None,
    });
    let server = tokio::spawn(serve(listener, pages, stop.clone()));
    for (request, status, body) in [
        ("GET /there HTTP/1.1", "503", "missing: x"),
        ("GET /elsewhere HTTP/1.1", "404", "nothing here"),
        ("POST /there HTTP/1.1", "405", "only GET"),
    ] {
        let answer = get(address, &format!("{request}\r\nhost: x\r\nconnection: close\r\n\r\n")).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(body),
            "{answer}"
        );
    }
    let taken = listen("--ready", address).await.unwrap_err().to_string();
    assert!(taken.contains("--ready"), "{taken}");
    stop.cancel();
    server.await.unwrap();
}
