//! The settings of `walship receive`: the table `[receive]`.

use std::path::PathBuf;

use serde::Deserialize;

use super::Variables;
use crate::error::Result;

/// What the file and the environment say about receiving; `None` leaves it to the command's flags and
/// their defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReceiveSettings {
    /// The replication slot. `WALSHIP_RECEIVE_SLOT`.
    pub slot: Option<String>,
    /// When the server hears that WAL is durable, `async`, `local` or `repository`. `WALSHIP_RECEIVE_FLUSH`.
    pub flush: Option<String>,
    /// How old bytes of the open segment may be before they are shipped, in milliseconds; 0: they wait for
    /// the whole segment. `WALSHIP_RECEIVE_TAIL_INTERVAL_MS`.
    pub tail_interval_ms: Option<u64>,
    /// How many closed segments are on their way at most. `WALSHIP_RECEIVE_UPLOADS_MAX`.
    pub uploads_max: Option<u64>,
    /// The file that says where everything is. `WALSHIP_RECEIVE_STATUS_FILE`.
    pub status_file: Option<PathBuf>,
    /// The folder in which WAL is durable with `flush = "local"`. `WALSHIP_RECEIVE_SPOOL`.
    pub spool: Option<PathBuf>,
    /// The most that the spool may hold, in MiB. `WALSHIP_RECEIVE_SPOOL_MIB_MAX`.
    pub spool_mib_max: Option<u64>,
}

impl ReceiveSettings {
    /// Returns the settings with what the environment says in the place of what the file says.
    pub(super) fn with_environment(self, environment: &Variables<'_>) -> Result<Self> {
        Ok(Self {
            slot: environment.text("WALSHIP_RECEIVE_SLOT")?.or(self.slot),
            flush: environment.text("WALSHIP_RECEIVE_FLUSH")?.or(self.flush),
            tail_interval_ms: environment
                .number("WALSHIP_RECEIVE_TAIL_INTERVAL_MS")?
                .or(self.tail_interval_ms),
            uploads_max: environment.number("WALSHIP_RECEIVE_UPLOADS_MAX")?.or(self.uploads_max),
            status_file: environment.path("WALSHIP_RECEIVE_STATUS_FILE").or(self.status_file),
            spool: environment.path("WALSHIP_RECEIVE_SPOOL").or(self.spool),
            spool_mib_max: environment.number("WALSHIP_RECEIVE_SPOOL_MIB_MAX")?.or(self.spool_mib_max),
        })
    }
}
