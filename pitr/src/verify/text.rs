//! What a verification came to, for people.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use walship::catalog::VerifyOutcome;

use super::affected::Affected;
use super::{Finding, Report, RepositoryReport};
use crate::words::{bytes, duration};

/// How many lines of one kind are printed: all of them are in the JSON.
const LINES_MAX: usize = 30;

/// Returns the report as text. `bold` marks headings.
pub fn text(report: &Report, bold: &dyn Fn(&str) -> String) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{} {} of cluster {} (lineage {}): {} in {}",
        bold("Verified"),
        report.scope,
        report.cluster,
        report.lineage,
        outcome(report.outcome),
        duration(report.millis)
    );
    for repository in &report.repositories {
        repository_text(&mut text, repository, bold);
    }
    for url in &report.unreadable_repositories {
        let _ = writeln!(text, "\n{} {url}: it could not be opened", bold("Repository"));
    }
    affected_text(&mut text, report, bold);
    text
}

fn outcome(outcome: VerifyOutcome) -> &'static str {
    match outcome {
        VerifyOutcome::Sound => "everything is sound",
        VerifyOutcome::Partly => "what was read is sound, the budget did not reach for all",
        VerifyOutcome::Interrupted => "interrupted; what was read is sound",
        VerifyOutcome::Unread => "not everything could be read",
        VerifyOutcome::Damaged => "DAMAGED",
        VerifyOutcome::Unknown => "unknown",
    }
}

fn repository_text(text: &mut String, report: &RepositoryReport, bold: &dyn Fn(&str) -> String) {
    let _ = writeln!(text, "\n{} {}: {}", bold("Repository"), report.repository, outcome(report.outcome));
    let segments: u64 = report.wal.iter().map(|range| range.segments).sum();
    let _ = writeln!(
        text,
        "  read    {} objects, {}; {segments} segments of WAL",
        report.objects,
        bytes(report.bytes)
    );
    if let Some(from) = report.goes_on_from {
        let _ = writeln!(
            text,
            "          went on with the verification that began {} and did not end",
            time(from)
        );
    }
    if report.objects_left > 0 {
        let _ = writeln!(
            text,
            "  left    {} objects, {} of them in pieces that were never proven",
            report.objects_left,
            if report.never_proven == 0 { "none".to_owned() } else { "some".to_owned() }
        );
    }
    let since = report.proven_since.map_or_else(
        || "not everything was ever proven".to_owned(),
        |since| format!("everything in the scope was proven since {}", time(since)),
    );
    let _ = writeln!(text, "  proven  {since}");
    let backups = report.backups.iter().map(|backup| {
        let since = backup.proven_since.map_or_else(String::new, |since| format!(", proven {}", time(since)));
        format!("backup {}: {}{since}", backup.id, backup.outcome.word())
    });
    lines(text, "  backups", backups.collect());
    let damage = report.findings.iter().filter(|finding| finding.is_damage());
    lines(text, &format!("  {}", bold("Damage")), damage.map(finding_line).collect());
    let notes = report.findings.iter().filter(|finding| !finding.is_damage());
    lines(text, "  To be known", notes.map(finding_line).collect());
    let unread = report.unread.iter().map(|unread| format!("{}: {}", unread.object, unread.why));
    lines(text, "  Could not be read (an outage, or missing rights, is no damage)", unread.collect());
}

fn finding_line(finding: &Finding) -> String {
    let mut line = format!("{}: {}", finding.object, finding.what);
    if finding.is_damage() && !finding.also_in.is_empty() {
        let _ = write!(
            line,
            "; restores go on with what {} holds, but the promise that it is stored more than once is broken",
            finding.also_in.join(" and ")
        );
    }
    line
}

fn lines(text: &mut String, title: &str, all: Vec<String>) {
    if all.is_empty() {
        return;
    }
    let _ = writeln!(text, "{title}");
    for line in all.iter().take(LINES_MAX) {
        let _ = writeln!(text, "    {line}");
    }
    if all.len() > LINES_MAX {
        let _ = writeln!(text, "    ({} more: --json shows all)", all.len() - LINES_MAX);
    }
}

fn affected_text(text: &mut String, report: &Report, bold: &dyn Fn(&str) -> String) {
    let Affected { unreachable, windows, backups } = &report.affected;
    if report.outcome != VerifyOutcome::Damaged {
        return;
    }
    let _ = writeln!(text, "\n{}", bold("What can no longer be reached"));
    if report.affected.is_empty() {
        let _ = writeln!(
            text,
            "  nothing: every moment and every backup is still there, by what is not known to be damaged"
        );
        return;
    }
    let stretches = unreachable.iter().map(|stretch| {
        let from = stretch.from_time.map_or_else(String::new, |at| format!(" (after {})", precise(at)));
        let until = stretch.until_time.map_or_else(String::new, |at| format!(" (before {})", precise(at)));
        format!(
            "timeline {}: every moment from {}{from} to {}{until}",
            stretch.timeline, stretch.from_lsn, stretch.until_lsn
        )
    });
    lines(text, "  moments", stretches.collect());
    let broken = windows.iter().map(|window| {
        let left: Vec<String> =
            window.left.iter().map(|(from, until)| format!("{from} to {until}")).collect();
        let left = if left.is_empty() { "nothing".to_owned() } else { left.join(", ") };
        format!(
            "timeline {}: of the window from {} to {}, {left} is left",
            window.timeline, window.from_lsn, window.until_lsn
        )
    });
    lines(text, "  windows", broken.collect());
    let unusable = backups.iter().map(|backup| format!("{}: {}", backup.id, backup.why));
    lines(text, "  backups that cannot be restored", unusable.collect());
}

fn time(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%SZ").to_string()
}

fn precise(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S%.6fZ").to_string()
}
