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
    /// How many closed segments are on their way at most. `WALSHIP_RECEIVE_UPLOADS_MAX`.
    pub uploads_max: Option<u64>,
    /// The file that says where everything is. `WALSHIP_RECEIVE_STATUS_FILE`.
    pub status_file: Option<PathBuf>,
}

impl ReceiveSettings {
    /// Returns the settings with what the environment says in the place of what the file says.
    pub(super) fn with_environment(self, environment: &Variables<'_>) -> Result<Self> {
        Ok(Self {
            slot: environment.text("WALSHIP_RECEIVE_SLOT")?.or(self.slot),
            uploads_max: environment.number("WALSHIP_RECEIVE_UPLOADS_MAX")?.or(self.uploads_max),
            status_file: environment.path("WALSHIP_RECEIVE_STATUS_FILE").or(self.status_file),
        })
    }
}
