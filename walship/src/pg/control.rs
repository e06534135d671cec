//! `global/pg_control`: what a data directory says about itself.
//!
//! Source: `src/include/catalog/pg_control.h`, ControlFileData and CheckPoint.

use chrono::{DateTime, Utc};

use super::{Lsn, ParseError, SegmentSize, TimelineId};

/// The contents of pg_control of PostgreSQL 14 to 18, checked against its CRC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlData {
    /// The cluster's system identifier.
    pub system_identifier: u64,
    /// PG_CONTROL_VERSION: 1300 for 14 to 16, 1700, 1800.
    pub control_version: u32,
    /// The catalog version, which tells the major version; see [`ControlData::major`].
    pub catalog_version: u32,
    /// What the server was doing when it last wrote the file.
    pub state: ClusterState,
    /// When it last wrote the file, in whole seconds.
    pub time: DateTime<Utc>,
    /// Where the last checkpoint record starts.
    pub checkpoint: Lsn,
    /// Where replay starts from that checkpoint.
    pub redo: Lsn,
    /// The timeline of that checkpoint.
    pub timeline: TimelineId,
    /// The timeline before, where that checkpoint began a new one; else the same.
    pub previous_timeline: TimelineId,
    /// The next transaction id at that checkpoint, 64 bits with epoch.
    pub next_full_xid: u64,
    /// When that checkpoint was made, in whole seconds.
    pub checkpoint_time: DateTime<Utc>,
    /// How far replay must go before the cluster is consistent; invalid when it need not.
    pub min_recovery_point: Lsn,
    /// The timeline of that position; `None` when there is none.
    pub min_recovery_timeline: Option<TimelineId>,
    /// Where the backup started that this directory was restored from, while replay has not reached its end.
    pub backup_start: Lsn,
    /// Where that backup ended, when it was taken from a standby.
    pub backup_end: Lsn,
    /// Whether replay must still meet the record that ends that backup.
    pub backup_end_required: bool,
    /// `wal_level`: 0 minimal, 1 replica, 2 logical.
    pub wal_level: i32,
    /// `wal_log_hints`.
    pub wal_log_hints: bool,
    /// `max_connections`.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`.
    pub max_prepared_transactions: i32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_transaction: i32,
    /// `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
    /// The size of a data page in bytes.
    pub block_size: u32,
    /// How many pages a file of a relation holds before the next one begins.
    pub relation_file_blocks: u32,
    /// The size of a WAL page in bytes.
    pub wal_block_size: u32,
    /// The WAL segment size.
    pub segment_size: SegmentSize,
    /// The version of data page checksums; 0 when they are off.
    pub data_checksum_version: u32,
}

/// What the server was doing when it last wrote pg_control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// Just made, or by `pg_resetwal`.
    StartingUp,
    /// Shut down cleanly.
    ShutDown,
    /// Shut down cleanly while it was a standby or recovering.
    ShutDownInRecovery,
    /// In the middle of shutting down.
    ShuttingDown,
    /// Recovering from a crash.
    InCrashRecovery,
    /// Recovering from an archive, or a standby.
    InArchiveRecovery,
    /// Running, or crashed while it was.
    InProduction,
}

impl ControlData {
    /// The length of the file; only the first few hundred bytes say anything.
    pub const FILE_LEN: usize = 8192;

    /// Parses the file's contents.
    ///
    /// # Errors
    /// [`ParseError`] for a file that is too short, of another version, with a wrong CRC, or with values
    /// that no server writes.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        let fields = Fields(bytes);
        let control_version = fields.u32(8)?;
        // Where the CRC lies; 18 put a flag before the 32 bytes in front of it.
        let crc_at = match control_version {
            1300 | 1700 => 288,
            1800 => 292,
            version if version != 0 && version & 0xFFFF == 0 => {
                return Err(ParseError::new("pg_control was written by a machine of the other byte order"));
            }
            version => {
                return Err(ParseError::new(format!(
                    "pg_control has version {version}; known are 1300 (PostgreSQL 14 to 16), 1700 and 1800"
                )));
            }
        };
        let (stored, computed) = (fields.u32(crc_at)?, crc32c::crc32c(fields.take(0, crc_at)?));
        if stored != computed {
            return Err(ParseError::new(format!(
                "pg_control is damaged: its CRC is {computed:08X}, it says {stored:08X}"
            )));
        }
        // `wal_level` and the limits lie behind the copy of the checkpoint (88 bytes from 40 on).
        Ok(Self {
            system_identifier: fields.u64(0)?,
            control_version,
            catalog_version: fields.u32(12)?,
            state: ClusterState::from_number(fields.u32(16)?)?,
            time: fields.time(24)?,
            checkpoint: fields.lsn(32)?,
            redo: fields.lsn(40)?,
            timeline: fields.timeline(48)?,
            previous_timeline: fields.timeline(52)?,
            next_full_xid: fields.u64(64)?,
            checkpoint_time: fields.time(104)?,
            min_recovery_point: fields.lsn(136)?,
            min_recovery_timeline: TimelineId::new(fields.u32(144)?),
            backup_start: fields.lsn(152)?,
            backup_end: fields.lsn(160)?,
            backup_end_required: fields.flag(168)?,
            wal_level: fields.i32(172)?,
            wal_log_hints: fields.flag(176)?,
            max_connections: fields.i32(180)?,
            max_worker_processes: fields.i32(184)?,
            max_wal_senders: fields.i32(188)?,
            max_prepared_transactions: fields.i32(192)?,
            max_locks_per_transaction: fields.i32(196)?,
            track_commit_timestamp: fields.flag(200)?,
            block_size: fields.u32(216)?,
            relation_file_blocks: fields.u32(220)?,
            wal_block_size: fields.u32(224)?,
            segment_size: SegmentSize::try_from(u64::from(fields.u32(228)?))?,
            data_checksum_version: fields.u32(252)?,
        })
    }

    /// Returns the major version that made the catalog, as far as released versions go; `None` for a
    /// development version.
    ///
    /// Source: `src/include/catalog/catversion.h` of each release.
    pub fn major(&self) -> Option<u32> {
        match self.catalog_version {
            202_107_181 => Some(14),
            202_209_061 => Some(15),
            202_307_071 => Some(16),
            202_406_281 => Some(17),
            202_506_291 => Some(18),
            _ => None,
        }
    }

    /// Returns whether the server was shut down cleanly, in recovery or not.
    pub fn is_shut_down(&self) -> bool {
        matches!(self.state, ClusterState::ShutDown | ClusterState::ShutDownInRecovery)
    }
}

impl ClusterState {
    fn from_number(number: u32) -> Result<Self, ParseError> {
        Ok(match number {
            0 => Self::StartingUp,
            1 => Self::ShutDown,
            2 => Self::ShutDownInRecovery,
            3 => Self::ShuttingDown,
            4 => Self::InCrashRecovery,
            5 => Self::InArchiveRecovery,
            6 => Self::InProduction,
            _ => return Err(ParseError::new(format!("pg_control names the unknown state {number}"))),
        })
    }
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&self, at: usize, len: usize) -> Result<&'a [u8], ParseError> {
        self.0
            .get(at..at + len)
            .ok_or_else(|| ParseError::new(format!("pg_control has only {} bytes", self.0.len())))
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], ParseError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(at, N)?);
        Ok(array)
    }

    fn u32(&self, at: usize) -> Result<u32, ParseError> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn i32(&self, at: usize) -> Result<i32, ParseError> {
        self.array(at).map(i32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, ParseError> {
        self.array(at).map(u64::from_le_bytes)
    }

    fn lsn(&self, at: usize) -> Result<Lsn, ParseError> {
        self.u64(at).map(Lsn)
    }

    fn flag(&self, at: usize) -> Result<bool, ParseError> {
        self.array::<1>(at).map(|byte| byte != [0])
    }

    fn timeline(&self, at: usize) -> Result<TimelineId, ParseError> {
        TimelineId::try_from(self.u32(at)?)
    }

    fn time(&self, at: usize) -> Result<DateTime<Utc>, ParseError> {
        let seconds = self.array(at).map(i64::from_le_bytes)?;
        DateTime::from_timestamp(seconds, 0)
            .ok_or_else(|| ParseError::new(format!("pg_control holds the impossible time {seconds}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(version: u32) -> Vec<u8> {
        let mut file = vec![0u8; ControlData::FILE_LEN];
        let mut put = |at: usize, value: &[u8]| file[at..at + value.len()].copy_from_slice(value);
        put(0, &7_000_000_000_000_000_001u64.to_le_bytes());
        put(8, &version.to_le_bytes());
        put(12, &202_506_291u32.to_le_bytes());
        put(16, &6u32.to_le_bytes());
        put(32, &0x0300_0060u64.to_le_bytes());
        put(40, &0x0300_0028u64.to_le_bytes());
        put(48, &3u32.to_le_bytes());
        put(52, &2u32.to_le_bytes());
        put(172, &1u32.to_le_bytes());
        put(180, &100u32.to_le_bytes());
        put(216, &8192u32.to_le_bytes());
        put(224, &8192u32.to_le_bytes());
        put(228, &(16u32 << 20).to_le_bytes());
        put(252, &1u32.to_le_bytes());
        let crc_at = if version == 1800 { 292 } else { 288 };
        let crc = crc32c::crc32c(&file[..crc_at]);
        file[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        file
    }

    #[test]
    fn every_known_version_parses() {
        for version in [1300, 1700, 1800] {
            let data = ControlData::parse(&sample(version)).unwrap();
            assert_eq!(data.system_identifier, 7_000_000_000_000_000_001);
            assert_eq!((data.checkpoint, data.redo), (Lsn(0x0300_0060), Lsn(0x0300_0028)));
            assert_eq!((data.timeline.get(), data.previous_timeline.get()), (3, 2));
            assert_eq!(data.state, ClusterState::InProduction);
            assert_eq!((data.max_connections, data.data_checksum_version), (100, 1));
            assert_eq!(data.segment_size, SegmentSize::DEFAULT);
            assert_eq!(data.major(), Some(18));
        }
    }

    #[test]
    fn damage_and_other_versions_are_refused() {
        assert!(ControlData::parse(&sample(1201)).unwrap_err().to_string().contains("1201"));
        assert!(ControlData::parse(&sample(1300u32.swap_bytes())).unwrap_err().to_string().contains("byte"));
        let good = sample(1800);
        for at in [0, 20, 48, 228, 291, 295] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(ControlData::parse(&bad).unwrap_err().to_string().contains("CRC"), "{at}");
        }
        for len in 0..296 {
            assert!(ControlData::parse(&good[..len]).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600),
                                  version in proptest::sample::select(vec![0u32, 1300, 1700, 1800])) {
            let _ = ControlData::parse(&bytes);
            // With a right version and CRC the values themselves are still hostile.
            let mut file = bytes;
            file.resize(600, 0xAA);
            file[8..12].copy_from_slice(&version.to_le_bytes());
            let crc_at = if version == 1800 { 292 } else { 288 };
            let crc = crc32c::crc32c(&file[..crc_at]);
            file[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
            let _ = ControlData::parse(&file);
        }
    }
}
