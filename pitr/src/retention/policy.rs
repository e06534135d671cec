//! What is to stay, as it was configured, checked.

use std::fmt;

use chrono::{DateTime, Datelike as _, Timelike as _, Utc};
use walship::config::{RetentionSettings, Span};
use walship::{Error, Result};

/// A policy that makes sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    settings: RetentionSettings,
}

/// The spans of which the newest full backup stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rotation {
    Hourly,
    Daily,
    Weekly,
    Monthly,
    Yearly,
}

impl Rotation {
    /// What the span is called.
    pub(super) fn noun(self) -> &'static str {
        match self {
            Self::Hourly => "hour",
            Self::Daily => "day",
            Self::Weekly => "week",
            Self::Monthly => "month",
            Self::Yearly => "year",
        }
    }

    /// Returns which span a moment lies in, in UTC: alike for all moments in it, and later ones are larger.
    pub(super) fn span_of(self, time: DateTime<Utc>) -> (i32, u32, u32) {
        match self {
            Self::Hourly => (time.year(), time.ordinal(), time.hour()),
            Self::Daily => (time.year(), time.ordinal(), 0),
            Self::Weekly => (time.iso_week().year(), time.iso_week().week(), 0),
            Self::Monthly => (time.year(), time.month(), 0),
            Self::Yearly => (time.year(), 0, 0),
        }
    }
}

impl Policy {
    /// Returns the policy.
    ///
    /// # Errors
    /// [`Error::Invalid`] for one that keeps nothing, or contradicts itself.
    pub fn of(settings: &RetentionSettings) -> Result<Self> {
        let policy = Self { settings: settings.clone() };
        let refused = |what: String, next: &str| {
            Err(Error::invalid(what).with_safe("nothing was removed").with_next(next))
        };
        if *settings == RetentionSettings::default() {
            return refused(
                "there is no policy: what is to be kept is not configured".to_owned(),
                "Write a table [retention] into the configuration, with window = \"14 days\" for instance; \
                 docs/retention.md has all keys.",
            );
        }
        let counts = policy.rotations().any(|(_, spans)| spans > 0) || policy.keep_last() > 0;
        if settings.window.is_none() && settings.keep_for.is_none() && !counts {
            return refused(
                "the policy keeps nothing: it has no window, and every count is 0".to_owned(),
                "Give [retention] a window, or a count of full backups that is more than 0.",
            );
        }
        if let (Some(window), Some(keep_for)) = (settings.window, settings.keep_for)
            && keep_for.length() < window.length()
        {
            return refused(
                format!(
                    "the policy contradicts itself: full backups go after {keep_for}, and every moment of {window} is to \
                     stay in reach, which needs them"
                ),
                "Make keep_for as long as window, or leave it out: backups in the window stay without it.",
            );
        }
        Ok(policy)
    }

    /// Returns how far back every moment stays in reach.
    pub fn window(&self) -> Option<Span> {
        self.settings.window
    }

    /// Returns from when on every moment stays in reach.
    pub fn window_from(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let span = self.settings.window?.length();
        Some(now.checked_sub_signed(span).unwrap_or(DateTime::<Utc>::MIN_UTC))
    }

    pub(super) fn keep_last(&self) -> usize {
        self.settings.keep_last.unwrap_or(0) as usize
    }

    pub(super) fn keep_for(&self) -> Option<Span> {
        self.settings.keep_for
    }

    /// Returns for how many spans of each length the newest full backup stays.
    pub(super) fn rotations(&self) -> impl Iterator<Item = (Rotation, usize)> {
        let RetentionSettings { keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly, .. } =
            self.settings;
        [
            (Rotation::Hourly, keep_hourly),
            (Rotation::Daily, keep_daily),
            (Rotation::Weekly, keep_weekly),
            (Rotation::Monthly, keep_monthly),
            (Rotation::Yearly, keep_yearly),
        ]
        .into_iter()
        .map(|(rotation, spans)| (rotation, spans.unwrap_or(0) as usize))
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        if let Some(window) = self.settings.window {
            words.push(format!("every moment of the last {window}"));
        }
        if self.keep_last() > 0 {
            words.push(format!("the last {} full backup(s)", self.keep_last()));
        }
        if let Some(keep_for) = self.keep_for() {
            words.push(format!("full backups for {keep_for}"));
        }
        for (rotation, spans) in self.rotations().filter(|(_, spans)| *spans > 0) {
            words.push(format!("one of each {} for {spans}", rotation.noun()));
        }
        f.write_str(&words.join("; "))
    }
}
