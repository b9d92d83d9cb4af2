//! Carries the bytes of an open connection, both ways, with the ends' own semantics: a half-close stays a half-close, a reset a
//! reset, and a reader that does not read stops its writer.
//!
//! Memory: what is read is read into a place that it can go on to, and what waits for a slow side is counted as its connection's
//! ([`super::buffers`]). Window is given back only as the slow side takes the bytes.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::Interest;
use tokio::time::{sleep, timeout};

use super::buffers::Account;
use super::error::{ProxyError, Refusal, ResetBy};
use super::limits::READ_BYTES;
use super::registry::Registered;
use super::socket::Carried;
use crate::telemetry::ConnectionRecord;

/// A first read; doubled while reads fill it. Small ones don't cost 64 KiB each.
const FIRST_READ_BYTES: usize = 8 * 1024;
/// A reset end may have sent bytes before, which are still read; longer than this, the other end is not left in doubt.
const RESET_GRACE: Duration = Duration::from_secs(1);
/// The smallest piece that waiting data is kept in, so that small frames don't cost an allocation each.
const PIECE_BYTES: usize = 4 * 1024;
/// Window is given back in parts of this, or all of it once nothing waits: not in crumbs that come back as crumbs.
const RELEASE_BYTES: usize = 32 * 1024;

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
    registered: &Registered,
) -> Result<(), ProxyError> {
    let account = registered.account();
    both_ways(
        forward(&source, End::Source, &destination, record, account),
        forward(&destination, End::Destination, &source, record, account),
        async {
            tokio::select! {
                () = aborted(&source) => End::Source,
                () = aborted(&destination) => End::Destination,
            }
        },
        record,
        registered,
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
    mut incoming: Incoming,
    record: &ConnectionRecord,
    registered: &Registered,
) -> Result<(), ProxyError> {
    let result = both_ways(
        into_tunnel(&socket, end, &mut send, record, registered.account()),
        from_tunnel(&mut incoming, &socket, end, record),
        async {
            aborted(&socket).await;
            end
        },
        record,
        registered,
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
    registered: &Registered,
) -> Result<(), ProxyError> {
    let directions = async {
        tokio::pin!(there, back);
        tokio::select! {
            first = &mut there => {
                first?;
                still_moving(back, record, registered.half_closed_idle()).await
            }
            first = &mut back => {
                first?;
                still_moving(there, record, registered.half_closed_idle()).await
            }
        }
    };
    tokio::select! {
        // A connection that was cut between its decision and here moves no byte.
        biased;
        error = registered.cut_off() => Err(error),
        () = registered.account().evicted().cancelled() => Err(ProxyError::Reset(ResetBy::Memory)),
        end = aborted => Err(end.reset()),
        result = directions => result,
    }
}

/// The other direction of a half-closed connection, while something moves.
async fn still_moving(
    direction: impl Future<Output = Result<(), ProxyError>>,
    record: &ConnectionRecord,
    patience: Duration,
) -> Result<(), ProxyError> {
    tokio::pin!(direction);
    loop {
        let before = record.bytes();
        tokio::select! {
            result = &mut direction => return result,
            () = sleep(patience) => {
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
    sleep(RESET_GRACE).await;
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

    /// At most `room` bytes; empty at the end of the stream, `None` when there is nothing after all.
    fn try_read(&mut self, room: usize) -> io::Result<Option<Bytes>> {
        let size = self.buffer_len_bytes.min(room);
        let mut buffer = BytesMut::with_capacity(size);
        match self.socket.try_read_buf(&mut buffer) {
            Ok(read) => {
                if read == self.buffer_len_bytes {
                    self.buffer_len_bytes = (2 * read).min(READ_BYTES);
                } else if read < self.buffer_len_bytes / 4 {
                    self.buffer_len_bytes = (self.buffer_len_bytes / 2).max(FIRST_READ_BYTES);
                }
                // A little data does not keep a large buffer while it waits.
                let data = if read < size / 2 {
                    Bytes::copy_from_slice(&buffer)
                } else {
                    buffer.freeze()
                };
                Ok(Some(data))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn read(&mut self) -> io::Result<Bytes> {
        loop {
            self.socket.readable().await?;
            if let Some(data) = self.try_read(READ_BYTES)? {
                return Ok(data);
            }
        }
    }
}

async fn forward(
    from: &Carried,
    from_end: End,
    to: &Carried,
    record: &ConnectionRecord,
    account: &Arc<Account>,
) -> Result<(), ProxyError> {
    let mut reader = Reader::new(from);
    let reset = |_| from_end.other().reset();
    loop {
        let chunk = reader.read().await.map_err(|_| from_end.reset())?;
        if chunk.is_empty() {
            return to.shutdown_write().map_err(reset);
        }
        let read = chunk.len();
        let written = to.try_write_some(&chunk).map_err(reset)?;
        if written < read {
            let rest = account.holding(chunk.slice(written..));
            to.write_all(&rest).await.map_err(reset)?;
        }
        from_end.count(record, read);
    }
}

async fn into_tunnel(
    socket: &Carried,
    end: End,
    send: &mut SendStream<Bytes>,
    record: &ConnectionRecord,
    account: &Arc<Account>,
) -> Result<(), ProxyError> {
    let mut reader = Reader::new(socket);
    loop {
        tokio::select! {
            readable = socket.readable() => readable.map_err(|_| end.reset())?,
            reset = poll_fn(|cx| send.poll_reset(cx)) => {
                return Err(reset.map_or_else(|error| broken(error, end.other()), |_| end.other().reset()));
            }
        };
        // Nothing is read that would wait here for a far side that does not read.
        let room = capacity(send, reader.buffer_len_bytes, end).await?;
        let chunk = reader.try_read(room).map_err(|_| end.reset())?;
        let read = chunk.as_ref().map_or(0, Bytes::len);
        match chunk {
            Some(chunk) if read == 0 => return send.send_data(chunk, true).map_err(|error| broken(error, end.other())),
            Some(chunk) => {
                let chunk = account.holding(chunk);
                send.send_data(chunk, false).map_err(|error| broken(error, end.other()))?;
                end.count(record, read);
            }
            None => {}
        }
        if read < room {
            // Others of the tunnel may have it.
            send.reserve_capacity(0);
        }
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

struct Piece {
    data: BytesMut,
    /// What it was counted as: all that it takes, not what is in it.
    held_bytes: usize,
}

/// What comes from a stream of a tunnel. It is taken as it arrives, so that what waits is known and counted.
pub(super) struct Incoming {
    receive: RecvStream,
    account: Arc<Account>,
    /// Copied: a frame is a part of the tunnel's read buffer, and a few bytes would keep all of that.
    waiting: VecDeque<Piece>,
    waiting_bytes: usize,
    unreleased_bytes: usize,
    ended: bool,
}

impl Incoming {
    pub(super) fn new(receive: RecvStream, registered: &Registered) -> Self {
        Self {
            receive,
            account: registered.account().clone(),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            unreleased_bytes: 0,
            ended: false,
        }
    }

    /// Resolves when more than `limit_bytes` have come, or the stream is broken.
    pub(super) async fn early(&mut self, limit_bytes: usize) -> ProxyError {
        loop {
            if self.waiting_bytes > limit_bytes {
                return Refusal::EarlyData.into();
            }
            if self.ended {
                return std::future::pending().await;
            }
            match self.next().await {
                Ok(data) => self.keep(&data),
                Err(error) => return broken(error, End::Source),
            }
        }
    }

    /// Empty at the end of the stream.
    async fn next(&mut self) -> Result<Bytes, h2::Error> {
        match self.receive.data().await {
            Some(data) => data,
            None => {
                self.ended = true;
                Ok(Bytes::new())
            }
        }
    }

    fn keep(&mut self, data: &[u8]) {
        self.waiting_bytes += data.len();
        let mut rest = data;
        if let Some(Piece { data: last, .. }) = self.waiting.back_mut() {
            let (first, further) = data.split_at(data.len().min(last.capacity() - last.len()));
            last.extend_from_slice(first);
            rest = further;
        }
        if !rest.is_empty() {
            let mut data = BytesMut::with_capacity(rest.len().max(PIECE_BYTES));
            data.extend_from_slice(rest);
            let held_bytes = data.capacity();
            self.account.hold(held_bytes);
            self.waiting.push_back(Piece { data, held_bytes });
        }
    }

    /// As much of what waits as the socket takes now.
    fn write_waiting(&mut self, socket: &Carried) -> io::Result<usize> {
        let mut total = 0;
        while let Some(Piece { data, held_bytes }) = self.waiting.front_mut() {
            let written = socket.try_write_some(data)?;
            total += written;
            self.waiting_bytes -= written;
            data.advance(written);
            if !data.is_empty() {
                break;
            }
            self.account.release(*held_bytes);
            self.waiting.pop_front();
        }
        Ok(total)
    }

    /// Gives window back for what the socket took.
    fn release(&mut self, bytes: usize) -> Result<(), h2::Error> {
        self.unreleased_bytes += bytes;
        if self.unreleased_bytes >= RELEASE_BYTES || self.waiting.is_empty() {
            let bytes = std::mem::take(&mut self.unreleased_bytes);
            let released = self.receive.flow_control().release_capacity(bytes);
            // Nobody wants the window of a stream that has ended.
            return if self.ended { Ok(()) } else { released };
        }
        Ok(())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.account.release(self.waiting.iter().map(|piece| piece.held_bytes).sum());
    }
}

async fn from_tunnel(incoming: &mut Incoming, socket: &Carried, end: End, record: &ConnectionRecord) -> Result<(), ProxyError> {
    let mut failed = None;
    while !(incoming.ended && incoming.waiting.is_empty()) {
        let waits = !incoming.waiting.is_empty();
        let written = tokio::select! {
            biased;
            writable = socket.writable(), if waits => {
                writable.map_err(|_| end.reset())?;
                incoming.write_waiting(socket).map_err(|_| end.reset())?
            }
            data = incoming.next(), if !incoming.ended => match data {
                Ok(data) => {
                    let written = if waits { 0 } else { socket.try_write_some(&data).map_err(|_| end.reset())? };
                    incoming.keep(&data[written..]);
                    written
                }
                Err(error) => {
                    failed = Some(broken(error, end.other()));
                    break;
                }
            },
        };
        incoming.release(written).map_err(|error| broken(error, end.other()))?;
        end.other().count(record, written);
    }
    if let Some(error) = failed {
        // What had come before is still delivered, to whoever reads.
        let deliver = async {
            while !incoming.waiting.is_empty() && socket.writable().await.is_ok() {
                let Ok(written) = incoming.write_waiting(socket) else { return };
                end.other().count(record, written);
            }
        };
        let _ = timeout(RESET_GRACE, deliver).await;
        return Err(error);
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
