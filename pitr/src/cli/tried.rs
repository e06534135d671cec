//! What is known of a restore or an extract when it ends, however it does: every one that was asked for leaves a record.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use walship::repository::LineageRepository;
use walship::{Error, Result};

use super::args::{SourceArgs, TargetArgs};
use super::output;
use super::source::open_lineages;
use crate::plan::{Refusal, RestorePlan};

/// How long writing records may take: somebody may be waiting for the end.
pub(super) const RECORDING_MAX: Duration = Duration::from_secs(30);

/// The longest problem that goes on record.
const PROBLEM_CHARS_MAX: usize = 1000;

/// A deed, as far as it has come.
#[derive(Debug)]
pub(super) struct Tried {
    /// The repository, once it is open.
    pub(super) repository: Option<LineageRepository>,
    /// The target, as options.
    pub(super) target: String,
    /// The backup, once there is a plan.
    pub(super) backup: Option<String>,
    /// When it began.
    pub(super) started: DateTime<Utc>,
    /// What went wrong, where that is told of already.
    pub(super) problem: Option<String>,
    /// Whether all is done: what goes wrong then, with the output perhaps, takes nothing away from it.
    pub(super) is_done: bool,
    /// Whether it was not wanted after all.
    pub(super) is_withdrawn: bool,
    /// Whether it came to where something is written.
    pub(super) has_begun: bool,
    clock: Instant,
}

/// How a deed ended, for its record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) outcome: &'static str,
    pub(super) problem: Option<String>,
}

impl Tried {
    pub(super) fn new(target: &TargetArgs) -> Self {
        Self {
            repository: None,
            target: target.shown(),
            backup: None,
            started: Utc::now(),
            problem: None,
            is_done: false,
            is_withdrawn: false,
            has_begun: false,
            clock: Instant::now(),
        }
    }

    /// Notes the plan.
    pub(super) fn planned(&mut self, plan: &RestorePlan) {
        self.target.clone_from(&plan.target_options);
        self.backup = Some(plan.backup.id.clone());
    }

    /// Notes that no plan leads to the target.
    pub(super) fn refused(&mut self, refusal: &Refusal) {
        self.problem = Some(refusal.reason.clone());
    }

    /// Notes that something is written from now on, and that it takes its time from now on: what an operator thought over
    /// until then is no part of it.
    pub(super) fn begin(&mut self) {
        (self.started, self.clock, self.has_begun) = (Utc::now(), Instant::now(), true);
    }

    /// Returns for how long it has been going on.
    pub(super) fn took(&self) -> Duration {
        self.clock.elapsed()
    }

    /// Returns how it ended, in a word and in a line; `done` is the word for one that succeeded.
    pub(super) fn ended(&self, done: &'static str, result: &Result<u8>, interrupted: bool) -> Ended {
        let error = result.as_ref().err().filter(|_| !self.is_done).map(ToString::to_string);
        let problem = self.problem.clone().or(error);
        let outcome = match (&problem, interrupted, self.has_begun) {
            (_, true, _) => "interrupted",
            (None, false, _) => done,
            (Some(_), false, true) => "failed",
            (Some(_), false, false) => "refused",
        };
        Ended { outcome, problem: problem.map(|problem| line(&problem)) }
    }

    /// Puts a record into every repository's history, by `put`, and says on standard error where that cannot be.
    pub(super) async fn record(
        &self,
        what: &str,
        source: &SourceArgs,
        put: impl AsyncFn(&LineageRepository) -> Result<()>,
    ) {
        let recording = async {
            let repository = match &self.repository {
                Some(repository) => repository.clone(),
                // It ended before that was opened.
                None => open_lineages(source).await?.0,
            };
            let each = repository.each();
            let puts = each.iter().map(async |one| (one.location(), put(one).await));
            Ok::<_, Error>(futures_util::future::join_all(puts).await)
        };
        let late = || Err(Error::unavailable("writing it took too long"));
        match tokio::time::timeout(RECORDING_MAX, recording).await.unwrap_or_else(|_| late()) {
            Ok(put) => {
                for (place, put) in put {
                    if let Err(error) = put {
                        let error = output::clean(&error.to_string());
                        eprintln!("note:  the {what} is not in the history of {place}: {error}");
                    }
                }
            }
            Err(error) => {
                let error = output::clean(&error.to_string());
                eprintln!("note:  the {what} is in the history of no repository: {error}");
            }
        }
    }
}

/// Returns a text as one line that is not too long.
pub(super) fn line(text: &str) -> String {
    let words = text.split(|c: char| c.is_control() || c.is_whitespace()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ").chars().take(PROBLEM_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::args::{Args, Command};

    fn tried(words: &[&str]) -> Tried {
        let words = [&["pitr", "plan"], words].concat();
        match Args::try_parse_from(words).unwrap().command {
            Command::Plan(args) => Tried::new(&args.target),
            _ => unreachable!(),
        }
    }

    #[test]
    fn an_end_is_told_by_how_far_it_had_come() {
        let mut deed = tried(&["--latest"]);
        let failed = || Err::<u8, _>(Error::local_io("the disk\nis full"));
        let told = |deed: &Tried, result: &Result<u8>, interrupted| {
            let ended = deed.ended("restored", result, interrupted);
            (ended.outcome, ended.problem.unwrap_or_default())
        };
        assert_eq!(told(&deed, &failed(), false), ("refused", "the disk is full".to_owned()));
        deed.begin();
        assert_eq!(told(&deed, &failed(), false), ("failed", "the disk is full".to_owned()));
        assert_eq!(told(&deed, &failed(), true).0, "interrupted");
        assert_eq!(told(&deed, &Ok(0), false), ("restored", String::new()));
        deed.is_done = true;
        assert_eq!(told(&deed, &failed(), false).0, "restored", "only the output is missing");
        deed.problem = Some("the server did not come up".to_owned());
        assert_eq!(told(&deed, &Ok(1), false), ("failed", "the server did not come up".to_owned()));
    }

    #[test]
    fn what_was_asked_for_is_shown_as_it_was_typed() {
        for words in [
            &["--latest", "--timeline", "3"][..],
            &["--to-time", "2026-03-01 14:29:59.8+01", "--exclusive"],
            &["--before-xid", "731", "--backup", "20261121T010203Z-0123456789abcdef"],
            &["--before", "drop:public.o'rders"],
        ] {
            let shown = tried(words).target;
            let typed = words.iter().map(|word| crate::target::shell_word(word));
            assert_eq!(shown, typed.collect::<Vec<_>>().join(" "));
        }
    }
}
