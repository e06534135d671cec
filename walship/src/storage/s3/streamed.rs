//! A long body on its way into one request: a few pieces in memory, whatever its length.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::storage::{PutBody, blocking};

/// How many pieces (of at most 1 MiB where they come from a file) wait to be sent.
const PIECES_MAX: usize = 2;

/// Why a body could not be read to its end, if it could not.
#[derive(Debug, Clone, Default)]
pub(super) struct ReadFailure(Arc<Mutex<Option<Error>>>);

impl ReadFailure {
    /// Returns the failure. Asked for after a request failed: the store is not to blame then.
    pub(super) fn take(&self) -> Option<Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Returns the CRC32 of a body, which may lie in a file.
pub(super) async fn crc32(body: Arc<PutBody>) -> Result<u32> {
    blocking(move || {
        let mut hasher = crc32fast::Hasher::new();
        body.each_piece(|piece| {
            hasher.update(piece);
            Ok(())
        })?;
        Ok(hasher.finalize())
    })
    .await
}

/// Returns a body as a stream for one request, read while it is sent.
pub(super) fn stream(body: Arc<PutBody>) -> (ByteStream, ReadFailure) {
    let (sender, pieces) = mpsc::channel(PIECES_MAX);
    let failure = ReadFailure::default();
    let (slot, left) = (failure.clone(), body.len());
    tokio::task::spawn_blocking(move || {
        let mut wanted = true;
        // A request that ended early wants no more: that is its own affair.
        let mut send = |piece: Bytes| {
            wanted = sender.blocking_send(piece).is_ok();
            if wanted { Ok(()) } else { Err(Error::local_io("the request ended early")) }
        };
        let sent = match &*body {
            PutBody::Memory(pieces) => pieces.iter().cloned().try_for_each(&mut send),
            spooled => spooled.each_piece(|piece| send(Bytes::copy_from_slice(piece))),
        };
        if let Err(error) = sent
            && wanted
        {
            *slot.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    });
    (ByteStream::from_body_1_x(Streamed { pieces, left }), failure)
}

struct Streamed {
    pieces: mpsc::Receiver<Bytes>,
    left: u64,
}

impl Body for Streamed {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let piece = ready!(self.pieces.poll_recv(context));
        Poll::Ready(Some(match piece {
            Some(piece) => {
                self.left = self.left.saturating_sub(piece.len() as u64);
                Ok(Frame::data(piece))
            }
            None => Err(io::Error::other("the body could not be read to its end")),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
