//! `pitr history`: what was done with the archive, and by whom.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use clap::ValueEnum as _;
use serde::Serialize;
use serde_json::json;
use walship::catalog::{
    BackupRecord, BackupRun, ChangeRecord, DrillRecord, ExpireOutcome, ExpireRecord, ExtractRecord,
    RecordHead, RestoreRecord, VerifyRecord,
};
use walship::repository::{DrillReportForm, LineageRepository, load_catalog};
use walship::{Error, Result};

use super::DONE;
use super::args::{Deed, HistoryArgs};
use super::output::{self, Style};
use super::source::{open_lineages, say_notes};
use crate::words::duration;

/// One line of the history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Entry {
    pub(super) kind: Deed,
    pub(super) id: String,
    pub(super) started: DateTime<Utc>,
    /// How long it took.
    pub(super) millis: Option<u64>,
    pub(super) host: Option<String>,
    pub(super) user: Option<String>,
    pub(super) reason: Option<String>,
    pub(super) outcome: String,
    /// What was not as it should be.
    pub(super) problems: Vec<String>,
    /// The target, as options.
    pub(super) target: Option<String>,
    /// What was extracted, and where it went; what was removed, verified or changed; a backup's label.
    pub(super) what: Option<String>,
    /// The backup that it used, or made.
    pub(super) backup: Option<String>,
    /// The bytes of that backup's files; of a removal those that it freed, of a verification those that it read.
    pub(super) bytes: u64,
    /// How long it took until a server was open at the target.
    pub(super) recovery_millis: Option<u64>,
}

pub(super) async fn run(args: &HistoryArgs) -> Result<u8> {
    let (repository, _) = open_lineages(&args.source).await?;
    if let Some(id) = &args.drill {
        return show(args, &repository, id).await;
    }
    let limit = args.limit as usize;
    let wants = |deed: Deed| args.only.is_empty() || args.only.contains(&deed);
    // One more than is shown tells whether there are more.
    let max = limit + 1;
    let mut entries = Vec::new();
    for kind in Deed::value_variants().iter().filter(|kind| wants(**kind)) {
        entries.extend(entries_of(&repository, *kind, max).await?);
    }
    entries.sort_by(|one, other| other.started.cmp(&one.started).then_with(|| other.id.cmp(&one.id)));
    let more = entries.len() > limit;
    entries.truncate(limit);
    say_notes(&repository);
    if args.source.json {
        output::print_json(&json!({
            "repository": repository.location(),
            "lineage": repository.lineage().number,
            "entries": entries,
            "more": more,
        }))?;
    } else {
        output::print(&text(&entries, more, Style::of_stdout()))?;
    }
    Ok(DONE)
}

/// Returns the last `max` entries of a kind, the newest first.
pub(super) async fn entries_of(repository: &LineageRepository, kind: Deed, max: usize) -> Result<Vec<Entry>> {
    Ok(match kind {
        Deed::Backup => {
            let catalog = load_catalog(repository).await?;
            let runs = repository.recent_backup_runs(max).await?;
            backups(catalog.backups.into_iter().rev().take(max), runs)
        }
        Deed::Change => repository.recent_changes(max).await?.into_iter().map(Entry::from).collect(),
        Deed::Restore => repository.recent_restores(max).await?.into_iter().map(Entry::from).collect(),
        Deed::Drill => repository.recent_drills(max).await?.into_iter().map(Entry::from).collect(),
        Deed::Extract => repository.recent_extracts(max).await?.into_iter().map(Entry::from).collect(),
        Deed::Expire => repository.recent_expires(max).await?.into_iter().map(Entry::from).collect(),
        Deed::Verify => repository.recent_verifications(max).await?.into_iter().map(Entry::from).collect(),
    })
}

/// Prints a drill's report as it is stored.
async fn show(args: &HistoryArgs, repository: &LineageRepository, id: &str) -> Result<u8> {
    let form = match (args.source.json, args.html) {
        (true, _) => DrillReportForm::Json,
        (false, true) => DrillReportForm::Html,
        (false, false) => DrillReportForm::Text,
    };
    let report = repository.get_drill_report(id, form).await?.ok_or_else(|| {
        Error::missing(format!("there is no report of a drill {id:?} in {}", repository.location()))
            .with_next("`pitr history --only drill` lists them.")
    })?;
    let text = String::from_utf8(report.to_vec())
        .map_err(|_| Error::corrupt(format!("the report of the drill {id} is not UTF-8")))?;
    // Whoever may write to the repository must not command this terminal.
    output::print(&output::clean(&text))?;
    Ok(DONE)
}

/// Puts backups and the records of those who took them together. Backups from before there were such records have
/// none, and of a backup that failed there is nothing but its record.
fn backups(records: impl Iterator<Item = BackupRecord>, runs: Vec<BackupRun>) -> Vec<Entry> {
    let mut known: BTreeMap<String, Entry> =
        records.map(|record| (record.id.clone(), Entry::from(record))).collect();
    let mut others = Vec::new();
    for run in runs {
        let entry = run.backup.as_ref().and_then(|id| known.get_mut(id));
        match entry {
            Some(entry) => entry.add(run),
            None => others.push(Entry::from(run)),
        }
    }
    others.extend(known.into_values());
    others
}

impl Entry {
    /// Returns what every record tells.
    fn of(kind: Deed, head: RecordHead, outcome: impl Into<String>) -> Self {
        Self {
            kind,
            id: head.id,
            started: head.started,
            millis: None,
            host: Some(head.host),
            user: Some(head.user),
            reason: head.reason,
            outcome: outcome.into(),
            problems: Vec::new(),
            target: None,
            what: None,
            backup: None,
            bytes: 0,
            recovery_millis: None,
        }
    }

    /// Adds to a backup who took it, and why.
    fn add(&mut self, run: BackupRun) {
        self.millis = Some(run.millis);
        self.host = Some(run.head.host);
        self.user = Some(run.head.user);
        self.reason = run.head.reason;
    }
}

impl From<BackupRecord> for Entry {
    fn from(record: BackupRecord) -> Self {
        let took = (record.finished - record.started).num_milliseconds();
        let damaged = record.damaged_pages.as_ref();
        Self {
            kind: Deed::Backup,
            backup: Some(record.id.clone()),
            id: record.id,
            started: record.started,
            millis: u64::try_from(took).ok(),
            host: None,
            user: None,
            reason: None,
            outcome: if damaged.is_some() { "damaged_pages" } else { "complete" }.to_owned(),
            problems: damaged.map(|pages| format!("{} damaged pages", pages.total)).into_iter().collect(),
            target: None,
            what: Some(record.label).filter(|label| !label.is_empty()),
            bytes: record.data_bytes,
            recovery_millis: None,
        }
    }
}

impl From<BackupRun> for Entry {
    fn from(record: BackupRun) -> Self {
        Self {
            millis: Some(record.millis),
            problems: record.problem.into_iter().collect(),
            backup: record.backup,
            bytes: record.data_bytes,
            ..Self::of(Deed::Backup, record.head, record.outcome)
        }
    }
}

impl From<ChangeRecord> for Entry {
    fn from(record: ChangeRecord) -> Self {
        Self { what: Some(record.what), ..Self::of(Deed::Change, record.head, record.change) }
    }
}

impl From<RestoreRecord> for Entry {
    fn from(record: RestoreRecord) -> Self {
        let replayed = record.replay.map(|replay| record.restore.millis.saturating_add(replay.millis));
        let outcome = match (record.succeeded(), replayed) {
            (false, _) => record.outcome,
            (true, Some(_)) => "recovered".to_owned(),
            (true, None) => "restored".to_owned(),
        };
        Self {
            millis: Some(replayed.unwrap_or(record.restore.millis)),
            problems: record.problem.into_iter().collect(),
            target: Some(record.target).filter(|target| !target.is_empty()),
            backup: record.backup,
            bytes: record.restore.bytes,
            recovery_millis: replayed,
            ..Self::of(Deed::Restore, record.head, outcome)
        }
    }
}

impl From<DrillRecord> for Entry {
    fn from(record: DrillRecord) -> Self {
        Self {
            millis: Some(record.millis),
            problems: record.problems,
            target: Some(record.target),
            backup: record.backup,
            bytes: record.restored_bytes,
            recovery_millis: record.recovery_millis,
            ..Self::of(Deed::Drill, record.head, record.outcome)
        }
    }
}

impl From<ExtractRecord> for Entry {
    fn from(record: ExtractRecord) -> Self {
        let database = record.database.map_or_else(String::new, |name| format!(" of database {name}"));
        let into = record.into.map_or_else(String::new, |into| format!(", into {into}"));
        Self {
            millis: Some(record.millis),
            problems: record.problem.into_iter().collect(),
            target: Some(record.target).filter(|target| !target.is_empty()),
            what: Some(format!("{}{database}{into}", record.what)),
            backup: record.backup,
            bytes: record.restored_bytes,
            ..Self::of(Deed::Extract, record.head, record.outcome)
        }
    }
}

impl From<(ExpireRecord, Option<ExpireOutcome>)> for Entry {
    fn from((record, end): (ExpireRecord, Option<ExpireOutcome>)) -> Self {
        let took = end.as_ref().map(|end| (end.finished - record.started).num_milliseconds());
        let nothing_to_remove = record.backups_total == 0 && record.wal.is_empty();
        let outcome = match &end {
            Some(end) if end.refused => "refused",
            Some(end) if end.failure.is_some() => "failed",
            Some(_) if nothing_to_remove => "nothing_to_remove",
            Some(_) => "removed",
            None => "not_ended",
        };
        let what = match &end {
            Some(end) if end.refused => "nothing was removed".to_owned(),
            Some(end) => format!("{} backups, {} objects", end.backups, end.objects),
            None => format!("{} backups were to go", record.backups_total),
        };
        // Where it was refused for that, there is no policy.
        let policy = Some(record.policy).filter(|policy| !policy.is_empty());
        let what = what + &policy.map_or_else(String::new, |policy| format!(" ({policy})"));
        Self {
            kind: Deed::Expire,
            id: record.id,
            started: record.started,
            millis: took.and_then(|millis| u64::try_from(millis).ok()),
            host: Some(record.host),
            user: Some(record.user),
            reason: record.reason,
            outcome: outcome.to_owned(),
            problems: end.iter().filter_map(|end| end.failure.clone()).collect(),
            target: None,
            what: Some(what),
            backup: None,
            bytes: end.map_or(0, |end| end.bytes),
            recovery_millis: None,
        }
    }
}

impl From<VerifyRecord> for Entry {
    fn from(record: VerifyRecord) -> Self {
        let what = format!("{}, {} objects in {}", record.scope, record.objects, record.repository);
        Self {
            millis: Some(record.millis),
            problems: record.problems,
            what: Some(what),
            bytes: record.bytes,
            ..Self::of(Deed::Verify, record.head, record.outcome.word())
        }
    }
}

fn text(entries: &[Entry], more: bool, style: Style) -> String {
    let mut text = String::new();
    if entries.is_empty() {
        text.push_str("Nothing is on record.\n");
    }
    for entry in entries {
        let took = entry.millis.map_or_else(|| "-".to_owned(), duration);
        let head = format!(
            "{}  {:<8} {:<18} {:>12}  {:>8}",
            output::short_time(entry.started),
            entry.kind.word(),
            entry.outcome,
            took,
            output::bytes(entry.bytes)
        );
        let _ = writeln!(text, "{}  {}", style.bold(&output::clean(&head)), output::clean(&entry.id));
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "    {name}: {}", output::clean(&value.replace('\n', " ")));
        };
        if let (Some(user), Some(host)) = (&entry.user, &entry.host) {
            line("by", &format!("{user} on {host}"));
        }
        if let Some(reason) = &entry.reason {
            line("reason", reason);
        }
        if let Some(target) = &entry.target {
            line("target", target);
        }
        if let Some(what) = &entry.what {
            line(if entry.kind == Deed::Backup { "label" } else { "what" }, what);
        }
        if let Some(millis) = entry.recovery_millis {
            line("open after", &duration(millis));
        }
        entry.problems.iter().for_each(|problem| line("problem", problem));
    }
    if more {
        text.push_str("There is more: --limit shows it.\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone as _;

    use super::*;

    fn head(month: u32, host: &str, reason: Option<&str>) -> RecordHead {
        RecordHead {
            format: 1,
            id: format!("2027{month:02}01T030000Z-00000000000000ff"),
            started: Utc.with_ymd_and_hms(2027, month, 1, 3, 0, 0).unwrap(),
            host: host.into(),
            user: "postgres".into(),
            reason: reason.map(str::to_owned),
        }
    }

    #[test]
    fn a_history_reads_well_and_commands_no_terminal() {
        let drill = DrillRecord {
            head: head(2, "backup1", Some("monthly\u{1b}[2J\ndrill")),
            millis: 754_000,
            outcome: "not_proven".into(),
            problems: vec!["SQL checks: 1 of 2 did not: a.sql".into()],
            target: "--latest".into(),
            backup: None,
            restored_bytes: 48 << 30,
            recovery_millis: Some(600_800),
            newest_commit_age_millis: Some(12_000),
            read_here: Some(true),
        };
        let restore = RestoreRecord {
            head: head(1, "db2", None),
            outcome: "failed".into(),
            problem: Some("an object of the backup is damaged".into()),
            backup: Some("20261231T010000Z-0123456789abcdef".into()),
            target: "--to-xid 731".into(),
            restore: walship::catalog::Phase { bytes: 1 << 30, millis: 9000 },
            kept_bytes: 0,
            replay: None,
        };
        let failed = BackupRun {
            head: head(3, "db1", Some("nightly")),
            millis: 1000,
            outcome: "failed".into(),
            problem: Some("db1 cannot be reached".into()),
            backup: None,
            data_bytes: 0,
            stored_bytes: 0,
        };
        let change = ChangeRecord {
            head: head(4, "db1", Some("audit")),
            change: "held".into(),
            what: "backup 20261231T010000Z-0123456789abcdef, until it is released".into(),
            settings: BTreeMap::new(),
        };
        let text = text(&[change.into(), failed.into(), drill.into(), restore.into()], true, Style::Plain);
        insta::assert_snapshot!(text);
        assert!(!text.contains('\x1b'));
    }
}
