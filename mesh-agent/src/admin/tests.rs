use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

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

/// Longer than anything here takes; only a hang meets it.
const PATIENCE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

async fn served(bounds: Bounds) -> SocketAddr {
    let listener = listen("--ready", "0.0.0.0:0".parse().unwrap()).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let pages: Pages = Arc::new(|_| Some(Page::text(StatusCode::OK, "ready\n".to_owned())));
    tokio::spawn(serve_within(bounds, listener, pages, CancellationToken::new()));
    SocketAddr::new("127.0.0.1".parse().unwrap(), port)
}

#[tokio::test]
async fn one_client_leaves_room_for_the_others() {
    let address = served(Bounds {
        head_timeout: HOUR,
        lifetime: HOUR,
        ..BOUNDS
    })
    .await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        silent.push(timeout(PATIENCE, socket.connect(address)).await.unwrap().unwrap());
    }
    let request = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let answer = timeout(PATIENCE, get(address, request)).await.expect("starved");
    assert!(answer.ends_with("ready\n"), "{answer}");
}

#[tokio::test]
async fn who_sends_no_head_is_not_waited_for() {
    let address = served(Bounds {
        head_timeout: Duration::from_millis(100),
        lifetime: HOUR,
        ..BOUNDS
    })
    .await;
    for sent in ["", "GET / HTTP/1.1\r\nhost: x\r\n\r\n"] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(sent.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // Either end of the stream.
        let _ = timeout(PATIENCE, stream.read_to_string(&mut answer))
            .await
            .expect("waited for");
        assert_eq!(answer.contains("ready"), !sent.is_empty(), "{answer}");
    }
}

#[tokio::test]
async fn who_reads_no_answer_is_not_waited_for() {
    let address = served(Bounds {
        lifetime: Duration::from_millis(100),
        ..BOUNDS
    })
    .await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let requests = "GET / HTTP/1.1\r\nhost: x\r\n\r\n".repeat(1024);
    let flood = async { while stream.write_all(requests.as_bytes()).await.is_ok() {} };
    timeout(PATIENCE, flood).await.expect("waited for");
}
