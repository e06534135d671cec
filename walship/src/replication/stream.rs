//! `START_REPLICATION`: WAL as the server sends it, and what is said back.
//!
//! It hands on messages in their order; which bytes they are and what became of them is for
//! `receive`. Source: PostgreSQL documentation, "Streaming Replication Protocol";
//! `src/backend/replication/walsender.c`.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::time::timeout;

use super::connection::Connection;
use super::message::BackendMessage;
use super::slot::check_slot_name;
use crate::error::{Error, Result};
use crate::pg::{Lsn, TimelineId};

/// How long a server may take to begin or end streaming.
const TURN_PATIENCE: Duration = Duration::from_secs(60);

/// Microseconds from 1970 to 2000, where PostgreSQL's clock begins.
const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// One thing that a streaming server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamMessage {
    /// WAL.
    Wal {
        /// Where the bytes begin.
        start: Lsn,
        /// How far the server's WAL went when it sent them.
        server: Lsn,
        /// When that was, by the server's clock: microseconds from 1970.
        sent_micros: i64,
        /// The bytes.
        bytes: Bytes,
    },
    /// A sign of life.
    Keepalive {
        /// How far the server has sent WAL.
        sent: Lsn,
        /// When it said so, by its own clock: microseconds from 1970.
        sent_micros: i64,
        /// Whether it wants to hear from us at once.
        reply_requested: bool,
    },
    /// No WAL of this timeline follows: [`end_streaming`] says why.
    End,
    /// The server shuts down, and knows that all its WAL is where it should be.
    ServerStopped,
}

/// The timeline that follows on the server's own path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextTimeline {
    /// Its number.
    pub timeline: TimelineId,
    /// The first position that does not belong to the timeline before it.
    pub switch_lsn: Lsn,
}

/// What we say about the WAL that came: each position is the first byte not yet dealt with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StandbyStatus {
    /// Written.
    pub write: Lsn,
    /// Durable: the server may forget what lies before it, and ends commits that wait for it.
    pub flush: Lsn,
    /// Whether the server shall answer at once.
    pub reply_requested: bool,
}

/// Starts to stream `timeline` from `start` on. Where the timeline ends at that very place, nothing is
/// streamed and the next timeline is returned.
///
/// # Errors
/// What the server says: a position that its history does not have, a slot that is in use.
pub async fn start_streaming(
    connection: &mut Connection,
    slot: &str,
    timeline: TimelineId,
    start: Lsn,
) -> Result<Option<NextTimeline>> {
    check_slot_name(slot)?;
    let command = format!("START_REPLICATION SLOT \"{slot}\" PHYSICAL {start} TIMELINE {timeline}");
    connection.send_query(&command).await?;
    let doing = format!("streaming {timeline:?} from {start} on {}", connection.host());
    match connection.next_message(TURN_PATIENCE).await? {
        BackendMessage::CopyBoth => Ok(None),
        BackendMessage::RowDescription(_) => {
            let next = read_next_timeline(connection).await?;
            next.map(Some).ok_or_else(|| out_of_order("a timeline ends, and none follows"))
        }
        BackendMessage::Error(error) => Err(error.into_error(&doing)),
        _ => Err(out_of_order("START_REPLICATION has an answer that is none")),
    }
}

/// Returns whether the server still has the WAL of `timeline` at `start`, without a slot. The session is of no
/// more use then.
///
/// # Errors
/// What the server says, other than that it has removed the WAL.
pub async fn still_has(connection: &mut Connection, timeline: TimelineId, start: Lsn) -> Result<bool> {
    connection.send_query(&format!("START_REPLICATION PHYSICAL {start} TIMELINE {timeline}")).await?;
    let doing = format!("asking {} for {timeline:?} from {start}", connection.host());
    let answer = async {
        loop {
            match connection.next_message(TURN_PATIENCE).await? {
                BackendMessage::CopyBoth => {}
                BackendMessage::CopyData(data) => {
                    if let StreamMessage::Wal { .. } = decode(data)? {
                        return Ok(true);
                    }
                }
                // The timeline ends there: nothing of it is missing.
                BackendMessage::CopyDone | BackendMessage::RowDescription(_) => return Ok(true),
                BackendMessage::Error(error) if error.code == "58P01" => return Ok(false),
                BackendMessage::Error(error) => return Err(error.into_error(&doing)),
                _ => return Err(out_of_order("START_REPLICATION has an answer that is none")),
            }
        }
    };
    timeout(TURN_PATIENCE, answer)
        .await
        .map_err(|_| Error::unavailable(format!("{doing}: no answer within {} s", TURN_PATIENCE.as_secs())))?
}

/// Returns the next message of a streaming session; waits for bytes at most `patience` long.
///
/// # Errors
/// What the server says, [`Error::Unavailable`] when the connection breaks or the time is up,
/// [`Error::Corrupt`] for messages that make no sense. The session is of no more use then.
/// # Cancel safety
/// Cancel safe: no byte is lost when the future is dropped.
pub async fn next_streamed(connection: &mut Connection, patience: Duration) -> Result<StreamMessage> {
    match connection.next_message(patience).await? {
        BackendMessage::CopyData(data) => decode(data),
        BackendMessage::CopyDone => Ok(StreamMessage::End),
        // A server that shuts down completes the command in the middle of the stream, and is gone.
        BackendMessage::CommandComplete(_) => Ok(StreamMessage::ServerStopped),
        BackendMessage::Error(error) => {
            Err(error.into_error(&format!("streaming from {}", connection.host())))
        }
        _ => Err(out_of_order("a message comes where none belongs")),
    }
}

/// Tells the server how far we are.
///
/// # Errors
/// [`Error::Unavailable`] when the connection breaks.
pub async fn send_status(connection: &mut Connection, status: StandbyStatus, now_micros: i64) -> Result<()> {
    connection.send(&encode(status, now_micros)).await
}

/// Ends streaming, or answers the server that ended it, and returns the next timeline where the old one is
/// over. What WAL still comes meanwhile is dropped: the next session asks for it again. The session is
/// ready for commands then.
///
/// # Errors
/// As [`next_streamed`].
pub async fn end_streaming(
    connection: &mut Connection,
    ended_by_server: bool,
) -> Result<Option<NextTimeline>> {
    let mut done = BytesMut::new();
    frontend::copy_done(&mut done);
    connection.send(&done).await?;
    if !ended_by_server {
        let drain = async {
            loop {
                match next_streamed(connection, TURN_PATIENCE).await? {
                    StreamMessage::End => return Ok::<(), Error>(()),
                    StreamMessage::ServerStopped => {
                        return Err(Error::unavailable("the server has shut down"));
                    }
                    StreamMessage::Wal { .. } | StreamMessage::Keepalive { .. } => {}
                }
            }
        };
        timeout(TURN_PATIENCE, drain)
            .await
            .map_err(|_| Error::unavailable("the server does not end the stream"))??;
    }
    read_next_timeline(connection).await
}

/// Reads what follows the end of a stream, to the point where the server waits for a command.
async fn read_next_timeline(connection: &mut Connection) -> Result<Option<NextTimeline>> {
    let mut next = None;
    loop {
        match connection.next_message(TURN_PATIENCE).await? {
            BackendMessage::RowDescription(_) | BackendMessage::CommandComplete(_) => {}
            BackendMessage::DataRow(row) => {
                let read = || {
                    let timeline = TimelineId::new(row.first()?.as_deref()?.parse().ok()?)?;
                    Some(NextTimeline { timeline, switch_lsn: row.get(1)?.as_deref()?.parse().ok()? })
                };
                next = Some(read().ok_or_else(|| out_of_order("a next timeline that makes no sense"))?);
            }
            BackendMessage::ReadyForQuery => return Ok(next),
            BackendMessage::Error(error) => {
                return Err(error.into_error(&format!("ending the stream from {}", connection.host())));
            }
            _ => return Err(out_of_order("a message comes after its end")),
        }
    }
}

fn decode(mut data: Bytes) -> Result<StreamMessage> {
    let cut = || out_of_order("a message is cut short");
    let kind = data.try_get_u8().map_err(|_| cut())?;
    match kind {
        b'w' => {
            // Where it starts, how far the server is, when it was sent.
            let start = data.try_get_u64().map_err(|_| cut())?;
            let server = data.try_get_u64().map_err(|_| cut())?;
            let sent_micros = unix_micros(data.try_get_i64().map_err(|_| cut())?);
            Ok(StreamMessage::Wal { start: Lsn(start), server: Lsn(server), sent_micros, bytes: data })
        }
        b'k' => {
            let sent = data.try_get_u64().map_err(|_| cut())?;
            let sent_micros = unix_micros(data.try_get_i64().map_err(|_| cut())?);
            let reply_requested = data.try_get_u8().map_err(|_| cut())? != 0;
            Ok(StreamMessage::Keepalive { sent: Lsn(sent), sent_micros, reply_requested })
        }
        _ => Err(out_of_order("a message of an unknown type")),
    }
}

fn unix_micros(postgres_micros: i64) -> i64 {
    postgres_micros.saturating_add(POSTGRES_EPOCH_MICROS)
}

/// The position of replay stays "none": nothing is replayed here, and who waits for that would wait for ever.
fn encode(status: StandbyStatus, now_micros: i64) -> BytesMut {
    let mut bytes = BytesMut::with_capacity(64);
    bytes.put_u8(b'd');
    bytes.put_u32(4 + 34);
    bytes.put_u8(b'r');
    bytes.put_u64(status.write.0);
    bytes.put_u64(status.flush.0);
    bytes.put_u64(Lsn::INVALID.0);
    bytes.put_i64(now_micros.saturating_sub(POSTGRES_EPOCH_MICROS));
    bytes.put_u8(u8::from(status.reply_requested));
    bytes
}

fn out_of_order(what: &str) -> Error {
    Error::corrupt(format!("the server's WAL stream cannot be followed: {what}"))
        .with_next("Check that this is PostgreSQL itself, not a pooler; it is tried again.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_are_read_and_written_as_postgres_does() {
        let mut wal = vec![b'w'];
        wal.extend(0x1000u64.to_be_bytes());
        wal.extend(0x2000u64.to_be_bytes());
        wal.extend(7u64.to_be_bytes());
        wal.extend(b"WAL");
        let bytes = Bytes::from_static(b"WAL");
        assert_eq!(
            decode(wal.clone().into()).unwrap(),
            StreamMessage::Wal {
                start: Lsn(0x1000),
                server: Lsn(0x2000),
                sent_micros: POSTGRES_EPOCH_MICROS + 7,
                bytes
            }
        );
        for cut in 0..wal.len() - 3 {
            assert!(decode(wal[..cut].to_vec().into()).is_err());
        }
        let mut keepalive = vec![b'k'];
        keepalive.extend(0x2000u64.to_be_bytes());
        keepalive.extend(7u64.to_be_bytes());
        keepalive.push(1);
        let expected = StreamMessage::Keepalive {
            sent: Lsn(0x2000),
            sent_micros: POSTGRES_EPOCH_MICROS + 7,
            reply_requested: true,
        };
        assert_eq!(decode(keepalive.into()).unwrap(), expected);
        assert!(decode(Bytes::from_static(b"x")).is_err());

        let status = StandbyStatus { write: Lsn(3), flush: Lsn(2), reply_requested: true };
        let bytes = encode(status, POSTGRES_EPOCH_MICROS + 5);
        assert_eq!(bytes[..6], *b"d\0\0\0\x26r");
        assert_eq!(bytes.len(), 1 + 38);
        assert_eq!((bytes[13], bytes[21], bytes[29], bytes[37], bytes[38]), (3, 2, 0, 5, 1));
    }

    proptest! {
        #[test]
        fn decoding_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = decode(bytes.into());
        }
    }
}
