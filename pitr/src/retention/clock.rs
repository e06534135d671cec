//! Whether the time that a removal goes by can be right.

use chrono::{DateTime, TimeDelta, Utc};
use walship::catalog::Catalog;
use walship::{Error, Result};

use super::{Policy, Seen};

/// How far what is stored may seem to come from the future.
const AHEAD_MAX: TimeDelta = TimeDelta::days(1);

/// An archive to which nothing came for so long is idle, whatever the window.
const IDLE_MAX: TimeDelta = TimeDelta::days(8);

/// An archive is not called idle before.
const IDLE_MIN: TimeDelta = TimeDelta::days(1);

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
    let finished = catalog.backups.iter().map(|backup| backup.finished);
    let begun = seen.recordless.iter().filter_map(|begun| begun.start.map(|start| start.started));
    let Some(newest) = finished.chain(begun).chain(seen.last_times.values().copied()).max() else {
        return Ok(());
    };
    let shown = |time: DateTime<Utc>| time.format("%Y-%m-%d %H:%M:%SZ").to_string();
    if newest.signed_duration_since(now) > AHEAD_MAX {
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
