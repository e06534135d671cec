//! `pitr expire`.

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicU64, Ordering};

use chrono::Utc;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use walship::config::Config;
use walship::repository::{LineageRepository, RemovedObjects};
use walship::{Error, Result};

use super::args::ExpireArgs;
use super::change;
use super::confirm::confirm_removal;
use super::output::{self, Style};
use super::source::{open_for_removal, say_notes};
use super::tried::RECORDING_MAX;
use super::{DONE, status_of};
use crate::execute::expire::{
    Prepared, Report, Request, carry_out, note_nothing_to_do, note_refused, prepare, prepare_to_remove,
    record_refused, take_back_old_marks,
};
use crate::retention::{KeptBackup, Policy, RetentionPlan};

/// How many lines of one kind are printed: all of them are in the JSON.
const LINES_MAX: usize = 40;

/// One repository, and what became of it.
struct Place {
    repository: LineageRepository,
    prepared: Result<Prepared>,
    report: Option<Result<Report>>,
}

pub(super) async fn run(args: &ExpireArgs) -> Result<u8> {
    let config = Config::load(&args.source.overrides)?;
    let policy = match args.policy.over(&config.retention).and_then(|settings| Policy::of(&settings)) {
        Ok(policy) => policy,
        Err(error) => {
            if args.confirm {
                record_without_policy(args, config, &error).await;
            }
            return Err(error);
        }
    };
    let request = Request {
        policy,
        now: Utc::now(),
        accept_idle: args.accept_idle,
        give_up: args.give_up.iter().cloned().collect(),
        reason: args.reason.clone(),
    };
    let repository = open_for_removal(&args.source, config).await?;
    say_notes(&repository);
    let said = repository.notes();
    if args.confirm {
        change::configuration(&repository, &args.source.overrides, args.reason.as_deref()).await;
    }
    let done = expire(args, &request, &repository).await;
    let new = repository.notes().into_iter().filter(|note| !said.contains(note));
    new.for_each(|note| eprintln!("note:  {}", output::clean(&note)));
    done
}

/// Puts on record that there is no policy that makes sense.
async fn record_without_policy(args: &ExpireArgs, config: Config, error: &Error) {
    let recording = async {
        for one in open_for_removal(&args.source, config).await?.each() {
            record_refused(&one, "", args.reason.as_deref(), error).await?;
        }
        Ok(())
    };
    let late = || Err(Error::unavailable("writing it took too long"));
    if let Err(error) = tokio::time::timeout(RECORDING_MAX, recording).await.unwrap_or_else(|_| late()) {
        let error = output::clean(&error.to_string());
        eprintln!("note:  that nothing was removed is not in the history of every repository: {error}");
    }
}

async fn expire(args: &ExpireArgs, request: &Request, repository: &LineageRepository) -> Result<u8> {
    let unread = repository.unreadable();
    // Each by itself: what is restored from one must not depend on another.
    let mut places = Vec::new();
    for one in repository.each() {
        if args.confirm
            && let Err(error) = take_back_old_marks(&one).await
        {
            tracing::debug!(%error, "marks of earlier removals stay");
        }
        let prepared = match args.confirm {
            true => prepare_to_remove(&one, request).await,
            false => prepare(&one, request).await,
        };
        places.push(Place { repository: one, prepared, report: None });
    }
    let style = Style::of_stdout();
    if !args.source.json {
        for place in &places {
            output::print(&shown(place, args.confirm, style))?;
        }
    }
    if args.confirm {
        if let Err(error) = ask(args, &places) {
            // Who says no on a terminal has only looked.
            let asked =
                places.iter().filter(|place| place.prepared.is_ok() && !std::io::stdin().is_terminal());
            for place in asked {
                note_refused(&place.repository, request, &error).await;
            }
            return Err(error);
        }
        for place in &mut places {
            let Ok(prepared) = &place.prepared else { continue };
            if prepared.is_done() {
                if let Err(error) = note_nothing_to_do(&place.repository, request, prepared).await {
                    place.report = Some(Err(error.with_safe("there was nothing to remove")));
                }
                continue;
            }
            let report = remove(&place.repository, request, prepared).await;
            if !args.source.json {
                output::print(&outcome(&place.repository, &report, style))?;
            }
            place.report = Some(report);
        }
    }
    finish(args, &places, &unread)
}

/// Has the removal confirmed, where there is anything to remove.
fn ask(args: &ExpireArgs, places: &[Place]) -> Result<()> {
    let going: Vec<&Prepared> = places
        .iter()
        .filter_map(|place| place.prepared.as_ref().ok())
        .filter(|prepared| !prepared.plan.is_empty())
        .collect();
    if going.is_empty() || args.yes {
        return Ok(());
    }
    let backups: usize = going.iter().map(|prepared| prepared.plan.backups_removed.len()).sum();
    let bytes: u64 = going.iter().map(|prepared| prepared.total().bytes).sum();
    let what = format!(
        "{backups} backup(s) and WAL, {} in all, will be removed for good from {} repositor{}.",
        output::bytes(bytes),
        going.len(),
        if going.len() == 1 { "y" } else { "ies" }
    );
    let cluster = places.first().map(|place| place.repository.cluster().to_string()).unwrap_or_default();
    confirm_removal(&what, &cluster)
}

async fn remove(repository: &LineageRepository, request: &Request, prepared: &Prepared) -> Result<Report> {
    let bar = std::io::stderr().is_terminal().then(|| {
        let bar = ProgressBar::new(prepared.total().objects);
        let style = ProgressStyle::with_template("  {bar:30} {pos} of {len} objects removed  {eta} left");
        bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    });
    let done = AtomicU64::new(0);
    let progress = |some: RemovedObjects| {
        let all = done.fetch_add(some.objects, Ordering::Relaxed) + some.objects;
        if let Some(bar) = &bar {
            bar.set_position(all);
        }
    };
    let report = carry_out(repository, request, &prepared.plan, &progress).await;
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    report
}

/// Prints what is to be printed at the end, and returns the status: the first failure's.
fn finish(args: &ExpireArgs, places: &[Place], unread: &[String]) -> Result<u8> {
    let failures = || {
        places.iter().filter_map(|place| match (&place.prepared, &place.report) {
            (Err(error), _) | (_, Some(Err(error))) => Some((place, error)),
            _ => None,
        })
    };
    if args.source.json {
        let repositories: Vec<Value> = places.iter().map(|place| json_of(place, args.confirm)).collect();
        output::print_json(&json!({ "repositories": repositories, "unreadable_repositories": unread }))?;
    }
    for (place, error) in failures() {
        let report = error.report();
        let text =
            if places.len() == 1 { report } else { format!("{}:\n{report}", place.repository.location()) };
        eprintln!("{}", output::clean(&text));
    }
    let status = failures().map(|(_, error)| status_of(error)).next();
    Ok(status.unwrap_or(if unread.is_empty() { DONE } else { super::FAILED }))
}

fn json_of(place: &Place, confirmed: bool) -> Value {
    let error = match (&place.prepared, &place.report) {
        (Err(error), _) | (_, Some(Err(error))) => output::error_json(error),
        _ => Value::Null,
    };
    json!({
        "repository": place.repository.location(),
        "plan": place.prepared.as_ref().ok().map(|prepared| &prepared.plan),
        "confirmed": confirmed,
        "report": place.report.as_ref().and_then(|report| report.as_ref().ok()),
        "error": error,
    })
}

fn shown(place: &Place, confirmed: bool, style: Style) -> String {
    match &place.prepared {
        Ok(prepared) => text(&place.repository.location(), prepared, confirmed, style),
        Err(_) => format!(
            "{} {}: nothing is removed, see below\n",
            style.bold("Repository"),
            output::clean(&place.repository.location())
        ),
    }
}

fn text(location: &str, prepared: &Prepared, confirmed: bool, style: Style) -> String {
    let plan = &prepared.plan;
    let mut text = String::new();
    let _ = writeln!(text, "{} {}", style.bold("Repository"), output::clean(location));
    let _ = writeln!(text, "  policy   {}", output::clean(&plan.policy));
    if let Some(from) = plan.window_from {
        let _ = writeln!(text, "  window   from {} on", output::short_time(from));
    }
    lines(&mut text, style, "Backups that stay", kept_lines(plan));
    lines(&mut text, style, "Backups that go", removed_lines(plan));
    let wal = plan.wal_kept.iter().map(|wal| {
        let stretch = stretch(&wal.first.to_string(), &wal.last.to_string(), wal.segments);
        format!("timeline {}  {stretch}: {}", wal.timeline, wal.reasons.join("; "))
    });
    lines(&mut text, style, "WAL that stays", wal.collect());
    let wal = plan.wal_removed.iter().map(|wal| {
        let stretch = stretch(&wal.first.to_string(), &wal.last.to_string(), wal.segments);
        let (size, objects) = (output::bytes(wal.stored_bytes), wal.objects);
        format!("timeline {}  {stretch}, {objects} objects, {size}: {}", wal.timeline, wal.reason)
    });
    lines(&mut text, style, "WAL that goes", wal.collect());
    if !plan.notes.is_empty() {
        lines(&mut text, style, "To be known", plan.notes.clone());
    }
    let total = prepared.total();
    let _ = writeln!(text);
    let _ = match (plan.is_empty(), confirmed) {
        (true, _) => writeln!(text, "Nothing goes."),
        (false, false) => writeln!(
            text,
            "{} in {} objects would go. Nothing was removed: --confirm does it.",
            output::bytes(total.bytes),
            total.objects
        ),
        (false, true) => writeln!(text, "{} in {} objects go.", output::bytes(total.bytes), total.objects),
    };
    text
}

fn stretch(first: &str, last: &str, segments: u64) -> String {
    format!("{first} to {last} ({segments} segments)")
}

fn lines(text: &mut String, style: Style, title: &str, all: Vec<String>) {
    let _ = writeln!(text, "\n{}", style.bold(title));
    if all.is_empty() {
        let _ = writeln!(text, "  none");
    }
    for line in all.iter().take(LINES_MAX) {
        let _ = writeln!(text, "  {}", output::clean(line));
    }
    if all.len() > LINES_MAX {
        let _ = writeln!(text, "  ({} more: --json shows all)", all.len() - LINES_MAX);
    }
}

fn kept_lines(plan: &RetentionPlan) -> Vec<String> {
    let line = |backup: &KeptBackup| {
        let what = match (backup.finished, &backup.parent) {
            (None, _) => "not complete".to_owned(),
            (Some(finished), parent) => format!(
                "{}, {}, {}",
                output::short_time(finished),
                if parent.is_some() { "incremental" } else { "full" },
                output::bytes(backup.stored_bytes)
            ),
        };
        format!("{}  {what}: {}", backup.id, backup.reasons.join("; "))
    };
    plan.backups_kept.iter().map(line).collect()
}

fn removed_lines(plan: &RetentionPlan) -> Vec<String> {
    let lines = plan.backups_removed.iter().map(|backup| {
        let finished = backup.finished.map_or_else(|| "not complete".to_owned(), output::short_time);
        format!("{}  {finished}, {}: {}", backup.id, output::bytes(backup.stored_bytes), backup.reason)
    });
    lines.collect()
}

fn outcome(repository: &LineageRepository, report: &Result<Report>, style: Style) -> String {
    let mut text = format!("{} {}\n", style.bold("Removed from"), output::clean(&repository.location()));
    match report {
        Ok(report) => {
            let _ = writeln!(
                text,
                "  {} backup(s), {} objects, {} (history/expires/{}.json)",
                report.backups,
                report.objects,
                output::bytes(report.bytes),
                report.id
            );
            if report.kept_as_versions > 0 {
                let _ = writeln!(
                    text,
                    "  The store keeps {} of these objects as older versions: their room is free when its own rules \
                     (lifecycle, retention of locked objects) let them go.",
                    report.kept_as_versions
                );
            }
            for note in &report.notes {
                let _ = writeln!(text, "  {}", output::clean(note));
            }
        }
        Err(_) => text.push_str("  not all, or nothing: see below\n"),
    }
    text
}
