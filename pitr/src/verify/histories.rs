//! Timeline history files against each other and against the WAL that is stored.

use walship::catalog::Catalog;
use walship::pg::{TimelineHistory, TimelineId};

use super::{Finding, FindingKind, Takes};

/// Returns what is wrong with the history files that are stored, and which are not although their timeline's WAL is.
pub fn history_flaws(repository: &str, catalog: &Catalog) -> Vec<Finding> {
    let mut findings = Vec::new();
    let has_wal = |timeline| catalog.has_wal_of(timeline);
    for timeline in catalog.timelines() {
        if timeline != TimelineId::FIRST && !catalog.histories.contains_key(&timeline) && has_wal(timeline) {
            findings.push(Finding::damage(
                FindingKind::Missing,
                repository,
                format!("{}.history", timeline.hex()),
                format!("WAL of timeline {timeline} is stored, its history file is not: nothing leads to that timeline"),
                Takes::History(timeline),
            ));
        }
    }
    for history in catalog.histories.values() {
        if let Some(what) = contradicts(catalog, history) {
            findings.push(Finding::damage(
                FindingKind::Contradiction,
                repository,
                format!("{}.history", history.timeline.hex()),
                what,
                Takes::History(history.timeline),
            ));
        }
    }
    findings
}

/// Returns how a history contradicts that of the timeline which it left.
fn contradicts(catalog: &Catalog, history: &TimelineHistory) -> Option<String> {
    let (parent, before) = history.ancestors.split_last()?;
    let known = catalog.history(parent.timeline)?;
    // A recovery that stopped before its timeline began names it as an ancestor all the same.
    let same = known.ancestors.iter().zip(before).all(|(theirs, ours)| {
        theirs.timeline == ours.timeline
            && theirs.switch_lsn.min(parent.switch_lsn) == ours.switch_lsn.min(parent.switch_lsn)
    });
    let same = same && known.ancestors.len() == before.len();
    (!same).then(|| {
        format!(
            "it tells another way to timeline {} than the history file of that timeline does",
            parent.timeline
        )
    })
}
