//! Memory that a socket is read into, and that is used again when nobody holds what was read any more.

use std::collections::VecDeque;

use bytes::BytesMut;

/// How long a buffer is: many messages with WAL (of 128 KiB), so that few are cut off at its end and have to be
/// moved to the next one.
const BUFFER_BYTES: usize = 1 << 20;

/// At most so many buffers that are still held by others are kept in mind. What a caller holds more of is given
/// back to the system when it is done with it.
const HELD_MAX: usize = 32;

/// Buffers that are still held by others, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    held: VecDeque<BytesMut>,
}

impl Buffers {
    /// Makes room for `missing` more bytes in `buffer`, and for others behind them where that costs nothing.
    pub(super) fn make_room(&mut self, buffer: &mut BytesMut, missing: usize) {
        if buffer.capacity() - buffer.len() >= missing {
            return;
        }
        let wanted = (buffer.len() + missing).max(BUFFER_BYTES);
        let mut next = self.free(wanted).unwrap_or_else(|| BytesMut::with_capacity(wanted));
        next.extend_from_slice(buffer);
        let mut full = std::mem::replace(buffer, next);
        // What remains in it was moved: only its memory is of interest.
        full.clear();
        if full.capacity() > 0 && self.held.len() < HELD_MAX {
            self.held.push_back(full);
        }
    }

    /// Returns the oldest buffer, if nobody holds anything of it.
    fn free(&mut self, bytes: usize) -> Option<BytesMut> {
        let mut oldest = self.held.pop_front()?;
        if !oldest.try_reclaim(bytes) {
            self.held.push_front(oldest);
            return None;
        }
        // Where the next one is free as well, less is in use than was: one goes back to the system.
        if self.held.front_mut().is_some_and(|next| next.try_reclaim(bytes)) {
            self.held.pop_front();
        }
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    /// Fills `buffer` with messages as a socket would, cut off at its end.
    fn fill(buffers: &mut Buffers, buffer: &mut BytesMut, number: u8) -> Bytes {
        buffers.make_room(buffer, 100_000);
        buffer.extend_from_slice(&[number; 100_000]);
        buffer.split_to(100_000).freeze()
    }

    #[test]
    fn what_is_held_stays_and_what_is_not_is_used_again() {
        let (mut buffers, mut buffer) = (Buffers::default(), BytesMut::new());
        let held: Vec<_> = (0..50).map(|number| fill(&mut buffers, &mut buffer, number)).collect();
        for (number, bytes) in held.iter().enumerate() {
            assert!(bytes.iter().all(|byte| usize::from(*byte) == number));
        }
        assert_eq!(buffers.held.len(), 4, "five of ten messages each, the last of them in use");
        drop(held);
        for number in 0..100 {
            fill(&mut buffers, &mut buffer, number);
        }
        assert!(buffers.held.len() <= 2, "{}", buffers.held.len());
    }

    #[test]
    fn a_cut_off_message_is_moved_and_a_long_one_fits() {
        let (mut buffers, mut buffer) = (Buffers::default(), BytesMut::new());
        buffers.make_room(&mut buffer, 5);
        buffer.extend_from_slice(b"begin");
        buffers.make_room(&mut buffer, 3 << 20);
        assert!(buffer.capacity() >= (3 << 20) + 5);
        assert_eq!(&buffer[..], b"begin");
    }
}
