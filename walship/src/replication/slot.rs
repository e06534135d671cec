//! What a replication session tells about the server, and its replication slots.

use super::connection::Connection;
use crate::error::{Error, Result};
use crate::pg::{Lsn, TimelineHistory, TimelineId};

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
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if name.is_empty() || name.len() > 63 || !name.bytes().all(legal) {
        return Err(Error::invalid(format!("{name:?} is not the name of a replication slot")));
    }
    let lifetime = match lifetime {
        SlotLifetime::Temporary => "TEMPORARY ",
        SlotLifetime::Permanent => "",
    };
    let command = format!("CREATE_REPLICATION_SLOT \"{name}\" {lifetime}PHYSICAL RESERVE_WAL");
    connection.query(&command).await.map(|_| ())
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
