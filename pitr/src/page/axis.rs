//! A scale of time, and what is written along it.

use chrono::{DateTime, Datelike as _, TimeZone as _, Utc};

/// From what to what a drawing goes, in milliseconds of whatever is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scale {
    from: i64,
    to: i64,
}

impl Scale {
    /// Returns the scale from one value to another, which is later.
    pub fn new(from_millis: i64, to_millis: i64) -> Self {
        Self { from: from_millis, to: to_millis.max(from_millis.saturating_add(1)) }
    }

    /// Returns where a value lies, in hundredths of the whole: 0 to 100, whatever lies outside at the edge.
    pub fn at(&self, millis: i64) -> f64 {
        let along = i128::from(millis.clamp(self.from, self.to)) - i128::from(self.from);
        let length = i128::from(self.to) - i128::from(self.from);
        along as f64 * 100.0 / length as f64
    }

    /// Returns the same of a time.
    pub fn at_time(&self, time: DateTime<Utc>) -> f64 {
        self.at(time.timestamp_millis())
    }
}

/// Returns a place or a width as it stands in a drawing.
pub fn percent(at: f64) -> String {
    let text = format!("{at:.2}");
    format!("{}%", text.trim_end_matches('0').trim_end_matches('.'))
}

/// A mark on a scale.
#[derive(Debug, Clone, PartialEq)]
pub struct Tick {
    /// Where, in hundredths.
    pub at: f64,
    /// What is written there.
    pub label: String,
    /// What is written below it: the day of a time, the year of a day; only where it changes.
    pub below: Option<String>,
}

const MINUTE: i64 = 60;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;
const WEEK: i64 = 7 * DAY;

/// Monday, the 5th of January 1970: weeks are counted from there.
const FIRST_MONDAY: i64 = 4 * DAY;

/// Lengths of time between marks, in seconds, up to where months begin.
const STEPS: &[i64] = &[
    1,
    2,
    5,
    10,
    15,
    30,
    MINUTE,
    2 * MINUTE,
    5 * MINUTE,
    10 * MINUTE,
    15 * MINUTE,
    30 * MINUTE,
    HOUR,
    2 * HOUR,
    3 * HOUR,
    6 * HOUR,
    12 * HOUR,
    DAY,
    2 * DAY,
    WEEK,
    2 * WEEK,
];

/// The same in months.
const MONTHS: &[i64] = &[1, 2, 3, 6, 12, 24, 60, 120, 240, 600, 1200, 12_000, 120_000, 1_200_000];

/// Returns at most `max` marks in UTC for a scale from one time to another.
pub fn clock_ticks(from: DateTime<Utc>, to: DateTime<Utc>, max: usize) -> Vec<Tick> {
    let max = max as i64;
    let (first, last) = (from.timestamp(), to.timestamp());
    let step = STEPS.iter().copied().find(|step| (last - first) / step < max);
    let times: Vec<DateTime<Utc>> = match step {
        Some(step) => {
            let origin = if step >= WEEK { FIRST_MONDAY } else { 0 };
            let begin = (first - origin).div_euclid(step) * step + origin;
            (0..=max + 1).filter_map(|number| DateTime::from_timestamp(begin + number * step, 0)).collect()
        }
        None => {
            let month = |time: DateTime<Utc>| i64::from(time.year()) * 12 + i64::from(time.month0());
            let months = month(to) - month(from);
            let Some(step) = MONTHS.iter().copied().find(|step| months / step < max) else {
                return Vec::new();
            };
            let begin = month(from).div_euclid(step) * step;
            let at = |number: i64| {
                let month = begin + number * step;
                let year = i32::try_from(month.div_euclid(12)).ok()?;
                Utc.with_ymd_and_hms(year, month.rem_euclid(12) as u32 + 1, 1, 0, 0, 0).single()
            };
            (0..=max + 1).filter_map(at).collect()
        }
    };
    let (label, below) = match step {
        Some(..MINUTE) => ("%H:%M:%S", "%-d %b %Y"),
        Some(..DAY) => ("%H:%M", "%-d %b %Y"),
        Some(_) => ("%-d %b", "%Y"),
        // Months between which there is more than one year.
        None if last - first > 366 * DAY * max => ("%Y", ""),
        None => ("%b", "%Y"),
    };
    let scale = Scale::new(from.timestamp_millis(), to.timestamp_millis());
    let mut said = String::new();
    let inside = times.into_iter().filter(|time| *time >= from && *time <= to);
    let ticks = inside.take(max as usize).map(|time| {
        let context = time.format(below).to_string();
        let below = (context != said).then(|| context.clone());
        said = context;
        Tick { at: scale.at_time(time), label: time.format(label).to_string(), below }
    });
    ticks.collect()
}

/// Returns at most `max` marks for a scale from 0 to a length of time.
pub fn elapsed_ticks(total_millis: u64, max: usize) -> Vec<Tick> {
    let seconds = STEPS.iter().map(|step| step.unsigned_abs() * 1000);
    let steps = [10, 20, 50, 100, 200, 500].into_iter().chain(seconds);
    let Some(step) = steps.into_iter().find(|step| total_millis / step < max as u64) else {
        return Vec::new();
    };
    let scale = Scale::new(0, i64::try_from(total_millis).unwrap_or(i64::MAX));
    let ticks = (0..max as u64).map(|number| number * step).take_while(|millis| *millis <= total_millis);
    let tick = |millis: u64| Tick { at: scale.at(millis as i64), label: elapsed(millis), below: None };
    ticks.map(tick).collect()
}

fn elapsed(millis: u64) -> String {
    let (hours, minutes, seconds) = (millis / 3_600_000, millis / 60_000 % 60, millis / 1000 % 60);
    match (hours, minutes, seconds, millis % 1000) {
        (0, 0, 0, 0) => "0".to_owned(),
        (0, 0, 0, millis) => format!("{millis} ms"),
        (0, 0, seconds, 0) => format!("{seconds} s"),
        (0, 0, seconds, millis) => format!("{:.1} s", seconds as f64 + millis as f64 / 1000.0),
        (0, minutes, 0, _) => format!("{minutes} min"),
        (0, minutes, seconds, _) => format!("{minutes}:{seconds:02} min"),
        (hours, 0, ..) => format!("{hours} h"),
        (hours, minutes, ..) => format!("{hours}:{minutes:02} h"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn time(text: &str) -> DateTime<Utc> {
        DateTime::parse_from_rfc3339(text).unwrap().to_utc()
    }

    fn said(from: &str, to: &str, max: usize) -> String {
        let ticks = clock_ticks(time(from), time(to), max).into_iter();
        let said = ticks.map(|tick| match tick.below {
            Some(below) => format!("{} ({below})", tick.label),
            None => tick.label,
        });
        said.collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn marks_are_round_for_seconds_and_for_centuries() {
        for (from, to, max, expected) in [
            (
                "2026-11-27T10:00:02Z",
                "2026-11-27T10:00:21Z",
                4,
                "10:00:05 (27 Nov 2026), 10:00:10, 10:00:15, 10:00:20",
            ),
            ("2026-11-27T10:07:00Z", "2026-11-27T11:07:00Z", 6, "10:15 (27 Nov 2026), 10:30, 10:45, 11:00"),
            ("2026-12-31T15:00:00Z", "2027-01-01T15:00:00Z", 3, "00:00 (1 Jan 2027), 12:00"),
            ("2026-11-01T10:00:00Z", "2026-11-27T11:00:00Z", 6, "2 Nov (2026), 9 Nov, 16 Nov, 23 Nov"),
            ("2025-11-27T10:00:00Z", "2026-11-27T11:00:00Z", 6, "Jan (2026), Apr, Jul, Oct"),
            ("2021-11-27T10:00:00Z", "2026-11-27T11:00:00Z", 3, "2022, 2024, 2026"),
        ] {
            assert_eq!(said(from, to, max), expected, "{from} {to} {max}");
        }
    }

    #[test]
    fn lengths_of_time_have_round_marks() {
        for (total, max, expected) in [
            (0, 3, "0"),
            (45, 6, "0 10 ms 20 ms 30 ms 40 ms"),
            (2500, 3, "0 1 s 2 s"),
            (754_000, 6, "0 5 min 10 min"),
            (9_000_000, 3, "0 1 h 2 h"),
        ] {
            let labels: Vec<_> = elapsed_ticks(total, max).into_iter().map(|tick| tick.label).collect();
            let shown = labels.join(" ");
            assert!(shown.starts_with(expected.split(' ').next().unwrap()), "{shown}");
            assert!(labels.len() <= max, "{shown}");
            assert_eq!(shown, expected, "{total}");
        }
    }

    #[test]
    fn places_are_short_and_within_the_drawing() {
        let scale = Scale::new(100, 200);
        let at: Vec<_> = [0, 100, 133, 200, 900].map(|millis| percent(scale.at(millis))).into();
        assert_eq!(at, ["0%", "0%", "33%", "100%", "100%"]);
        assert_eq!(percent(33.333), "33.33%");
        assert_eq!(Scale::new(5, 5).at(5), 0.0);
        assert_eq!(Scale::new(i64::MIN, i64::MAX).at(i64::MAX), 100.0);
    }

    proptest! {
        /// Whatever a stored time says: a bounded number of marks, in order, within the drawing.
        #[test]
        fn marks_stay_within(from in -8_000_000_000_000_i64..8_000_000_000_000, length in 0_i64..16_000_000_000_000, max in 1_usize..16) {
            let from = DateTime::from_timestamp(from, 0).unwrap();
            let to = DateTime::from_timestamp(from.timestamp() + length, 0).unwrap_or(DateTime::<Utc>::MAX_UTC);
            let ticks = clock_ticks(from, to, max);
            prop_assert!(ticks.len() <= max);
            prop_assert!(ticks.iter().all(|tick| (0.0..=100.0).contains(&tick.at)));
            prop_assert!(ticks.windows(2).all(|pair| pair[0].at < pair[1].at));
            prop_assert!(elapsed_ticks(length as u64, max).len() <= max);
        }
    }
}
