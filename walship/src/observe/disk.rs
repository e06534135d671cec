//! How full a file system is.

use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::watch::Disk;

/// Returns the room of the file system that a path lies on, as an ordinary user has it; `None` when it cannot be told.
/// Blocks, on a mount that hangs without end.
pub(super) fn room(path: &Path) -> Option<Disk> {
    let stat = statvfs(path).ok()?;
    let block = stat.fragment_size() as u64;
    let (all, free, available) = (stat.blocks(), stat.blocks_free(), stat.blocks_available());
    // What is kept for root is nobody else's.
    let total = all.saturating_sub(free.saturating_sub(available));
    Some(Disk { total_bytes: total.saturating_mul(block), free_bytes: available.saturating_mul(block) })
}
