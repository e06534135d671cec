//! A second thread that watches the bytes which the first one compresses or decompresses.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::error::Result;

/// How much is handed over at once: large enough for BLAKE3's wide rounds and to make a hand-over
/// cheap, small enough to stay in cache.
pub(super) const CHUNK_BYTES: usize = 256 << 10;
/// How many chunks there are: one in each thread's hands and two on the way, to even out both.
const CHUNKS: usize = 4;
/// Below this a thread costs more than it saves.
const THREAD_BYTES_MIN: u64 = 1 << 20;

/// How many bodies are at work in this process.
static AT_WORK: AtomicUsize = AtomicUsize::new(0);

type Chunk = Arc<Vec<u8>>;

/// One of those at work.
struct AtWork;

impl AtWork {
    /// Counts this one in; returns how many there were before as well.
    fn begin() -> (Self, usize) {
        (Self, AT_WORK.fetch_add(1, Ordering::Relaxed))
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        AT_WORK.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs `work`, which gives what it reads to its [`Watcher`]; `watch` sees those bytes in order, and
/// has seen all of them when this returns. It runs on a thread of its own when `expected_bytes` are
/// worth it, a core is left for it by the bodies that are at work already, and a thread can be had; else on this
/// one: where every core has a body of its own, handing bytes from one to another only costs.
pub(super) fn beside<T>(
    expected_bytes: u64,
    watch: &mut (dyn FnMut(&[u8]) + Send),
    work: impl FnOnce(&Watcher<'_>) -> Result<T>,
) -> Result<T> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let (_at_work, others) = AtWork::begin();
    if expected_bytes < THREAD_BYTES_MIN || others + 1 >= cores {
        return work(&Watcher::here(watch));
    }
    // Whoever turns out to do the watching takes it out.
    let watch = Mutex::new(watch);
    let take = || watch.lock().unwrap_or_else(PoisonError::into_inner);
    thread::scope(|scope| {
        let (read_in, read) = sync_channel::<(Chunk, usize)>(CHUNKS);
        let (free_in, free) = sync_channel::<Chunk>(CHUNKS);
        for _ in 0..CHUNKS {
            // There is room for all of them.
            let _ = free_in.send(new_chunk());
        }
        let started = thread::Builder::new().name("digest".to_owned()).spawn_scoped(scope, move || {
            let mut watch = take();
            for (chunk, bytes) in read {
                (*watch)(&chunk[..bytes]);
                // Nobody waits for it when the work is over or was broken off.
                let _ = free_in.send(chunk);
            }
        });
        match started {
            Ok(_joined_by_the_scope) => work(&Watcher::Beside { read_in, free }),
            Err(_no_thread_to_be_had) => work(&Watcher::here(&mut **take())),
        }
    })
}

/// Sees every byte that is read, in order.
type Watch<'a> = &'a mut (dyn FnMut(&[u8]) + Send);

/// Where the bytes go that are to be watched.
pub(super) enum Watcher<'a> {
    Here { watch: RefCell<Watch<'a>>, spare: Cell<Option<Chunk>> },
    Beside { read_in: SyncSender<(Chunk, usize)>, free: Receiver<Chunk> },
}

impl<'a> Watcher<'a> {
    fn here(watch: Watch<'a>) -> Self {
        Self::Here { watch: RefCell::new(watch), spare: Cell::new(None) }
    }

    /// Returns a buffer to read into; waits while the other thread has all of them.
    pub(super) fn buffer(&self) -> Chunk {
        match self {
            Self::Here { spare, .. } => spare.take().unwrap_or_else(new_chunk),
            // The other thread ends early only when it panics, and then the scope passes that on.
            Self::Beside { free, .. } => free.recv().unwrap_or_else(|_| new_chunk()),
        }
    }

    /// Has the first `bytes` of `chunk` watched, in the order of the calls.
    pub(super) fn watch(&self, chunk: &Chunk, bytes: usize) {
        match self {
            Self::Here { watch, .. } => (watch.borrow_mut())(&chunk[..bytes]),
            Self::Beside { read_in, .. } => {
                let _ = read_in.send((Arc::clone(chunk), bytes));
            }
        }
    }

    /// Takes back a buffer that the caller needs no more; the next one may be the same.
    pub(super) fn done(&self, chunk: Chunk) {
        match self {
            Self::Here { spare, .. } => spare.set(Some(chunk)),
            // It comes back from the other thread, which may still be reading it.
            Self::Beside { .. } => drop(chunk),
        }
    }
}

fn new_chunk() -> Chunk {
    Arc::new(vec![0; CHUNK_BYTES])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_watched_in_order_on_either_thread() {
        for expected_bytes in [0, THREAD_BYTES_MIN] {
            let mut seen = Vec::new();
            let mut watch = |bytes: &[u8]| seen.extend_from_slice(bytes);
            let answer = beside(expected_bytes, &mut watch, |watcher| {
                for number in 0..100u8 {
                    let mut chunk = watcher.buffer();
                    Arc::make_mut(&mut chunk)[..3].fill(number);
                    watcher.watch(&chunk, 3);
                    watcher.done(chunk);
                }
                Ok(7)
            });
            assert_eq!(answer.unwrap(), 7);
            assert_eq!(seen, (0..100u8).flat_map(|number| [number; 3]).collect::<Vec<_>>());
        }
    }

    #[test]
    fn work_that_is_broken_off_ends_the_other_thread() {
        let failed: Result<()> = beside(THREAD_BYTES_MIN, &mut |_| (), |watcher| {
            watcher.watch(&watcher.buffer(), 1);
            Err(crate::Error::corrupt("damage"))
        });
        assert!(failed.is_err());
    }
}
