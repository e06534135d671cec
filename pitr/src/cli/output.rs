//! Plans, refusals and reports as text for people and as JSON for programs.

use std::fmt::Write as _;
use std::io::IsTerminal as _;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use walship::{Error, Result};

use crate::plan::{Refusal, RestorePlan, StopKind, TransactionEnd};
use crate::recovery_settings::Recovery;
use crate::target::{TargetKind, Zone};

pub(super) use crate::words::{bytes, clean, version};

/// How much is emphasised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Colour,
}

impl Style {
    /// Returns colour for a terminal whose user did not refuse it.
    pub(super) fn of_stdout() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        if std::io::stdout().is_terminal() && !refused { Self::Colour } else { Self::Plain }
    }

    pub(super) fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    fn yellow(self, text: &str) -> String {
        self.wrap("33", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Colour => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }
}

/// Whether a recovery along a plan comes to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// It ends where the plan says.
    ToItsEnd,
    /// A standby goes on behind that.
    Onward,
}

impl Way {
    pub(super) fn of(recovery: &Recovery) -> Self {
        match recovery {
            Recovery::ToTarget(_) => Self::ToItsEnd,
            Recovery::Standby(_) => Self::Onward,
        }
    }
}

/// Returns the plan for people. `next` is the command to paste.
pub(super) fn plan_text(plan: &RestorePlan, way: Way, next: Option<&str>, style: Style) -> String {
    let zone = match plan.target.kind {
        TargetKind::Time { zone, .. } => zone,
        _ => Zone::Utc,
    };
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {}  {}", style.bold(&format!("{name:<13}")), clean(&value));
    };
    line(
        "Cluster",
        format!("{} (lineage {}, system {})", plan.cluster, plan.lineage, plan.system_identifier),
    );
    line("Target", plan.target.to_string());
    // Escapes of our own pass the cleaning in disguise.
    let disguised = |text: String| text.replace('\x1b', "\u{e000}");
    match &plan.last_included {
        Some(end) => {
            let there = format!("every commit up to and including transaction {}", end.xid);
            line("Will be there", disguised(style.green(&there)));
            line("", detail(end, zone));
        }
        None => line(
            "Will be there",
            "what the backup holds; no commit lies between its start and the target".to_owned(),
        ),
    }
    match &plan.first_excluded {
        Some(end) => {
            let not = format!("transaction {} and everything after it", end.xid);
            line("Will NOT be", disguised(style.yellow(&not)));
            line("", detail(end, zone));
        }
        None if way == Way::Onward => line("Will NOT be", not_on_the_way(plan)),
        None => line("Will NOT be", not_there(plan)),
    }
    if !plan.timelines_left_out.is_empty() && plan.first_excluded.is_some() {
        line("", left_out(plan));
    }
    let timelines: Vec<String> = plan.timeline_path.iter().map(|part| part.timeline.to_string()).collect();
    line(
        "Recovery",
        format!(
            "{} {} on timeline {}{}{}",
            if way == Way::Onward { "goes through" } else { "ends at" },
            plan.stop.final_lsn,
            plan.timeline_path.last().map_or(plan.timeline, |part| part.timeline),
            if timelines.len() > 1 {
                format!(" (by way of {})", timelines.join(" > "))
            } else {
                String::new()
            },
            if way == Way::Onward {
                "; then, as a standby, on with what is archived later, along the newest timeline"
            } else {
                ""
            }
        ),
    );
    let backup = &plan.backup;
    line(
        "Backup",
        format!(
            "{} of {}, PostgreSQL {}, {} in {} files",
            backup.id,
            zone.text(backup.started),
            version(backup.server_version),
            bytes(backup.data_bytes),
            backup.files
        ),
    );
    for part in &plan.chain {
        let run = match part.segments {
            _ if part.open => format!("{} (the open segment, up to {})", part.first, part.until_lsn),
            1 => format!("{} (1 segment)", part.first),
            count => format!("{} to {} ({count} segments)", part.first, part.last),
        };
        line("WAL", run);
    }
    line("Chain checked", checked(plan));
    line(
        "To fetch",
        format!(
            "{} of backup and {} of WAL; {} of WAL to replay",
            bytes(plan.backup_fetch_bytes),
            bytes(plan.wal_fetch_bytes),
            bytes(plan.wal_replay_bytes)
        ),
    );
    if let Some(forecast) = &plan.forecast {
        line("Forecast", super::forecast::text(plan, forecast));
    }
    let mut list = |title: &str, items: &[String]| {
        if items.is_empty() {
            return;
        }
        let _ = writeln!(text, "\n{}", style.bold(title));
        for item in items {
            let _ = writeln!(text, "  - {}", clean(item));
        }
    };
    list("Why", &plan.reasons);
    list("Take care", &plan.warnings);
    if let Some(next) = next {
        let _ = writeln!(text, "\n{}\n  {}", style.bold("Next"), clean(next));
    }
    let head = style.bold("Restore plan");
    format!("{head}\n{}", text.replace('\u{e000}', "\x1b"))
}

/// Returns how much of the chain was looked for in the repository.
fn checked(plan: &RestorePlan) -> String {
    match (plan.wal_segments_checked, plan.wal_segments) {
        (checked, all) if checked >= all => format!("all {all} segments are stored"),
        (checked, all) => {
            format!(
                "{checked} of {all} segments are known to be stored; `pitr restore` looks for all of them"
            )
        }
    }
}

/// Returns what is known of commits behind the stop when none of them can be named.
fn not_there(plan: &RestorePlan) -> String {
    let own = match (&plan.first_excluded_unknown, plan.stop.kind) {
        (Some(why), _) => format!("what was committed after that: {why}"),
        (None, StopKind::EndOfWal) => "the way is followed to the end of the archived WAL".to_owned(),
        (None, _) => "no commit is archived behind the stop on this way".to_owned(),
    };
    match &*plan.timelines_left_out {
        [] => own,
        _ => format!("{own}; {}", left_out(plan)),
    }
}

/// Returns what a standby leaves out.
fn not_on_the_way(plan: &RestorePlan) -> String {
    match &*plan.timelines_left_out {
        [] => "nothing that is archived: a standby replays all of it".to_owned(),
        _ => left_out(plan),
    }
}

/// Returns which timelines' WAL is not used, and what that means.
fn left_out(plan: &RestorePlan) -> String {
    let timelines: Vec<_> = plan.timelines_left_out.iter().map(ToString::to_string).collect();
    format!("WAL of timeline {} is stored beside this way; commits in it are left out", timelines.join(", "))
}

/// Returns when and where a transaction was committed, for people.
fn detail(end: &TransactionEnd, zone: Zone) -> String {
    let drops = match end.dropped_relations {
        0 => String::new(),
        1 => "; it drops 1 relation".to_owned(),
        count => format!("; it drops {count} relations"),
    };
    format!("committed {} (record at {}{drops})", zone.both(end.time), end.lsn)
}

/// Returns the refusal for people, in the form of an error report.
pub(super) fn refusal_text(refusal: &Refusal) -> String {
    let mut text = format!("error: {}\nsafe:  nothing was started\n", refusal.reason);
    let mut label = "next:  ";
    let mut say = |line: String| {
        let _ = writeln!(text, "{label}{line}");
        label = "       ";
    };
    if let Some(before) = &refusal.before {
        say(format!("nearest before: {}   ({})", before.options, before.what));
    }
    if let Some(after) = &refusal.after {
        say(format!("nearest after:  {}   ({})", after.options, after.what));
    }
    for hint in &refusal.hints {
        say(hint.clone());
    }
    if refusal.before.is_none() && refusal.after.is_none() && refusal.hints.is_empty() {
        say("Look at `pitr info` for what can be reached.".to_owned());
    }
    clean(text.trim_end())
}

/// Returns the plan for programs.
pub(super) fn plan_json(plan: &RestorePlan) -> Value {
    json!({ "outcome": "plan", "target": plan.target.to_string(), "plan": plan })
}

/// Returns the refusal for programs.
pub(super) fn refusal_json(refusal: &Refusal) -> Value {
    json!({ "outcome": "refused", "refusal": refusal })
}

/// Prints text to standard output; a reader that has gone away has seen enough.
pub(super) fn print(text: &str) -> Result<()> {
    print_to(&mut std::io::stdout().lock(), text)
}

fn print_to(output: &mut impl std::io::Write, text: &str) -> Result<()> {
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::from_io("writing to standard output", error))
        }
        _ => Ok(()),
    }
}

/// Prints JSON.
pub(super) fn print_json(value: &Value) -> Result<()> {
    print(&format!("{value:#}\n"))
}

/// Returns an error for programs.
pub(super) fn error_json(error: &Error) -> Value {
    let kind = match error {
        Error::Unavailable(_) => "unavailable",
        Error::Denied(_) => "denied",
        Error::Missing(_) => "missing",
        Error::Conflict(_) => "conflict",
        Error::Corrupt(_) => "corrupt",
        Error::Mismatch(_) => "mismatch",
        Error::Invalid(_) => "invalid",
        Error::LocalIo(_) => "local_io",
    };
    json!({
        "outcome": "error",
        "kind": kind,
        "error": error.to_string(),
        "safe": error.safe(),
        "next": error.next(),
    })
}

/// Returns a time for tables.
pub(super) fn short_time(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%d %H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::{plain_plan, plain_refusal};
    use crate::target::{RecoveryTarget, StopSide};

    #[test]
    fn a_plan_reads_well() {
        let (time, zone) =
            crate::target::parse_time("2026-03-01 13:00:20 Europe/Berlin", |_| Vec::new()).unwrap();
        let target = RecoveryTarget {
            stop: StopSide::Exclusive,
            ..RecoveryTarget::new(TargetKind::Time { time, zone })
        };
        let plan = plain_plan(&target);
        let next = "pitr restore --to-time '2026-03-01 12:00:20Z' --exclusive -D DIR";
        insta::assert_snapshot!(plan_text(&plan, Way::ToItsEnd, Some(next), Style::Plain));
        let json = serde_json::to_string_pretty(&plan_json(&plan)).unwrap();
        insta::assert_snapshot!("plan_json", json);
        assert!(plan_text(&plan, Way::ToItsEnd, None, Style::Colour).contains("\x1b[32m"));
    }

    #[test]
    fn a_refusal_offers_what_can_be_pasted() {
        let late = plain_refusal(&RecoveryTarget::new(TargetKind::Name("before\u{1b}[2J".into())));
        insta::assert_snapshot!(refusal_text(&late));
        let early = plain_refusal(&RecoveryTarget::new(TargetKind::Xid(1001)));
        insta::assert_snapshot!("refusal_before_the_first", refusal_text(&early));
    }

    #[test]
    fn a_reader_that_has_gone_is_no_error_and_a_full_disk_is() {
        struct Broken(std::io::ErrorKind);
        impl std::io::Write for Broken {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(self.0.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        assert!(print_to(&mut Broken(std::io::ErrorKind::BrokenPipe), "x").is_ok());
        assert!(print_to(&mut Broken(std::io::ErrorKind::StorageFull), "x").is_err());
    }

    #[test]
    fn programs_get_errors_too() {
        let value = error_json(&Error::missing("it is gone").with_next("Look."));
        assert_eq!((&value["outcome"], &value["kind"]), (&json!("error"), &json!("missing")));
        assert_eq!((&value["error"], &value["next"]), (&json!("it is gone"), &json!("Look.")));
    }
}
