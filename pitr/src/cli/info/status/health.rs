//! What is to be thought of an archive: figures beside what they should be, and what somebody should look at.

use chrono::{DateTime, TimeDelta, Utc};
use walship::catalog::{BackupRecord, VerifyOutcome, VerifyRecord};
use walship::config::Objectives;
use walship::watch::{Limits, VerificationFacts};

use super::super::super::args::Deed;
use super::super::super::history::Entry;
use super::super::super::output::{bytes, short_time};
use super::super::age;
use super::LineageStatus;
use crate::execute::info::{Info, WindowInfo};
use crate::page::Tone;
use crate::plan::{Gap, WindowEnd};
use crate::words::duration;

/// A clock may be so far ahead of another.
const CLOCKS_DIFFER: TimeDelta = TimeDelta::minutes(5);

/// A backup that was begun so long ago is hardly under way.
const UNDER_WAY: TimeDelta = TimeDelta::hours(24);

/// What somebody should look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) tone: Tone,
    pub(super) what: String,
    pub(super) next: String,
}

/// A figure, and what it is to be compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Figure {
    pub(super) name: &'static str,
    pub(super) value: String,
    pub(super) tone: Tone,
    pub(super) details: Vec<String>,
}

/// What is to be thought of one lineage.
#[derive(Debug, Default)]
pub(super) struct Health {
    pub(super) findings: Vec<Finding>,
    pub(super) figures: Vec<Figure>,
}

impl Health {
    /// Returns how bad the worst of it is.
    pub(super) fn tone(&self) -> Tone {
        self.findings.iter().map(|finding| finding.tone).max().unwrap_or(Tone::Good)
    }

    fn find(&mut self, tone: Tone, what: impl Into<String>, next: impl Into<String>) {
        self.findings.push(Finding { tone, what: what.into(), next: next.into() });
    }

    fn figure(&mut self, name: &'static str, tone: Tone, value: impl Into<String>, details: Vec<String>) {
        self.figures.push(Figure { name, tone, value: value.into(), details });
    }
}

/// Judges the lineage that the cluster is on now.
pub(super) fn judge(status: &LineageStatus, limits: &Limits) -> Health {
    let LineageStatus { info, history, verifications, .. } = status;
    let objectives = &limits.objectives;
    let mut health = Health::default();
    reach(info, objectives, &mut health);
    backups(info, limits, &mut health);
    gaps(info, &mut health);
    drills(info.asked, history, objectives, &mut health);
    verification(info.asked, verifications, &mut health);
    retention(info, history, &mut health);
    stored(info, &mut health);
    server(info, &mut health);
    // The worst first.
    health.findings.sort_by_key(|finding| std::cmp::Reverse(finding.tone));
    health
}

/// Returns the window at the archive's end on the newest timeline: what is restored from now.
pub(super) fn current_window(info: &Info) -> Option<&WindowInfo> {
    info.timelines.last()?.windows.last().filter(|found| found.window.ended_by == WindowEnd::EndOfArchive)
}

/// Returns how long ago something was.
pub(super) fn ago(now: DateTime<Utc>, time: DateTime<Utc>) -> String {
    match now.signed_duration_since(time) {
        passed if passed < -CLOCKS_DIFFER => "in the future".to_owned(),
        passed => format!("{} ago", age(passed)),
    }
}

fn reach(info: &Info, objectives: &Objectives, health: &mut Health) {
    let objective = objectives.recovery_point.map(|rpo| rpo.as_secs());
    let objective_text = match objective {
        Some(seconds) => format!("objective (rpo): {}", whole(seconds.saturating_mul(1000))),
        None => "no objective (rpo) is set".to_owned(),
    };
    let behind = info.server.as_ref().and_then(|server| server.behind_bytes);
    let Some(found) = current_window(info) else {
        let has_backups = !info.backups.is_empty();
        let (what, next) = match info.timelines.last() {
            Some(timeline) if !timeline.has_history => (
                format!(
                    "the history file of timeline {} is missing: no plan can follow it",
                    timeline.timeline
                ),
                "Archive it again from the server's pg_wal.",
            ),
            _ if has_backups => (
                "the end of the archive cannot be reached: no usable backup lies behind the last gap"
                    .to_owned(),
                "Take a backup now: `walship backup`.",
            ),
            _ => (
                "nothing can be restored: there is no complete backup".to_owned(),
                "Take one: `walship backup`.",
            ),
        };
        health.find(Tone::Bad, what, next);
        health.figure("Newest commit in reach", Tone::Bad, "none", vec![objective_text]);
        return;
    };
    let window = &found.window;
    let length = info.asked.signed_duration_since(window.from_time);
    match (&found.latest_transaction, found.latest_age_seconds) {
        (Some(latest), Some(seconds)) => {
            let met = objective.map(|objective| seconds.unsigned_abs() <= objective);
            let missed = format!(
                "the newest commit in reach is {} old, {}",
                age(TimeDelta::seconds(seconds)),
                &objective_text
            );
            let tone = match (met, behind) {
                (Some(false), Some(0)) => Tone::Good,
                (Some(false), Some(_)) => {
                    health.find(Tone::Bad, missed, "WAL does not arrive: look at `walship check`.");
                    Tone::Bad
                }
                (Some(false), None) => {
                    let next = "Nothing was committed since, or WAL does not arrive: `pitr info --server --html` tells which.";
                    health.find(Tone::Warn, missed, next);
                    Tone::Warn
                }
                (Some(true), _) => Tone::Good,
                (None, _) => Tone::Plain,
            };
            let mut details = vec![short_time(latest.time), objective_text];
            if (met, behind) == (Some(false), Some(0)) {
                details.push("the server has written nothing since".to_owned());
            }
            health.figure("Newest commit in reach", tone, ago(info.asked, latest.time), details);
            if latest.time > info.asked + CLOCKS_DIFFER {
                let what =
                    format!("the newest commit is of {}, which lies in the future", short_time(latest.time));
                health.find(
                    Tone::Warn,
                    what,
                    "Compare the server's clock with that of the machine that made this page.",
                );
            }
        }
        _ => {
            let details = vec!["no commit was found near the archive's end".to_owned(), objective_text];
            health.figure("Newest commit in reach", Tone::Soft, "not known", details);
        }
    }
    let since = vec![format!("since {}", short_time(window.from_time)), plural(window.backups, "backup")];
    health.figure("Every commit of the last", Tone::Plain, age(length), since);
}

/// Returns a length of time without the smaller unit that it has none of.
fn whole(millis: u64) -> String {
    let text = duration(millis);
    [" 0 s", " 0 min"].iter().find_map(|end| text.strip_suffix(end)).unwrap_or(&text).to_owned()
}

/// Returns a number of things in words.
pub(super) fn plural(count: u64, thing: &str) -> String {
    if count == 1 { format!("1 {thing}") } else { format!("{count} {thing}s") }
}

/// Returns the newest backup that could be taken for the newest one: by when it was complete.
pub(super) fn newest_backup(info: &Info) -> Option<&BackupRecord> {
    info.backups.iter().max_by_key(|backup| (backup.finished, backup.stop_lsn))
}

/// Returns what keeps a backup from being of full use; nothing when it is.
pub(super) fn flaws(info: &Info, backup: &BackupRecord) -> Vec<String> {
    let mut flaws = Vec::new();
    if let Some(damaged) = &backup.damaged_pages {
        flaws.push(plural(damaged.total, "damaged page"));
    }
    let is_in_window =
        info.timelines.iter().flat_map(|timeline| &timeline.windows).any(|found| {
            found.window.from_lsn <= backup.stop_lsn && backup.stop_lsn <= found.window.until_lsn
        });
    if !is_in_window {
        flaws.push("WAL that it needs is missing".to_owned());
    }
    flaws
}

fn backups(info: &Info, limits: &Limits, health: &mut Health) {
    let Some(newest) = newest_backup(info) else {
        health.figure("Newest backup", Tone::Bad, "none", vec!["`walship backup` takes one".to_owned()]);
        return;
    };
    let flaws = flaws(info, newest);
    let full =
        info.backups.iter().filter(|backup| backup.parent.is_none()).map(|backup| backup.finished).max();
    let mut late = Tone::Good;
    for (what, finished, limit) in [
        ("backup", Some(newest.finished), limits.watch.backup_overdue.0),
        ("full backup", full, limits.watch.full_backup_overdue.0),
    ] {
        let Some((finished, limit)) = finished.zip(limit) else { continue };
        let since = info.asked.signed_duration_since(finished).to_std().unwrap_or_default();
        if since <= limit {
            continue;
        }
        let tone = if since > limit * 2 { Tone::Bad } else { Tone::Warn };
        let old = |length: std::time::Duration| age(TimeDelta::from_std(length).unwrap_or(TimeDelta::MAX));
        let what = format!("the newest {what} is {} old; it may be {} old", old(since), old(limit));
        health.find(tone, what, "See why none was taken since: the schedule, then `walship check`.");
        late = late.max(tone);
    }
    let tone = match (&*flaws, &newest.damaged_pages) {
        ([], _) => late,
        (_, Some(_)) => {
            let what = format!("the newest backup, {}, holds {}", newest.id, flaws.join("; "));
            health.find(Tone::Bad, what, "The damage is the server's: check its disk and pg_amcheck; `pitr info --json` names the pages.");
            Tone::Bad
        }
        _ => {
            health.find(
                Tone::Bad,
                format!("the newest backup, {}, cannot be used: {}", newest.id, flaws.join("; ")),
                "Take another: `walship backup`.",
            );
            Tone::Bad
        }
    };
    let kind = kind_of(newest);
    let size = format!("{kind}, {} ({} stored)", bytes(newest.data_bytes), bytes(newest.stored_bytes));
    let mut details = vec![short_time(newest.finished), size];
    details.push(if flaws.is_empty() { "usable".to_owned() } else { flaws.join("; ") });
    health.figure("Newest backup", tone, ago(info.asked, newest.finished), details);
    for backup in info.backups.iter().filter(|backup| backup.finished > info.asked + CLOCKS_DIFFER).take(1) {
        let what = format!(
            "backup {} was complete at {}, which lies in the future",
            backup.id,
            short_time(backup.finished)
        );
        health.find(Tone::Warn, what, "Compare the clocks of the machines.");
    }
    if let Some(orphan) = info.orphaned_backups.first() {
        let count = info.orphaned_backups.len() as u64;
        let what = format!(
            "{} cannot be restored: {} builds on {}, which is gone",
            plural(count, "incremental backup"),
            orphan.id,
            orphan.missing
        );
        health.find(Tone::Warn, what, "Take a full backup: `walship backup`.");
    }
    let stale =
        info.unfinished_backups.iter().filter(|backup| info.asked - backup.started > UNDER_WAY).count();
    if stale > 0 {
        let what = format!("{} begun more than a day ago did not complete", plural(stale as u64, "backup"));
        health.find(
            Tone::Warn,
            what,
            "See why it failed; the next backup with --source local goes on from it.",
        );
    }
}

/// Returns what kind of backup it is.
pub(super) fn kind_of(backup: &BackupRecord) -> &'static str {
    if backup.parent.is_some() { "incremental" } else { "full" }
}

/// Returns every gap that is no removal on purpose, each once, although several timelines may know of it.
pub(super) fn lost(info: &Info) -> Vec<&Gap> {
    let mut lost: Vec<&Gap> = Vec::new();
    for gap in info.timelines.iter().flat_map(|timeline| &timeline.gaps).filter(|gap| !gap.expired) {
        if !lost
            .iter()
            .any(|other| (other.from, other.to, other.first_missing) == (gap.from, gap.to, gap.first_missing))
        {
            lost.push(gap);
        }
    }
    lost
}

fn gaps(info: &Info, health: &mut Health) {
    let lost = lost(info);
    let Some(last) = lost.iter().max_by_key(|gap| gap.to) else {
        health.figure("Gaps", Tone::Good, "none", vec!["no WAL is known to be missing".to_owned()]);
        return;
    };
    let bytes_lost: u64 = lost.iter().map(|gap| gap.to.0.saturating_sub(gap.from.0)).sum();
    let tone = if current_window(info).is_some() { Tone::Warn } else { Tone::Bad };
    let what = format!(
        "{}: moments in {} can never be reached ({} of WAL; the last ends at {})",
        plural(lost.len() as u64, "gap"),
        if lost.len() == 1 { "it" } else { "them" },
        bytes(bytes_lost),
        last.to
    );
    let next =
        "If the WAL is still somewhere, store it: `walship wal push`. Else restore to before or behind it.";
    health.find(tone, what, next);
    let details = vec![format!("{} of WAL", bytes(bytes_lost)), format!("the last ends at {}", last.to)];
    health.figure("Gaps", tone, lost.len().to_string(), details);
}

fn of_kind(history: &[Entry], kind: Deed) -> impl Iterator<Item = &Entry> {
    history.iter().filter(move |entry| entry.kind == kind)
}

fn drills(now: DateTime<Utc>, history: &[Entry], objectives: &Objectives, health: &mut Health) {
    let objective = objectives.recovery_time.map(|rto| rto.as_secs().saturating_mul(1000));
    let wanted = match objective {
        Some(millis) => format!("objective (rto): {}", whole(millis)),
        None => "no objective (rto) is set".to_owned(),
    };
    let measured = of_kind(history, Deed::Drill).find_map(|entry| Some((entry, entry.recovery_millis?)));
    match measured {
        Some((entry, millis)) => {
            let tone = match objective.map(|objective| millis <= objective) {
                Some(true) => Tone::Good,
                Some(false) => {
                    let what = format!(
                        "the last drill that got so far took {} until the server was open, {wanted}",
                        duration(millis)
                    );
                    health.find(
                        Tone::Warn,
                        what,
                        "Its report says where the time went: `pitr history --drill ID`.",
                    );
                    Tone::Warn
                }
                None => Tone::Plain,
            };
            let details = vec![wanted, format!("measured {}", short_time(entry.started))];
            health.figure("Recovery time", tone, duration(millis), details);
        }
        None => {
            let details = vec![wanted, "no drill on record has measured it".to_owned()];
            health.figure("Recovery time", Tone::Soft, "not known", details);
        }
    }
    match of_kind(history, Deed::Drill).next() {
        Some(last) => {
            let tone = drill_tone(&last.outcome);
            if matches!(tone, Tone::Bad) || last.outcome == "interrupted" {
                let problem =
                    last.problems.first().map_or_else(String::new, |problem| format!(": {problem}"));
                let what =
                    format!("the last drill, {}, ended as \"{}\"{problem}", last.id, said(&last.outcome));
                health.find(tone, what, format!("Its report: `pitr history --drill {}`.", last.id));
            }
            let details = vec![short_time(last.started), ago(now, last.started)];
            health.figure("Last drill", tone, said(&last.outcome), details);
        }
        None => {
            health.find(
                Tone::Soft,
                "no drill is on record: that a restore works was never proven here",
                "`pitr drill` proves it.",
            );
            health.figure(
                "Last drill",
                Tone::Soft,
                "none",
                vec!["that a restore works was never proven".to_owned()],
            );
        }
    }
}

/// Returns an outcome as people write it.
pub(super) fn said(outcome: &str) -> String {
    outcome.replace('_', " ")
}

/// Returns how good the outcome of a drill is.
pub(super) fn drill_tone(outcome: &str) -> Tone {
    match outcome {
        "proven" => Tone::Good,
        "objective_missed" | "interrupted" => Tone::Warn,
        _ => Tone::Bad,
    }
}

/// Returns how good the outcome of a verification is.
pub(super) fn verification_tone(outcome: &str) -> Tone {
    match outcome {
        "sound" => Tone::Good,
        "partly" => Tone::Soft,
        "damaged" => Tone::Bad,
        _ => Tone::Warn,
    }
}

/// As watching judges: damage stands until what was damaged is proven, in each repository for itself.
fn verification(now: DateTime<Utc>, repositories: &[(String, Vec<VerifyRecord>)], health: &mut Health) {
    let judged = repositories.iter().filter_map(|(here, records)| {
        let facts = VerificationFacts::of(records, here, now)?;
        let tone = match (facts.is_damaged, facts.is_good, &*facts.outcome) {
            (true, ..) => Tone::Bad,
            (_, false, _) => Tone::Warn,
            (_, _, "sound") => Tone::Good,
            _ => Tone::Soft,
        };
        Some((tone, here, facts.damage, VerificationFacts::standing(records, here, now)?))
    });
    let Some((tone, here, damage, last)) = judged.max_by_key(|(tone, ..)| *tone) else {
        health.find(
            Tone::Soft,
            "no verification is on record: that what is stored is still what it was has not been looked at",
            "`pitr verify` reads every byte.",
        );
        let details = vec!["no verification is on record".to_owned()];
        return health.figure("Last verification", Tone::Soft, "none", details);
    };
    let (outcome, started) = (last.outcome.word(), last.head.started);
    let ended_damaged = last.outcome == VerifyOutcome::Damaged;
    if matches!(tone, Tone::Bad | Tone::Warn) {
        let problem = last.problems.first().map_or_else(String::new, |problem| format!(": {problem}"));
        let what = match damage.filter(|_| !ended_damaged) {
            Some((places, since)) => format!(
                "in {here} damage is known and was not found mended since: {}, the first of {}",
                plural(places, "object"),
                short_time(since)
            ),
            None => format!("the verification of {} ended as \"{outcome}\"{problem}", short_time(started)),
        };
        health.find(
            tone,
            what,
            "`pitr verify` says which moments that takes away; damage stands here until it has read that again and found it \
             sound.",
        );
    }
    let mut details = vec![short_time(started), ago(now, started)];
    if outcome == "partly" {
        details.push("as far as its budget went".to_owned());
    }
    if damage.is_some() && !ended_damaged {
        details.push("what others found damaged was not found sound since".to_owned());
    }
    health.figure("Last verification", tone, outcome, details);
}

fn retention(info: &Info, history: &[Entry], health: &mut Health) {
    let holds = info.holds.iter().filter(|hold| hold.holds_at(info.asked)).count() as u64;
    let holds = format!("{} in force", plural(holds, "hold"));
    match of_kind(history, Deed::Expire).next() {
        Some(last) => {
            let tone = match &*last.outcome {
                "removed" | "nothing_to_remove" => Tone::Plain,
                _ => Tone::Warn,
            };
            if tone == Tone::Warn {
                let why = last.problems.first().map_or_else(String::new, |why| format!(": {why}"));
                let what =
                    format!("the last removal, {}, ended as \"{}\"{why}", last.id, said(&last.outcome));
                health.find(tone, what, "`pitr expire` shows what is left to do.");
            }
            let details = vec![format!("{}: {}", said(&last.outcome), short_time(last.started)), holds];
            health.figure("Last removal", tone, ago(info.asked, last.started), details);
        }
        None => health.figure(
            "Last removal",
            Tone::Plain,
            "none",
            vec!["nothing was ever removed".to_owned(), holds],
        ),
    }
}

/// What is stored and is not as it should be.
fn stored(info: &Info, health: &mut Health) {
    if let Some(first) = info.unreadable_segments.first() {
        let count = info.unreadable_segments.len() as u64;
        let what = format!("{} damaged where stored: {first}", plural(count, "segment"));
        health.find(
            Tone::Bad,
            what,
            "Store a good copy, from pg_wal or another repository: `walship wal push`.",
        );
    }
    if let Some(first) = info.incomplete_segments.first() {
        let count = info.incomplete_segments.len() as u64;
        let what =
            format!("{} kept apart as incomplete, never used as the whole: {first}", plural(count, "file"));
        health.find(
            Tone::Warn,
            what,
            "Nothing, where the whole segment is stored as well; a gap is shown where it is not.",
        );
    }
    for timeline in &info.timelines {
        let flaws = timeline.tail.iter().filter_map(|tail| tail.tail.flaw_text());
        for flaw in flaws.chain(timeline.stranded.iter().filter_map(|tail| tail.flaw_text())).take(3) {
            health.find(
                Tone::Warn,
                flaw,
                "The whole segment mends it, once it is archived: look at `walship check`.",
            );
        }
    }
}

fn server(info: &Info, health: &mut Health) {
    let Some(server) = &info.server else { return };
    if let Some(problem) = &server.problem {
        health.find(Tone::Warn, problem.clone(), "Check --connection, or libpq's PG* variables.");
    }
    if let Some(file) = server.archiver.as_ref().and_then(|archiver| archiver.failing_wal.as_ref()) {
        health.find(
            Tone::Bad,
            format!("the server's archiver fails with {file}"),
            "The server's log says why; `walship check` looks for it.",
        );
    }
    if let (Some(bytes_behind), Some(segments)) = (server.behind_bytes, server.behind_segments) {
        let (tone, value) = match (bytes_behind, segments) {
            (0, _) => (Tone::Good, "nothing missing".to_owned()),
            (_, 0..=1) => (Tone::Plain, bytes(bytes_behind)),
            _ => (Tone::Warn, bytes(bytes_behind)),
        };
        let details = vec![plural(segments, "full segment")];
        health.figure("Behind the server", tone, value, details);
    }
}
