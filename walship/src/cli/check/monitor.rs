//! `walship check --monitor`: everything that `check` finds and everything that the objectives know, as a plugin answers.

use std::ffi::OsString;
use std::time::{Duration, Instant};

use chrono::Utc;
use serde::Serialize;
use walship::config::Overrides;
use walship::error::Result;
use walship::watch::monitor::{Line, State, answer, worst};
use walship::watch::{Facts, Kind, Problem, problems};

use super::{Args, Findings, Weight};
use crate::cli::serve::watcher;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    state: State,
    cluster: &'a str,
    lines: &'a [Line],
    problems: &'a [Problem],
}

/// Answers a monitor; what cannot be looked at for a reason of its own is UNKNOWN.
pub(crate) async fn run(args: &Args, overrides: &Overrides) -> Result<u8> {
    match look(args, overrides).await {
        Ok(status) => Ok(status),
        Err(error) => Ok(unknown(&format!("{error} - {}", error.next()))),
    }
}

/// Says why nothing is known, and returns the status for that.
pub(crate) fn unknown(why: &str) -> u8 {
    let line = Line { state: State::Unknown, text: why.to_owned(), next: None };
    let text = answer("walship", &[line], None);
    let _ = super::super::print_report(&(), false, || text.lines().next().unwrap_or_default().to_owned());
    State::Unknown.status()
}

/// Returns whether these arguments, which may make no sense, are a monitor's.
pub(crate) fn is_for_monitor(arguments: &[OsString]) -> bool {
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    has("check") && has("--monitor")
}

async fn look(args: &Args, overrides: &Overrides) -> Result<u8> {
    let config = crate::cli::config(overrides)?;
    let limit = Duration::from_secs(args.timeout);
    let began = Instant::now();
    let mut findings = Findings::default();
    // A repository that hangs leaves time for the rest.
    let mut watcher = watcher(&config, args.offline, limit / 2)?;
    let mut facts: Option<Facts> = None;
    let mut hung = false;
    // What is known so far is said also when the time is up.
    let work = async {
        let seen = facts.insert(watcher.look(Utc::now()).await);
        hung = began.elapsed() >= limit / 2;
        let answers = |at: usize| seen.repositories.get(at).is_none_or(|facts| facts.failure.is_none());
        let mut to_check = config.clone();
        let mut at = 0..;
        to_check.repositories.retain(|_| at.next().is_some_and(|at| !hung || answers(at)));
        super::check(&to_check, args.offline, overrides, &mut findings).await
    };
    let in_time = tokio::time::timeout(limit, work).await;
    let limits = walship::watch::Limits::of(&config);
    let found = facts.as_ref().map(|facts| problems(facts, &limits)).unwrap_or_default();
    let mut lines = lines(&findings, &found, in_time.is_ok(), hung);
    match in_time {
        Ok(done) => done?,
        Err(_) => lines.push(Line {
            state: State::Critical,
            text: format!("not everything could be looked at within {} s", began.elapsed().as_secs()),
            next: Some(
                "See what hangs with `walship check`; raise --timeout where a store is slow.".to_owned(),
            ),
        }),
    }
    lines.sort_by_key(|line| std::cmp::Reverse(line.state));
    let state = worst(&lines);
    let report = Answer { state, cluster: &config.cluster, lines: &lines, problems: &found };
    crate::cli::print_report(&report, args.json, || {
        answer(&config.cluster, &lines, facts.as_ref().map(|facts| (facts, &limits)))
    })?;
    Ok(state.status())
}

/// What is found and what is a problem, each once.
fn lines(findings: &Findings, problems: &[Problem], checked: bool, hung: bool) -> Vec<Line> {
    // Both say these; `check` in more words, but nothing of a repository that hangs.
    let by_check =
        |kind: Kind| checked && kind.is_told_by_check() && !(hung && kind == Kind::RepositoryUnreachable);
    let told = problems.iter().filter(|problem| !by_check(problem.kind));
    let told = told.map(|problem| Line {
        state: problem.severity.into(),
        text: problem.text.clone(),
        next: Some(problem.next.clone()),
    });
    let found = findings.findings.iter().filter_map(|finding| {
        let state = match finding.weight {
            Weight::Good => return None,
            Weight::Advice if finding.is_lasting => State::Ok,
            Weight::Advice => State::Warning,
            Weight::Needed => State::Critical,
        };
        Some(Line { state, text: finding.what.clone(), next: finding.next.clone() })
    });
    told.chain(found).collect()
}
