//! What a backup tells about its course.

use std::time::{Duration, Instant};

use crate::pg::{Lsn, SegmentName, TimelineId};

/// A step in the course of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupEvent {
    /// The server was asked and makes its checkpoint.
    Checkpoint,
    /// Data begins to flow.
    Started {
        /// The backup's id.
        id: String,
        /// Where replay will start.
        start_lsn: Lsn,
        /// The timeline.
        timeline: TimelineId,
        /// The server's estimate of what will be sent.
        total_bytes: u64,
    },
    /// Data flows; a few times a second.
    Data(Transfer),
    /// All data is stored; WAL is missing still.
    WaitingForWal {
        /// The first segment that is missing.
        first: Option<SegmentName>,
        /// How many segments are.
        segments: usize,
    },
    /// Something the operator should know; the backup goes on.
    Warning(String),
    /// What was chosen where there was a choice.
    Note(String),
}

/// How far the data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Bytes received.
    pub done_bytes: u64,
    /// The server's estimate of all bytes; the true number may be greater or smaller.
    pub total_bytes: u64,
    /// Bytes a second over the last seconds.
    pub bytes_per_second: u64,
    /// The time left at that rate; `None` while it is unknown.
    pub left: Option<Duration>,
}

/// Turns byte counts into rates.
#[derive(Debug)]
pub(crate) struct Meter {
    total_bytes: u64,
    done_bytes: u64,
    rate: f64,
    marked_at: Instant,
    marked_bytes: u64,
}

impl Meter {
    /// How often progress is told.
    const INTERVAL: Duration = Duration::from_millis(250);

    pub(crate) fn new(total_bytes: u64, now: Instant) -> Self {
        Self { total_bytes, done_bytes: 0, rate: 0.0, marked_at: now, marked_bytes: 0 }
    }

    /// Adds bytes, and returns what to tell when it is time to.
    pub(crate) fn add(&mut self, bytes: u64, now: Instant) -> Option<Transfer> {
        self.done_bytes += bytes;
        let elapsed = now.saturating_duration_since(self.marked_at);
        if elapsed < Self::INTERVAL {
            return None;
        }
        let recent = (self.done_bytes - self.marked_bytes) as f64 / elapsed.as_secs_f64();
        self.rate = if self.rate == 0.0 { recent } else { self.rate * 0.8 + recent * 0.2 };
        (self.marked_at, self.marked_bytes) = (now, self.done_bytes);
        Some(self.now())
    }

    pub(crate) fn now(&self) -> Transfer {
        let left = self.total_bytes.saturating_sub(self.done_bytes) as f64 / self.rate;
        Transfer {
            done_bytes: self.done_bytes,
            total_bytes: self.total_bytes,
            bytes_per_second: self.rate as u64,
            left: (self.rate > 0.0).then(|| Duration::try_from_secs_f64(left).ok()).flatten(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_meter_tells_rate_and_time_left() {
        let start = Instant::now();
        let mut meter = Meter::new(1000, start);
        assert_eq!(meter.now().left, None);
        assert_eq!(meter.add(50, start + Duration::from_millis(10)), None);
        let told = meter.add(50, start + Duration::from_secs(1)).unwrap();
        assert_eq!((told.done_bytes, told.bytes_per_second), (100, 100));
        assert_eq!(told.left, Some(Duration::from_secs(9)));
        // More than the estimate: nothing is left, nothing overflows.
        assert_eq!(meter.add(5000, start + Duration::from_secs(2)).unwrap().left, Some(Duration::ZERO));
    }
}
