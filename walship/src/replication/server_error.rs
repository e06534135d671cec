//! What the server said when it refused: its fields, and which [`Error`] that is.

use std::fmt;

use crate::error::Error;

/// An error or a notice of the server's. Pure.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
pub struct ServerError {
    /// `ERROR`, `FATAL`, `WARNING`, ...; never translated.
    pub severity: String,
    /// The SQLSTATE, five characters.
    pub code: String,
    /// The primary message.
    pub message: String,
    /// The detail, if any.
    pub detail: Option<String>,
    /// The hint, if any.
    pub hint: Option<String>,
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, ": {detail}")?;
        }
        write!(f, " (SQLSTATE {})", self.code)
    }
}

impl ServerError {
    /// Returns the error with the class a caller acts on, and advice where the cause is known.
    pub fn into_error(self, doing: &str) -> Error {
        let text = format!("{doing}: the server says: {self}");
        let hint = self.hint.clone();
        let (error, next) = match self.code.as_str() {
            "28P01" => (
                Error::denied(text),
                Some("Check the password in ~/.pgpass or PGPASSWORD, and the user's name."),
            ),
            "28000" if self.message.contains("pg_hba.conf") && self.message.contains("no encryption") => (
                Error::denied(text),
                Some(
                    "Try sslmode=require: the server may let this user in with TLS only. Else add a line for this user and address to the server's pg_hba.conf (database \"replication\" for replication connections) and reload.",
                ),
            ),
            "28000" if self.message.contains("pg_hba.conf") => (
                Error::denied(text),
                Some(
                    "Add a line for this user and address to the server's pg_hba.conf (database \"replication\" for replication connections) and reload.",
                ),
            ),
            "28000" => (Error::denied(text), Some("Check the user's name and how pg_hba.conf lets it in.")),
            "42501" => (
                Error::denied(text),
                Some("Give the user the rights: ALTER ROLE name REPLICATION; for settings GRANT pg_monitor."),
            ),
            "3D000" => (Error::missing(text), Some("Name an existing database, such as postgres.")),
            // No server with it can have WAL senders at all: waiting does not help.
            "53300" if self.message.contains("max_wal_senders") && self.message.contains(" 0)") => (
                Error::invalid(text),
                Some(
                    "Set max_wal_senders to 2 or more, and wal_level to replica (with minimal there can be no senders); then restart the server.",
                ),
            ),
            "53300" => (
                Error::unavailable(text),
                Some("Raise max_wal_senders (or max_connections), or end a connection that is not needed."),
            ),
            "53400" => (
                Error::unavailable(text),
                Some("Raise max_replication_slots or drop a slot that is not needed."),
            ),
            "57P03" | "57P01" | "57P02" | "57P05" => {
                (Error::unavailable(text), Some("Try again when the server is up and accepts connections."))
            }
            "42710" => (Error::conflict(text), Some("Choose another name.")),
            "XX001" | "XX002" => (
                Error::corrupt(text),
                Some("The server's own data is damaged: check its storage, and find the last sound backup."),
            ),
            "55006" => (
                Error::unavailable(text),
                Some(
                    "Give each receiver a slot of its own (--slot). What a dead one held is free once the server notices (wal_sender_timeout).",
                ),
            ),
            "55000" => (Error::invalid(text), None),
            "42601" | "0A000" | "08P01" => (
                Error::mismatch(text),
                Some("Check that this is PostgreSQL 14 to 18 itself, not a pooler or another version."),
            ),
            code if code.starts_with("08")
                || code.starts_with("53")
                || code.starts_with("57")
                || code.starts_with("58") =>
            {
                (Error::unavailable(text), Some("See the server's log; try again once it is mended."))
            }
            _ => (Error::invalid(text), None),
        };
        let error = match (next, hint) {
            (Some(next), _) => error.with_next(next),
            (None, Some(hint)) => error.with_next(format!("The server's hint: {hint}")),
            (None, None) => error.with_next("See the server's log for the reason."),
        };
        error.with_source(self)
    }

    /// Returns the server's own words inside `error`, if the server caused it.
    pub fn of(error: &Error) -> Option<&Self> {
        error.cause()?.downcast_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: &str, message: &str) -> Error {
        ServerError { code: code.into(), message: message.into(), ..Default::default() }
            .into_error("connecting")
    }

    #[test]
    fn each_refusal_has_its_class_and_its_way_out() {
        let wrong = error("28P01", "password authentication failed for user \"u\"");
        assert!(matches!(wrong, Error::Denied(_)) && wrong.next().contains(".pgpass"));
        assert!(wrong.to_string().contains("SQLSTATE 28P01"));
        assert_eq!(ServerError::of(&wrong).unwrap().code, "28P01");
        let hba = error("28000", "no pg_hba.conf entry for replication connection");
        assert!(matches!(hba, Error::Denied(_)) && hba.next().contains("pg_hba.conf"));
        let role = error("42501", "must be superuser or replication role to start walsender");
        assert!(matches!(role, Error::Denied(_)) && role.next().contains("REPLICATION"));
        let full = error("53300", "number of requested standby connections exceeds max_wal_senders");
        assert!(full.is_transient() && full.next().contains("max_wal_senders"));
        let none = error(
            "53300",
            "number of requested standby connections exceeds \"max_wal_senders\" (currently 0)",
        );
        assert!(!none.is_transient() && none.next().contains("wal_level"));
        let full =
            error("53300", "number of requested standby connections exceeds max_wal_senders (currently 10)");
        assert!(full.is_transient());
        let plain = error("28000", "no pg_hba.conf entry for host \"::1\", user \"u\", no encryption");
        assert!(matches!(plain, Error::Denied(_)) && plain.next().contains("sslmode=require"));
        assert!(error("55006", "replication slot \"walship\" is active for PID 7").is_transient());
        assert!(error("57P03", "the database system is starting up").is_transient());
        assert!(matches!(error("XX001", "checksum"), Error::Corrupt(_)));
        assert!(matches!(error("22023", "x"), Error::Invalid(_)));
    }
}
