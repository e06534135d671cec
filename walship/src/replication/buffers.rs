//! Memory that a socket is read into, and that is used again when nobody holds what was read any more.

use std::collections::VecDeque;

use bytes::BytesMut;

/// How long a buffer is: many messages with WAL (of 128 KiB), so that few are cut off at its end and have to be
/// moved to the next one.
const BUFFER_BYTES: usize = 1 << 20;

/// At most so many filled buffers are kept in mind. What a caller holds more of goes back to the system when it
/// is done with it.
const HELD_MAX: usize = 32;

/// So many buffers stay at hand that nobody holds anything of.
const FREE_MAX: usize = 2;

/// Buffers that were filled, the oldest first.
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

    /// Returns a buffer that nobody holds anything of any more. Where many are free, less is in use than was: one
    /// of them goes back to the system.
    fn free(&mut self, bytes: usize) -> Option<BytesMut> {
        let mut free = self.held.iter_mut().enumerate().filter_map(|(place, buffer)| {
            // What has been read from one buffer may be done with before what was read before it.
            buffer.try_reclaim(bytes).then_some(place)
        });
        let first = free.next()?;
        if free.count() >= FREE_MAX {
            self.held.remove(first);
            return self.free(bytes);
        }
        self.held.remove(first)
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
        assert!(buffers.held.len() <= FREE_MAX + 1, "{}", buffers.held.len());
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
