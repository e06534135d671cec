//! Bounded waits for something that another process brings about.

use std::time::{Duration, Instant};

/// How long a test waits for another process before it calls it a failure. Generous on purpose:
/// a machine under load must not turn a pass into a failure.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks `condition` again and again, at most [`PATIENCE`] long.
///
/// # Panics
/// When the time is over; `what` completes the sentence "waited in vain until ...".
pub fn until(what: &str, condition: impl FnMut() -> bool) {
    until_within(what, PATIENCE, condition);
}

/// Asks `condition` again and again, at most `patience` long.
///
/// # Panics
/// When the time is over.
pub fn until_within(what: &str, patience: Duration, mut condition: impl FnMut() -> bool) {
    some_within(what, patience, || condition().then_some(()));
}

/// Returns the first value that `attempt` yields, within [`PATIENCE`].
///
/// # Panics
/// When the time is over.
pub fn some<T>(what: &str, attempt: impl FnMut() -> Option<T>) -> T {
    some_within(what, PATIENCE, attempt)
}

/// Returns the first value that `attempt` yields, within `patience`.
///
/// # Panics
/// When the time is over.
pub fn some_within<T>(what: &str, patience: Duration, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {patience:?} in vain until {what}");
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
