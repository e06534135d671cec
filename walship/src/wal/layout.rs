//! What differs in the WAL of PostgreSQL's major versions: one table, one row per major.
//!
//! Everything that is equal in 14 to 18 stands as a constant where it is used.

/// Resource manager ids. These have not changed since PostgreSQL 9.5.
///
/// Source: `src/include/access/rmgrlist.h`.
pub mod rmgr {
    /// `XLOG`: checkpoints, switches, restore points, full-page images.
    pub const XLOG: u8 = 0;
    /// `Transaction`: commits, aborts, prepares.
    pub const XACT: u8 = 1;
    /// `Storage`: creation and truncation of relation files.
    pub const SMGR: u8 = 2;
    /// `Database`: CREATE and DROP DATABASE.
    pub const DATABASE: u8 = 4;
    /// `Tablespace`: CREATE and DROP TABLESPACE.
    pub const TABLESPACE: u8 = 5;
    /// `Heap`: inserts, updates, deletes.
    pub const HEAP: u8 = 10;
    /// The largest id of a built-in resource manager.
    pub const MAX_BUILTIN: u8 = 21;
    /// The smallest id of one that an extension registers (PostgreSQL 15 and later).
    pub const MIN_CUSTOM: u8 = 128;

    /// The name that `pg_waldump` prints, for built-in ones.
    pub fn name(id: u8) -> Option<&'static str> {
        const NAMES: [&str; MAX_BUILTIN as usize + 1] = [
            "XLOG",
            "Transaction",
            "Storage",
            "CLOG",
            "Database",
            "Tablespace",
            "MultiXact",
            "RelMap",
            "Standby",
            "Heap2",
            "Heap",
            "Btree",
            "Hash",
            "Gin",
            "Gist",
            "Sequence",
            "SPGist",
            "BRIN",
            "CommitTs",
            "ReplicationOrigin",
            "Generic",
            "LogicalMessage",
        ];
        NAMES.get(usize::from(id)).copied()
    }
}

/// The WAL layout of one major version.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout {
    /// The major version.
    pub major: u32,
    /// XLOG_PAGE_MAGIC.
    pub page_magic: u16,
    /// The info code of DROP DATABASE. 15 gave 0x10 to the new CREATE DATABASE strategy.
    pub(crate) database_drop: u8,
    /// The length of an item in the list of dropped statistics in commit and abort records; `None`
    /// where there is no such list (14). 18 widened the object id.
    pub(crate) dropped_stats_item: Option<usize>,
    /// The bits in a block image's flags that say it is compressed. Until 14 one bit, from 15 one per
    /// method (pglz, lz4, zstd), and the "apply" bit moved.
    pub(crate) image_compressed: u8,
    /// Whether resource managers of extensions (id 128 and up) exist.
    pub(crate) custom_rmgrs: bool,
    /// Whether PREPARE records count dropped statistics, which moves the fields behind them.
    pub(crate) prepare_has_stats: bool,
    /// The length of an end-of-recovery record's data; 17 added `wal_level`.
    pub(crate) end_of_recovery_len: usize,
    /// Where `datconnlimit` lies in a row of `pg_database`; until 14 two names lay before it.
    pub(crate) database_limit_at: usize,
    /// The longest record. 16 set 1020 MiB; before, only the memory allocator's limit stood.
    pub(crate) max_record_len: u32,
}

const ALLOCATION_LIMIT: u32 = 0x3FFF_FFFF;
const RECORD_LIMIT: u32 = 1020 << 20;

/// One row per supported major version.
static LAYOUTS: [Layout; 5] = [
    Layout {
        major: 14,
        page_magic: 0xD10D,
        database_drop: 0x10,
        dropped_stats_item: None,
        image_compressed: 0x02,
        custom_rmgrs: false,
        prepare_has_stats: false,
        end_of_recovery_len: 16,
        database_limit_at: 208,
        max_record_len: ALLOCATION_LIMIT,
    },
    Layout {
        major: 15,
        page_magic: 0xD110,
        database_drop: 0x20,
        dropped_stats_item: Some(12),
        image_compressed: 0x1C,
        custom_rmgrs: true,
        prepare_has_stats: true,
        end_of_recovery_len: 16,
        database_limit_at: 80,
        max_record_len: ALLOCATION_LIMIT,
    },
    Layout {
        major: 16,
        page_magic: 0xD113,
        database_drop: 0x20,
        dropped_stats_item: Some(12),
        image_compressed: 0x1C,
        custom_rmgrs: true,
        prepare_has_stats: true,
        end_of_recovery_len: 16,
        database_limit_at: 80,
        max_record_len: RECORD_LIMIT,
    },
    Layout {
        major: 17,
        page_magic: 0xD116,
        database_drop: 0x20,
        dropped_stats_item: Some(12),
        image_compressed: 0x1C,
        custom_rmgrs: true,
        prepare_has_stats: true,
        end_of_recovery_len: 20,
        database_limit_at: 80,
        max_record_len: RECORD_LIMIT,
    },
    Layout {
        major: 18,
        page_magic: 0xD118,
        database_drop: 0x20,
        dropped_stats_item: Some(16),
        image_compressed: 0x1C,
        custom_rmgrs: true,
        prepare_has_stats: true,
        end_of_recovery_len: 20,
        database_limit_at: 80,
        max_record_len: RECORD_LIMIT,
    },
];

impl Layout {
    /// Returns the layout that a page magic stands for; `None` for a version that is not known here.
    pub fn for_magic(magic: u16) -> Option<&'static Self> {
        LAYOUTS.iter().find(|layout| layout.page_magic == magic)
    }

    /// Returns whether a page magic is that of a known version, or could be that of a newer one.
    pub fn is_known_or_newer(magic: u16) -> bool {
        let newest = LAYOUTS.iter().map(|layout| layout.page_magic).max().unwrap_or(u16::MAX);
        Self::for_magic(magic).is_some() || (newest < magic && magic <= 0xD2FF)
    }

    /// Returns the layout of a major version; `None` for one that is not known here.
    pub fn for_major(major: u32) -> Option<&'static Self> {
        LAYOUTS.iter().find(|layout| layout.major == major)
    }

    /// Returns whether a resource manager with this id can exist.
    ///
    /// Source: `src/include/access/rmgr.h`, RmgrIdIsValid.
    #[inline]
    pub(crate) fn is_rmgr(&self, id: u8) -> bool {
        id <= rmgr::MAX_BUILTIN || (self.custom_rmgrs && id >= rmgr::MIN_CUSTOM)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_supported_major_has_one_row() {
        for major in 14..=18 {
            let layout = Layout::for_major(major).unwrap();
            assert_eq!(Layout::for_magic(layout.page_magic), Some(layout));
        }
        assert!(Layout::for_magic(0xD106).is_none(), "13 is not supported");
        for (magic, plausible) in [
            (0xD106, false),
            (0xD10D, true),
            (0xD111, false),
            (0xD118, true),
            (0xD119, true),
            (0xD398, false),
        ] {
            assert_eq!(Layout::is_known_or_newer(magic), plausible, "{magic:#06X}");
        }
        assert_eq!(rmgr::name(21), Some("LogicalMessage"));
        assert_eq!(rmgr::name(22), None);
    }
}
