//! `pitr restore`.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use chrono::Utc;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use walship::catalog::TailFlaw;
use walship::repository::LineageRepository;
use walship::{Error, Result};

use super::DONE;
use super::args::RestoreArgs;
use super::before::Asked;
use super::confirm::confirm;
use super::output::{self, Style};
use super::plan::refused;
use super::source::{Source, credentials_note, restore_cmd, restore_cmd_arguments};
use crate::execute::restore::{Existing, check};
use crate::execute::{Planned, Progress, Proof, RestoreOptions, RestoreReport, make_plan, restore};
use crate::plan::{PlanOptions, RestorePlan};
use crate::recovery_settings::{RestoreAs, SettingsOptions, TargetAction, restore_command};
use crate::target::TargetKind;

/// How often progress is shown on a terminal.
const REDRAW: Duration = Duration::from_millis(200);

/// How often a line of progress is printed elsewhere.
const LINE_EVERY: Duration = Duration::from_secs(10);

pub(super) async fn run(args: &RestoreArgs) -> Result<u8> {
    let asked = Asked::of(&args.target)?;
    let program = restore_cmd(args.restore_cmd.as_deref())?;
    let source = Source::open(&args.source).await?;
    let target = match asked.target(&source).await? {
        Ok(target) => target,
        Err(refusal) => return refused(&refusal, args.source.json),
    };
    let mut options = options(args, &program, &source.repository, target.kind == TargetKind::Latest)?;
    let plan_options = PlanOptions { backup: args.target.backup.clone() };
    let mut plan =
        match make_plan(&source.repository, &source.catalog, &target, &plan_options, Proof::Whole).await? {
            Planned::Plan(plan) => plan,
            Planned::Refused(refusal) => return refused(&refusal, args.source.json),
        };
    let planned = tail_arguments(&plan);
    if !planned.is_empty() {
        let mut arguments = restore_cmd_arguments(&args.source.overrides, &source.repository)?;
        arguments.extend(planned);
        options.settings.restore_command = restore_command(&program, &arguments);
    }
    let before = source.repository.notes();
    plan.warnings.extend(before.iter().cloned());
    let style = Style::of_stdout();
    if !args.source.json {
        output::print(&output::plan_text(&plan, None, style))?;
    }
    let mut report = if args.dry_run {
        let report = check(&plan, &options)?;
        source.repository.check_backup_objects(&plan.backup).await?;
        report
    } else {
        if !args.yes
            && let Some(what) = changes(&check(&plan, &options)?)
        {
            confirm(&what, &plan.cluster)?;
        }
        let progress = Arc::new(Progress::default());
        let shown = progress.clone();
        tokio::select! {
            report = restore(&source.repository, &plan, &options, progress) => report?,
            () = show(&shown, plan.backup.data_bytes) => unreachable_end()?,
        }
    };
    report.notes.extend(source.repository.notes().into_iter().filter(|note| !before.contains(note)));
    for url in source.repository.unreadable() {
        report.notes.push(format!(
            "restore_command in postgresql.auto.conf leaves {url} out (--without-repo), because it cannot be read now"
        ));
    }
    report.notes.extend(credentials_note(&args.source.overrides)?);
    if args.source.json {
        let value = json!({
            "outcome": if args.dry_run { "would_restore" } else { "restored" },
            "report": report,
            "plan": plan,
        });
        output::print_json(&value)?;
    } else {
        output::print(&report_text(&report, &plan, &options, args.dry_run, style))?;
    }
    Ok(DONE)
}

/// Says what a restore changes that is there already; `None` when nothing is.
fn changes(report: &RestoreReport) -> Option<String> {
    if report.delta.is_some() {
        let folders = std::iter::once(&report.data_dir).chain(report.tablespaces.values());
        let folders: Vec<String> = folders.map(|folder| folder.display().to_string()).collect();
        return Some(format!(
            "{} will be brought to what the backup says: whatever differs is overwritten, and files of \
             PostgreSQL's that the backup does not have are removed. WAL in pg_wal is set aside there, \
             and so are folders that are not PostgreSQL's own and in the backup, its log for one.",
            folders.join(" and ")
        ));
    }
    let moved: Vec<String> = report
        .set_aside
        .iter()
        .map(|(from, to)| format!("{} will be renamed to {}", from.display(), to.display()))
        .collect();
    (!moved.is_empty()).then(|| moved.join("\n"))
}

/// Returns what `restore-cmd` has to be told of parts that it serves for this plan alone.
fn tail_arguments(plan: &RestorePlan) -> Vec<String> {
    let Some(tail) = &plan.tail else { return Vec::new() };
    let mut arguments = Vec::new();
    if matches!(tail.flaw, Some(TailFlaw::Damaged { .. })) {
        arguments.push("--up-to-damage".to_owned());
    }
    if let Some(lost_from) = tail.lost_from {
        arguments.extend(["--up-to-gap".to_owned(), lost_from.to_string()]);
    }
    arguments
}

/// Progress never ends by itself; if it did, the restore would be unattended.
fn unreachable_end() -> Result<RestoreReport> {
    Err(Error::local_io("the progress display ended before the restore"))
}

fn options(
    args: &RestoreArgs,
    program: &str,
    repository: &LineageRepository,
    latest: bool,
) -> Result<RestoreOptions> {
    let restore_as = RestoreAs::from(args.restore_as);
    let action = action(restore_as, latest, args.target_action.map(TargetAction::from))?;
    let command = restore_command(program, &restore_cmd_arguments(&args.source.overrides, repository)?);
    Ok(RestoreOptions {
        data_dir: args.data_dir.clone(),
        existing: match (args.delta, args.set_aside) {
            (true, _) => Existing::Match,
            (false, true) => Existing::SetAside { at: Utc::now() },
            (false, false) => Existing::Refuse,
        },
        tablespaces: mappings(&args.tablespace_mapping)?,
        accept_tablespace_paths: args.accept_tablespace_paths,
        settings_dir: args.settings_dir.clone(),
        settings: SettingsOptions { restore_as, action, restore_command: command },
    })
}

/// Returns what PostgreSQL does at the target.
///
/// # Errors
/// [`Error::Invalid`] for what it would not do: without a recovery target it ends recovery at the end of
/// the WAL and opens, whatever `recovery_target_action` says.
fn action(restore_as: RestoreAs, latest: bool, asked: Option<TargetAction>) -> Result<TargetAction> {
    match (asked, restore_as) {
        (Some(TargetAction::Promote), _) | (None, RestoreAs::Copy) => Ok(TargetAction::Promote),
        (None, RestoreAs::Production) if latest => Ok(TargetAction::Promote),
        (None, RestoreAs::Production) => Ok(TargetAction::Pause),
        (Some(action), _) if latest => Err(Error::invalid(format!(
            "--target-action {} does not go with --latest: without a target PostgreSQL opens for writing at \
             the end of the WAL",
            action.word()
        ))
        .with_safe("nothing was written")
        .with_next("Leave it out, or give the last transaction as a target: `pitr plan --latest` names it.")),
        (Some(action), _) => Ok(action),
    }
}

fn mappings(words: &[String]) -> Result<BTreeMap<String, PathBuf>> {
    let mut mappings = BTreeMap::new();
    for word in words {
        let (old, new) = word
            .split_once('=')
            .filter(|(old, new)| !old.is_empty() && !new.is_empty())
            .ok_or_else(|| {
                Error::invalid(format!("{word:?} is no tablespace mapping"))
                    .with_next("Write OLD=NEW, both absolute paths, or OID=NEW.")
            })?;
        if mappings.insert(old.to_owned(), PathBuf::from(new)).is_some() {
            return Err(Error::invalid(format!("tablespace {old:?} is mapped twice")));
        }
    }
    Ok(mappings)
}

/// Shows progress until it is dropped: a bar on a terminal, now and then a line elsewhere.
async fn show(progress: &Progress, total: u64) {
    let started = Instant::now();
    let bar = std::io::stderr().is_terminal().then(|| {
        let bar = ProgressBar::new(total);
        let style =
            ProgressStyle::with_template("  {bar:30} {bytes} of {total_bytes}  {bytes_per_sec}  {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Finish(bar)
    });
    let mut next_line = started + LINE_EVERY;
    loop {
        tokio::time::sleep(REDRAW).await;
        let written = progress.written_bytes.load(Ordering::Relaxed);
        match &bar {
            Some(bar) => bar.0.set_position(written),
            None if Instant::now() >= next_line => {
                next_line += LINE_EVERY;
                let seconds = started.elapsed().as_secs().max(1);
                let rate = written / seconds;
                let left = total.saturating_sub(written) / rate.max(1);
                eprintln!(
                    "restored {} of {}, {}/s, about {left} s left",
                    output::bytes(written),
                    output::bytes(total),
                    output::bytes(rate)
                );
            }
            None => {}
        }
    }
}

/// Clears the bar when the restore ends, however it ends.
struct Finish(ProgressBar);

impl Drop for Finish {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

fn report_text(
    report: &RestoreReport,
    plan: &RestorePlan,
    options: &RestoreOptions,
    dry_run: bool,
    style: Style,
) -> String {
    let mut lines = Vec::new();
    lines.push(String::new());
    let done = if dry_run { "Would restore" } else { "Restored" };
    lines.push(format!(
        "{} {} in {} files to {}",
        style.bold(done),
        output::bytes(report.data_bytes),
        report.files,
        report.data_dir.display()
    ));
    for (oid, path) in &report.tablespaces {
        lines.push(format!("  tablespace {oid} in {}", path.display()));
    }
    lines.extend(existing_text(report, dry_run));
    if dry_run {
        lines.push("  Nothing was written.".to_owned());
    }
    lines.push(String::new());
    lines.push(style.bold("Next"));
    for note in &report.notes {
        lines.push(format!("  - {}", output::clean(note)));
    }
    lines.push(format!("  - start it: {}", output::clean(&report.start_command)));
    lines.push(match options.settings.action {
        _ if plan.target.kind == TargetKind::Latest => {
            "  - it opens for writing at the end of the archived WAL, on a new timeline".to_owned()
        }
        TargetAction::Pause => {
            "  - it pauses read-only at the target, unless hot_standby is turned off at its start: look, then \
             SELECT pg_wal_replay_resume() to open it"
                .to_owned()
        }
        TargetAction::Promote => "  - it opens for writing at the target, on a new timeline".to_owned(),
        TargetAction::Shutdown => "  - it stops at the target".to_owned(),
    });
    lines.push(String::new());
    lines.join("\n")
}

/// Says what became, or would become, of what was there.
fn existing_text(report: &RestoreReport, dry_run: bool) -> Vec<String> {
    let mut lines = Vec::new();
    for (from, to) in &report.set_aside {
        let done = if dry_run { "would be renamed" } else { "was renamed" };
        lines.push(format!("  {} {done} to {}", from.display(), to.display()));
    }
    let Some(delta) = &report.delta else { return lines };
    if dry_run {
        lines.push("  What of the data directory matches the backup would stay.".to_owned());
        return lines;
    }
    let percent = (delta.kept_bytes as f64 * 100.0 / report.data_bytes.max(1) as f64).min(100.0);
    lines.push(format!(
        "  {} of it ({percent:.1} %) was in place already; {} were fetched, {} files removed",
        output::bytes(delta.kept_bytes),
        output::bytes(delta.fetched_bytes),
        delta.removed_files
    ));
    for aside in &delta.set_aside {
        lines.push(format!("  what was there before is in {}", aside.display()));
    }
    if let Some(old_wal) = &delta.old_wal {
        lines.push(format!(
            "  the WAL that was in it is in {}: remove it when nothing of it is missed",
            old_wal.display()
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latest_promotes_and_is_not_promised_to_do_otherwise() {
        use RestoreAs::{Copy, Production};
        use TargetAction::{Pause, Promote, Shutdown};
        for (restore_as, latest, asked, expected) in [
            (Copy, false, None, Some(Promote)),
            (Production, false, None, Some(Pause)),
            (Production, true, None, Some(Promote)),
            (Production, true, Some(Promote), Some(Promote)),
            (Copy, false, Some(Shutdown), Some(Shutdown)),
            (Copy, true, Some(Shutdown), None),
            (Production, true, Some(Pause), None),
        ] {
            assert_eq!(action(restore_as, latest, asked).ok(), expected, "{restore_as:?} {latest} {asked:?}");
        }
    }
}
