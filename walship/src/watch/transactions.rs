//! Which transactions have ended on a server, and by which position all of them had.
//!
//! Numbers alone do not tell: they are given at the begin, and one that has a lower number may end last. So it is remembered
//! from look to look which ones ran.

use std::collections::BTreeSet;

use crate::pg::{Lsn, TimelineId};

/// What is known of the transactions that have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The largest number of one, without its epoch.
    pub newest_xid: u32,
    /// At this position all of them had ended.
    pub by: Lsn,
    /// At this position those had ended that had been seen to run, and whose numbers are not the largest.
    pub late: Option<Lsn>,
}

/// What was seen at the last look.
#[derive(Debug, Clone, Default)]
pub struct Transactions(Option<Seen>);

#[derive(Debug, Clone)]
struct Seen {
    timeline: TimelineId,
    /// One more than the largest number that has ended, and lower ones that run.
    next: u64,
    running: BTreeSet<u64>,
    by: Lsn,
    late: Option<Lsn>,
}

impl Transactions {
    /// Takes what `pg_current_snapshot()` says, and a position that was asked for after it: what had ended by then was
    /// written before it. `None` for what makes no sense.
    pub fn step(&mut self, timeline: TimelineId, snapshot: &str, position: Lsn) -> Option<Ended> {
        let mut parts = snapshot.split(':').skip(1);
        let next: u64 = parts.next()?.parse().ok()?;
        let running = parts.next()?.split(',').filter(|xid| !xid.is_empty());
        let running: BTreeSet<u64> = running.map(|xid| xid.parse().ok()).collect::<Option<_>>()?;
        let seen = match self.0.take().filter(|seen| seen.timeline == timeline && seen.next <= next) {
            // Nothing has ended since.
            Some(seen) if (seen.next, &seen.running) == (next, &running) => seen,
            Some(seen) => {
                let ended_late = seen.running.difference(&running).any(|xid| xid + 1 < next);
                let late = if ended_late { Some(position) } else { seen.late };
                Seen { timeline, next, running, by: position, late }
            }
            None => Seen { timeline, next, running, by: position, late: None },
        };
        let ended = Ended { newest_xid: (next as u32).wrapping_sub(1), by: seen.by, late: seen.late };
        self.0 = Some(seen);
        Some(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ran_and_ended_last_is_remembered() {
        let mut seen = Transactions::default();
        let mut step = |snapshot: &str, position| {
            let ended = seen.step(TimelineId::FIRST, snapshot, Lsn(position))?;
            Some((ended.newest_xid, ended.by.0, ended.late.map(|late| late.0)))
        };
        assert_eq!(step("700:702:700", 10), Some((701, 10, None)));
        assert_eq!(step("700:702:700", 20), Some((701, 10, None)), "nothing has ended");
        assert_eq!(step("700:703:700", 30), Some((702, 30, None)));
        assert_eq!(step("703:703:", 40), Some((702, 40, Some(40))), "700 has ended last");
        assert_eq!(step("703:703:", 50), Some((702, 40, Some(40))));
        assert_eq!(step("703:705:703", 60), Some((704, 60, Some(40))));
        assert_eq!(step("703:705:703", 60), Some((704, 60, Some(40))));
        for nonsense in ["", "1", "1:2", "1:x:", "1:3:x"] {
            assert_eq!(step(nonsense, 70), None, "{nonsense}");
        }
    }

    #[test]
    fn another_timeline_begins_anew_and_numbers_wrap_around() {
        let mut seen = Transactions::default();
        seen.step(TimelineId::FIRST, "700:702:700", Lsn(10));
        assert_eq!(seen.step(TimelineId::FIRST, "702:702:", Lsn(20)).unwrap().late, Some(Lsn(20)));
        let other = TimelineId::new(2).unwrap();
        assert_eq!(seen.step(other, "702:702:", Lsn(5)).unwrap().late, None);
        let wrapped = 1_u64 << 32;
        assert_eq!(
            seen.step(other, &format!("{wrapped}:{wrapped}:"), Lsn(30)),
            Some(Ended { newest_xid: u32::MAX, by: Lsn(30), late: None })
        );
    }
}
