//! What retention keeps: the table `[retention]`.

use chrono::TimeDelta;
use serde::Deserialize;

use super::Variables;
use crate::error::{Error, Result};

/// What the file and the environment say about retention; `None` says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionSettings {
    /// How far back every moment stays in reach, `14 days`. `WALSHIP_RETENTION_WINDOW`.
    pub window: Option<Span>,
    /// How many of the newest full backups stay. `WALSHIP_RETENTION_KEEP_LAST`.
    pub keep_last: Option<u32>,
    /// How old full backups become, `90 days`. `WALSHIP_RETENTION_KEEP_FOR`.
    pub keep_for: Option<Span>,
    /// For how many hours the newest full backup of each stays. `WALSHIP_RETENTION_KEEP_HOURLY`.
    pub keep_hourly: Option<u32>,
    /// For how many days. `WALSHIP_RETENTION_KEEP_DAILY`.
    pub keep_daily: Option<u32>,
    /// For how many weeks, which begin on Monday. `WALSHIP_RETENTION_KEEP_WEEKLY`.
    pub keep_weekly: Option<u32>,
    /// For how many months. `WALSHIP_RETENTION_KEEP_MONTHLY`.
    pub keep_monthly: Option<u32>,
    /// For how many years. `WALSHIP_RETENTION_KEEP_YEARLY`.
    pub keep_yearly: Option<u32>,
}

impl RetentionSettings {
    /// Returns the settings with what the environment says in the place of what the file says.
    pub(super) fn with_environment(self, environment: &Variables<'_>) -> Result<Self> {
        let span = |name| environment.text(name)?.map(|text| text.parse()).transpose();
        let count = |name| {
            let number = environment.number(name)?;
            let fits = |number: u64| {
                u32::try_from(number)
                    .map_err(|_| Error::invalid(format!("{name} is {number}: that is too much")))
            };
            number.map(fits).transpose()
        };
        Ok(Self {
            window: span("WALSHIP_RETENTION_WINDOW")?.or(self.window),
            keep_last: count("WALSHIP_RETENTION_KEEP_LAST")?.or(self.keep_last),
            keep_for: span("WALSHIP_RETENTION_KEEP_FOR")?.or(self.keep_for),
            keep_hourly: count("WALSHIP_RETENTION_KEEP_HOURLY")?.or(self.keep_hourly),
            keep_daily: count("WALSHIP_RETENTION_KEEP_DAILY")?.or(self.keep_daily),
            keep_weekly: count("WALSHIP_RETENTION_KEEP_WEEKLY")?.or(self.keep_weekly),
            keep_monthly: count("WALSHIP_RETENTION_KEEP_MONTHLY")?.or(self.keep_monthly),
            keep_yearly: count("WALSHIP_RETENTION_KEEP_YEARLY")?.or(self.keep_yearly),
        })
    }
}

/// A length of time as people write it: `90 minutes`, `36 hours`, `14 days`, `6 weeks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Span {
    count: u32,
    unit: Unit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Unit {
    Minutes,
    Hours,
    Days,
    Weeks,
}

impl Unit {
    const ALL: [(Self, &'static str, i64); 4] = [
        (Self::Minutes, "minute", 60),
        (Self::Hours, "hour", 3600),
        (Self::Days, "day", 86_400),
        (Self::Weeks, "week", 604_800),
    ];
}

/// No span is longer: a hundred years.
const SECONDS_MAX: i64 = 100 * 366 * 86_400;

impl Span {
    /// Returns the length.
    pub fn length(self) -> TimeDelta {
        let seconds =
            Unit::ALL.iter().find(|(unit, ..)| *unit == self.unit).map_or(1, |(.., seconds)| *seconds);
        TimeDelta::seconds(i64::from(self.count) * seconds)
    }
}

impl std::str::FromStr for Span {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let trimmed = text.trim();
        let digits = trimmed.len() - trimmed.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (count, word) = trimmed.split_at(digits);
        let word = word.trim_start();
        let unit =
            Unit::ALL.iter().find(|(_, name, _)| word == *name || word.strip_suffix('s') == Some(name));
        let read = unit.and_then(|(unit, _, seconds)| {
            let count: u32 = count.parse().ok().filter(|count| *count > 0)?;
            (i64::from(count) * seconds <= SECONDS_MAX).then_some(Self { count, unit: *unit })
        });
        read.ok_or_else(|| {
            Error::invalid(format!("{text:?} is no length of time"))
                .with_next("Write it like \"14 days\", in minutes, hours, days or weeks, and more than none.")
        })
    }
}

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse().map_err(|error: Error| format!("{error}: write it like \"14 days\""))
    }
}

impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = Unit::ALL.iter().find(|(unit, ..)| *unit == self.unit).map_or("", |(_, name, _)| *name);
        write!(f, "{} {name}{}", self.count, if self.count == 1 { "" } else { "s" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_as_people_write_them() {
        for (text, seconds, shown) in [
            ("14 days", 14 * 86_400, "14 days"),
            ("1 day", 86_400, "1 day"),
            ("36hours", 36 * 3600, "36 hours"),
            (" 2 weeks ", 14 * 86_400, "2 weeks"),
            ("90 minutes", 5400, "90 minutes"),
        ] {
            let span: Span = text.parse().unwrap();
            assert_eq!((span.length().num_seconds(), &*span.to_string()), (seconds, shown), "{text}");
        }
        for text in [
            "",
            "days",
            "14",
            "0 days",
            "-1 days",
            "14 d",
            "14 Days",
            "1.5 days",
            "9999999 weeks",
            "14 days ago",
        ] {
            assert!(text.parse::<Span>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_table_is_read_and_unknown_keys_are_refused() {
        let read = |text: &str| toml::from_str::<RetentionSettings>(text);
        let settings = read("window = '14 days'\nkeep_last = 2\nkeep_monthly = 12").unwrap();
        assert_eq!(settings.window.map(|span| span.length().num_days()), Some(14));
        assert_eq!(
            (settings.keep_last, settings.keep_monthly, settings.keep_daily),
            (Some(2), Some(12), None)
        );
        assert!(read("windows = '14 days'").is_err());
        assert!(read("window = '14'").unwrap_err().to_string().contains("no length of time"));
        assert!(read("keep_last = -1").is_err());
    }
}
