//! Work of which no second begins while the first hangs.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use tokio::time::timeout;

/// Work that is waited for no longer than it may take, and is not given up then: a thread that a mount holds cannot be ended,
/// and a second attempt would be held as well.
pub(super) struct Alone<T>(Option<Pin<Box<dyn Future<Output = T>>>>);

impl<T> Default for Alone<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> fmt::Debug for Alone<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Alone").field(&self.0.is_some()).finish()
    }
}

impl<T> Alone<T> {
    /// Returns what comes of the work, or of what was begun before and has not ended yet; `None` when that takes longer than
    /// `patience`.
    ///
    /// # Cancel safety
    /// What was begun goes on with the next call.
    pub(super) async fn run<F>(&mut self, patience: Duration, work: F) -> Option<T>
    where
        F: Future<Output = T> + 'static,
    {
        let begun = self.0.get_or_insert_with(|| Box::pin(work));
        let done = timeout(patience, begun.as_mut()).await.ok();
        if done.is_some() {
            self.0 = None;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, mpsc};

    use super::*;

    #[tokio::test]
    async fn nothing_begins_while_the_first_hangs() {
        let begun = Arc::new(AtomicUsize::new(0));
        let hang = |until: mpsc::Receiver<u32>| {
            let begun = Arc::clone(&begun);
            async move {
                begun.fetch_add(1, Ordering::SeqCst);
                tokio::task::spawn_blocking(move || until.recv().ok()).await.unwrap()
            }
        };
        let mut alone = Alone::default();
        let (end, until) = mpsc::channel();
        assert_eq!(alone.run(Duration::from_millis(20), hang(until)).await, None);
        for _ in 0..3 {
            let (_never, until) = mpsc::channel();
            assert_eq!(alone.run(Duration::from_millis(1), hang(until)).await, None);
        }
        assert_eq!(begun.load(Ordering::SeqCst), 1, "one thread hangs, not four");
        end.send(1).unwrap();
        let patience = Duration::from_secs(60);
        let (end, until) = mpsc::channel();
        end.send(2).unwrap();
        assert_eq!(alone.run(patience, hang(until)).await, Some(Some(1)), "the first has ended");
        let (end, until) = mpsc::channel();
        end.send(3).unwrap();
        assert_eq!(alone.run(patience, hang(until)).await, Some(Some(3)));
        assert_eq!(begun.load(Ordering::SeqCst), 2);
    }
}
