//! What the server lets the slot hold back, looked at before it matters.

use std::path::Path;

use super::{ReceiveEvent, Receiver};
use crate::archive::DataDirectory;
use crate::error::Result;
use crate::replication::{Connection, Host, show, show_bytes};

impl Receiver {
    /// Warns where an outage would soon cost WAL, or fill the server's disk.
    pub(super) async fn warn_of_limits(
        &self,
        connection: &mut Connection,
        system_identifier: u64,
    ) -> Result<()> {
        let keep = show_bytes(connection, "max_slot_wal_keep_size").await?;
        let max_wal = show_bytes(connection, "max_wal_size").await?.unwrap_or(0);
        // Who may not see where the data lies is not told how full the disk is.
        let free = match is_local(connection.host()) {
            true => show(connection, "data_directory").await.ok(),
            false => None,
        };
        let free = free.and_then(|directory| free_bytes(Path::new(&directory), system_identifier));
        for warning in warnings(keep, max_wal, free) {
            (self.progress)(ReceiveEvent::Warning(warning));
        }
        Ok(())
    }
}

/// Whether the server runs on this machine.
fn is_local(host: &Host) -> bool {
    let address = host.address.or_else(|| host.name.parse().ok());
    host.socket_folders().is_some()
        || host.name == "localhost"
        || address.is_some_and(|address: std::net::IpAddr| address.is_loopback())
}

/// Returns the room on the disk with the server's WAL, if its data directory is that of this very cluster.
fn free_bytes(directory: &Path, system_identifier: u64) -> Option<u64> {
    let wal = directory.join("pg_wal");
    let (found, _) = DataDirectory::of_wal_file(&wal.join("x"))?.identity().ok()??;
    if !directory.is_absolute() || found != system_identifier {
        return None;
    }
    let space = nix::sys::statvfs::statvfs(&wal).ok()?;
    // The types differ between platforms.
    #[allow(clippy::useless_conversion)]
    let (blocks, size) = (u64::from(space.blocks_available()), u64::from(space.fragment_size()));
    blocks.checked_mul(size)
}

/// Returns what to say about `max_slot_wal_keep_size` (`keep`; `None`: no limit), `max_wal_size`, and the room on
/// the disk where that is known.
fn warnings(keep: Option<u64>, max_wal: u64, free: Option<u64>) -> Vec<String> {
    let mut warnings = Vec::new();
    match keep {
        None => {
            let room = free.map_or(String::new(), |free| format!(" ({} are free)", mib(free)));
            warnings.push(format!(
                "max_slot_wal_keep_size is -1: while the repository cannot be reached, the server keeps all WAL for the \
                 slot until its disk is full{room}. Set it to what the disk can take"
            ));
        }
        Some(keep) => {
            if keep < max_wal {
                warnings.push(format!(
                    "max_slot_wal_keep_size is {}, less than max_wal_size ({}): an outage between two checkpoints is \
                     enough for WAL to be lost. Raise it to what the disk can take",
                    mib(keep),
                    mib(max_wal)
                ));
            }
            if let Some(free) = free.filter(|free| *free < keep) {
                warnings.push(format!(
                    "max_slot_wal_keep_size is {}, and the server's disk has {} free: in an outage it is full before the \
                     limit helps. Lower the one or enlarge the other",
                    mib(keep),
                    mib(free)
                ));
            }
        }
    }
    warnings
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_that_an_outage_would_reach_is_named() {
        const GIB: u64 = 1 << 30;
        for (keep, free, expected) in [
            (None, None, vec!["until its disk is full. Set"]),
            (None, Some(3 * GIB), vec!["until its disk is full (3072 MiB are free). Set"]),
            (Some(4 * GIB), None, vec![]),
            (Some(4 * GIB), Some(5 * GIB), vec![]),
            (Some(4 * GIB), Some(3 * GIB), vec!["is 4096 MiB, and the server's disk has 3072 MiB free"]),
            (Some(GIB / 2), Some(GIB / 4), vec!["less than max_wal_size (1024 MiB)", "has 256 MiB free"]),
        ] {
            let told = warnings(keep, GIB, free);
            assert_eq!(told.len(), expected.len(), "{told:?}");
            for (told, expected) in told.iter().zip(expected) {
                assert!(told.contains(expected), "{told}");
            }
        }
    }
}
