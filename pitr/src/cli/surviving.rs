//! `pitr restore --latest`: what is left of the lost server's WAL comes first, where it is named or where the restore goes.

use std::path::{Path, PathBuf};

use walship::archive::own_folder;
use walship::archive::push::PushOptions;
use walship::config::Config;
use walship::{Error, Result};

use super::args::RestoreArgs;
use super::source::Source;
use crate::execute::surviving::{Surviving, check_agree, push, survey};
use crate::execute::{old_wal, wal_folders};
use crate::plan::RestorePlan;
use crate::target::shell_word;

/// Refuses words that do not go together.
///
/// # Errors
/// [`Error::Invalid`] for a target that no later WAL can change, and where there is nothing to look into.
pub(super) fn check_words(args: &RestoreArgs) -> Result<()> {
    let refused =
        |what: &str, next: &str| Err(Error::invalid(what).with_safe("nothing was written").with_next(next));
    if args.surviving_wal.is_some() && !args.target.is_latest() {
        return refused(
            "--surviving-wal goes with --latest only: it is about the WAL behind the archive's end",
            "Give --latest; or push it first with `walship wal push`, and restore to any target in it.",
        );
    }
    if args.push_surviving && args.leave_surviving && args.surviving_wal.is_none() {
        return refused(
            "--push-surviving and --leave-surviving contradict each other",
            "Leave one of them out, or name what is to be pushed with --surviving-wal.",
        );
    }
    if args.push_surviving && args.surviving_wal.is_none() && own_folders(args).0.is_empty() {
        return refused(
            "--push-surviving goes with --surviving-wal, or with --latest to where the data directory of the lost server is, or was",
            "Name what is left of the lost server's pg_wal with --surviving-wal, or leave it out.",
        );
    }
    Ok(())
}

/// Why a plan to the archive's end leads no further, where nothing was looked at.
pub(super) fn only_archived() -> String {
    "what is archived counts, and of a lost server's pg_wal nothing else unless `pitr restore --surviving-wal DIR` names it"
        .to_owned()
}

/// Returns the folders where this restore goes, or went before, that may hold the lost server's last WAL, and what could not
/// be looked into.
fn own_folders(args: &RestoreArgs) -> (Vec<PathBuf>, Vec<Error>) {
    match args.target.is_latest() && !args.leave_surviving {
        true => wal_folders(&args.data_dir),
        false => Default::default(),
    }
}

/// Returns the folder that is named, and what restores set aside in it.
fn named_folders(named: &Path) -> Result<Vec<PathBuf>> {
    let inner = named.join("pg_wal");
    let mut folders = old_wal(if inner.is_dir() { &inner } else { named })?;
    folders.insert(0, named.to_owned());
    Ok(folders)
}

/// WAL that survives in one of the folders.
struct Found {
    surviving: Surviving,
    is_named: bool,
}

/// Looks at the surviving WAL, adds to the plan what is to be said of it, and pushes what is not archived when that is asked
/// for. Returns what it pushed: the plan is to be made anew then, and more may lie behind. `pushed` is what was before.
///
/// # Errors
/// [`Error::Missing`], which names what was found, when it is to be decided what becomes of it; as [`survey`],
/// [`check_agree`] and [`push`].
pub(super) async fn look(
    args: &RestoreArgs,
    source: &Source,
    plan: &mut RestorePlan,
    pushed: &[String],
) -> Result<Option<String>> {
    let named = args.surviving_wal.as_deref().map(named_folders).transpose()?.unwrap_or_default();
    let (own, unreadable) = own_folders(args);
    let unsure =
        |error: &Error| format!("whether there is more WAL than the archive has is not known: {error}");
    let mut notes: Vec<String> = unreadable.iter().map(unsure).collect();
    if named.is_empty() && own.is_empty() {
        let says_so = args.target.is_latest() && !args.standby && !args.leave_surviving;
        plan.reasons.extend(says_so.then(only_archived));
        plan.warnings.extend(notes);
        return Ok(None);
    }
    let (mut found, mut unknown): (Vec<Found>, Vec<Error>) = (Vec::new(), Vec::new());
    for (folder, is_named) in
        named.iter().map(|folder| (folder, true)).chain(own.iter().map(|own| (own, false)))
    {
        match survey(folder, &source.repository, plan).await {
            Ok(surviving) if found.iter().any(|one| one.surviving.folder() == surviving.folder()) => {}
            Ok(surviving) => found.push(Found { surviving, is_named }),
            Err(error) if is_named => return Err(error),
            Err(error) => unknown.push(error),
        }
    }
    found.retain(|one| !one.surviving.is_empty() && !pushed.contains(&one.surviving.describe()));
    // What ends no transaction may lead to what does, where that could not be told.
    let counts =
        !unknown.is_empty() || found.iter().any(|one| one.is_named || one.surviving.ends_transactions);
    if !counts {
        found.clear();
    }
    notes.extend(unknown.iter().map(unsure));
    let what: Vec<String> = found.iter().map(|one| one.surviving.describe()).collect();
    if args.dry_run {
        let would = if args.push_surviving { "would be pushed" } else { "--push-surviving pushes it" };
        notes.extend(what.iter().map(|what| format!("not archived: {what}: {would}")));
    }
    if found.is_empty() && pushed.is_empty() {
        notes.extend(named.first().map(|folder| {
            format!("{} holds no WAL of timeline {} that is not stored", folder.display(), plan.timeline)
        }));
    }
    let Some(first) = found.first().filter(|_| !args.dry_run) else {
        return match unknown.into_iter().next().filter(|_| args.push_surviving && !args.dry_run) {
            Some(error) => Err(undecided(error, pushed)),
            // Nobody asked, and nothing of it is lost: the restore sets it aside.
            None => {
                let pushed = pushed.iter().map(|what| format!("pushed into every repository: {what}"));
                plan.warnings.extend(pushed.chain(notes));
                Ok(None)
            }
        };
    };
    if !args.push_surviving {
        return Err(offer(args, &found, &what, &notes));
    }
    let size = source.repository.lineage().segment_size;
    for other in &found[1..] {
        check_agree(&first.surviving, &other.surviving, size).await?;
    }
    let config = Config::load(&args.source.overrides)?;
    let spool_dir = match &config.state_dir {
        Some(folder) => own_folder(Some(folder))?,
        None => std::env::temp_dir(),
    };
    let lineage = Some(source.repository.lineage().number);
    let options = PushOptions { compression: config.compression, lineage, spool_dir };
    push(&first.surviving, &source.repository, plan, &options).await?;
    Ok(Some(first.surviving.describe()))
}

/// Says what is there, and how to go on with it or without.
fn offer(args: &RestoreArgs, found: &[Found], what: &[String], notes: &[String]) -> Error {
    let also: String = notes.iter().map(|note| format!("; {note}")).collect();
    let named = args.surviving_wal.as_ref().filter(|_| found.iter().any(|one| one.is_named));
    let is_own = found.iter().any(|one| !one.is_named);
    Error::missing(format!("the archive lacks WAL that is still there: {}{also}", what.join("; ")))
        .with_safe("nothing was written and nothing pushed; the archive ends without it")
        .with_next(match named {
            Some(folder) => format!(
                "Push it and restore up to its end: the same command with --push-surviving (--surviving-wal {}). Or \
                 restore without it: leave --surviving-wal out{}.",
                shell_word(&folder.to_string_lossy()),
                if is_own { ", and give --leave-surviving" } else { "" }
            ),
            None => "Push it and restore up to its end: the same command with --push-surviving. Or restore without \
                     it: --leave-surviving."
                .to_owned(),
        })
}

/// An error of a folder that nobody named, when all there is was to be pushed.
fn undecided(error: Error, pushed: &[String]) -> Error {
    let next = format!(
        "{} Or restore without it: --leave-surviving in the place of --push-surviving.",
        error.next()
    );
    match pushed {
        [] => error.with_next(next),
        pushed => error
            .with_safe(format!("nothing was written; pushed into every repository: {}", pushed.join("; ")))
            .with_next(next),
    }
}
