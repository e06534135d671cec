//! A slot that the server has invalidated: it stays there, with its position, and nobody can stream through it.
//!
//! PostgreSQL 18 does that to a slot that nobody has used for `idle_replication_slot_timeout`. Where
//! `max_slot_wal_keep_size` is exceeded the position is gone as well, in every release: such a slot is seen before
//! it is used.
//! Source: `src/backend/replication/slot.c`, ReplicationSlotAcquire and InvalidatePossiblyObsoleteSlot.

use super::Receiver;
use crate::error::{Error, Result};
use crate::replication::{Connection, Host, ServerError};

/// The primary message for an invalidated slot, where the server's messages are not translated.
const NO_LONGER: &str = "can no longer access replication slot";

/// A slot that the server does not let anybody use.
#[derive(Debug)]
pub(super) struct Refused {
    host: Host,
    /// Whether it said that the slot is invalidated, in words that are understood here.
    said_so: bool,
    error: String,
}

impl Receiver {
    /// Takes note of a server that refuses to stream through the slot, and says it clearly.
    pub(super) fn slot_refused(
        &mut self,
        connection: &Connection,
        error: &Error,
        said: &ServerError,
    ) -> Error {
        let (host, slot) = (connection.host().clone(), &self.options.slot);
        self.refused =
            Some(Refused { host, said_so: said.message.contains(NO_LONGER), error: error.to_string() });
        Error::unavailable(format!("the slot \"{slot}\" cannot be used any more: {error}"))
            .with_safe(
                "what is stored is unchanged; whether the server still has all WAL behind it is seen next",
            )
            .with_next(
                "Nothing now: the slot is made anew, and WAL goes on where the archive ends. Make \
                 idle_replication_slot_timeout longer than `walship receive` may be away, or 0.",
            )
    }

    /// Returns whether a slot that shows a position holds nothing back, because the server has invalidated it. Looked at
    /// when the server did not let it be used a moment ago.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the server refuses it for another reason, or that cannot be found out.
    pub(super) async fn is_invalidated(
        &self,
        connection: &Connection,
        refused: Option<Refused>,
    ) -> Result<bool> {
        let Some(refused) = refused.filter(|refused| refused.host == *connection.host()) else {
            return Ok(false);
        };
        let slot = &self.options.slot;
        let sql = format!(
            "SELECT wal_status = 'lost' FROM pg_replication_slots WHERE slot_name = '{slot}' AND slot_type = 'physical'"
        );
        match self.ask_by_sql(connection, &sql).await {
            Ok(rows) if rows.get(0, 0) == Some("t") => Ok(true),
            // Somebody has made it anew meanwhile.
            Ok(rows) if refused.said_so && rows.get(0, 0) == Some("f") => Ok(false),
            // Whoever may only stream hears it from the server, where its messages are not translated.
            Err(_) if refused.said_so => Ok(true),
            _ => Err(Error::invalid(format!("the slot \"{slot}\" cannot be used: {}", refused.error))
                .with_safe("the slot was not changed; what is stored is unchanged")
                .with_next(format!(
                    "See pg_replication_slots. If the slot is invalidated, drop it with SELECT pg_drop_replication_slot('{slot}'): \
                     it is made anew."
                ))),
        }
    }
}
