//! What a restored data directory tells PostgreSQL: recovery settings and the signal file. Pure.
//!
//! Only `postgresql.auto.conf` is written: it is read last, so it overrules whatever the backup's own
//! configuration says, and the operator's files stay as they were. Lines there that stand in the way
//! are kept as comments. Order matters: an empty `recovery_target_*` un-sets the target whichever it
//! was, so all empty ones come before the one that counts.
//! Source: `src/backend/access/transam/xlogrecovery.c`, assign_recovery_target and its siblings.

use serde::Serialize;
use walship::wal::event::ServerLimits;

use crate::inherited::Inherited;
use crate::plan::RestorePlan;
use crate::target::{StopSide, TargetKind, shell_word};

/// The file that makes PostgreSQL recover from the archive once; `standby.signal` must not be there.
const RECOVERY_SIGNAL: &str = "recovery.signal";

/// The file that makes PostgreSQL a standby.
const STANDBY_SIGNAL: &str = "standby.signal";

/// Every signal file: one that a backup brings along must not decide.
pub const SIGNAL_FILES: [&str; 2] = [RECOVERY_SIGNAL, STANDBY_SIGNAL];

/// What the restored server is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RestoreAs {
    /// A copy beside the original: it archives nothing, subscribes to nothing.
    Copy,
    /// The original's successor: archiving stays as it was.
    Production,
}

/// What PostgreSQL does once the target is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetAction {
    /// Stay read-only until `pg_wal_replay_resume()`.
    Pause,
    /// Begin a new timeline and accept writes.
    Promote,
    /// Stop.
    Shutdown,
}

impl TargetAction {
    /// Returns the value of `recovery_target_action`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Promote => "promote",
            Self::Shutdown => "shutdown",
        }
    }
}

/// How the restored server recovers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// Up to the plan's stop, on the plan's timeline; then it does this.
    ToTarget(TargetAction),
    /// Without end, until it is promoted: from the archive, and from a primary where one is named.
    Standby(Standby),
}

impl Recovery {
    /// Returns the name of the file that tells PostgreSQL so.
    pub fn signal_file(&self) -> &'static str {
        match self {
            Self::ToTarget(_) => RECOVERY_SIGNAL,
            Self::Standby(_) => STANDBY_SIGNAL,
        }
    }
}

/// What a standby follows beside the archive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standby {
    /// The value of `primary_conninfo`; `None` follows the archive alone.
    pub primary_conninfo: Option<String>,
    /// The value of `primary_slot_name`.
    pub primary_slot: Option<String>,
}

/// Everything about the settings that the plan does not decide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingsOptions {
    /// What the restored server is to be.
    pub restore_as: RestoreAs,
    /// How it recovers.
    pub recovery: Recovery,
    /// The whole value of `restore_command`; see [`restore_command`].
    pub restore_command: String,
}

/// Returns a `restore_command` that runs `program` with `arguments`, then `%f %p`.
///
/// Each word is quoted for the shell where it must be, and a `%` of its own is doubled, because
/// PostgreSQL replaces `%f`, `%p`, `%r` and `%%` anywhere in the text.
pub fn restore_command(program: &str, arguments: &[String]) -> String {
    let mut words = vec![shell_word(program)];
    words.extend(arguments.iter().map(|argument| shell_word(argument)));
    let command: Vec<String> = words.into_iter().map(|word| word.replace('%', "%%")).collect();
    format!("{} %f %p", command.join(" "))
}

/// Returns the new content of `postgresql.auto.conf`, given the configuration in the backup.
pub fn auto_conf(plan: &RestorePlan, options: &SettingsOptions, inherited: &Inherited) -> Vec<u8> {
    let existing = &*inherited.auto_conf;
    let settings = settings(plan, options, inherited);
    let mut text = Vec::with_capacity(existing.len() + 2048);
    for line in existing.split_inclusive(|byte| *byte == b'\n') {
        let overruled = setting_name(line).is_some_and(|name| settings.iter().any(|(own, _)| *own == name));
        if overruled {
            text.extend_from_slice(b"# before the restore: ");
        }
        text.extend_from_slice(line);
    }
    if !text.is_empty() && !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    let target = match &options.recovery {
        Recovery::ToTarget(_) => comment(&plan.target_options),
        Recovery::Standby(_) => "--latest --standby".to_owned(),
    };
    text.extend_from_slice(format!("# written by pitr restore: {target}\n").as_bytes());
    for (name, value) in &settings {
        text.extend_from_slice(format!("{name} = {}\n", quoted(value)).as_bytes());
    }
    text
}

/// Returns the settings in the order in which they must be written.
pub fn settings(
    plan: &RestorePlan,
    options: &SettingsOptions,
    inherited: &Inherited,
) -> Vec<(&'static str, String)> {
    let (chosen, value) = match &plan.target.kind {
        TargetKind::Time { time, .. } => {
            ("recovery_target_time", time.format("%Y-%m-%d %H:%M:%S%.6f+00").to_string())
        }
        TargetKind::Lsn(lsn) => ("recovery_target_lsn", lsn.to_string()),
        TargetKind::Xid(xid) => ("recovery_target_xid", xid.to_string()),
        TargetKind::Name(name) => ("recovery_target_name", name.clone()),
        TargetKind::Immediate => ("recovery_target", "immediate".to_owned()),
        TargetKind::Latest => ("", String::new()),
    };
    let mut settings: Vec<(&'static str, String)> = Vec::new();
    for name in [
        "recovery_target",
        "recovery_target_name",
        "recovery_target_time",
        "recovery_target_xid",
        "recovery_target_lsn",
    ] {
        if name != chosen {
            settings.push((name, String::new()));
        }
    }
    if !chosen.is_empty() {
        settings.push((chosen, value));
    }
    let inclusive = if plan.target.stop == StopSide::Inclusive { "on" } else { "off" };
    settings.push(("recovery_target_inclusive", inclusive.to_owned()));
    let (timeline, action, standby) = match &options.recovery {
        Recovery::ToTarget(action) => (plan.timeline.to_string(), *action, Standby::default()),
        // A number would hold it on a timeline that its primary leaves with the next failover. The action never
        // counts without a target: PostgreSQL's default stands in for whatever was inherited.
        Recovery::Standby(standby) => ("latest".to_owned(), TargetAction::Pause, standby.clone()),
    };
    settings.push(("recovery_target_timeline", timeline));
    settings.push(("recovery_target_action", action.word().to_owned()));
    if action == TargetAction::Pause {
        // Without it PostgreSQL cannot be asked anything while paused, and shuts down instead; and nobody could
        // read from a standby.
        settings.push(("hot_standby", "on".to_owned()));
    }
    settings.push(("restore_command", options.restore_command.clone()));
    let hurdle_behind = plan.gap_behind.is_some() || plan.damaged_behind.is_some();
    if hurdle_behind && plan.backup.server_version >= 150_000 {
        // Reading ahead would ask for that segment, and that stops recovery short of the target.
        settings.push(("recovery_prefetch", "off".to_owned()));
    }
    settings.push(("recovery_min_apply_delay", "0".to_owned()));
    for (name, value) in [
        ("archive_cleanup_command", None),
        ("recovery_end_command", None),
        ("primary_conninfo", standby.primary_conninfo),
        ("primary_slot_name", standby.primary_slot),
        ("synchronous_standby_names", None),
    ] {
        settings.push((name, value.unwrap_or_default()));
    }
    if plan.backup.server_version < 160_000 {
        // A file that lies there already would end recovery before the target.
        settings.push(("promote_trigger_file", String::new()));
    }
    if plan.backup.server_version >= 170_000 {
        settings.push(("synchronized_standby_slots", String::new()));
    }
    if options.restore_as == RestoreAs::Copy {
        settings.push(("archive_mode", "off".to_owned()));
        if plan.backup.server_version >= 150_000 {
            settings.push(("archive_library", String::new()));
        }
        settings.push(("max_logical_replication_workers", "0".to_owned()));
    }
    settings.extend(overruled(plan, options, inherited));
    settings.extend(limits(plan.limits, &inherited.auto_conf));
    settings
}

/// Returns what is overruled so that a copy does not write where the original server writes.
pub fn overruled(
    plan: &RestorePlan,
    options: &SettingsOptions,
    inherited: &Inherited,
) -> Vec<(&'static str, String)> {
    match options.restore_as {
        RestoreAs::Copy => inherited.overruled(plan.backup.server_version),
        RestoreAs::Production => Vec::new(),
    }
}

/// Returns the five settings that recovery refuses to run below, none lower than it is now.
fn limits(seen: ServerLimits, existing: &[u8]) -> [(&'static str, String); 5] {
    [
        ("max_connections", seen.max_connections),
        ("max_worker_processes", seen.max_worker_processes),
        ("max_wal_senders", seen.max_wal_senders),
        ("max_prepared_transactions", seen.max_prepared_transactions),
        ("max_locks_per_transaction", seen.max_locks_per_transaction),
    ]
    .map(|(name, seen)| {
        let now = existing
            .split(|byte| *byte == b'\n')
            .filter(|line| setting_name(line).as_deref() == Some(name))
            .filter_map(number_of)
            .max();
        (name, seen.max(now.unwrap_or(0)).to_string())
    })
}

/// Returns the name that a configuration line sets, in lower case.
fn setting_name(line: &[u8]) -> Option<String> {
    let line = line.trim_ascii_start();
    let length = line.iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'_' || **b == b'.').count();
    let name = std::str::from_utf8(&line[..length]).ok()?;
    (!name.is_empty()).then(|| name.to_ascii_lowercase())
}

/// Returns the whole number that a configuration line sets its name to.
fn number_of(line: &[u8]) -> Option<i32> {
    let text = std::str::from_utf8(line).ok()?;
    let (_, value) = text.split_once(|c: char| c == '=' || c.is_whitespace())?;
    let value = value.trim_start_matches(|c: char| c == '=' || c.is_whitespace()).trim_start_matches('\'');
    let digits = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
    value[..digits].parse().ok()
}

/// Returns a value as PostgreSQL's configuration files quote it.
fn quoted(value: &str) -> String {
    let mut text = String::with_capacity(value.len() + 2);
    text.push('\'');
    for c in value.chars() {
        match c {
            '\'' => text.push_str("''"),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            c => text.push(c),
        }
    }
    text.push('\'');
    text
}

fn comment(text: &str) -> String {
    text.replace(|c: char| c.is_control(), " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::plain_plan;
    use crate::target::RecoveryTarget;

    fn options(restore_as: RestoreAs) -> SettingsOptions {
        SettingsOptions {
            restore_as,
            recovery: Recovery::ToTarget(TargetAction::Promote),
            restore_command: restore_command(
                "/usr/bin/restore-cmd",
                &["--config".into(), "/etc/walship/walship.toml".into()],
            ),
        }
    }

    fn inherited(auto_conf: &str) -> Inherited {
        Inherited { auto_conf: auto_conf.as_bytes().to_vec(), ..Inherited::default() }
    }

    fn render(target: &RecoveryTarget, options: &SettingsOptions, existing: &str) -> String {
        let text = auto_conf(&plain_plan(target), options, &inherited(existing));
        String::from_utf8(text).unwrap()
    }

    fn xid_target() -> RecoveryTarget {
        RecoveryTarget { stop: StopSide::Exclusive, ..RecoveryTarget::new(TargetKind::Xid(1020)) }
    }

    #[test]
    fn a_copy_overrules_what_it_inherits() {
        let existing = "# Do not edit this file manually!\n\
                        primary_conninfo = 'host=old'\n\
                        Recovery_Target_Time = '2020-01-01'\n\
                        work_mem = '64MB'\n\
                        max_connections = '500'";
        insta::assert_snapshot!(render(&xid_target(), &options(RestoreAs::Copy), existing));
    }

    #[test]
    fn production_keeps_archiving() {
        let text = render(&xid_target(), &options(RestoreAs::Production), "archive_mode = 'on'\n");
        assert!(text.starts_with("archive_mode = 'on'\n"), "{text}");
        assert!(!text.contains("archive_library") && !text.contains("logical"), "{text}");
    }

    #[test]
    fn a_standby_follows_the_newest_timeline_and_what_it_is_told() {
        let mut options = options(RestoreAs::Production);
        options.recovery = Recovery::Standby(Standby {
            primary_conninfo: Some("host=db1 user='it''s'".into()),
            primary_slot: Some("standby1".into()),
        });
        let existing = "hot_standby = 'off'\nprimary_conninfo = 'host=old'\narchive_mode = 'on'\n";
        insta::assert_snapshot!(render(&RecoveryTarget::new(TargetKind::Latest), &options, existing));
        options.recovery = Recovery::Standby(Standby::default());
        let alone = render(&RecoveryTarget::new(TargetKind::Latest), &options, existing);
        for line in ["primary_conninfo = ''", "primary_slot_name = ''", "recovery_target_timeline = 'latest'"]
        {
            assert!(alone.lines().any(|found| found == line), "{alone}");
        }
    }

    #[test]
    fn the_target_is_set_once_and_after_all_empty_ones() {
        for target in [
            xid_target(),
            RecoveryTarget::new(TargetKind::Immediate),
            RecoveryTarget::new(TargetKind::Latest),
        ] {
            let plan = plain_plan(&target);
            let settings = settings(&plan, &options(RestoreAs::Copy), &Inherited::default());
            let kinds: Vec<_> = settings
                .iter()
                .filter(|(name, _)| {
                    let side = ["_inclusive", "_timeline", "_action"];
                    name.starts_with("recovery_target") && !side.iter().any(|end| name.ends_with(end))
                })
                .collect();
            assert_eq!(kinds.len(), 5);
            let set = kinds.iter().position(|(_, value)| !value.is_empty());
            let wanted = (target.kind != TargetKind::Latest).then_some(4);
            assert_eq!(set, wanted, "{target:?}");
        }
    }

    #[test]
    fn only_a_copy_is_kept_from_the_originals_files() {
        let existing = "external_pid_file = '/run/postgresql/main.pid'\n";
        let copy = render(&xid_target(), &options(RestoreAs::Copy), existing);
        assert!(copy.starts_with("# before the restore: external_pid_file"), "{copy}");
        assert!(copy.contains("\nexternal_pid_file = 'postmaster.external.pid'\n"), "{copy}");
        let production = render(&xid_target(), &options(RestoreAs::Production), existing);
        assert_eq!(production.matches("external_pid_file").count(), 1, "{production}");
    }

    #[test]
    fn settings_are_only_named_where_they_exist() {
        for (version, library, trigger, slots) in [
            (140_012, false, true, false),
            (150_010, true, true, false),
            (160_001, true, false, false),
            (170_004, true, false, true),
        ] {
            let mut plan = plain_plan(&xid_target());
            plan.backup.server_version = version;
            let text = String::from_utf8(auto_conf(&plan, &options(RestoreAs::Copy), &Inherited::default()))
                .unwrap();
            assert_eq!(text.contains("archive_library = ''"), library, "{version}");
            assert_eq!(text.contains("promote_trigger_file = ''"), trigger, "{version}");
            assert_eq!(text.contains("synchronized_standby_slots = ''"), slots, "{version}");
        }
    }

    #[test]
    fn quoting_survives_both_the_file_and_the_shell() {
        let command = restore_command(
            "/opt/wal ship/restore-cmd",
            &["--config".into(), "/etc/o'clock 100%.toml".into()],
        );
        assert_eq!(command, r"'/opt/wal ship/restore-cmd' --config '/etc/o'\''clock 100%%.toml' %f %p");
        assert_eq!(quoted(r"a'b\c"), r"'a''b\\c'");
        assert_eq!(quoted("a\nb"), r"'a\nb'");
    }

    #[test]
    fn limits_are_never_lowered() {
        for (line, expected) in [
            ("max_connections = '500'", "500"),
            ("MAX_CONNECTIONS=500", "500"),
            ("max_connections 500 # c", "500"),
            ("max_connections = 20", "100"),
            ("max_connections = 'x'", "100"),
        ] {
            let plan = plain_plan(&xid_target());
            let settings = settings(&plan, &options(RestoreAs::Copy), &inherited(line));
            let value = settings.iter().find(|(name, _)| *name == "max_connections").unwrap();
            assert_eq!(value.1, expected, "{line}");
        }
    }
}
