//! What recovery is to achieve: `rto` and `rpo`.

use std::time::Duration;

use super::Variables;
use crate::error::{Error, Result};

/// The longest objective.
const DAYS_MAX: u64 = 3650;

/// The objectives of recovery; `None` where there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Objectives {
    /// How long a restore may take until the server is open (`rto`). `WALSHIP_RTO`.
    pub recovery_time: Option<Duration>,
    /// How old the newest commit may be that can be reached (`rpo`). `WALSHIP_RPO`.
    pub recovery_point: Option<Duration>,
}

impl Objectives {
    pub(super) fn read(
        environment: &Variables<'_>,
        rto: Option<String>,
        rpo: Option<String>,
    ) -> Result<Self> {
        let objective = |variable: &str, key: &str, file: Option<String>| {
            let text = environment.text(variable)?.or(file);
            text.map(|text| parse_duration(&text).map_err(|error| error.context(key))).transpose()
        };
        Ok(Self {
            recovery_time: objective("WALSHIP_RTO", "rto", rto)?,
            recovery_point: objective("WALSHIP_RPO", "rpo", rpo)?,
        })
    }
}

/// Returns the time that `90s`, `15m`, `2h`, `1d` or several of these (`1h 30m`) make.
///
/// # Errors
/// [`Error::Invalid`] for anything else, for none at all, and for more than ten years.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let bad = || {
        Error::invalid(format!("{text:?} is no length of time"))
            .with_next("Write a number with its unit, s, m, h or d: 90s, 15m, 1h 30m.")
    };
    let mut rest = text.trim();
    let mut seconds = 0u64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
        let unit = rest[digits..].chars().next().ok_or_else(bad)?;
        let scale = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(bad()),
        };
        seconds = number.checked_mul(scale).and_then(|part| seconds.checked_add(part)).ok_or_else(bad)?;
        rest = rest[digits + unit.len_utf8()..].trim_start();
    }
    match seconds {
        1.. if seconds <= DAYS_MAX * 86_400 => Ok(Duration::from_secs(seconds)),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_have_units() {
        for (text, seconds) in [("90s", 90), ("15m", 900), (" 2h ", 7200), ("1h 30m", 5400), ("1d1s", 86_401)]
        {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_secs(seconds), "{text}");
        }
        for text in [
            "",
            " ",
            "15",
            "m",
            "15 m",
            "-1s",
            "1.5h",
            "0s",
            "15min",
            "99999999999999999999s",
            "4000d",
            "5\u{b5}",
        ] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
    }
}
