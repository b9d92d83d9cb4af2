//! Carries the bytes of an open connection, both ways, with the ends' own semantics: a half-close stays a half-close, a reset a
//! reset, and a reader that does not read stops its writer.
//!
//! Memory: at most one buffer of `READ_BYTES` a direction, plus, from a tunnel, the stream's window. Window is given back only as
//! the slow side takes the bytes.

use std::future::{Future, poll_fn};
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::Interest;
use tokio_util::sync::CancellationToken;

use super::error::{ProxyError, ResetBy};
use super::limits::{HALF_CLOSED_IDLE, READ_BYTES};
use super::socket::Carried;
use crate::telemetry::ConnectionRecord;

/// A first read; doubled while reads fill it. Small ones don't cost 64 KiB each.
const FIRST_READ_BYTES: usize = 8 * 1024;
/// A reset end may have sent bytes before, which are still read; longer than this, the other end is not left in doubt.
const RESET_GRACE: Duration = Duration::from_secs(1);

/// Which end of the connection a socket leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Destination,
}

impl End {
    fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }

    fn reset(self) -> ProxyError {
        ProxyError::Reset(match self {
            Self::Source => ResetBy::Source,
            Self::Destination => ResetBy::Destination,
        })
    }

    /// Counts what came from this end.
    fn count(self, record: &ConnectionRecord, bytes: usize) {
        match self {
            Self::Source => record.received(bytes),
            Self::Destination => record.sent(bytes),
        }
    }
}

/// Between two sockets.
pub(super) async fn plain(
    source: Carried,
    destination: Carried,
    record: &ConnectionRecord,
    cut: &CancellationToken,
) -> Result<(), ProxyError> {
    both_ways(
        forward(&source, End::Source, &destination, record),
        forward(&destination, End::Destination, &source, record),
        async {
            tokio::select! {
                () = aborted(&source) => End::Source,
                () = aborted(&destination) => End::Destination,
            }
        },
        record,
        cut,
    )
    .await?;
    // Not reached on an error: the sockets are dropped and so reset.
    source.close();
    destination.close();
    Ok(())
}

/// Between a socket, which leads to `end`, and a stream of a tunnel.
pub(super) async fn tunnel(
    socket: Carried,
    end: End,
    mut send: SendStream<Bytes>,
    mut receive: RecvStream,
    record: &ConnectionRecord,
    cut: &CancellationToken,
) -> Result<(), ProxyError> {
    let result = both_ways(
        into_tunnel(&socket, end, &mut send, record),
        from_tunnel(&mut receive, &socket, end, record),
        async {
            aborted(&socket).await;
            end
        },
        record,
        cut,
    )
    .await;
    match result {
        Ok(()) => socket.close(),
        Err(_) => send.send_reset(Reason::CANCEL),
    }
    result
}

/// Until both directions have ended properly, or one of them breaks both.
async fn both_ways(
    there: impl Future<Output = Result<(), ProxyError>>,
    back: impl Future<Output = Result<(), ProxyError>>,
    aborted: impl Future<Output = End>,
    record: &ConnectionRecord,
    cut: &CancellationToken,
) -> Result<(), ProxyError> {
    let directions = async {
        tokio::pin!(there, back);
        tokio::select! {
            first = &mut there => {
                first?;
                still_moving(back, record).await
            }
            first = &mut back => {
                first?;
                still_moving(there, record).await
            }
        }
    };
    tokio::select! {
        result = directions => result,
        end = aborted => Err(end.reset()),
        () = cut.cancelled() => Err(ProxyError::Reset(ResetBy::Cut)),
    }
}

/// The other direction of a half-closed connection, while something moves.
async fn still_moving(
    direction: impl Future<Output = Result<(), ProxyError>>,
    record: &ConnectionRecord,
) -> Result<(), ProxyError> {
    tokio::pin!(direction);
    loop {
        let before = record.bytes();
        tokio::select! {
            result = &mut direction => return result,
            () = tokio::time::sleep(HALF_CLOSED_IDLE) => {
                if record.bytes() == before {
                    return Err(ProxyError::Reset(ResetBy::Idle));
                }
            }
        }
    }
}

/// Resolves some time after the socket was reset, for when nobody reads from it.
async fn aborted(socket: &Carried) {
    // An error here means as much.
    let _ = socket.ready(Interest::ERROR).await;
    tokio::time::sleep(RESET_GRACE).await;
}

/// Reads with a buffer that exists only while there is something to read, and that grows with the traffic.
struct Reader<'a> {
    socket: &'a Carried,
    buffer_len_bytes: usize,
}

impl<'a> Reader<'a> {
    fn new(socket: &'a Carried) -> Self {
        Self {
            socket,
            buffer_len_bytes: FIRST_READ_BYTES,
        }
    }

    /// Empty at the end of the stream.
    async fn read(&mut self) -> io::Result<Bytes> {
        loop {
            self.socket.readable().await?;
            let mut buffer = BytesMut::with_capacity(self.buffer_len_bytes);
            match self.socket.try_read_buf(&mut buffer) {
                Ok(read) => {
                    if read == self.buffer_len_bytes {
                        self.buffer_len_bytes = (2 * read).min(READ_BYTES);
                    } else if read < self.buffer_len_bytes / 4 {
                        self.buffer_len_bytes = (self.buffer_len_bytes / 2).max(FIRST_READ_BYTES);
                    }
                    return Ok(buffer.freeze());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

async fn forward(from: &Carried, from_end: End, to: &Carried, record: &ConnectionRecord) -> Result<(), ProxyError> {
    let mut reader = Reader::new(from);
    loop {
        let chunk = reader.read().await.map_err(|_| from_end.reset())?;
        if chunk.is_empty() {
            return to.shutdown_write().map_err(|_| from_end.other().reset());
        }
        to.write_all(&chunk).await.map_err(|_| from_end.other().reset())?;
        from_end.count(record, chunk.len());
    }
}

async fn into_tunnel(
    socket: &Carried,
    end: End,
    send: &mut SendStream<Bytes>,
    record: &ConnectionRecord,
) -> Result<(), ProxyError> {
    let mut reader = Reader::new(socket);
    loop {
        let mut chunk = tokio::select! {
            read = reader.read() => read.map_err(|_| end.reset())?,
            reset = poll_fn(|cx| send.poll_reset(cx)) => {
                return Err(reset.map_or_else(|error| broken(error, end.other()), |_| end.other().reset()));
            }
        };
        let read = chunk.len();
        if read == 0 {
            return send.send_data(chunk, true).map_err(|error| broken(error, end.other()));
        }
        while !chunk.is_empty() {
            let room = capacity(send, chunk.len(), end).await?;
            let part = chunk.split_to(room.min(chunk.len()));
            send.send_data(part, false).map_err(|error| broken(error, end.other()))?;
        }
        end.count(record, read);
    }
}

/// Waits until the far side's window, and our buffer, have room.
async fn capacity(send: &mut SendStream<Bytes>, wanted: usize, end: End) -> Result<usize, ProxyError> {
    send.reserve_capacity(wanted);
    loop {
        if send.capacity() > 0 {
            return Ok(send.capacity());
        }
        match poll_fn(|cx| send.poll_capacity(cx)).await {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(broken(error, end.other())),
            None => return Err(end.other().reset()),
        }
    }
}

async fn from_tunnel(receive: &mut RecvStream, socket: &Carried, end: End, record: &ConnectionRecord) -> Result<(), ProxyError> {
    while let Some(data) = receive.data().await {
        let data = data.map_err(|error| broken(error, end.other()))?;
        socket.write_all(&data).await.map_err(|_| end.reset())?;
        receive
            .flow_control()
            .release_capacity(data.len())
            .map_err(|error| broken(error, end.other()))?;
        end.other().count(record, data.len());
    }
    socket.shutdown_write().map_err(|_| end.reset())
}

/// A stream that its far end reset, or whose tunnel broke.
fn broken(error: h2::Error, far_end: End) -> ProxyError {
    // Using a stream after its end is how h2 tells of a reset that was not read yet.
    if error.is_reset() || error.is_library() || error.get_io().is_none() && !error.is_go_away() {
        far_end.reset()
    } else {
        error.into()
    }
}
