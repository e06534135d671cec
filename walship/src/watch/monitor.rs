//! The answer to a monitor that runs plugins: one line with performance data, then one for each problem.
//!
//! Nagios and what came after it read this form: <https://www.monitoring-plugins.org/doc/guidelines.html>.

use std::fmt::Write as _;

use serde::Serialize;

use super::facts::Facts;
use super::kind::Severity;
use super::metrics::figures;
use super::problems::Limits;

/// So many problems are listed one by one.
const LINES_MAX: usize = 50;

/// The state, whose number is the exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum State {
    /// Nothing is wrong.
    Ok,
    /// Something should be looked at.
    Warning,
    /// What is in the archive, or is to come into it, is in danger.
    Critical,
    /// It could not be looked: the arguments or the configuration are wrong.
    Unknown,
}

impl State {
    /// Returns the exit status.
    pub fn status(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Warning => 1,
            Self::Critical => 2,
            Self::Unknown => 3,
        }
    }

    /// Returns the word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Critical => "CRITICAL",
            Self::Unknown => "UNKNOWN",
        }
    }
}

impl From<Severity> for State {
    fn from(severity: Severity) -> Self {
        match severity {
            Severity::Warning => Self::Warning,
            Severity::Critical => Self::Critical,
        }
    }
}

/// One thing that is wrong, or worth a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    /// What it makes of the whole.
    pub state: State,
    /// What it is: a lowercase fact.
    pub text: String,
    /// What to do.
    pub next: Option<String>,
}

/// Returns the state of the whole: the worst.
pub fn worst(lines: &[Line]) -> State {
    lines.iter().map(|line| line.state).max().unwrap_or(State::Ok)
}

/// Returns the answer. `lines` are what is wrong, the worst first; `facts` give the figures, where there are any.
pub fn answer(cluster: &str, lines: &[Line], facts: Option<(&Facts, &Limits)>) -> String {
    let state = worst(lines);
    let wrong = || lines.iter().filter(|line| line.state != State::Ok);
    let mut first = match wrong().count() {
        0 => {
            format!("WALSHIP OK - {cluster}: {}", facts.map(|(facts, _)| in_order(facts)).unwrap_or_default())
        }
        many => {
            let text = wrong().find(|line| line.state == state).map_or("", |line| &line.text);
            let more = if many > 1 { format!(" (and {} more)", many - 1) } else { String::new() };
            format!("WALSHIP {} - {cluster}: {text}{more}", state.word())
        }
    };
    first = plain(&first);
    if let Some((facts, limits)) = facts {
        let figures = figures(facts, limits);
        for (at, (name, value, warn, crit)) in figures.into_iter().enumerate() {
            let number = |limit: Option<u64>| limit.map(|limit| limit.to_string()).unwrap_or_default();
            let max = if value.ends_with('%') { "100" } else { "" };
            let separator = if at == 0 { " | " } else { " " };
            let _ = write!(first, "{separator}{name}={value};{};{};0;{max}", number(warn), number(crit));
        }
    }
    let mut text = first;
    for line in lines.iter().take(LINES_MAX) {
        let next = line.next.as_ref().map(|next| format!(" - {next}")).unwrap_or_default();
        let _ = write!(text, "\n{}", plain(&format!("{}: {}{next}", line.state.word(), line.text)));
    }
    if lines.len() > LINES_MAX {
        let _ = write!(text, "\n... and {} more; `walship check` says them all", lines.len() - LINES_MAX);
    }
    text
}

/// What is said when nothing is wrong.
fn in_order(facts: &Facts) -> String {
    let newest = facts.repositories.iter().filter_map(|one| one.contents.as_ref()?.newest_backup()).min();
    let age = newest.map(|newest| facts.at.signed_duration_since(newest).to_std().unwrap_or_default());
    match age {
        Some(age) => format!("the newest backup is {} old", super::problems::length(age)),
        None => "nothing is wrong".to_owned(),
    }
}

/// A bar would begin the figures, a line's end the next line.
fn plain(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '|' => '/',
            c if c.is_control() => ' ',
            c => c,
        })
        .collect()
}
