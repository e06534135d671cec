//! When watching calls something overdue or full (`[watch]`), and who hears of it (`[notify]`).

use std::time::Duration;

use serde::Deserialize;

use super::{Variables, parse_duration};
use crate::error::{Error, Result};
use crate::storage::Secret;

/// The limits of `[watch]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WatchSettings {
    /// The newest backup, of either kind, may be so old: `26h`. `WALSHIP_WATCH_BACKUP_OVERDUE`.
    pub backup_overdue: Overdue,
    /// The newest full backup: `off`. `WALSHIP_WATCH_FULL_BACKUP_OVERDUE`.
    pub full_backup_overdue: Overdue,
    /// The last drill that proved something: `35d`. `WALSHIP_WATCH_DRILL_OVERDUE`.
    pub drill_overdue: Overdue,
    /// The last verification: `8d`. `WALSHIP_WATCH_VERIFICATION_OVERDUE`.
    pub verification_overdue: Overdue,
    /// What no verification has read for longest: `90d`. `WALSHIP_WATCH_PROVEN_OVERDUE`.
    pub proven_overdue: Overdue,
    /// The last run of retention, whether it found anything to remove or not: `8d`. `WALSHIP_WATCH_RETENTION_OVERDUE`.
    pub retention_overdue: Overdue,
    /// So many full segments may wait on the server before it is worth a warning: 4; sixteen times as many are critical.
    /// `WALSHIP_WATCH_WAITING_SEGMENTS`.
    pub waiting_segments: u64,
    /// A disk this full is worth a warning, in percent: 80. `WALSHIP_WATCH_DISK_WARNING_PERCENT`.
    pub disk_warning_percent: u64,
    /// A disk this full is critical: 90. `WALSHIP_WATCH_DISK_CRITICAL_PERCENT`.
    pub disk_critical_percent: u64,
}

impl Default for WatchSettings {
    fn default() -> Self {
        let hours = |hours: u64| Overdue(Some(Duration::from_secs(hours * 3600)));
        Self {
            backup_overdue: hours(26),
            full_backup_overdue: Overdue(None),
            drill_overdue: hours(35 * 24),
            verification_overdue: hours(8 * 24),
            proven_overdue: hours(90 * 24),
            retention_overdue: hours(8 * 24),
            waiting_segments: 4,
            disk_warning_percent: 80,
            disk_critical_percent: 90,
        }
    }
}

impl WatchSettings {
    pub(super) fn with_environment(self, environment: &Variables<'_>) -> Result<Self> {
        let overdue = |name: &str, file: Overdue| match environment.text(name)? {
            Some(text) => Overdue::try_from(text).map_err(|error| Error::invalid(format!("{name}: {error}"))),
            None => Ok(file),
        };
        let read = Self {
            backup_overdue: overdue("WALSHIP_WATCH_BACKUP_OVERDUE", self.backup_overdue)?,
            full_backup_overdue: overdue("WALSHIP_WATCH_FULL_BACKUP_OVERDUE", self.full_backup_overdue)?,
            drill_overdue: overdue("WALSHIP_WATCH_DRILL_OVERDUE", self.drill_overdue)?,
            verification_overdue: overdue("WALSHIP_WATCH_VERIFICATION_OVERDUE", self.verification_overdue)?,
            proven_overdue: overdue("WALSHIP_WATCH_PROVEN_OVERDUE", self.proven_overdue)?,
            retention_overdue: overdue("WALSHIP_WATCH_RETENTION_OVERDUE", self.retention_overdue)?,
            waiting_segments: environment
                .number("WALSHIP_WATCH_WAITING_SEGMENTS")?
                .unwrap_or(self.waiting_segments),
            disk_warning_percent: environment
                .number("WALSHIP_WATCH_DISK_WARNING_PERCENT")?
                .unwrap_or(self.disk_warning_percent),
            disk_critical_percent: environment
                .number("WALSHIP_WATCH_DISK_CRITICAL_PERCENT")?
                .unwrap_or(self.disk_critical_percent),
        };
        if read.waiting_segments == 0 {
            return Err(Error::invalid("watch.waiting_segments is 0; it is at least 1"));
        }
        let (warning, critical) = (read.disk_warning_percent, read.disk_critical_percent);
        if !(1..=100).contains(&warning) || !(warning..=100).contains(&critical) {
            return Err(Error::invalid(format!(
                "watch.disk_warning_percent is {warning} and watch.disk_critical_percent {critical}; they are from 1 to \
                 100, the second not below the first"
            )));
        }
        Ok(read)
    }
}

/// How old something may become; `None` where that is nobody's trouble. Written `26h`, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Overdue(pub Option<Duration>);

impl TryFrom<String> for Overdue {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        match text.trim() {
            "off" => Ok(Self(None)),
            text => parse_duration(text)
                .map(|length| Self(Some(length)))
                .map_err(|error| format!("{error}: write it like 26h or 35d, or \"off\"")),
        }
    }
}

/// Who hears of what is wrong, and when. Read by `walship serve`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NotifySettings {
    /// The address that each notice is sent to, with a POST of JSON. `WALSHIP_NOTIFY_WEBHOOK`.
    pub webhook: Option<Secret>,
    /// What is sent: `json`, or `text`, which chats understand. `WALSHIP_NOTIFY_WEBHOOK_FORM`.
    pub webhook_form: WebhookForm,
    /// A command for the shell, with the JSON on its standard input. `WALSHIP_NOTIFY_COMMAND`.
    pub command: Option<String>,
    /// What is notified of: from `warning` on, or `critical` alone. `WALSHIP_NOTIFY_LEAST`.
    pub least: NotifyLeast,
    /// How long a condition has to hold, and then to be gone, before it is told: `2m`; `off`: no time.
    /// `WALSHIP_NOTIFY_HOLD`.
    pub hold: Overdue,
    /// After how long what still holds is told again: `4h`. `WALSHIP_NOTIFY_REPEAT`.
    pub repeat: Overdue,
}

impl Default for NotifySettings {
    fn default() -> Self {
        Self {
            webhook: None,
            webhook_form: WebhookForm::default(),
            command: None,
            least: NotifyLeast::default(),
            hold: Overdue(Some(Duration::from_secs(120))),
            repeat: Overdue(Some(Duration::from_secs(4 * 3600))),
        }
    }
}

impl NotifySettings {
    pub(super) fn with_environment(self, environment: &Variables<'_>) -> Result<Self> {
        let overdue = |name: &str, file: Overdue| match environment.text(name)? {
            Some(text) => Overdue::try_from(text).map_err(|error| Error::invalid(format!("{name}: {error}"))),
            None => Ok(file),
        };
        let read = Self {
            webhook: environment.text("WALSHIP_NOTIFY_WEBHOOK")?.map(Secret::new).or(self.webhook),
            webhook_form: match environment.text("WALSHIP_NOTIFY_WEBHOOK_FORM")?.as_deref() {
                None => self.webhook_form,
                Some("json") => WebhookForm::Json,
                Some("text") => WebhookForm::Text,
                Some(other) => {
                    return Err(Error::invalid(format!(
                        "WALSHIP_NOTIFY_WEBHOOK_FORM is {other:?}; there are json and text"
                    )));
                }
            },
            command: environment.text("WALSHIP_NOTIFY_COMMAND")?.or(self.command),
            least: match environment.text("WALSHIP_NOTIFY_LEAST")?.as_deref() {
                None => self.least,
                Some("warning") => NotifyLeast::Warning,
                Some("critical") => NotifyLeast::Critical,
                Some(other) => {
                    return Err(Error::invalid(format!(
                        "WALSHIP_NOTIFY_LEAST is {other:?}; there are warning and critical"
                    )));
                }
            },
            hold: overdue("WALSHIP_NOTIFY_HOLD", self.hold)?,
            repeat: overdue("WALSHIP_NOTIFY_REPEAT", self.repeat)?,
        };
        Ok(read)
    }

    /// Returns whether anybody is to be told.
    pub fn is_on(&self) -> bool {
        self.webhook.is_some() || self.command.is_some()
    }
}

/// The form of what a webhook is sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WebhookForm {
    /// Every fact by its name.
    #[default]
    Json,
    /// `{"text": "..."}`.
    Text,
}

/// From which weight on something is notified of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NotifyLeast {
    /// Warnings too.
    #[default]
    Warning,
    /// What is critical alone.
    Critical,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_and_nonsense_is_refused() {
        let read = |text: &str| toml::from_str::<WatchSettings>(text);
        let settings = read("backup_overdue = '50h'\ndrill_overdue = 'off'").unwrap();
        assert_eq!(settings.backup_overdue, Overdue(Some(Duration::from_secs(50 * 3600))));
        assert_eq!(settings.drill_overdue, Overdue(None));
        assert_eq!(settings.disk_critical_percent, 90);
        for text in ["backup_overdu = '1h'", "backup_overdue = 'never'", "backup_overdue = 5"] {
            assert!(read(text).is_err(), "{text}");
        }
        let none = |_: &str| None;
        for (warning, critical) in [(0, 90), (80, 101), (95, 90)] {
            let settings = WatchSettings {
                disk_warning_percent: warning,
                disk_critical_percent: critical,
                ..WatchSettings::default()
            };
            assert!(settings.with_environment(&Variables(&none)).is_err(), "{warning} {critical}");
        }
    }

    #[test]
    fn the_environment_beats_the_file_and_no_secret_is_shown() {
        let file: NotifySettings =
            toml::from_str("webhook = 'https://h/hush'\nwebhook_form = 'text'").unwrap();
        assert!(!format!("{file:?}").contains("hush"));
        let variables = |name: &str| match name {
            "WALSHIP_NOTIFY_WEBHOOK_FORM" => Some("json".into()),
            "WALSHIP_NOTIFY_HOLD" => Some("off".into()),
            _ => None,
        };
        let read = file.with_environment(&Variables(&variables)).unwrap();
        assert_eq!((read.webhook_form, read.hold), (WebhookForm::Json, Overdue(None)));
        assert!(read.is_on() && !NotifySettings::default().is_on());
    }
}
