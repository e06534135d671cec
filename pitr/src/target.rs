//! What the DBA asked for: a recovery target, parsed from words. Pure: no clock, no environment.
//!
//! Nothing is guessed here. A time without an offset or zone is refused with the readings it could
//! have; a local time that a clock change made ambiguous or impossible is refused with the reason.

use std::fmt;

use chrono::{
    DateTime, FixedOffset, LocalResult, NaiveDate, NaiveDateTime, NaiveTime, Offset as _, TimeZone as _, Utc,
};
use chrono_tz::Tz;
use serde::{Deserialize, Serialize};
use walship::pg::{Lsn, TimelineId, Xid};

/// The longest restore point name that PostgreSQL stores, in bytes.
///
/// Source: `src/include/access/xlog_internal.h`, MAXFNAMELEN less the final zero byte.
pub const RESTORE_POINT_NAME_MAX: usize = 63;

/// Where recovery is to stop, and on which timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryTarget {
    /// What to stop at.
    pub kind: TargetKind,
    /// Whether what the target names is still replayed.
    pub stop: StopSide,
    /// The timeline to follow.
    pub timeline: TimelineChoice,
}

impl RecoveryTarget {
    /// Returns an inclusive target on the latest timeline.
    pub fn new(kind: TargetKind) -> Self {
        Self { kind, stop: StopSide::Inclusive, timeline: TimelineChoice::Latest }
    }

    /// Returns the command-line options that spell this target.
    pub fn options(&self) -> String {
        let mut text = match &self.kind {
            TargetKind::Time { time, .. } => format!("--to-time '{}'", utc_text(*time)),
            TargetKind::Lsn(lsn) => format!("--to-lsn {lsn}"),
            TargetKind::Xid(xid) => format!("--to-xid {xid}"),
            TargetKind::Name(name) => format!("--to-name {}", shell_word(name)),
            TargetKind::Latest => "--latest".to_owned(),
            TargetKind::Immediate => "--immediate".to_owned(),
        };
        if self.stop == StopSide::Exclusive {
            text.push_str(" --exclusive");
        }
        if let TimelineChoice::Number(timeline) = self.timeline {
            text.push_str(&format!(" --timeline {timeline}"));
        }
        text
    }
}

impl fmt::Display for RecoveryTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = self.stop == StopSide::Exclusive;
        match &self.kind {
            TargetKind::Time { time, zone } => {
                f.write_str(if before { "everything before " } else { "time " })?;
                f.write_str(&zone.both(*time))
            }
            TargetKind::Lsn(lsn) => {
                write!(f, "{} LSN {lsn}", if before { "everything before" } else { "the record at" })
            }
            TargetKind::Xid(xid) => {
                write!(f, "{} transaction {xid}", if before { "just before" } else { "just after" })
            }
            TargetKind::Name(name) => write!(f, "restore point {name:?}"),
            TargetKind::Latest => f.write_str("the latest commit in the repository"),
            TargetKind::Immediate => f.write_str("the earliest consistent moment of the backup"),
        }
    }
}

/// What recovery stops at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetKind {
    /// The last moment to keep.
    Time {
        /// The moment, in whole microseconds.
        time: DateTime<Utc>,
        /// The zone it was given in, for output.
        zone: Zone,
    },
    /// The record that starts at or first after a position.
    Lsn(Lsn),
    /// The end of a transaction.
    Xid(Xid),
    /// A restore point made with `pg_create_restore_point`.
    Name(String),
    /// The end of the archived WAL.
    Latest,
    /// The moment the backup becomes consistent.
    Immediate,
}

/// Whether the record that a target names is still replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopSide {
    /// Stop just after the target.
    Inclusive,
    /// Stop just before the target.
    Exclusive,
}

/// Which timeline to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimelineChoice {
    /// The highest that is stored; resolved to a number by the plan, shown, and pinned.
    Latest,
    /// This one.
    Number(TimelineId),
}

/// The zone a time was given in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zone {
    /// UTC.
    Utc,
    /// A fixed offset.
    Fixed(FixedOffset),
    /// An IANA zone.
    Named(Tz),
}

impl Zone {
    /// Returns the time in this zone as text, microseconds kept: `2026-03-01 14:29:59.8+01:00`.
    pub fn text(self, time: DateTime<Utc>) -> String {
        match self {
            Self::Utc => utc_text(time),
            Self::Fixed(offset) => {
                let local = time.with_timezone(&offset);
                format!("{}{}", naive_text(local.naive_local()), local.format("%:z"))
            }
            Self::Named(zone) => {
                let local = time.with_timezone(&zone);
                let offset = local.format("%:z");
                format!("{}{offset} ({zone})", naive_text(local.naive_local()))
            }
        }
    }

    /// Returns the time in UTC and, when that is another text, in this zone.
    pub fn both(self, time: DateTime<Utc>) -> String {
        match self {
            Self::Utc => utc_text(time),
            _ => format!("{} = {}", utc_text(time), self.text(time)),
        }
    }
}

/// Why words are no recovery target: a fact, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct TargetError {
    what: String,
    /// What to do about it, a sentence.
    pub next: String,
}

impl TargetError {
    pub(crate) fn new(what: impl Into<String>, next: impl Into<String>) -> Self {
        Self { what: what.into(), next: next.into() }
    }
}

impl From<TargetError> for walship::Error {
    fn from(error: TargetError) -> Self {
        Self::invalid(error.what.clone()).with_next(error.next)
    }
}

/// The target options of a command line as they were typed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TargetWords {
    /// `--to-time`.
    pub time: Option<String>,
    /// `--to-lsn`.
    pub lsn: Option<String>,
    /// `--to-xid`.
    pub xid: Option<String>,
    /// `--to-name`.
    pub name: Option<String>,
    /// `--latest`.
    pub latest: bool,
    /// `--immediate`.
    pub immediate: bool,
    /// `--timeline`.
    pub timeline: Option<String>,
    /// `--exclusive`.
    pub exclusive: bool,
}

impl TargetWords {
    /// Returns the target that the words spell. `local_offset` answers which offset this machine's
    /// zone has at a local time; it is used only to name a likely reading, never to choose one.
    ///
    /// # Errors
    /// [`TargetError`] when no target or more than one is given, when one does not parse, when a time
    /// has no offset or zone, and for `--exclusive` where it means nothing.
    pub fn parse(
        &self,
        local_offset: impl Fn(NaiveDateTime) -> Option<FixedOffset>,
    ) -> Result<RecoveryTarget, TargetError> {
        let mut kinds = Vec::new();
        if let Some(text) = &self.time {
            let (time, zone) = parse_time(text, local_offset)?;
            kinds.push(TargetKind::Time { time, zone });
        }
        if let Some(text) = &self.lsn {
            kinds.push(TargetKind::Lsn(parse_lsn(text)?));
        }
        if let Some(text) = &self.xid {
            kinds.push(TargetKind::Xid(parse_xid(text)?));
        }
        if let Some(text) = &self.name {
            kinds.push(TargetKind::Name(parse_name(text)?));
        }
        if self.latest {
            kinds.push(TargetKind::Latest);
        }
        if self.immediate {
            kinds.push(TargetKind::Immediate);
        }
        const CHOICES: &str =
            "Give exactly one of --to-time, --to-lsn, --to-xid, --to-name, --latest, --immediate.";
        if kinds.len() > 1 {
            return Err(TargetError::new("more than one recovery target is given", CHOICES));
        }
        let kind = kinds.pop().ok_or_else(|| TargetError::new("no recovery target is given", CHOICES))?;
        let takes_exclusive =
            matches!(kind, TargetKind::Time { .. } | TargetKind::Lsn(_) | TargetKind::Xid(_));
        if self.exclusive && !takes_exclusive {
            return Err(TargetError::new(
                "--exclusive has no meaning for this target",
                "Use --exclusive with --to-time, --to-lsn or --to-xid only.",
            ));
        }
        let timeline = match self.timeline.as_deref() {
            None | Some("latest") => TimelineChoice::Latest,
            Some(text) => TimelineChoice::Number(parse_timeline(text)?),
        };
        let stop = if self.exclusive { StopSide::Exclusive } else { StopSide::Inclusive };
        Ok(RecoveryTarget { kind, stop, timeline })
    }
}

fn parse_lsn(text: &str) -> Result<Lsn, TargetError> {
    let lsn: Lsn = text.trim().parse().map_err(|_| {
        TargetError::new(format!("{text:?} is not an LSN"), "Write an LSN as PostgreSQL does: 16/B374D848.")
    })?;
    if !lsn.is_valid() {
        return Err(TargetError::new("LSN 0/0 means \"no position\"", "Give the position of a WAL record."));
    }
    Ok(lsn)
}

pub(crate) fn parse_xid(text: &str) -> Result<Xid, TargetError> {
    const NEXT: &str = "Give the 32-bit number that logs and WAL show, from 3 on; of a 64-bit \
                        pg_current_xact_id() take the remainder of division by 4294967296.";
    let wide: u64 = text
        .trim()
        .parse()
        .map_err(|_| TargetError::new(format!("{text:?} is not a transaction id"), NEXT))?;
    match u32::try_from(wide) {
        Err(_) => Err(TargetError::new(
            format!("{wide} has more than 32 bits: WAL knows it as {}", wide & 0xFFFF_FFFF),
            NEXT,
        )),
        Ok(0..=2) => Err(TargetError::new(format!("{wide} is not the id of a normal transaction"), NEXT)),
        Ok(xid) => Ok(xid),
    }
}

fn parse_name(text: &str) -> Result<String, TargetError> {
    if text.is_empty() || text.len() > RESTORE_POINT_NAME_MAX || text.contains(['\n', '\r', '\0']) {
        return Err(TargetError::new(
            format!("{text:?} cannot be the name of a restore point"),
            format!("A name has 1 to {RESTORE_POINT_NAME_MAX} bytes and no line breaks."),
        ));
    }
    Ok(text.to_owned())
}

pub(crate) fn parse_timeline(text: &str) -> Result<TimelineId, TargetError> {
    text.parse::<u32>().ok().and_then(TimelineId::new).ok_or_else(|| {
        TargetError::new(
            format!("{text:?} is not a timeline"),
            "Give a decimal number from 1 on, or \"latest\"; `pitr info` lists the timelines.",
        )
    })
}

/// Returns the moment that `text` names and the zone it was given in.
///
/// A date (`YYYY-MM-DD`), `T` or spaces, a time (`HH:MM`, seconds and up to six fractional digits
/// optional), and an offset (`Z`, `+02`, `+0200`, `+02:00`) or an IANA zone name. `local_offset` is
/// as in [`TargetWords::parse`].
///
/// # Errors
/// [`TargetError`] for everything else; a time without offset or zone is answered with its likeliest
/// readings, one that a clock change made ambiguous or impossible with the reason.
pub fn parse_time(
    text: &str,
    local_offset: impl Fn(NaiveDateTime) -> Option<FixedOffset>,
) -> Result<(DateTime<Utc>, Zone), TargetError> {
    const NEXT: &str = "Write a time like '2026-03-01 14:29:59.8+01' or '2026-03-01 14:29 Europe/Berlin'.";
    let bad = |why: &str| TargetError::new(format!("{text:?} is not a point in time: {why}"), NEXT);
    let trimmed = text.trim();
    if !trimmed.is_ascii() || trimmed.len() < 10 || trimmed.len() > 120 {
        return Err(bad("a date YYYY-MM-DD and a time HH:MM are needed"));
    }
    let (date, rest) = trimmed.split_at(10);
    let date = parse_date(date).ok_or_else(|| bad("it does not begin with a date YYYY-MM-DD"))?;
    let rest = rest.strip_prefix(['T', 't', ' ', '_']).ok_or_else(|| bad("no time follows the date"))?;
    let rest = rest.trim_start();
    let clock_len =
        rest.find(|c: char| !c.is_ascii_digit() && !matches!(c, ':' | '.' | ',')).unwrap_or(rest.len());
    let (clock, zone) = rest.split_at(clock_len);
    let naive = NaiveDateTime::new(date, parse_clock(clock).map_err(bad)?);
    let zone = zone.trim();
    if zone.is_empty() {
        return Err(without_zone(text, naive, local_offset(naive)));
    }
    if zone.eq_ignore_ascii_case("z") || zone.eq_ignore_ascii_case("utc") || zone.eq_ignore_ascii_case("gmt")
    {
        return Ok((naive.and_utc(), Zone::Utc));
    }
    if zone.starts_with(['+', '-']) {
        let offset = parse_offset(zone).ok_or_else(|| bad("its offset is not like +02, +0200 or +02:00"))?;
        let time = offset.from_local_datetime(&naive).single().ok_or_else(|| bad("it is out of range"))?;
        let zone = if offset.local_minus_utc() == 0 { Zone::Utc } else { Zone::Fixed(offset) };
        return Ok((time.with_timezone(&Utc), zone));
    }
    let zone: Tz = zone.parse().map_err(|_| {
        bad("its zone is no IANA zone name (abbreviations such as IST or CST mean several zones)")
    })?;
    in_named_zone(text, naive, zone)
}

fn in_named_zone(text: &str, naive: NaiveDateTime, zone: Tz) -> Result<(DateTime<Utc>, Zone), TargetError> {
    match zone.from_local_datetime(&naive) {
        LocalResult::Single(time) => Ok((time.with_timezone(&Utc), Zone::Named(zone))),
        LocalResult::Ambiguous(first, second) => Err(TargetError::new(
            format!("{text:?} happened twice: clocks in {zone} were put back"),
            format!(
                "Write {} (the first time) or {} (the second time).",
                quoted(naive, first.offset().fix()),
                quoted(naive, second.offset().fix())
            ),
        )),
        LocalResult::None => {
            // Read with the offset in force a day before and a day after: the two instants a person
            // who forgot about the change may have meant.
            let day = chrono::Duration::days(1);
            let readings = [-day, day].map(|shift| {
                let offset = zone.from_utc_datetime(&(naive + shift)).offset().fix();
                quoted(naive, offset)
            });
            Err(TargetError::new(
                format!("{text:?} never happened: clocks in {zone} were put forward over it"),
                format!(
                    "Write {} (by the offset before the change) or {} (by the offset after it).",
                    readings[0], readings[1]
                ),
            ))
        }
    }
}

fn without_zone(text: &str, naive: NaiveDateTime, local: Option<FixedOffset>) -> TargetError {
    let utc = format!("'{}Z' (UTC)", naive_text(naive));
    let next = match local {
        Some(offset) if offset.local_minus_utc() != 0 => {
            format!("Write {} (this machine's zone) or {utc}.", quoted(naive, offset))
        }
        Some(_) => format!("Write {utc}, which is this machine's zone too, or name the zone meant."),
        None => format!("Write {utc}, or name the zone meant."),
    };
    TargetError::new(format!("{text:?} has no offset and no zone"), next)
}

fn quoted(naive: NaiveDateTime, offset: FixedOffset) -> String {
    format!("'{}{}'", naive_text(naive), offset)
}

fn parse_date(text: &str) -> Option<NaiveDate> {
    let bytes = text.as_bytes();
    let shape = bytes.iter().enumerate().all(|(at, b)| match at {
        4 | 7 => *b == b'-',
        _ => b.is_ascii_digit(),
    });
    if !shape {
        return None;
    }
    NaiveDate::from_ymd_opt(text[..4].parse().ok()?, text[5..7].parse().ok()?, text[8..10].parse().ok()?)
}

fn parse_clock(text: &str) -> Result<NaiveTime, &'static str> {
    let (whole, fraction) = match text.split_once(['.', ',']) {
        Some((whole, fraction)) => (whole, fraction),
        None => (text, ""),
    };
    let parts: Vec<&str> = whole.split(':').collect();
    let two_digits = |part: &&str| {
        part.len() == 2 && part.bytes().all(|b| b.is_ascii_digit()) && part.parse::<u32>().is_ok()
    };
    if !(2..=3).contains(&parts.len()) || !parts.iter().all(two_digits) {
        return Err("its time is not like 14:29, 14:29:59 or 14:29:59.8");
    }
    if parts.len() == 2 && !fraction.is_empty() || text.ends_with(['.', ',']) {
        return Err("its time is not like 14:29, 14:29:59 or 14:29:59.8");
    }
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err("its fraction of a second is no number");
    }
    // PostgreSQL would round a seventh digit; a target that moves by itself is refused instead.
    if fraction.len() > 6 && fraction.bytes().skip(6).any(|b| b != b'0') {
        return Err("PostgreSQL keeps microseconds, that is six digits after the point");
    }
    let number = |part: Option<&&str>| part.and_then(|part| part.parse::<u32>().ok()).unwrap_or(0);
    let micros: u32 = format!("{:0<6}", fraction.get(..fraction.len().min(6)).unwrap_or(""))
        .parse()
        .map_err(|_| "its fraction of a second is no number")?;
    NaiveTime::from_hms_micro_opt(number(parts.first()), number(parts.get(1)), number(parts.get(2)), micros)
        .ok_or("there is no such time of day")
}

fn parse_offset(text: &str) -> Option<FixedOffset> {
    let sign = if text.starts_with('-') { -1 } else { 1 };
    let digits = &text[1..];
    let (hours, minutes) = match digits.len() {
        1 | 2 => (digits, "0"),
        4 => digits.split_at(2),
        5 => digits.split_once(':')?,
        _ => return None,
    };
    if !hours.bytes().chain(minutes.bytes()).all(|b| b.is_ascii_digit()) {
        return None;
    }
    let (hours, minutes): (i32, i32) = (hours.parse().ok()?, minutes.parse().ok()?);
    // PostgreSQL's own limit is just below 16 hours.
    (hours < 16 && minutes < 60)
        .then(|| FixedOffset::east_opt(sign * (hours * 3600 + minutes * 60)))
        .flatten()
}

/// Returns the time as `2026-03-01 13:29:59.8Z`: RFC 3339 with a blank, microseconds kept.
pub fn utc_text(time: DateTime<Utc>) -> String {
    format!("{}Z", naive_text(time.naive_utc()))
}

fn naive_text(time: NaiveDateTime) -> String {
    let text = time.format("%Y-%m-%d %H:%M:%S%.6f").to_string();
    match text.split_once('.') {
        Some((whole, fraction)) => {
            let fraction = fraction.trim_end_matches('0');
            if fraction.is_empty() { whole.to_owned() } else { format!("{whole}.{fraction}") }
        }
        None => text,
    }
}

/// Returns `text` as one word of a POSIX shell, quoted only when it has to be.
pub fn shell_word(text: &str) -> String {
    let plain = |b: u8| {
        b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/' | b':' | b'@' | b'+' | b'=' | b',')
    };
    if !text.is_empty() && text.bytes().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_local(_: NaiveDateTime) -> Option<FixedOffset> {
        None
    }

    fn utc(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn every_spelling_of_one_moment_is_the_same_moment() {
        let moment = utc("2026-03-01T13:29:59.800001Z");
        for text in [
            "2026-03-01T13:29:59.800001Z",
            "2026-03-01t13:29:59.800001z",
            "2026-03-01 13:29:59.800001 UTC",
            "2026-03-01 14:29:59.800001+01",
            "2026-03-01 14:29:59,800001 +01:00",
            "2026-03-01 14:29:59.8000010+0100",
            "2026-03-01 08:29:59.800001-05",
            "2026-03-01 18:59:59.800001+0530",
            "2026-03-01 14:29:59.800001 Europe/Berlin",
            "  2026-03-01  08:29:59.800001 America/New_York ",
        ] {
            assert_eq!(parse_time(text, no_local).unwrap().0, moment, "{text}");
        }
        let minute = parse_time("2026-03-01 14:29 Europe/Berlin", no_local).unwrap();
        assert_eq!(minute.0, utc("2026-03-01T13:29:00Z"));
        assert_eq!(
            minute.1.both(minute.0),
            "2026-03-01 13:29:00Z = 2026-03-01 14:29:00+01:00 (Europe/Berlin)"
        );
    }

    #[test]
    fn microseconds_survive_parsing_and_printing() {
        for text in ["2026-03-01 14:29:59.999999Z", "2026-03-01 14:29:59.000001Z", "2026-03-01 14:29:59.8Z"] {
            let (time, zone) = parse_time(text, no_local).unwrap();
            assert_eq!(zone.text(time), text);
            assert_eq!(parse_time(&zone.text(time), no_local).unwrap().0, time);
        }
        let (time, zone) = parse_time("2026-03-01 14:29:59.123456+05:30", no_local).unwrap();
        assert_eq!(zone.text(time), "2026-03-01 14:29:59.123456+05:30");
    }

    #[test]
    fn times_that_postgres_would_guess_or_round_are_refused() {
        for text in [
            "",
            "now",
            "yesterday 12:00",
            "2026-03-01",
            "2026-03-01Z",
            "2026-02-30 12:00Z",
            "2026-03-01 24:00Z",
            "2026-03-01 12:60Z",
            "2026-03-01 12:00:60Z",
            "2026-03-01 1:00Z",
            "2026-03-01 12:00.5Z",
            "2026-03-01 12:00:00.Z",
            "2026-03-01 12:00:00.1234567Z",
            "2026-03-01 12:00 IST",
            "2026-03-01 12:00 Mars/Olympus",
            "2026-03-01 12:00+99",
            "2026-03-01 12:00+1:0",
            "2026-03-01 12:00 +\u{661}",
            "2026-03-01T12:00Z trailing",
            "2026\u{e9}-03-01 12:00Z",
        ] {
            assert!(parse_time(text, no_local).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_time_without_zone_is_answered_with_its_readings() {
        let berlin = |_| FixedOffset::east_opt(3600);
        let error = parse_time("2026-03-01 14:29:59.8", berlin).unwrap_err();
        assert_eq!(error.to_string(), "\"2026-03-01 14:29:59.8\" has no offset and no zone");
        assert_eq!(
            error.next,
            "Write '2026-03-01 14:29:59.8+01:00' (this machine's zone) or '2026-03-01 14:29:59.8Z' (UTC)."
        );
    }

    #[test]
    fn clock_changes_are_explained() {
        let twice = parse_time("2026-10-25 02:30 Europe/Berlin", no_local).unwrap_err();
        assert_eq!(
            twice.to_string(),
            "\"2026-10-25 02:30 Europe/Berlin\" happened twice: clocks in Europe/Berlin were put back"
        );
        assert_eq!(
            twice.next,
            "Write '2026-10-25 02:30:00+02:00' (the first time) or '2026-10-25 02:30:00+01:00' (the second time)."
        );
        let never = parse_time("2026-03-29 02:30 Europe/Berlin", no_local).unwrap_err();
        assert_eq!(
            never.next,
            "Write '2026-03-29 02:30:00+01:00' (by the offset before the change) or \
             '2026-03-29 02:30:00+02:00' (by the offset after it)."
        );
    }

    #[test]
    fn exactly_one_target_and_exclusive_only_where_it_means_something() {
        let words = TargetWords { latest: true, ..TargetWords::default() };
        assert_eq!(words.parse(no_local).unwrap(), RecoveryTarget::new(TargetKind::Latest));
        assert!(TargetWords::default().parse(no_local).is_err());
        assert!(TargetWords { immediate: true, ..words.clone() }.parse(no_local).is_err());
        for (latest, immediate, name) in [(true, false, None), (false, true, None), (false, false, Some("x"))]
        {
            let words = TargetWords {
                latest,
                immediate,
                name: name.map(str::to_owned),
                exclusive: true,
                ..TargetWords::default()
            };
            assert!(words.parse(no_local).is_err());
        }
        let words = TargetWords {
            xid: Some("731".into()),
            exclusive: true,
            timeline: Some("3".into()),
            ..TargetWords::default()
        };
        let target = words.parse(no_local).unwrap();
        assert_eq!(target.stop, StopSide::Exclusive);
        assert_eq!(target.options(), "--to-xid 731 --exclusive --timeline 3");
    }

    #[test]
    fn xids_lsns_names_and_timelines_have_their_bounds() {
        assert_eq!(parse_xid("4294967295").unwrap(), u32::MAX);
        assert!(parse_xid("4294967299").unwrap_err().to_string().contains("WAL knows it as 3"));
        assert!(["", "-1", "0", "2", "x"].iter().all(|text| parse_xid(text).is_err()));
        assert!(parse_lsn("0/0").is_err() && parse_lsn("zz").is_err());
        assert!(parse_name(&"x".repeat(63)).is_ok() && parse_name(&"x".repeat(64)).is_err());
        assert!(parse_name("").is_err() && parse_name("a\nb").is_err());
        assert!(["0", "-1", "newest", ""].iter().all(|text| parse_timeline(text).is_err()));
    }

    #[test]
    fn shell_words_survive_a_shell() {
        assert_eq!(shell_word("before_drop"), "before_drop");
        assert_eq!(shell_word("it's late"), r"'it'\''s late'");
        assert_eq!(shell_word(""), "''");
    }
}
