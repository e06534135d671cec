//! What a restored server is to be, and which words for that go together.

use walship::replication::{check_slot_name, options};
use walship::{Error, Result};

use super::args::RestoreArgs;
use crate::recovery_settings::{Recovery, RestoreAs, Standby, TargetAction};

/// Returns what the restored server is to be, and how it recovers.
///
/// # Errors
/// [`Error::Invalid`] for words that do not go together, or that PostgreSQL would not act on.
pub(super) fn of(args: &RestoreArgs) -> Result<(RestoreAs, Recovery)> {
    let asked = args.restore_as.map(RestoreAs::from);
    let action = args.target_action.map(TargetAction::from);
    if !args.standby {
        let restore_as = asked.unwrap_or(RestoreAs::Copy);
        let action = action_at_target(restore_as, args.target.is_latest(), action)?;
        return Ok((restore_as, Recovery::ToTarget(action)));
    }
    let standby = standby(args, action)?;
    // A standby is there to take its primary's place. It archives nothing before; were archiving off from
    // that moment on, what it writes would be in no archive, and only a restart could change that.
    Ok((asked.unwrap_or(RestoreAs::Production), Recovery::Standby(standby)))
}

/// Returns what PostgreSQL does at the target.
///
/// # Errors
/// [`Error::Invalid`] for what it would not do: without a recovery target it ends recovery at the end of
/// the WAL and opens, whatever `recovery_target_action` says.
fn action_at_target(
    restore_as: RestoreAs,
    latest: bool,
    asked: Option<TargetAction>,
) -> Result<TargetAction> {
    match (asked, restore_as) {
        (Some(TargetAction::Promote), _) | (None, RestoreAs::Copy) => Ok(TargetAction::Promote),
        (None, RestoreAs::Production) if latest => Ok(TargetAction::Promote),
        (None, RestoreAs::Production) => Ok(TargetAction::Pause),
        (Some(action), _) if latest => Err(refused(
            format!(
                "--target-action {} does not go with --latest: without a target PostgreSQL opens for writing at \
                 the end of the WAL",
                action.word()
            ),
            "Leave it out, or give the last transaction as a target: `pitr plan --latest` names it.",
        )),
        (Some(action), _) => Ok(action),
    }
}

fn standby(args: &RestoreArgs, action: Option<TargetAction>) -> Result<Standby> {
    if !args.target.is_latest() {
        return Err(refused(
            "--standby goes with --latest and no other target: a standby replays all there is, and never stops by itself",
            "Give --latest; or leave --standby out, and the server stops at the target.",
        ));
    }
    if args.target.names_timeline() {
        return Err(refused(
            "--standby does not go with the number of a timeline: a standby follows the newest one, through each failover",
            "Leave --timeline out; or leave --standby out, and the server recovers along that timeline.",
        ));
    }
    if let Some(action) = action {
        return Err(refused(
            format!("--target-action {} does not go with --standby: it has no target", action.word()),
            "Leave it out; a standby is ended with pg_ctl promote.",
        ));
    }
    if let Some(conninfo) = &args.primary_conninfo {
        let settings = options::argument_settings(conninfo).map_err(|error| {
            error.context("--primary-conninfo").with_next(
                "Give a connection string without a password; that goes into the .pgpass (mode 0600) of the user that \
                 PostgreSQL runs as, or into a file that passfile=FILE names.",
            )
        })?;
        // To PostgreSQL an empty text means that there is no primary.
        if settings.is_empty() {
            return Err(refused(
                "--primary-conninfo names no server",
                "Name it, as in --primary-conninfo 'host=db1 user=replicator', or leave the option out.",
            ));
        }
    }
    if let Some(slot) = &args.primary_slot {
        check_slot_name(slot)?;
    }
    Ok(Standby { primary_conninfo: args.primary_conninfo.clone(), primary_slot: args.primary_slot.clone() })
}

fn refused(what: impl Into<String>, next: &str) -> Error {
    Error::invalid(what).with_safe("nothing was written").with_next(next)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::args::{Args, Command};

    fn role(words: &str) -> Result<(RestoreAs, Recovery)> {
        let words: Vec<String> =
            format!("pitr restore -D /x {words}").split(' ').map(|word| word.replace('+', " ")).collect();
        match Args::try_parse_from(words).unwrap().command {
            Command::Restore(args) => of(&args),
            _ => unreachable!("the words begin with restore"),
        }
    }

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
            let action = action_at_target(restore_as, latest, asked).ok();
            assert_eq!(action, expected, "{restore_as:?} {latest} {asked:?}");
        }
    }

    #[test]
    fn a_standby_is_to_archive_once_it_takes_over() {
        let standby = |conninfo: Option<&str>, slot: Option<&str>| {
            Recovery::Standby(Standby {
                primary_conninfo: conninfo.map(str::to_owned),
                primary_slot: slot.map(str::to_owned),
            })
        };
        for (words, expected) in [
            ("--latest --standby", (RestoreAs::Production, standby(None, None))),
            ("--latest --standby --as copy --timeline latest", (RestoreAs::Copy, standby(None, None))),
            (
                "--latest --standby --primary-conninfo host=a+user=b --primary-slot s1",
                (RestoreAs::Production, standby(Some("host=a user=b"), Some("s1"))),
            ),
            ("--latest", (RestoreAs::Copy, Recovery::ToTarget(TargetAction::Promote))),
        ] {
            assert_eq!(role(words).unwrap(), expected, "{words}");
        }
    }

    #[test]
    fn what_no_standby_would_do_is_refused() {
        for words in [
            "--standby",
            "--standby --immediate",
            "--standby --to-xid 731",
            "--standby --before drop:t",
            "--standby --latest --timeline 2",
            "--standby --latest --target-action promote",
            "--standby --latest --primary-conninfo host=a+password=hunter2",
            "--standby --latest --primary-conninfo postgresql://u:hunter2@a/",
            "--standby --latest --primary-conninfo=",
            "--standby --latest --primary-conninfo host=a --primary-slot Upper",
        ] {
            let report = match role(words) {
                Err(error @ Error::Invalid(_)) => error.report(),
                other => panic!("{words}: {other:?}"),
            };
            assert!(!report.contains("hunter2"), "{report}");
        }
    }
}
