//! Whether the time that a removal goes by can be right.

use chrono::{DateTime, TimeDelta, Utc};
use walship::catalog::Catalog;
use walship::pg::TimelineId;
use walship::{Error, Result};

use super::{Policy, Seen};

/// How far what is stored may seem to come from the future.
const AHEAD_MAX: TimeDelta = TimeDelta::days(1);

/// An archive to which nothing came for so long is idle, whatever the window.
const IDLE_MAX: TimeDelta = TimeDelta::days(8);

/// An archive is not called idle before.
const IDLE_MIN: TimeDelta = TimeDelta::days(1);

/// Returns whether a time is later than differing clocks explain.
pub(super) fn is_to_come(time: DateTime<Utc>, now: DateTime<Utc>) -> bool {
    time.signed_duration_since(now) > AHEAD_MAX
}

/// Refuses a clock that what is stored contradicts: with one that is ahead, all would look old.
///
/// # Errors
/// [`Error::Invalid`] with both times.
pub fn check_clock(
    catalog: &Catalog,
    seen: &Seen,
    policy: &Policy,
    now: DateTime<Utc>,
    accept_idle: bool,
) -> Result<()> {
    // What a machine said of the time is not later than when the store had it.
    let by_store =
        |said: DateTime<Utc>, written: Option<&DateTime<Utc>>| written.map_or(said, |at| said.min(*at));
    let finished =
        catalog.backups.iter().map(|backup| by_store(backup.finished, seen.written.get(&backup.id)));
    let begun = seen
        .recordless
        .iter()
        .filter_map(|begun| begun.start.map(|start| by_store(start.started, begun.last_written.as_ref())));
    // A server whose clock was ahead has left its times in its WAL for good: on older timelines they say nothing.
    let newest_timeline = catalog.segments.timelines().last().copied();
    let told = |(timeline, time): (&TimelineId, &DateTime<Utc>)| {
        (Some(*timeline) >= newest_timeline || !is_to_come(*time, now)).then_some(*time)
    };
    let Some(newest) = finished.chain(begun).chain(seen.last_times.iter().filter_map(told)).max() else {
        return Ok(());
    };
    let shown = |time: DateTime<Utc>| time.format("%Y-%m-%d %H:%M:%SZ").to_string();
    if is_to_come(newest, now) {
        return Err(Error::invalid(format!(
            "this machine says that it is {}, and something in the archive is of {}",
            shown(now),
            shown(newest)
        ))
        .with_safe("nothing was removed")
        .with_next("Set this machine's clock (is NTP running?), then try again."));
    }
    let window = policy.window().map_or(IDLE_MAX, |window| window.length() / 2);
    let idle = now.signed_duration_since(newest);
    if idle > window.clamp(IDLE_MIN, IDLE_MAX) && !accept_idle {
        return Err(Error::invalid(format!(
            "nothing came to the archive since {}, and this machine says that it is {}: with a clock that is ahead \
             everything would look old",
            shown(newest),
            shown(now)
        ))
        .with_safe("nothing was removed")
        .with_next(
            "Check this machine's clock, and whether the server still archives (`walship check`). If both are as \
             they should be, add --accept-idle.",
        ));
    }
    Ok(())
}
