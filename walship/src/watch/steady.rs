//! What is told, and when: a problem that holds, once; again after a while; and that it is over, once that holds.
//!
//! What comes and goes within the time that it has to hold is never told, and what was told is over only when it has been
//! gone for as long: nobody is woken twice by one thing.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::kind::{Absence, Kind, Problem, Severity};

/// How notices are spaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// What matters less is not told.
    pub least: Severity,
    /// So long a problem has to hold, or to be gone.
    pub hold: Duration,
    /// After this long it is told again; `None`: never.
    pub repeat: Option<Duration>,
}

/// What a notice is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A problem is there, or has become critical.
    Problem,
    /// It is still there.
    Reminder,
    /// It is gone.
    Recovery,
    /// It was there, and what it is about was taken out of the configuration.
    Unwatched,
}

/// Something to be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// What happened to the problem.
    pub event: Event,
    /// The problem, as it was seen last.
    pub problem: Problem,
    /// Since when it is, or was, there.
    pub since: DateTime<Utc>,
    /// When this was decided.
    pub at: DateTime<Utc>,
}

/// What is known of each problem. Kept over restarts, so that nothing is told twice.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Steady {
    episodes: Vec<Episode>,
}

/// A problem from when it was first seen until it is told that it is over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Episode {
    problem: Problem,
    since: DateTime<Utc>,
    /// Since when it is as bad as it is.
    worse_since: DateTime<Utc>,
    gone_since: Option<DateTime<Utc>>,
    told: Option<Told>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Told {
    severity: Severity,
    at: DateTime<Utc>,
}

impl Steady {
    /// Takes what is wrong now, and returns what is to be told. `absence` says what it means that there is no problem of a kind
    /// and about a subject: while nobody knows, nothing is over.
    pub fn step(
        &mut self,
        problems: &[Problem],
        absence: &dyn Fn(Kind, &str) -> Absence,
        now: DateTime<Utc>,
        rules: &Rules,
    ) -> Vec<Notice> {
        let mut here: BTreeMap<(Kind, String), &Problem> = BTreeMap::new();
        for problem in problems.iter().filter(|problem| problem.severity >= rules.least) {
            // Of two about the same thing the worse counts.
            let known = here.entry((problem.kind, problem.subject.clone())).or_insert(problem);
            if known.severity < problem.severity {
                *known = problem;
            }
        }
        let mut notices = Vec::new();
        self.episodes.retain_mut(|episode| {
            let key = (episode.problem.kind, episode.problem.subject.clone());
            if let Some(problem) = here.remove(&key) {
                episode.is_there(problem, now, rules, &mut notices);
                return true;
            }
            match absence(key.0, &key.1) {
                Absence::Over => episode.is_gone(now, rules, &mut notices),
                Absence::Unknown => {
                    episode.gone_since = None;
                    true
                }
                Absence::Unwatched => {
                    notices.extend(episode.told.map(|_| episode.is_unwatched(now)));
                    false
                }
            }
        });
        for problem in here.into_values() {
            let mut episode = Episode {
                problem: problem.clone(),
                since: now,
                worse_since: now,
                gone_since: None,
                told: None,
            };
            episode.is_there(problem, now, rules, &mut notices);
            self.episodes.push(episode);
        }
        notices
    }
}

impl Episode {
    fn is_there(&mut self, problem: &Problem, now: DateTime<Utc>, rules: &Rules, notices: &mut Vec<Notice>) {
        // The clock may have been set back.
        self.since = self.since.min(now);
        self.worse_since =
            if problem.severity > self.problem.severity { now } else { self.worse_since.min(now) };
        self.problem = problem.clone();
        self.gone_since = None;
        let event = match self.told {
            Some(told) if problem.severity <= told.severity => {
                let again = rules.repeat.is_some_and(|repeat| reached(told.at, now, repeat));
                if !again {
                    return;
                }
                Event::Reminder
            }
            _ if reached(self.worse_since, now, rules.hold) => Event::Problem,
            _ => return,
        };
        self.told = Some(Told { severity: problem.severity, at: now });
        notices.push(self.notice(event, now));
    }

    /// Returns whether it is still to be remembered.
    fn is_gone(&mut self, now: DateTime<Utc>, rules: &Rules, notices: &mut Vec<Notice>) -> bool {
        if self.told.is_none() {
            return false;
        }
        let gone_since = self.gone_since.unwrap_or(now).min(now);
        self.gone_since = Some(gone_since);
        if !reached(gone_since, now, rules.hold) {
            return true;
        }
        notices.push(self.notice(Event::Recovery, now));
        false
    }

    fn is_unwatched(&self, now: DateTime<Utc>) -> Notice {
        let mut notice = self.notice(Event::Unwatched, now);
        notice.problem.next =
            "It is not in the configuration any more, and this was not over: see that it was taken out on \
                               purpose."
                .to_owned();
        notice
    }

    fn notice(&self, event: Event, at: DateTime<Utc>) -> Notice {
        Notice { event, problem: self.problem.clone(), since: self.since, at }
    }
}

fn reached(since: DateTime<Utc>, now: DateTime<Utc>, length: Duration) -> bool {
    now.signed_duration_since(since).to_std().unwrap_or_default() >= length
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + second, 0).unwrap()
    }

    fn problem(severity: Severity) -> Problem {
        Problem {
            kind: Kind::BackupOverdue,
            subject: "file:///r".into(),
            severity,
            text: "old".into(),
            next: "New.".into(),
        }
    }

    const OVER: fn(Kind, &str) -> Absence = |_, _| Absence::Over;

    const RULES: Rules = Rules {
        least: Severity::Warning,
        hold: Duration::from_secs(120),
        repeat: Some(Duration::from_secs(1000)),
    };

    /// The events at each second at which there are any.
    fn play(states: &[(i64, Option<Severity>)]) -> Vec<(i64, Event)> {
        let (mut steady, mut events) = (Steady::default(), Vec::new());
        for (second, state) in states {
            let problems: Vec<_> = state.map(problem).into_iter().collect();
            // What is kept over a restart is all there is.
            steady = serde_json::from_str(&serde_json::to_string(&steady).unwrap()).unwrap();
            events.extend(
                steady
                    .step(&problems, &OVER, at(*second), &RULES)
                    .into_iter()
                    .map(|notice| (*second, notice.event)),
            );
        }
        events
    }

    #[test]
    fn what_holds_is_told_once_and_again_after_a_while_and_when_it_is_over() {
        use Severity::{Critical, Warning};
        let (warn, bad) = (Some(Warning), Some(Critical));
        assert_eq!(play(&[(0, warn), (60, warn), (119, warn)]), []);
        assert_eq!(play(&[(0, warn), (120, warn), (180, warn)]), [(120, Event::Problem)]);
        assert_eq!(
            play(&[
                (0, warn),
                (120, warn),
                (1119, warn),
                (1120, warn),
                (1200, None),
                (1320, None),
                (1400, None)
            ]),
            [(120, Event::Problem), (1120, Event::Reminder), (1320, Event::Recovery)]
        );
        // It becomes critical, and that holds; that it is less bad again is nobody's news.
        assert_eq!(
            play(&[(0, warn), (120, warn), (200, bad), (319, bad), (320, bad), (400, warn), (500, warn)]),
            [(120, Event::Problem), (320, Event::Problem)]
        );
        // It is away for less than it has to be, and back.
        assert_eq!(
            play(&[(0, warn), (120, warn), (200, None), (300, warn), (400, None), (500, warn)]),
            [(120, Event::Problem)]
        );
    }

    #[test]
    fn what_flaps_is_never_told() {
        let flapping: Vec<_> =
            (0..100).map(|n| (n * 60, (n % 2 == 0).then_some(Severity::Critical))).collect();
        assert_eq!(play(&flapping), []);
    }

    #[test]
    fn what_nobody_can_look_at_is_not_over() {
        let rules = Rules { least: Severity::Warning, hold: Duration::ZERO, repeat: None };
        let mut steady = Steady::default();
        assert_eq!(steady.step(&[problem(Severity::Critical)], &OVER, at(0), &rules).len(), 1);
        let unknown = |kind, subject: &str| match (kind, subject) {
            (Kind::BackupOverdue, "file:///r") => Absence::Unknown,
            _ => Absence::Over,
        };
        assert!(steady.step(&[], &unknown, at(1), &rules).is_empty());
        assert!(steady.step(&[], &unknown, at(100_000), &rules).is_empty());
        let over = steady.step(&[], &OVER, at(100_001), &rules);
        assert_eq!(over[0].event, Event::Recovery);
    }

    #[test]
    fn what_is_watched_no_more_did_not_recover() {
        let unwatched = |_, _: &str| Absence::Unwatched;
        let mut steady = Steady::default();
        let bad = [problem(Severity::Critical)];
        assert!(steady.step(&bad, &OVER, at(0), &RULES).is_empty());
        assert!(steady.step(&[], &unwatched, at(120), &RULES).is_empty(), "it was never told");
        steady.step(&bad, &OVER, at(200), &RULES);
        assert_eq!(steady.step(&bad, &OVER, at(320), &RULES)[0].event, Event::Problem);
        let told = steady.step(&[], &unwatched, at(321), &RULES);
        let [Notice { event: Event::Unwatched, problem: last, since, .. }] = &*told else {
            panic!("{told:?}");
        };
        assert_eq!((&last.text, *since), (&bad[0].text, at(200)));
        assert!(last.next.contains("configuration"), "{}", last.next);
        assert!(steady.step(&[], &unwatched, at(1000), &RULES).is_empty(), "it is told once");
        // It is back, and a problem like any other.
        steady.step(&bad, &OVER, at(2000), &RULES);
        assert_eq!(steady.step(&bad, &OVER, at(2120), &RULES)[0].event, Event::Problem);
    }

    #[test]
    fn what_matters_less_is_left_out() {
        let rules = Rules { least: Severity::Critical, hold: Duration::ZERO, repeat: None };
        let mut steady = Steady::default();
        assert!(steady.step(&[problem(Severity::Warning)], &OVER, at(0), &rules).is_empty());
        assert_eq!(steady.step(&[problem(Severity::Critical)], &OVER, at(1), &rules).len(), 1);
        assert!(steady.step(&[problem(Severity::Critical)], &OVER, at(1_000_000), &rules).is_empty());
        assert_eq!(
            steady.step(&[problem(Severity::Warning)], &OVER, at(1_000_001), &rules)[0].event,
            Event::Recovery
        );
    }

    proptest! {
        /// Problems and recoveries alternate, and no two notices other than reminders come within the time to hold.
        #[test]
        fn notices_alternate(states in proptest::collection::vec((1i64..100, any::<bool>()), 0..200)) {
            let mut second = 0;
            let states: Vec<_> = states.into_iter().map(|(step, there)| {
                second += step;
                (second, there.then_some(Severity::Critical))
            }).collect();
            let events: Vec<_> =
                play(&states).into_iter().filter(|(_, event)| *event != Event::Reminder).collect();
            for pair in events.windows(2) {
                prop_assert!(pair[0].1 != pair[1].1);
                prop_assert!(pair[1].0 - pair[0].0 >= 120);
            }
            if let Some((_, first)) = events.first() {
                prop_assert_eq!(*first, Event::Problem);
            }
        }
    }
}
