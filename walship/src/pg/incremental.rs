//! Files of which an incremental backup holds only some blocks, in PostgreSQL's own form: what `pg_combinebackup` puts
//! together again.
//!
//! Source: `src/backend/backup/basebackup_incremental.c`, GetIncrementalHeaderSize; `basebackup.c`, sendFile;
//! `src/bin/pg_combinebackup/reconstruct.c`.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use super::ParseError;
use super::page::PAGE_BYTES;

/// What the names of such files begin with.
const PREFIX: &[u8] = b"INCREMENTAL.";

/// What such files begin with.
const MAGIC: u32 = 0xD3AE_1F0D;

/// The magic, how many blocks there are, and the length.
const FIXED_BYTES: usize = 12;

/// Returns the name under which some blocks of the file `path` are stored: `base/5/INCREMENTAL.1259`.
pub fn partial_path(path: &Path) -> PathBuf {
    let mut name = OsString::from_vec(PREFIX.to_vec());
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}

/// Returns the path of the file of which `path` would hold some blocks, by its name; `None` for other names.
pub fn whole_path(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.as_bytes().strip_prefix(PREFIX).filter(|name| !name.is_empty())?;
    Some(path.with_file_name(OsString::from_vec(name.to_vec())))
}

/// Which blocks of a file follow, and how long it is with all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PartialFile {
    /// The blocks, in ascending order.
    pub blocks: Vec<u32>,
    /// So many blocks of the file are there at least; those that do not follow are as they were before.
    pub length_blocks: u32,
}

impl PartialFile {
    /// Returns how many bytes stand before `blocks` blocks: whole pages, but for a file without any.
    pub fn header_bytes(blocks: u64) -> u64 {
        match FIXED_BYTES as u64 + 4 * blocks {
            bytes if blocks == 0 => bytes,
            bytes => bytes.next_multiple_of(PAGE_BYTES as u64),
        }
    }

    /// Returns how long such a file is.
    pub fn stored_bytes(&self) -> u64 {
        let blocks = self.blocks.len() as u64;
        Self::header_bytes(blocks) + blocks * PAGE_BYTES as u64
    }

    /// Returns the length of the file that is put together.
    pub fn whole_bytes(&self) -> u64 {
        let last = self.blocks.last().map_or(0, |last| u64::from(*last) + 1);
        last.max(u64::from(self.length_blocks)) * PAGE_BYTES as u64
    }

    /// Makes the file, and its beginning in `bytes`, say that it has at least so many blocks, where it says more: those behind
    /// are not as they were before.
    pub fn shorten(&mut self, length_blocks: u32, bytes: &mut [u8]) {
        self.length_blocks = self.length_blocks.min(length_blocks);
        if let Some(said) = bytes.get_mut(8..FIXED_BYTES) {
            said.copy_from_slice(&self.length_blocks.to_le_bytes());
        }
    }

    /// Returns what stands before the blocks.
    pub fn header(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::header_bytes(self.blocks.len() as u64) as usize);
        for number in [MAGIC, self.blocks.len() as u32, self.length_blocks] {
            bytes.extend(number.to_le_bytes());
        }
        self.blocks.iter().for_each(|block| bytes.extend(block.to_le_bytes()));
        bytes.resize(Self::header_bytes(self.blocks.len() as u64) as usize, 0);
        bytes
    }

    /// Reads the beginning of such a file of `stored_bytes`; `None` when more of it is needed.
    ///
    /// # Errors
    /// [`ParseError`] for a beginning that is none, or that says another length.
    pub fn read(bytes: &[u8], stored_bytes: u64) -> Result<Option<Self>, ParseError> {
        let number =
            |at: usize| bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map(u32::from_le_bytes);
        let (Some(magic), Some(count), Some(length_blocks)) = (number(0), number(4), number(8)) else {
            return match stored_bytes < FIXED_BYTES as u64 {
                true => Err(ParseError::new("a file of some blocks is too short to be one")),
                false => Ok(None),
            };
        };
        if magic != MAGIC {
            return Err(ParseError::new(format!("a file of some blocks begins with {magic:08X}")));
        }
        let blocks = u64::from(count);
        if Self::header_bytes(blocks) + blocks * PAGE_BYTES as u64 != stored_bytes {
            return Err(ParseError::new(format!(
                "a file of some blocks has {stored_bytes} bytes, and is to hold {count} blocks"
            )));
        }
        let Some(list) = bytes.get(FIXED_BYTES..FIXED_BYTES + 4 * count as usize) else { return Ok(None) };
        let (numbers, _) = list.as_chunks();
        let blocks: Vec<u32> = numbers.iter().map(|four| u32::from_le_bytes(*four)).collect();
        if !blocks.is_sorted_by(|a, b| a < b) {
            return Err(ParseError::new("a file of some blocks names them out of order"));
        }
        Ok(Some(Self { blocks, length_blocks }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_lead_there_and_back() {
        let path = Path::new("pg_tblspc/16400/PG_15_202209061/5/16384_vm.1");
        let partial = partial_path(path);
        assert_eq!(partial, Path::new("pg_tblspc/16400/PG_15_202209061/5/INCREMENTAL.16384_vm.1"));
        assert_eq!(whole_path(&partial).as_deref(), Some(path));
        for other in ["base/5/1259", "base/5/INCREMENTAL.", "INCREMENTAL.x/1"] {
            assert_eq!(whole_path(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn the_form_is_postgresqls() {
        let none = PartialFile { blocks: Vec::new(), length_blocks: 7 };
        assert_eq!(none.header(), [0x0D, 0x1F, 0xAE, 0xD3, 0, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!((none.stored_bytes(), none.whole_bytes()), (12, 7 * 8192));
        let two = PartialFile { blocks: vec![3, 9], length_blocks: 7 };
        assert_eq!((two.header().len(), two.stored_bytes(), two.whole_bytes()), (8192, 3 * 8192, 10 * 8192));
        assert_eq!(PartialFile::header_bytes(2045), 8192);
        assert_eq!(PartialFile::header_bytes(2046), 16_384);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let two = PartialFile { blocks: vec![3, 9], length_blocks: 7 };
        let header = two.header();
        assert_eq!(PartialFile::read(&header, two.stored_bytes()), Ok(Some(two)));
        assert_eq!(PartialFile::read(&header[..19], 3 * 8192), Ok(None));
        assert_eq!(PartialFile::read(&header[..11], 3 * 8192), Ok(None));
        assert!(PartialFile::read(&header, 4 * 8192).is_err());
        assert!(PartialFile::read(&header[..11], 11).is_err());
        assert!(PartialFile::read(&[0; 12], 12).is_err());
        let mut shorter = PartialFile { blocks: vec![3, 9], length_blocks: 7 };
        let mut bytes = shorter.header();
        shorter.shorten(9, &mut bytes);
        assert_eq!(shorter.length_blocks, 7);
        shorter.shorten(5, &mut bytes);
        assert_eq!(PartialFile::read(&bytes, shorter.stored_bytes()), Ok(Some(shorter)));
        let twice = PartialFile { blocks: vec![3, 3], length_blocks: 7 };
        assert!(PartialFile::read(&twice.header(), twice.stored_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(blocks in proptest::collection::btree_set(0u32..200_000, 0..3000), length_blocks in 0u32..300_000) {
            let file = PartialFile { blocks: blocks.into_iter().collect(), length_blocks };
            prop_assert_eq!(PartialFile::read(&file.header(), file.stored_bytes()), Ok(Some(file)));
        }

        #[test]
        fn reading_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..200), length: u64) {
            let _ = PartialFile::read(&bytes, length);
        }
    }
}
