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

use super::args::RestoreArgs;
use super::confirm::confirm;
use super::forecast::Measured;
use super::hold::hold_for_restore;
use super::output::{self, Style, Way};
use super::plan::{open_and_plan, refused};
use super::scratch::Told;
use super::source::{credentials_note, restore_cmd, restore_cmd_arguments};
use super::tried::Tried;
use super::{DONE, forecast, role, start, status_of, surviving};
use crate::execute::restore::{Existing, INCOMPLETE_MARKER, another_backup, check};
use crate::execute::start::{StartOptions, Started, State, would_start};
use crate::execute::{Progress, RestoreOptions, RestoreReport, restore};
use crate::plan::{Refusal, RestorePlan};
use crate::recovery_settings::{Recovery, RestoreAs, SettingsOptions, TargetAction, restore_command};
use crate::target::{TargetKind, shell_word};

/// How often progress is shown on a terminal.
pub(super) const REDRAW: Duration = Duration::from_millis(200);

/// How often a line of progress is printed elsewhere.
pub(super) const LINE_EVERY: Duration = Duration::from_secs(10);

pub(super) async fn run(args: &RestoreArgs) -> Result<u8> {
    let mut told = Told::listen()?;
    let (mut tried, mut measured) = (Tried::new(&args.target), None);
    let (result, interrupted) = tokio::select! {
        result = carry_out(args, &mut tried, &mut measured) => (result, false),
        signal = told.stop() => (Err(interrupted(args, signal, measured.is_some())), true),
    };
    if !args.dry_run && !tried.is_withdrawn {
        let ended = tried.ended("restored", &result, interrupted);
        forecast::record(args, &tried, measured, ended).await;
    }
    result
}

/// Returns what a restore ended with that was told to stop, and whether all files were in place by then.
fn interrupted(args: &RestoreArgs, signal: &str, is_restored: bool) -> Error {
    let error = Error::unavailable(format!("interrupted by {signal}"));
    if is_restored {
        return error
            .with_safe("the restored folder is whole, and the repository unchanged; a server that was started goes on")
            .with_next(format!("Look at the server: pg_ctl -D {} status.", shell_word(&args.data_dir.to_string_lossy())));
    }
    if !args.data_dir.join(INCOMPLETE_MARKER).exists() {
        return error.with_safe("no file of a data directory was written").with_next("Run it again.");
    }
    error
        .with_safe("the repository is unchanged; the folder is marked as incomplete and PostgreSQL does not start from it")
        .with_next("Run it again with --delta: it goes on where it was.")
}

/// Does what was asked for; what is known of it goes into `tried` as it is done, and into `measured` once all files are in
/// place.
async fn carry_out(args: &RestoreArgs, tried: &mut Tried, measured: &mut Option<Measured>) -> Result<u8> {
    let (restore_as, recovery) = role::of(args)?;
    start::refuse_root(&args.starting)?;
    surviving::check_words(args)?;
    let program = restore_cmd(args.restore_cmd.as_deref())?;
    let planned = open_and_plan(&args.source, &args.target, &mut tried.repository).await?;
    let (mut source, mut plan) = match planned {
        Ok(planned) => planned,
        Err(refusal) => return not_planned(args, tried, &refusal),
    };
    tried.planned(&plan);
    let mut pushed = Vec::new();
    while let Some(more) = surviving::look(args, &source, &mut plan, &pushed).await? {
        pushed.push(more);
        let planned = open_and_plan(&args.source, &args.target, &mut tried.repository).await?;
        (source, plan) = match planned {
            Ok(planned) => planned,
            Err(refusal) => return not_planned(args, tried, &refusal),
        };
        tried.planned(&plan);
    }
    let mut options = options(args, &program, &source.repository, restore_as, recovery)?;
    let planned = tail_arguments(&plan);
    if !planned.is_empty() {
        let mut arguments = restore_cmd_arguments(&args.source.overrides, &source.repository)?;
        arguments.extend(planned);
        options.settings.restore_command = restore_command(&program, &arguments);
    }
    forecast::add(&source.repository, &mut plan).await;
    let starting = start::options(&args.starting, &plan, &options.settings.recovery).await?;
    let before = source.repository.notes();
    plan.warnings.extend(before.iter().cloned());
    let style = Style::of_stdout();
    if !args.source.json {
        output::print(&output::plan_text(&plan, Way::of(&options.settings.recovery), None, style))?;
    }
    let mut held = None;
    let mut report = if args.dry_run {
        let report = check(&plan, &options)?;
        source.repository.check_backup_objects(&plan.backup).await.map_err(another_backup)?;
        report
    } else {
        let would = check(&plan, &options)?;
        if !args.yes
            && let Some(what) = changes(&would)
        {
            let confirmed = confirm(what, plan.cluster.clone()).await;
            // Who says no on a terminal has only looked.
            tried.is_withdrawn = confirmed.is_err() && std::io::stdin().is_terminal();
            confirmed?;
        }
        held = Some(hold_for_restore(&source.repository, &plan, "pitr restore").await?);
        tried.begin();
        let progress = Arc::new(Progress::default());
        let shown = progress.clone();
        let restored = tokio::select! {
            restored = restore(&source.repository, &plan, &options, progress) => restored,
            () = show(&shown, plan.backup.data_bytes) => unreachable_end(),
        };
        if restored.is_err()
            && let Some(held) = held.take()
        {
            held.release().await;
        }
        restored?
    };
    let restored_in = tried.took();
    *measured = Some(Measured::of(&report, restored_in, None));
    report.notes.extend(source.repository.notes().into_iter().filter(|note| !before.contains(note)));
    for url in source.repository.unreadable() {
        report.notes.push(format!(
            "restore_command in postgresql.auto.conf leaves {url} out (--without-repo), because it cannot be read now"
        ));
    }
    report.notes.extend(credentials_note(&args.source.overrides)?);
    let restored = Restored { plan: &plan, report: &report, options: &options, dry_run: args.dry_run };
    if !args.source.json {
        output::print(&report_text(&restored, starting.as_ref(), style))?;
    }
    let ended = match &starting {
        None => None,
        Some(starting) if args.dry_run => Some(Ok(would_start(&report, starting))),
        Some(starting) => Some(start::carry_out(&plan, &report, starting, restored_in).await),
    };
    if let Some(held) = held {
        match has_ended(ended.as_ref()) {
            true => held.release().await,
            false => held.leave_to_recovery().await,
        }
    }
    let (started, failed) = match ended {
        None => (None, None),
        Some(Ok(started)) => {
            let unplanned = start::unplanned(&plan, &report, &started);
            (Some(started), unplanned)
        }
        Some(Err(error)) => (None, Some(error)),
    };
    *measured = Some(Measured::of(&report, restored_in, started.as_ref()));
    (tried.is_done, tried.problem) = (true, failed.as_ref().map(ToString::to_string));
    finish(&restored, started.as_ref(), failed, args.source.json, style)
}

/// Reports that no plan leads to the target, and returns the exit status.
fn not_planned(args: &RestoreArgs, tried: &mut Tried, refusal: &Refusal) -> Result<u8> {
    tried.refused(refusal);
    refused(refusal, args.source.json)
}

/// Returns whether a recovery that was watched has come to its end.
fn has_ended(ended: Option<&Result<Started>>) -> bool {
    // One that paused or stopped may be told to go on.
    matches!(ended, Some(Ok(Started { state: State::Open, .. })))
}

/// What was restored, or would be.
struct Restored<'a> {
    plan: &'a RestorePlan,
    report: &'a RestoreReport,
    options: &'a RestoreOptions,
    dry_run: bool,
}

/// Reports how it ended, and returns the exit status.
fn finish(
    restored: &Restored<'_>,
    started: Option<&Started>,
    failed: Option<Error>,
    json: bool,
    style: Style,
) -> Result<u8> {
    let Restored { plan, report, dry_run, .. } = *restored;
    if json {
        let mut value = start::outcome(dry_run, started, failed.as_ref());
        value["report"] = json!(report);
        value["plan"] = json!(plan);
        output::print_json(&value)?;
    } else if let Some(started) = started {
        output::print(&start::text(plan, started, style))?;
    }
    let Some(error) = failed else { return Ok(DONE) };
    eprintln!("{}", output::clean(&error.report()));
    Ok(status_of(&error))
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
pub(super) fn tail_arguments(plan: &RestorePlan) -> Vec<String> {
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
    restore_as: RestoreAs,
    recovery: Recovery,
) -> Result<RestoreOptions> {
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
        settings: SettingsOptions { restore_as, recovery, restore_command: command },
    })
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
pub(super) async fn show(progress: &Progress, total: u64) {
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

/// Clears the bar when the work ends, however it ends.
pub(super) struct Finish(pub(super) ProgressBar);

impl Drop for Finish {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

fn report_text(restored: &Restored<'_>, starting: Option<&StartOptions>, style: Style) -> String {
    let Restored { plan, report, options, dry_run } = *restored;
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
    match starting {
        None => lines.push(format!("  - start it: {}", output::clean(&report.start_command))),
        Some(_) if dry_run => {}
        Some(starting) => {
            let command = would_start(report, starting).command;
            lines.push(format!("  - it is started now: {}", output::clean(&command)));
        }
    }
    lines.push(format!("  - {}", afterwards(plan, &options.settings.recovery)));
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

/// Returns what the server does once it has replayed what is archived, or reached the target.
fn afterwards(plan: &RestorePlan, recovery: &Recovery) -> &'static str {
    match recovery {
        Recovery::Standby(_) => {
            "it stays a standby, and follows the newest timeline (recovery_target_timeline = latest); promote it \
             with pg_ctl promote"
        }
        Recovery::ToTarget(_) if plan.target.kind == TargetKind::Latest => {
            "it opens for writing at the end of the archived WAL, on a new timeline"
        }
        Recovery::ToTarget(TargetAction::Pause) => {
            "it pauses read-only at the target, unless hot_standby is turned off at its start: look, then SELECT \
             pg_wal_replay_resume() to open it"
        }
        Recovery::ToTarget(TargetAction::Promote) => "it opens for writing at the target, on a new timeline",
        Recovery::ToTarget(TargetAction::Shutdown) => "it stops at the target",
    }
}
