//! What a running server says about itself, and what of it archiving needs.

use std::path::Path;

use serde::Serialize;
use walship::config::Config;
use walship::error::{Error, Result};
use walship::pg::SegmentSize;
use walship::pg::control::ControlData;
use walship::replication::connection::{Connection, SessionKind};
use walship::replication::options::ConnectOptions;

/// Who the server is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Identity {
    #[serde(serialize_with = "decimal")]
    pub(crate) system_identifier: u64,
    pub(crate) segment_size: SegmentSize,
    pub(crate) postgres_major: u32,
}

fn decimal<S: serde::Serializer>(value: &u64, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// How much a finding about a setting matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Weight {
    /// As it should be.
    Good,
    /// Archiving works, something is worse than it could be.
    Advice,
    /// Archiving does not work, or its WAL is not enough to recover from.
    Needed,
}

/// One setting, as it is and as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Setting {
    pub(crate) name: &'static str,
    pub(crate) value: String,
    /// What to set it to; `None` when it is good or there is no one answer.
    pub(crate) wanted: Option<String>,
    pub(crate) weight: Weight,
    pub(crate) why: &'static str,
    /// Whether a change needs a restart of the server.
    pub(crate) restart: bool,
    /// Whether this call has changed it.
    pub(crate) applied: bool,
}

/// Returns how to reach the configured server.
pub(crate) fn options(config: &Config) -> Result<ConnectOptions> {
    match &config.connection {
        Some(connection) if connection.is_argument => ConnectOptions::from_env_and_uri(&connection.text),
        Some(connection) => ConnectOptions::from_private(&connection.text),
        None => ConnectOptions::from_private(""),
    }
}

/// Connects to the configured server.
pub(crate) async fn connect(config: &Config) -> Result<Connection> {
    Connection::connect(&options(config)?, SessionKind::Ordinary).await
}

/// Returns who the connected server is.
pub(crate) async fn identity(connection: &mut Connection) -> Result<Identity> {
    let sql = "SELECT s.system_identifier, c.bytes_per_wal_segment \
               FROM pg_control_system() s, pg_control_init() c";
    let rows = connection.query(sql).await?;
    let read = || {
        let system_identifier = rows.get(0, 0)?.parse::<i64>().ok()? as u64;
        let segment_size = SegmentSize::new(rows.get(0, 1)?.parse().ok()?)?;
        Some((system_identifier, segment_size))
    };
    let (system_identifier, segment_size) =
        read().ok_or_else(|| Error::mismatch("the server's pg_control_system() makes no sense"))?;
    let postgres_major = connection.server_version()? / 10_000;
    Ok(Identity { system_identifier, segment_size, postgres_major })
}

/// Returns who the server of a data directory is, without a connection.
pub(crate) fn identity_of(data_dir: &Path) -> Result<Identity> {
    let path = data_dir.join("global/pg_control");
    let read = |path: &Path| {
        std::fs::read(path).map_err(|error| Error::from_io(format!("reading {}", path.display()), error))
    };
    let control =
        ControlData::parse(&read(&path)?).map_err(|error| Error::from(error).context(path.display()))?;
    let version = String::from_utf8_lossy(&read(&data_dir.join("PG_VERSION"))?).trim().parse().ok();
    let postgres_major = version.or(control.major()).ok_or_else(|| {
        Error::mismatch(format!(
            "{} does not say a PostgreSQL version",
            data_dir.join("PG_VERSION").display()
        ))
    })?;
    Ok(Identity {
        system_identifier: control.system_identifier,
        segment_size: control.segment_size,
        postgres_major,
    })
}

/// Returns the settings that archiving and recovery depend on, judged. `archive_command` is what to
/// propose for it.
pub(crate) async fn settings(connection: &mut Connection, archive_command: &str) -> Result<Vec<Setting>> {
    let sql = "SELECT name, coalesce(setting, '') FROM pg_settings WHERE name IN ('wal_level', 'archive_mode', \
               'archive_command', 'archive_library', 'archive_timeout', 'full_page_writes', 'fsync', \
               'max_wal_senders', 'data_checksums')";
    let rows = connection.query(sql).await?;
    let value = |name: &str| {
        let row = rows.rows.iter().find(|row| row.first().and_then(Option::as_deref) == Some(name))?;
        Some(row.get(1)?.clone().unwrap_or_default())
    };
    Ok(judge(&value, archive_command))
}

/// Judges settings as the server says them; a setting that this version does not have is left out.
fn judge(value: &dyn Fn(&str) -> Option<String>, archive_command: &str) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut add = |name, good: &dyn Fn(&str) -> bool, wanted: Option<&str>, bad, why, restart| {
        let Some(value) = value(name) else { return };
        let good = good(&value);
        settings.push(Setting {
            name,
            value,
            wanted: if good { None } else { wanted.map(str::to_owned) },
            weight: if good { Weight::Good } else { bad },
            why,
            restart,
            applied: false,
        });
    };
    let is = |expected: &'static str| move |value: &str| value == expected;
    add(
        "wal_level",
        &|value| value != "minimal",
        Some("replica"),
        Weight::Needed,
        "with minimal, WAL is not enough to recover from",
        true,
    );
    add(
        "archive_mode",
        &|value| value != "off",
        Some("on"),
        Weight::Needed,
        "without it PostgreSQL archives nothing",
        true,
    );
    let is_ours = |value: &str| value.contains("archive-cmd") || value.contains("walship wal push");
    add(
        "archive_command",
        &is_ours,
        Some(archive_command),
        Weight::Needed,
        "it does not call archive-cmd",
        false,
    );
    add(
        "archive_library",
        &str::is_empty,
        Some(""),
        Weight::Needed,
        "while it is set, PostgreSQL does not run archive_command",
        false,
    );
    add(
        "full_page_writes",
        &is("on"),
        Some("on"),
        Weight::Needed,
        "without it a base backup may hold torn pages that replay cannot mend",
        false,
    );
    add("fsync", &is("on"), Some("on"), Weight::Needed, "without it a crash loses what was committed", false);
    let enough = |value: &str| value.parse::<u32>().is_ok_and(|senders| senders >= 2);
    add(
        "max_wal_senders",
        &enough,
        Some("10"),
        Weight::Needed,
        "a base backup needs a replication connection, a standby another",
        true,
    );
    add(
        "archive_timeout",
        &|value| value != "0",
        Some("60"),
        Weight::Advice,
        "on a quiet server the last commits wait in an open segment until it is full",
        false,
    );
    add(
        "data_checksums",
        &is("on"),
        None,
        Weight::Advice,
        "without checksums a backup cannot tell damaged pages (pg_checksums --enable, server stopped)",
        true,
    );
    settings
}

/// Changes the settings that are needed or advised and have one answer.
pub(crate) async fn apply(connection: &mut Connection, settings: &mut [Setting]) -> Result<()> {
    for setting in settings.iter_mut() {
        let Some(wanted) = &setting.wanted else { continue };
        let value = wanted.replace('\'', "''");
        // A session of another setting of standard_conforming_strings would read backslashes otherwise.
        let quoted = if value.contains('\\') {
            format!("E'{}'", value.replace('\\', "\\\\"))
        } else {
            format!("'{value}'")
        };
        connection.query(&format!("ALTER SYSTEM SET {} = {quoted}", setting.name)).await?;
        setting.applied = true;
    }
    if settings.iter().any(|setting| setting.applied) {
        connection.query("SELECT pg_reload_conf()").await?;
    }
    Ok(())
}

/// Renders settings for people.
pub(crate) fn settings_text(settings: &[Setting]) -> String {
    let mut text = String::new();
    for setting in settings {
        let Setting { name, value, why, .. } = setting;
        let change = match (&setting.wanted, setting.applied) {
            (_, true) if setting.restart => " - set; takes effect at the next restart",
            (_, true) => " - set",
            (_, false) if setting.restart => " (needs a restart)",
            (_, false) => "",
        };
        match (setting.weight, &setting.wanted) {
            (Weight::Good, _) => {}
            (weight, Some(wanted)) => {
                let word = if weight == Weight::Needed { "needed" } else { "advice" };
                text += &format!("  {word}: {name} = '{wanted}'{change}\n          is '{value}': {why}\n");
            }
            (weight, None) => {
                let word = if weight == Weight::Needed { "needed" } else { "advice" };
                text += &format!("  {word}: {name} is '{value}': {why}\n");
            }
        }
    }
    if text.is_empty() { "  all as they should be\n".to_owned() } else { text }
}

/// Returns the `archive_command` to propose: with what of the configuration the server's own
/// environment does not say.
pub(crate) fn proposed_archive_command(overrides: &walship::config::Overrides) -> String {
    let program = std::env::current_exe()
        .ok()
        .map(|own| own.with_file_name("archive-cmd"))
        .filter(|path| path.is_file())
        .map_or_else(|| "archive-cmd".to_owned(), |path| shell_word(&path.display().to_string()));
    let mut command = program;
    let config = overrides.config.clone().or_else(|| std::env::var_os("WALSHIP_CONFIG").map(Into::into));
    if let Some(config) = config.and_then(|path: std::path::PathBuf| std::path::absolute(path).ok()) {
        command += &format!(" --config {}", shell_word(&config.display().to_string()));
    }
    for url in &overrides.repo {
        command += &format!(" --repo {}", shell_word(url));
    }
    if let Some(cluster) = &overrides.cluster {
        command += &format!(" --cluster {}", shell_word(cluster));
    }
    command + " %p"
}

/// Quotes a word for the shell where it needs it, and `%` for PostgreSQL.
fn shell_word(word: &str) -> String {
    let plain =
        !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-:=@,+".contains(&b));
    let word = word.replace('%', "%%");
    if plain { word } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_server_lacks_what_it_lacks() {
        let fresh = |name: &str| {
            let value = match name {
                "wal_level" => "replica",
                "archive_mode" => "off",
                "archive_command" => "(disabled)",
                "archive_library" => return None,
                "archive_timeout" => "0",
                "max_wal_senders" => "10",
                "data_checksums" => "off",
                _ => "on",
            };
            Some(value.to_owned())
        };
        let settings = judge(&fresh, "archive-cmd %p");
        assert_eq!(
            settings_text(&settings),
            "  needed: archive_mode = 'on' (needs a restart)\n          \
             is 'off': without it PostgreSQL archives nothing\n  \
             needed: archive_command = 'archive-cmd %p'\n          \
             is '(disabled)': it does not call archive-cmd\n  \
             advice: archive_timeout = '60'\n          \
             is '0': on a quiet server the last commits wait in an open segment until it is full\n  \
             advice: data_checksums is 'off': without checksums a backup cannot tell damaged pages \
             (pg_checksums --enable, server stopped)\n"
        );
    }

    #[test]
    fn words_are_quoted_for_shell_and_server() {
        assert_eq!(shell_word("/usr/bin/x"), "/usr/bin/x");
        assert_eq!(shell_word("a b'c%"), r"'a b'\''c%%'");
        assert_eq!(shell_word(""), "''");
    }
}
