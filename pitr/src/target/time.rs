//! Moments, as they are written and shown. Nothing is guessed: see the module above.

use chrono::{
    DateTime, Datelike as _, FixedOffset, LocalResult, NaiveDate, NaiveDateTime, NaiveTime, Offset as _,
    TimeZone as _, Utc,
};
use chrono_tz::Tz;

use super::TargetError;

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
                let offset = local.offset().fix();
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

/// Returns the moment that `text` names and the zone it was given in.
///
/// A date (`YYYY-MM-DD`), `T` or spaces, a time (`HH:MM`, seconds and up to six fractional digits
/// optional), and an offset (`Z`, `+02`, `+0200`, `+02:00`) or an IANA zone name. `local_offset` is
/// as in [`super::TargetWords::parse`].
///
/// # Errors
/// [`TargetError`] for everything else; a time without offset or zone is answered with its likeliest
/// readings, one that a clock change made ambiguous or impossible with the reason.
pub fn parse_time(
    text: &str,
    local_offset: impl Fn(NaiveDateTime) -> Vec<FixedOffset>,
) -> Result<(DateTime<Utc>, Zone), TargetError> {
    const NEXT: &str = "Write a time like '2026-03-01 14:29:59.8+01' or '2026-03-01 14:29 Europe/Berlin'.";
    let bad = |why: &str| TargetError::new(format!("{text:?} is not a point in time: {why}"), NEXT);
    let trimmed = text.trim();
    if let Some(why) = moving_word(trimmed) {
        return Err(bad(why));
    }
    if !trimmed.is_ascii() || trimmed.len() < 10 || trimmed.len() > 120 {
        return Err(bad("a date YYYY-MM-DD and a time HH:MM are needed"));
    }
    let (date, rest) = trimmed.split_at(10);
    let date = parse_date(date)
        .ok_or_else(|| bad("it does not begin with a date YYYY-MM-DD that exists, from year 0001 to 9999"))?;
    let rest = rest.strip_prefix(['T', 't', ' ', '_']).ok_or_else(|| bad("no time follows the date"))?;
    let rest = rest.trim_start();
    let clock_len =
        rest.find(|c: char| !c.is_ascii_digit() && !matches!(c, ':' | '.' | ',')).unwrap_or(rest.len());
    let (clock, zone) = rest.split_at(clock_len);
    let naive = NaiveDateTime::new(date, parse_clock(clock).map_err(bad)?);
    let zone = zone.trim();
    if zone.is_empty() {
        return Err(without_zone(text, naive, &local_offset(naive)));
    }
    if zone.eq_ignore_ascii_case("z") || zone.eq_ignore_ascii_case("utc") || zone.eq_ignore_ascii_case("gmt")
    {
        return Ok((naive.and_utc(), Zone::Utc));
    }
    if zone.starts_with(['+', '-']) {
        let offset = parse_offset(zone).ok_or_else(|| bad("its offset is not like +02, +0200 or +02:00"))?;
        let time = offset.from_local_datetime(&naive).single();
        // In UTC it must be a year of four digits too: that is how it is shown and given to PostgreSQL.
        let time = time.filter(|time| (1..=9999).contains(&time.with_timezone(&Utc).year()));
        let time = time.ok_or_else(|| bad("in UTC it is not from year 0001 to 9999"))?;
        let zone = if offset.local_minus_utc() == 0 { Zone::Utc } else { Zone::Fixed(offset) };
        return Ok((time.with_timezone(&Utc), zone));
    }
    if SUMMER_ABBREVIATIONS.iter().any(|word| zone.eq_ignore_ascii_case(word)) {
        return Err(bad(
            "PostgreSQL reads its zone as one offset all year, others as a zone with summer time; write the \
             offset, or a place",
        ));
    }
    let zone: Tz = zone.parse().map_err(|_| {
        bad("its zone is no IANA zone name (abbreviations such as IST or CST mean several zones)")
    })?;
    in_named_zone(text, naive, zone)
}

/// Names that are an abbreviation to PostgreSQL, which outranks the zone of the same name.
///
/// Source: `src/timezone/tznames/Default`; `src/backend/utils/adt/datetime.c`, DecodeDateTime.
const SUMMER_ABBREVIATIONS: [&str; 4] = ["CET", "EET", "MET", "WET"];

/// Returns why a time that begins with a word is none: PostgreSQL takes such in other places.
fn moving_word(text: &str) -> Option<&'static str> {
    let word = text.split(|c: char| !c.is_ascii_alphabetic() && c != '-').next().unwrap_or_default();
    match word.trim_start_matches('-').to_ascii_lowercase().as_str() {
        "now" | "today" | "yesterday" | "tomorrow" | "allballs" => Some(
            "what it means depends on when it is read, and recovery reads its target again at each start",
        ),
        "infinity" => Some("no record has that time; --latest is everything that is archived"),
        "epoch" => Some("PostgreSQL's recovery does not take words"),
        _ => None,
    }
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

fn without_zone(text: &str, naive: NaiveDateTime, local: &[FixedOffset]) -> TargetError {
    let utc = format!("'{}Z' (UTC)", naive_text(naive));
    let next = match local {
        [first, second] => format!(
            "Write {} or {} (this machine's zone, whose clocks were put back over that time), or {utc}.",
            quoted(naive, *first),
            quoted(naive, *second)
        ),
        [offset] if offset.local_minus_utc() != 0 => {
            format!("Write {} (this machine's zone) or {utc}.", quoted(naive, *offset))
        }
        [_] => format!("Write {utc}, which is this machine's zone too, or name the zone meant."),
        _ => format!("Write {utc}, or name the zone meant."),
    };
    TargetError::new(format!("{text:?} has no offset and no zone"), next)
}

/// Returns a reading that can be pasted; in UTC where the offset has seconds, as it had before zones were agreed on.
fn quoted(naive: NaiveDateTime, offset: FixedOffset) -> String {
    match offset.from_local_datetime(&naive).single() {
        Some(time) if offset.local_minus_utc() % 60 != 0 => {
            format!("'{}'", utc_text(time.with_timezone(&Utc)))
        }
        _ => format!("'{}{}'", naive_text(naive), offset),
    }
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
    let date = NaiveDate::from_ymd_opt(
        text[..4].parse().ok()?,
        text[5..7].parse().ok()?,
        text[8..10].parse().ok()?,
    )?;
    // PostgreSQL has no year 0.
    (date.year() > 0).then_some(date)
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
    if parts.first() == Some(&"24") {
        return Err("a day ends at 23:59:59.999999; write 00:00 of the next one");
    }
    if parts.get(2) == Some(&"60") {
        return Err(
            "the server's clock has no leap seconds, and PostgreSQL reads :60 as the next minute; write that",
        );
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

#[cfg(test)]
mod tests {
    use super::*;

    fn no_local(_: NaiveDateTime) -> Vec<FixedOffset> {
        Vec::new()
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
        let berlin = |_| vec![FixedOffset::east_opt(3600).unwrap()];
        let error = parse_time("2026-03-01 14:29:59.8", berlin).unwrap_err();
        assert_eq!(error.to_string(), "\"2026-03-01 14:29:59.8\" has no offset and no zone");
        assert_eq!(
            error.next,
            "Write '2026-03-01 14:29:59.8+01:00' (this machine's zone) or '2026-03-01 14:29:59.8Z' (UTC)."
        );
    }

    #[test]
    fn every_reading_of_a_local_time_is_named() {
        let hours = |list: &'static [i32]| {
            move |_| list.iter().map(|hours| FixedOffset::east_opt(hours * 3600).unwrap()).collect()
        };
        for (offsets, next) in [
            (&[][..], "Write '2026-10-25 02:30:00Z' (UTC), or name the zone meant."),
            (
                &[0],
                "Write '2026-10-25 02:30:00Z' (UTC), which is this machine's zone too, or name the zone meant.",
            ),
            (
                &[-5],
                "Write '2026-10-25 02:30:00-05:00' (this machine's zone) or '2026-10-25 02:30:00Z' (UTC).",
            ),
            (
                &[2, 1],
                "Write '2026-10-25 02:30:00+02:00' or '2026-10-25 02:30:00+01:00' (this machine's zone, whose \
                 clocks were put back over that time), or '2026-10-25 02:30:00Z' (UTC).",
            ),
        ] {
            assert_eq!(parse_time("2026-10-25 02:30", hours(offsets)).unwrap_err().next, next);
        }
        // What is named can be pasted.
        for text in ["2026-10-25 02:30:00+02:00", "2026-10-25 02:30:00Z", "2026-10-25 02:30:00-05:00"] {
            assert!(parse_time(text, no_local).is_ok(), "{text}");
        }
    }

    #[test]
    fn what_is_no_moment_is_refused_with_its_reason() {
        for (text, why) in [
            ("now", "each start"),
            ("NOW", "each start"),
            ("yesterday 12:00Z", "each start"),
            ("tomorrow", "each start"),
            ("infinity", "--latest"),
            ("-infinity", "--latest"),
            ("epoch", "words"),
            ("2026-06-30 23:59:60Z", "leap seconds"),
            ("2016-12-31 23:59:60.5Z", "leap seconds"),
            ("2026-06-30 24:00Z", "00:00 of the next"),
            ("0000-01-01 00:00Z", "from year 0001 to 9999"),
            ("10000-01-01 00:00Z", "from year 0001 to 9999"),
            ("2026-02-29 00:00Z", "that exists"),
            ("0044-03-15 12:00Z BC", "zone"),
            ("2026-07-01 12:00 CET", "one offset all year"),
            ("2026-07-01 12:00 met", "one offset all year"),
            ("2026-07-01 12:00 CST", "several zones"),
            ("2026-07-01 12:00:00.1234567Z", "microseconds"),
        ] {
            let error = parse_time(text, no_local).unwrap_err();
            assert!(error.to_string().contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn the_first_and_the_last_year_are_times() {
        for text in ["0001-01-01 00:00:00Z", "9999-12-31 23:59:59.999999Z"] {
            let (time, zone) = parse_time(text, no_local).unwrap();
            assert_eq!(zone.text(time), text);
        }
        for text in ["9999-12-31 23:59:59.999999-15:59", "0001-01-01 00:00+01"] {
            assert!(parse_time(text, no_local).unwrap_err().to_string().contains("in UTC"), "{text}");
        }
    }

    #[test]
    fn clock_changes_are_told_in_every_zone() {
        // Half an hour, a whole day that never was, and years before.
        for (text, readings) in [
            ("2026-04-05 01:45 Australia/Lord_Howe", ["+11:00", "+10:30"]),
            ("2026-11-01 01:30 America/New_York", ["-04:00", "-05:00"]),
            ("2026-10-04 02:15 Australia/Lord_Howe", ["+10:30", "+11:00"]),
            ("2011-12-30 12:00 Pacific/Apia", ["-10:00", "+14:00"]),
            ("2026-03-08 02:30 America/New_York", ["-05:00", "-04:00"]),
        ] {
            let error = parse_time(text, no_local).unwrap_err();
            let named: Vec<&str> = error.next.split('\'').skip(1).step_by(2).collect();
            assert_eq!(named.len(), 2, "{error:?}");
            for (named, offset) in named.iter().zip(readings) {
                assert!(named.ends_with(offset), "{text}: {error:?}");
                assert!(parse_time(named, no_local).is_ok(), "{named}");
            }
        }
        for text in ["2026-10-25 01:59:59.999999 Europe/Berlin", "2026-10-25 03:00 Europe/Berlin"] {
            assert!(parse_time(text, no_local).is_ok(), "{text}");
        }
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
}
