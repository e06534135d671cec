//! Whether the server's clock and ours tell the same time: commits in the archive have the server's.

use std::time::Duration;

use chrono::TimeDelta;

/// How far the clocks may lie apart without a word.
const APART_MAX: TimeDelta = TimeDelta::seconds(30);

/// A judgement rests on so many messages at least.
const MESSAGES_MIN: u32 = 3;

/// A judgement rests on messages over so long at least: what had to wait for us to listen is followed by others.
const WATCH_MIN: Duration = Duration::from_secs(10);

/// Compares when messages were sent, by the server's clock, with when they came, by ours.
///
/// A message may have been on its way for long, but not for less than no time: of several the one that says that the
/// server is furthest ahead is nearest to the truth.
#[derive(Debug, Default)]
pub struct ServerClock {
    since: Option<Duration>,
    messages: u32,
    ahead_micros: i64,
    told: bool,
}

impl ServerClock {
    /// Notes a message; returns how far the server's clock is ahead (negative: behind), when that is to be said:
    /// once, until the clocks have agreed again. `now` is counted from any one moment, the others are microseconds
    /// from 1970.
    pub fn heard(&mut self, now: Duration, sent_micros: i64, came_micros: i64) -> Option<TimeDelta> {
        let ahead = sent_micros.saturating_sub(came_micros);
        let since = *self.since.get_or_insert(now);
        self.ahead_micros = if self.messages == 0 { ahead } else { self.ahead_micros.max(ahead) };
        self.messages = self.messages.saturating_add(1);
        if self.messages < MESSAGES_MIN || now.saturating_sub(since) < WATCH_MIN {
            return None;
        }
        (self.since, self.messages) = (None, 0);
        let ahead = TimeDelta::microseconds(self.ahead_micros);
        let told = std::mem::replace(&mut self.told, is_apart(ahead));
        (self.told && !told).then_some(ahead)
    }
}

/// Returns how far the server's clock is ahead (negative: behind) when it gave the time `server` as an answer to a
/// question that was asked at `asked` and answered at `answered`, all in microseconds from 1970; `None` when that
/// is nothing to speak of.
pub fn clock_ahead(server: i64, asked: i64, answered: i64) -> Option<TimeDelta> {
    let nearest = server.clamp(asked, answered.max(asked));
    Some(TimeDelta::microseconds(server.saturating_sub(nearest))).filter(|ahead| is_apart(*ahead))
}

/// Returns in words that the clock of `server` is ahead or behind, and what that means.
pub fn clock_text(server: &str, ahead: TimeDelta) -> String {
    let seconds = ahead.num_seconds().unsigned_abs();
    let long = match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, seconds) => format!("{seconds} s"),
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, ..) => format!("{days} d {hours} h"),
    };
    let side = if ahead < TimeDelta::zero() { "behind" } else { "ahead of" };
    format!(
        "the clock of {server} is {long} {side} this machine's: the times of commits in the archive are the server's, and \
         a time to restore to has to be given by that clock"
    )
}

fn is_apart(ahead: TimeDelta) -> bool {
    ahead.abs() > APART_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;

    /// Feeds messages, each with the second at which it comes, how far the server's clock is ahead, and how long it
    /// was on its way; returns what is said at which of them.
    fn said(messages: &[(u64, i64, i64)]) -> Vec<(u64, i64)> {
        let mut clock = ServerClock::default();
        let mut said = Vec::new();
        for (at, ahead, late) in messages {
            let came = 1_700_000_000 * SECOND + *at as i64 * SECOND;
            let sent = came + (ahead - late) * SECOND;
            if let Some(ahead) = clock.heard(Duration::from_secs(*at), sent, came) {
                said.push((*at, ahead.num_seconds()));
            }
        }
        said
    }

    #[test]
    fn a_clock_that_is_off_is_told_once() {
        for ahead in [31, 4000, -31, -90_000] {
            let messages: Vec<_> = (0..60).map(|at| (at, ahead, 0)).collect();
            assert_eq!(said(&messages), [(10, ahead)]);
            // A few messages, far apart.
            assert_eq!(said(&[(0, ahead, 0), (30, ahead, 0), (60, ahead, 0), (90, ahead, 0)]), [(60, ahead)]);
        }
        for ahead in [0, 30, -30] {
            let messages: Vec<_> = (0..60).map(|at| (at, ahead, 0)).collect();
            assert_eq!(said(&messages), []);
        }
        // Once it was right, it is told again.
        let messages: Vec<_> =
            (0..90).map(|at| (at, if (30..60).contains(&at) { 0 } else { 100 }, 0)).collect();
        assert_eq!(said(&messages).iter().map(|(_, ahead)| *ahead).collect::<Vec<_>>(), [100, 100]);
    }

    #[test]
    fn messages_that_had_to_wait_are_no_clock_that_is_behind() {
        // Nobody listened for a minute and a half; then all comes at once, and what follows comes in time.
        let mut messages: Vec<_> = (0..50).map(|number| (100, 0, 90 - number)).collect();
        messages.extend((101..130).map(|at| (at, 0, 0)));
        assert_eq!(said(&messages), []);
        // A clock that is ahead is not hidden by it.
        let messages: Vec<_> = (0..20).map(|at| (at, 300, if at % 2 == 0 { 200 } else { 5 })).collect();
        assert_eq!(said(&messages), [(10, 295)]);
    }

    #[test]
    fn an_answer_is_judged_by_when_it_was_asked_for() {
        let ahead = |server, asked, answered| {
            clock_ahead(server * SECOND, asked * SECOND, answered * SECOND).map(|ahead| ahead.num_seconds())
        };
        assert_eq!(ahead(1000, 990, 1010), None);
        assert_eq!((ahead(1040, 990, 1010), ahead(1041, 990, 1010)), (None, Some(31)));
        assert_eq!((ahead(960, 990, 1010), ahead(959, 990, 1010)), (None, Some(-31)));
        // Our own clock was set back meanwhile.
        assert_eq!(ahead(1000, 1000, 900), None);
        assert_eq!(clock_ahead(i64::MIN, 0, 1).is_some(), clock_ahead(i64::MAX, 0, 1).is_some());
    }

    #[test]
    fn it_is_said_in_words() {
        for (seconds, words) in [
            (31, "is 31 s ahead of this"),
            (-125, "is 2 min 5 s behind this"),
            (-7260, "is 2 h 1 min behind this"),
            (200_000, "is 2 d 7 h ahead of this"),
        ] {
            let text = clock_text("db1 port 5432", TimeDelta::seconds(seconds));
            assert!(text.starts_with("the clock of db1 port 5432 ") && text.contains(words), "{text}");
        }
    }
}
