//! `pitr restore --surviving-wal`: what is left of the lost server's WAL comes first.

use std::path::PathBuf;

use walship::archive::own_folder;
use walship::archive::push::PushOptions;
use walship::config::Config;
use walship::{Error, Result};

use super::args::RestoreArgs;
use super::source::Source;
use crate::execute::surviving::{push, survey};
use crate::plan::RestorePlan;
use crate::target::shell_word;

/// What is to be done now that the surviving WAL was looked at.
pub(super) enum Then {
    /// Go on with the plan.
    GoOn {
        /// What is to be said of it.
        note: Option<String>,
    },
    /// The repository has more now: plan again.
    PlanAgain {
        /// What was pushed.
        note: String,
    },
}

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
    if args.push_surviving && args.surviving_wal.is_none() && own_directory(args).is_none() {
        return refused(
            "--push-surviving goes with --surviving-wal, or with --latest over the data directory of the lost server",
            "Name what is left of the lost server's pg_wal with --surviving-wal, or leave it out.",
        );
    }
    Ok(())
}

/// Returns the data directory that is restored over, which may hold the lost server's last WAL.
fn own_directory(args: &RestoreArgs) -> Option<PathBuf> {
    let over = (args.delta || args.set_aside) && args.target.is_latest() && !args.leave_surviving;
    (over && args.data_dir.join("pg_wal").is_dir()).then(|| args.data_dir.clone())
}

/// Looks at the surviving WAL, and pushes what is not archived when that is asked for.
///
/// # Errors
/// [`Error::Missing`], which names what was found, when it is to be decided what becomes of it; as [`survey`] and
/// [`push`].
pub(super) async fn look(args: &RestoreArgs, source: &Source, plan: &RestorePlan) -> Result<Then> {
    let (folder, is_named) = match (&args.surviving_wal, own_directory(args)) {
        (Some(folder), _) => (folder.clone(), true),
        (None, Some(folder)) => (folder, false),
        (None, None) => return Ok(Then::GoOn { note: None }),
    };
    let found = match survey(&folder, &source.repository, plan).await {
        Ok(found) => found,
        // Nobody asked, and nothing of it is lost: the restore sets it aside.
        Err(error) if !is_named && !args.push_surviving => {
            let note = format!(
                "whether pg_wal in {} holds more than the archive is not known: {error}",
                folder.display()
            );
            return Ok(Then::GoOn { note: Some(note) });
        }
        Err(error) => return Err(error),
    };
    if found.is_empty() || (!is_named && !found.ends_transactions) {
        let note =
            format!("{} holds no WAL of timeline {} that is not stored", folder.display(), plan.timeline);
        return Ok(Then::GoOn { note: is_named.then_some(note) });
    }
    let what = found.describe();
    if args.dry_run {
        let would = if args.push_surviving { "would be pushed" } else { "--push-surviving pushes it" };
        return Ok(Then::GoOn { note: Some(format!("not archived: {what}: {would}")) });
    }
    if !args.push_surviving {
        return Err(Error::missing(format!("the archive lacks WAL that is still there: {what}"))
            .with_safe("nothing was written and nothing pushed; the archive ends without it")
            .with_next(match is_named {
                true => format!(
                    "Push it and restore up to its end: the same command with --push-surviving (--surviving-wal {}). Or \
                     restore without it: leave --surviving-wal out.",
                    shell_word(&folder.to_string_lossy())
                ),
                false => "Push it and restore up to its end: the same command with --push-surviving. Or restore without \
                          it: --leave-surviving."
                    .to_owned(),
            }));
    }
    let config = Config::load(&args.source.overrides)?;
    let spool_dir = match &config.state_dir {
        Some(folder) => own_folder(Some(folder))?,
        None => std::env::temp_dir(),
    };
    let lineage = Some(source.repository.lineage().number);
    let options = PushOptions { compression: config.compression, lineage, spool_dir };
    push(&found, &source.repository, plan, &options).await?;
    Ok(Then::PlanAgain { note: format!("pushed into every repository: {what}") })
}
