//! Data pages: where a relation's files lie, and whether a page is what PostgreSQL wrote.
//!
//! Source: `src/include/storage/bufpage.h`, `src/include/storage/checksum_impl.h`,
//! `src/backend/backup/basebackup.c` (sendFile, verify_page_checksum).

use std::path::Path;

use super::{Lsn, Oid};

/// The size of a data page in bytes: PostgreSQL's default, and the only one whose pages are checked.
pub const PAGE_BYTES: usize = 8192;

/// What a page turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// Its checksum is right.
    Sound,
    /// Never written: all zeros.
    New,
    /// Changed since the backup began: replay writes it anew, whatever is in it now.
    Replayed,
    /// None of these.
    Damaged {
        /// The checksum that the page says.
        stored: u16,
        /// The checksum that it should say.
        computed: u16,
    },
}

/// Returns what a page is, by the server's own rule for pages that are read while it writes them: one whose LSN is at
/// or behind the backup's start comes whole from the WAL and is not judged.
///
/// `block` is its number in the whole relation, all of its files counted.
/// # Panics
/// Never; a slice that is no whole page is damaged.
pub fn judge(page: &[u8], block: u32, start: Lsn) -> PageState {
    let Some(header) = page.get(..16).filter(|_| page.len() == PAGE_BYTES) else {
        return PageState::Damaged { stored: 0, computed: 0 };
    };
    let upper = u16::from_le_bytes([header[14], header[15]]);
    if upper == 0 && page.iter().all(|byte| *byte == 0) {
        return PageState::New;
    }
    if lsn(page) >= start {
        return PageState::Replayed;
    }
    let stored = u16::from_le_bytes([header[8], header[9]]);
    let computed = checksum(page, block);
    if stored == computed { PageState::Sound } else { PageState::Damaged { stored, computed } }
}

/// Returns a page's LSN: the end of the last WAL record that changed it. 0/0 for what is too short to have one.
pub fn lsn(page: &[u8]) -> Lsn {
    let word = |at: usize| {
        page.get(at..at + 4).map_or(0, |bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    Lsn(u64::from(word(0)) << 32 | u64::from(word(4)))
}

/// How many sums a checksum is made of, side by side.
const SUMS: usize = 32;

const FNV_PRIME: u32 = 16_777_619;

/// What the sums begin with.
const SEEDS: [u32; SUMS] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// Returns the checksum that a page of [`PAGE_BYTES`] should say as block `block` of its relation.
fn checksum(page: &[u8], block: u32) -> u16 {
    #[cfg(target_arch = "x86_64")]
    if let Some(token) = <archmage::X64V3Token as archmage::SimdToken>::summon() {
        return checksum_by_avx2(token, page, block);
    }
    checksum_by_sums(page, block)
}

/// The same code, compiled for processors with AVX2: what every x86-64 processor has knows no product of 32 bits side
/// by side.
#[cfg(target_arch = "x86_64")]
#[archmage::arcane]
fn checksum_by_avx2(_token: archmage::X64V3Token, page: &[u8], block: u32) -> u16 {
    checksum_by_sums(page, block)
}

#[inline(always)]
fn checksum_by_sums(page: &[u8], block: u32) -> u16 {
    let mut sums = SEEDS;
    for (number, row) in page.chunks_exact(4 * SUMS).enumerate() {
        for (at, sum) in sums.iter_mut().enumerate() {
            let mut value =
                u32::from_le_bytes([row[4 * at], row[4 * at + 1], row[4 * at + 2], row[4 * at + 3]]);
            // The checksum's own place counts as zero.
            if number == 0 && at == 2 {
                value &= 0xFFFF_0000;
            }
            *sum = mixed(*sum, value);
        }
    }
    for _ in 0..2 {
        for sum in &mut sums {
            *sum = mixed(*sum, 0);
        }
    }
    let folded = sums.iter().fold(0, |all, sum| all ^ sum) ^ block;
    // Never zero, and at most 65535.
    (folded % 65_535 + 1) as u16
}

#[inline(always)]
fn mixed(sum: u32, value: u32) -> u32 {
    let sum = sum ^ value;
    sum.wrapping_mul(FNV_PRIME) ^ (sum >> 17)
}

/// A file that holds pages of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationFile {
    /// The tablespace: 1663 for `base`, 1664 for `global`.
    pub tablespace: Oid,
    /// The database; 0 for `global`.
    pub database: Oid,
    /// The relation's file number.
    pub filenode: Oid,
    /// Which of its forks.
    pub fork: Fork,
    /// Which of the fork's files, from 0.
    pub segment: u32,
}

/// What a relation's pages are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fork {
    /// The rows, or an index's entries.
    Main,
    /// The free space map.
    FreeSpaceMap,
    /// The visibility map.
    VisibilityMap,
    /// What an unlogged relation is after a crash.
    Init,
}

impl RelationFile {
    /// Returns the relation's file that lies at `path` below a data directory; `None` for any other file, temporary
    /// relations among them.
    ///
    /// Source: `src/backend/storage/file/reinit.c`, parse_filename_for_nontemp_relation; `src/common/relpath.c`.
    pub fn of(path: &Path) -> Option<Self> {
        let parts: Vec<&str> = path.iter().map(|part| part.to_str()).collect::<Option<_>>()?;
        let (tablespace, database, name) = match parts[..] {
            ["global", name] => (1664, 0, name),
            ["base", database, name] => (1663, number(database)?, name),
            ["pg_tblspc", tablespace, version, database, name] if version.starts_with("PG_") => {
                (number(tablespace)?, number(database)?, name)
            }
            _ => return None,
        };
        let (name, segment) = match name.split_once('.') {
            Some((name, segment)) => (name, number(segment).filter(|segment| *segment > 0)?),
            None => (name, 0),
        };
        let (filenode, fork) = match name.split_once('_') {
            None => (name, Fork::Main),
            Some((filenode, "fsm")) => (filenode, Fork::FreeSpaceMap),
            Some((filenode, "vm")) => (filenode, Fork::VisibilityMap),
            Some((filenode, "init")) => (filenode, Fork::Init),
            Some(_) => return None,
        };
        Some(Self { tablespace, database, filenode: number(filenode)?, fork, segment })
    }
}

/// Reads a number as PostgreSQL writes it into a file's name.
fn number(digits: &str) -> Option<u32> {
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    (plain && (digits == "0" || !digits.starts_with('0'))).then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(lsn: u64, fill: u8, block: u32) -> Vec<u8> {
        let mut page = vec![fill; PAGE_BYTES];
        page[..4].copy_from_slice(&((lsn >> 32) as u32).to_le_bytes());
        page[4..8].copy_from_slice(&(lsn as u32).to_le_bytes());
        let sum = checksum(&page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        page
    }

    #[test]
    fn a_page_is_judged_by_its_checksum_unless_replay_writes_it() {
        let start = Lsn(0x1_0000_0000);
        let sound = page(start.0 - 1, 7, 3);
        assert_eq!(lsn(&sound), Lsn(start.0 - 1));
        assert_eq!(judge(&sound, 3, start), PageState::Sound);
        assert!(matches!(judge(&sound, 4, start), PageState::Damaged { .. }), "it is another page's");
        let mut damaged = sound.clone();
        damaged[5000] ^= 1;
        assert!(matches!(judge(&damaged, 3, start), PageState::Damaged { .. }));
        assert_eq!(judge(&damaged, 3, Lsn(5)), PageState::Replayed);
        let mut new = vec![0; PAGE_BYTES];
        assert_eq!(judge(&new, 3, start), PageState::New);
        new[8000] = 1;
        assert!(
            matches!(judge(&new, 3, start), PageState::Damaged { .. }),
            "no page is new but for one byte"
        );
        assert!(matches!(judge(&sound[1..], 3, start), PageState::Damaged { .. }));
    }

    #[test]
    fn relations_files_are_known_by_their_paths() {
        let file = |tablespace, database, filenode, fork, segment| {
            Some(RelationFile { tablespace, database, filenode, fork, segment })
        };
        for (path, expected) in [
            ("base/5/1259", file(1663, 5, 1259, Fork::Main, 0)),
            ("base/5/1259.12", file(1663, 5, 1259, Fork::Main, 12)),
            ("base/5/1259_fsm", file(1663, 5, 1259, Fork::FreeSpaceMap, 0)),
            ("base/5/1259_vm.1", file(1663, 5, 1259, Fork::VisibilityMap, 1)),
            ("global/1262_init", file(1664, 0, 1262, Fork::Init, 0)),
            ("pg_tblspc/16400/PG_15_202209061/5/99", file(16400, 5, 99, Fork::Main, 0)),
            ("base/5/t3_1259", None),
            ("base/5/1259.0", None),
            ("base/5/01259", None),
            ("base/5/PG_VERSION", None),
            ("base/5/pg_filenode.map", None),
            ("base/1259", None),
            ("global/pg_control", None),
            ("pg_xact/0000", None),
            ("pg_tblspc/16400/x/5/99", None),
            ("base/5/99999999999", None),
        ] {
            assert_eq!(RelationFile::of(Path::new(path)), expected, "{path}");
        }
    }

    proptest! {
        #[test]
        fn every_processor_makes_the_same_checksum(
            page in proptest::collection::vec(any::<u8>(), PAGE_BYTES..=PAGE_BYTES),
            block: u32,
        ) {
            prop_assert_eq!(checksum(&page, block), checksum_by_sums(&page, block));
        }

        #[test]
        fn judging_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..9000), block: u32, start: u64) {
            let _ = judge(&bytes, block, Lsn(start));
            let _ = lsn(&bytes);
        }
    }
}
