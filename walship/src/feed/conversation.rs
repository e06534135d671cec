//! When to tell the server how far we are, and when to leave.

use std::time::Duration;

use crate::pg::Lsn;

/// The most often that a question of the server's is answered while there is nothing new to say. Each
/// answer of ours makes a server that shuts down ask again at once.
const SAME_ANSWER_PAUSE: Duration = Duration::from_millis(100);

/// So many questions without any news in between, over [`Rules::stop_patience`], are a server that shuts
/// down and waits for us: otherwise it asks once in half of its `wal_sender_timeout`.
const STOPPING_QUESTIONS: u32 = 8;

/// How patient to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Say something at least this often.
    pub status_interval: Duration,
    /// A server that is silent for this long, although it was asked half-way, is gone.
    pub silence_max: Duration,
    /// A server that shuts down is kept waiting for this long at most.
    pub stop_patience: Duration,
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// All is well.
    Stay,
    /// The server has said nothing for too long.
    Silent,
    /// The server shuts down and waits for WAL to be durable that is not: leave without saying that it is.
    KeptWaiting,
}

/// What passed between the server and us. Times are counted from any one moment.
#[derive(Debug)]
pub struct Conversation {
    rules: Rules,
    heard: Duration,
    said: Duration,
    said_durable: Lsn,
    owes_answer: bool,
    asked_for_life: bool,
    /// Questions since the last news, and when the first of them came.
    questions: u32,
    questions_since: Duration,
}

impl Conversation {
    /// Returns a conversation that begins now.
    pub fn new(rules: Rules, now: Duration) -> Self {
        Self {
            rules,
            heard: now,
            said: now,
            said_durable: Lsn::INVALID,
            // The server learns where we are before anything else.
            owes_answer: true,
            asked_for_life: false,
            questions: 0,
            questions_since: now,
        }
    }

    /// Notes that WAL came.
    pub fn heard_wal(&mut self, now: Duration) {
        self.heard = now;
        self.asked_for_life = false;
        self.questions = 0;
    }

    /// Notes a sign of life.
    pub fn heard_keepalive(&mut self, now: Duration, reply_requested: bool) {
        self.heard = now;
        self.asked_for_life = false;
        if reply_requested {
            self.owes_answer = true;
            if self.questions == 0 {
                self.questions_since = now;
            }
            self.questions = self.questions.saturating_add(1);
        }
    }

    /// Returns whether to speak now, and if so whether to ask for an answer.
    pub fn speak(&mut self, now: Duration, durable: Lsn) -> Option<bool> {
        let news = durable != self.said_durable;
        let since = now.saturating_sub(self.said);
        let answer = self.owes_answer && (self.questions <= 1 || since >= SAME_ANSWER_PAUSE);
        let ask = !self.asked_for_life && now.saturating_sub(self.heard) >= self.rules.silence_max / 2;
        if !(news || answer || ask || since >= self.rules.status_interval) {
            return None;
        }
        if news {
            self.questions = 0;
        }
        self.said = now;
        self.said_durable = durable;
        self.owes_answer = false;
        self.asked_for_life |= ask;
        Some(ask)
    }

    /// Returns when [`Conversation::speak`] and [`Conversation::verdict`] are to be asked again at the latest.
    pub fn next_look(&self, now: Duration) -> Duration {
        let silence = if self.asked_for_life { self.rules.silence_max } else { self.rules.silence_max / 2 };
        let mut next = (self.heard + silence).min(self.said + self.rules.status_interval);
        if self.owes_answer {
            next = next.min(self.said + SAME_ANSWER_PAUSE);
        }
        next.saturating_sub(now)
    }

    /// Returns whether to go on; `durable` and `received` are how far we are.
    pub fn verdict(&self, now: Duration, durable: Lsn, received: Lsn) -> Verdict {
        if now.saturating_sub(self.heard) >= self.rules.silence_max {
            return Verdict::Silent;
        }
        let waited = now.saturating_sub(self.questions_since);
        if durable < received && self.questions >= STOPPING_QUESTIONS && waited >= self.rules.stop_patience {
            return Verdict::KeptWaiting;
        }
        Verdict::Stay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        status_interval: Duration::from_secs(10),
        silence_max: Duration::from_secs(60),
        stop_patience: Duration::from_secs(1),
    };

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn it_speaks_first_when_asked_with_news_and_now_and_then() {
        let mut talk = Conversation::new(RULES, ms(0));
        assert_eq!(talk.speak(ms(0), Lsn(5)), Some(false));
        assert_eq!(talk.speak(ms(1), Lsn(5)), None);
        assert_eq!(talk.next_look(ms(1)), ms(9_999));
        talk.heard_keepalive(ms(2), false);
        assert_eq!(talk.speak(ms(2), Lsn(5)), None);
        talk.heard_keepalive(ms(3), true);
        assert_eq!(talk.speak(ms(3), Lsn(5)), Some(false), "a first question is answered at once");
        assert_eq!(talk.speak(ms(4), Lsn(6)), Some(false), "news are told at once");
        talk.heard_wal(ms(9_000));
        assert_eq!(talk.speak(ms(10_004), Lsn(6)), Some(false));
    }

    #[test]
    fn a_silent_server_is_asked_and_then_left() {
        let mut talk = Conversation::new(RULES, ms(0));
        assert_eq!(talk.speak(ms(0), Lsn(5)), Some(false));
        assert_eq!(talk.speak(ms(30_000), Lsn(5)), Some(true));
        assert_eq!(talk.speak(ms(30_001), Lsn(5)), None);
        assert_eq!(talk.verdict(ms(59_999), Lsn(5), Lsn(5)), Verdict::Stay);
        assert_eq!(talk.verdict(ms(60_000), Lsn(5), Lsn(5)), Verdict::Silent);
        talk.heard_keepalive(ms(60_000), false);
        assert_eq!(talk.verdict(ms(60_000), Lsn(5), Lsn(5)), Verdict::Stay);
    }

    #[test]
    fn a_server_that_shuts_down_is_not_kept_waiting() {
        let mut talk = Conversation::new(RULES, ms(0));
        assert_eq!(talk.speak(ms(0), Lsn(5)), Some(false));
        let (mut now, mut answers) = (0, 0);
        // It asks again as soon as it is answered.
        talk.heard_keepalive(ms(0), true);
        let left = loop {
            if talk.speak(ms(now), Lsn(5)).is_some() {
                answers += 1;
                talk.heard_keepalive(ms(now), true);
            }
            match talk.verdict(ms(now), Lsn(5), Lsn(9)) {
                Verdict::Stay => now += 1,
                verdict => break verdict,
            }
            assert_eq!(talk.verdict(ms(now), Lsn(9), Lsn(9)), Verdict::Stay, "nothing is owed");
        };
        assert_eq!(left, Verdict::KeptWaiting);
        assert!((1_000..1_100).contains(&now), "{now} ms");
        assert!(answers <= 12, "{answers} answers");
    }

    #[test]
    fn ordinary_questions_are_no_shutdown() {
        let mut talk = Conversation::new(RULES, ms(0));
        for half_minute in 0..20 {
            let now = ms(half_minute * 30_000);
            talk.heard_keepalive(now, true);
            talk.heard_wal(now);
            assert!(talk.speak(now, Lsn(5)).is_some());
            assert_eq!(talk.verdict(now, Lsn(5), Lsn(9)), Verdict::Stay);
        }
    }
}
