//! What a replication session tells about the server, and its replication slots.

use super::connection::Connection;
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentSize, TimelineHistory, TimelineId};

/// What `IDENTIFY_SYSTEM` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SystemIdentity {
    /// The cluster's system identifier.
    pub system_identifier: u64,
    /// The timeline the server is on.
    pub timeline: TimelineId,
    /// How far WAL is flushed (on a standby: replayed).
    pub flush_lsn: Lsn,
}

/// Returns who the server is. Needs a replication session.
///
/// # Errors
/// What the server says; [`Error::Mismatch`] for an answer that is none.
pub async fn identify_system(connection: &mut Connection) -> Result<SystemIdentity> {
    let rows = connection.query("IDENTIFY_SYSTEM").await?;
    let identity = || {
        Some(SystemIdentity {
            system_identifier: rows.get(0, 0)?.parse().ok()?,
            timeline: TimelineId::new(rows.get(0, 1)?.parse().ok()?)?,
            flush_lsn: rows.get(0, 2)?.parse().ok()?,
        })
    };
    identity().ok_or_else(|| Error::mismatch("the answer to IDENTIFY_SYSTEM makes no sense"))
}

/// Returns the value of a setting. Works in both kinds of sessions.
///
/// # Errors
/// What the server says; [`Error::Invalid`] for a name that is none.
pub async fn show(connection: &mut Connection, setting: &str) -> Result<String> {
    if setting.is_empty() || !setting.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.') {
        return Err(Error::invalid(format!("{setting:?} is not the name of a setting")));
    }
    let rows = connection.query(&format!("SHOW {setting}")).await?;
    rows.get(0, 0).map(str::to_owned).ok_or_else(|| Error::mismatch(format!("SHOW {setting} gave nothing")))
}

/// Returns the value of a setting that is a size, in bytes; `None` for -1, which stands for no limit.
///
/// # Errors
/// As [`show`].
pub async fn show_bytes(connection: &mut Connection, setting: &str) -> Result<Option<u64>> {
    let text = show(connection, setting).await?;
    match text.as_str() {
        "-1" => Ok(None),
        text => parse_bytes(text)
            .map(Some)
            .ok_or_else(|| Error::mismatch(format!("{setting} = {text:?} is not understood"))),
    }
}

/// Returns the segment size of the server.
///
/// # Errors
/// What the server says; [`Error::Mismatch`] for a size that is none.
pub async fn segment_size(connection: &mut Connection) -> Result<SegmentSize> {
    let text = show(connection, "wal_segment_size").await?;
    parse_bytes(&text)
        .and_then(SegmentSize::new)
        .ok_or_else(|| Error::mismatch(format!("wal_segment_size = {text:?} is not understood")))
}

/// How long a slot lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotLifetime {
    /// Until the session ends.
    Temporary,
    /// Until it is dropped.
    Permanent,
}

/// Creates a physical slot that holds WAL back from this moment on (`RESERVE_WAL`). Needs a
/// replication session. The server does not say where it starts: not after the position that
/// [`identify_system`] gives later.
///
/// # Errors
/// What the server says: [`Error::Unavailable`] when all slots are in use, [`Error::Conflict`] when
/// the name is taken, [`Error::Denied`] without the right; [`Error::Invalid`] for a name that is none.
pub async fn create_slot(connection: &mut Connection, name: &str, lifetime: SlotLifetime) -> Result<()> {
    check_slot_name(name)?;
    let lifetime = match lifetime {
        SlotLifetime::Temporary => "TEMPORARY ",
        SlotLifetime::Permanent => "",
    };
    let command = format!("CREATE_REPLICATION_SLOT \"{name}\" {lifetime}PHYSICAL RESERVE_WAL");
    connection.query(&command).await.map(|_| ())
}

/// What is known of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    /// There is no slot of this name.
    Missing,
    /// It holds WAL from this position on.
    Holds(Lsn),
    /// It is there and holds no WAL: never used, or its WAL was removed.
    HoldsNothing,
    /// This version (before 15) does not tell.
    Unknown,
}

/// Returns what a physical slot holds. Needs a replication session.
///
/// # Errors
/// What the server says: [`Error::Invalid`] for a slot of another kind.
pub async fn read_slot(connection: &mut Connection, name: &str) -> Result<SlotState> {
    check_slot_name(name)?;
    if connection.server_version()? / 10_000 < 15 {
        return Ok(SlotState::Unknown);
    }
    let rows = connection.query(&format!("READ_REPLICATION_SLOT \"{name}\"")).await?;
    match (rows.get(0, 0), rows.get(0, 1)) {
        (None, _) => Ok(SlotState::Missing),
        (Some(_), None) => Ok(SlotState::HoldsNothing),
        (Some(_), Some(text)) => match text.parse() {
            Ok(Lsn::INVALID) => Ok(SlotState::HoldsNothing),
            Ok(lsn) => Ok(SlotState::Holds(lsn)),
            Err(_) => Err(Error::mismatch("the answer to READ_REPLICATION_SLOT makes no sense")),
        },
    }
}

/// Drops a slot. Needs a replication session.
///
/// # Errors
/// What the server says, above all that somebody uses it.
pub async fn drop_slot(connection: &mut Connection, name: &str) -> Result<()> {
    check_slot_name(name)?;
    connection.query(&format!("DROP_REPLICATION_SLOT \"{name}\"")).await.map(|_| ())
}

/// Fails for a name that no slot can have.
///
/// # Errors
/// [`Error::Invalid`], with PostgreSQL's rule.
pub fn check_slot_name(name: &str) -> Result<()> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if name.is_empty() || name.len() > 63 || !name.bytes().all(legal) {
        return Err(Error::invalid(format!("{name:?} is not the name of a replication slot"))
            .with_next("Use up to 63 of a-z, 0-9 and \"_\"."));
    }
    Ok(())
}

/// Returns the text of a timeline's history file and what it says. Needs a replication session.
///
/// # Errors
/// What the server says; [`Error::Mismatch`] for a file that PostgreSQL would refuse.
pub async fn timeline_history(
    connection: &mut Connection,
    timeline: TimelineId,
) -> Result<(String, TimelineHistory)> {
    let rows = connection.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
    let text = rows
        .get(0, 1)
        .ok_or_else(|| Error::mismatch(format!("the server sent no history of {timeline:?}")))?
        .to_owned();
    let history = TimelineHistory::parse(timeline, &text)?;
    Ok((text, history))
}

/// Reads `16MB`, `1GB`, `8kB`, `512`.
fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        "TB" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_servers_write_them() {
        assert_eq!(parse_bytes("16MB"), Some(16 << 20));
        assert_eq!(parse_bytes("1GB"), Some(1 << 30));
        assert_eq!(parse_bytes("x"), None);
        assert_eq!(parse_bytes("18446744073709551615GB"), None);
    }

    #[test]
    fn slot_names_are_postgres_own() {
        for name in ["a", "walship_1", &"x".repeat(63)] {
            check_slot_name(name).unwrap();
        }
        for name in ["", "A", "a-b", "a\"b", "a b", &"x".repeat(64)] {
            assert!(check_slot_name(name).is_err(), "{name:?}");
        }
    }
}
