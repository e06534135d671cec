//! A drill's report for people.

use std::fmt::Write as _;

use super::{Checked, DrillReport, Objective, Verdict, title};
use crate::target::utc_text;
use crate::words::{bytes, clean, duration, version};

/// How many tables' rows the text lists: all of them are in the JSON.
const COUNTS_MAX: usize = 40;

/// Returns what an objective asks for and what was measured; `None` where there is nothing of both.
pub(super) fn compared(objective: &Objective) -> Option<String> {
    let wanted = objective.objective_seconds.map(|seconds| duration(seconds.saturating_mul(1000)));
    let measured = objective.measured_millis.map(duration);
    match (measured, wanted, objective.met) {
        (Some(measured), Some(wanted), Some(true)) => Some(format!("{measured}, within {wanted}")),
        (Some(measured), Some(wanted), _) => Some(format!("{measured}: MISSED, the objective is {wanted}")),
        (Some(measured), None, _) => Some(format!("{measured} (no objective is set)")),
        (None, Some(wanted), _) => Some(format!("not measured; the objective is {wanted}")),
        (None, None, _) => None,
    }
}

pub(super) fn verdict_word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Proven => "proven",
        Verdict::Failed => "FAILED",
        Verdict::Skipped => "skipped",
    }
}

pub(super) fn checked_word(checked: Checked) -> &'static str {
    match checked {
        Checked::Passed => "passed",
        Checked::Failed => "FAILED",
        Checked::TimedOut => "TIMED OUT",
    }
}

/// Returns the lines that say what the drill was about: a name and a value each.
pub(super) fn facts(report: &DrillReport) -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("Cluster", format!("{} (lineage {})", report.cluster, report.lineage)),
        ("When", format!("{}, for {}", utc_text(report.started), duration(report.millis))),
        ("By", format!("{} on {}", report.user, report.host)),
    ];
    facts.extend(report.reason.iter().map(|reason| ("Reason", reason.clone())));
    let chosen = if report.target_by_chance { ", chosen by chance" } else { "" };
    facts.push(("Target", format!("{}{chosen}", report.target_words)));
    facts.push(("Again with", report.target.clone()));
    if let Some(backup) = &report.backup {
        let version = report.server_version.map(version).unwrap_or_default();
        let size = match report.restored_bytes {
            0 => String::new(),
            restored => format!(", {}", bytes(restored)),
        };
        facts.push(("Backup", format!("{backup} of PostgreSQL {version}{size}")));
    }
    if let Some(last) = &report.last_included {
        facts.push(("Last commit", format!("transaction {} of {}", last.xid, utc_text(last.time))));
    }
    facts.extend(compared(&report.objectives.rto).map(|text| ("RTO", text)));
    facts.extend(compared(&report.objectives.rpo).map(|text| ("RPO", text)));
    facts.extend(report.kept.iter().map(|kept| ("Kept", kept.clone())));
    facts
}

/// Returns the report, with no control characters but line feeds.
pub fn text(report: &DrillReport) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "Drill {}: {}", report.id, report.outcome.said());
    for (name, value) in facts(report) {
        let _ = writeln!(text, "  {name:<12} {value}");
    }
    let _ = writeln!(text, "\nProofs");
    for proof in &report.proofs {
        let _ =
            writeln!(text, "  {:<8} {}: {}", verdict_word(proof.verdict), title(proof.what), proof.detail);
    }
    if !report.checks.is_empty() {
        let _ = writeln!(text, "\nSQL checks");
    }
    for check in &report.checks {
        let took = duration(check.millis);
        let _ = writeln!(
            text,
            "  {:<9} {} in database {} ({took})",
            checked_word(check.result),
            check.name,
            check.database
        );
        for line in check.detail.iter().flat_map(|detail| detail.lines()) {
            let _ = writeln!(text, "            {line}");
        }
    }
    if !report.row_counts.is_empty() {
        let _ = writeln!(text, "\nRows");
    }
    for count in report.row_counts.iter().take(COUNTS_MAX) {
        let rows = count.rows.map_or_else(|| "not counted".to_owned(), |rows| rows.to_string());
        let _ = writeln!(text, "  {rows:>12}  {} {}", count.database, count.table);
    }
    if let Some(more) = report.row_counts.len().checked_sub(COUNTS_MAX).filter(|more| *more > 0) {
        let _ = writeln!(text, "  and of {more} more tables, in the JSON");
    }
    let _ = writeln!(text, "\nTime");
    for step in &report.steps {
        let rate = step.bytes.map(|of| {
            let rate = (of as f64 * 1000.0 / step.millis.max(1) as f64) as u64;
            format!("  {} ({}/s)", bytes(of), bytes(rate))
        });
        let _ = writeln!(
            text,
            "  {:>12}  {}{}",
            duration(step.millis),
            title(step.name),
            rate.unwrap_or_default()
        );
    }
    if !report.notes.is_empty() {
        let _ = writeln!(text, "\nNotes");
    }
    for note in &report.notes {
        let _ = writeln!(text, "  - {note}");
    }
    if let Some(trouble) = &report.trouble {
        let _ =
            writeln!(text, "\nerror: {}\nsafe:  {}\nnext:  {}", trouble.error, trouble.safe, trouble.next);
    }
    clean(&text)
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn a_report_reads_well_and_commands_no_terminal() {
        let text = text(&report());
        insta::assert_snapshot!(text);
        assert!(!text.contains('\x1b'));
    }
}
