//! The end of a backup's data object: which files it holds, where their bytes stand in its frames, and a digest of
//! every block. With it any file, and any block, is read by ranged requests, and a copy on disk is compared
//! without reading the object. `docs/repository-format.md` is the specification.

use std::ffi::OsString;
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::pg::backup_manifest::check_path;
use crate::pg::incremental::{PartialFile, whole_path};

/// The size in bytes of the blocks whose digests are kept: PostgreSQL's default page.
pub const BLOCK_BYTES: usize = 8192;

/// The longest end of an object that is read: room for the blocks of a file of 32 GiB.
pub const INDEX_BYTES_MAX: u64 = 128 << 20;

/// The longest frame that is read, stored or unpacked.
pub const FRAME_BYTES_MAX: u32 = 8 << 20;

/// Some blocks are kept of files of at most so many: 32 GiB, as with [`INDEX_BYTES_MAX`].
pub const PARTIAL_BLOCKS_MAX: u32 = 1 << 22;

/// More folders than any object's index names.
const FOLDERS_MAX: usize = 1_000_000;

/// A skippable frame's magic that decompressors pass over, here for the index.
const INDEX_MAGIC: u32 = 0x184D_2A5D;

/// The magic of the frame of zstd's seek table.
const SEEK_MAGIC: u32 = 0x184D_2A5E;

/// The last four bytes of zstd's seek table.
const SEEK_END: u32 = 0x8F92_EAB1;

/// What a seek table holds beside its entries.
const SEEK_FOOTER_BYTES: usize = 9;

/// The first 16 bytes of the BLAKE3 digest of a block; a file's last block may be shorter than the others.
pub type BlockDigest = [u8; 16];

/// Returns the digests of consecutive blocks of [`BLOCK_BYTES`].
pub fn block_digests(bytes: &[u8]) -> impl Iterator<Item = BlockDigest> {
    super::lanes::digest_of_each(bytes).map(|whole| {
        let mut digest = BlockDigest::default();
        digest.copy_from_slice(&whole[..16]);
        digest
    })
}

/// A compressed frame of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Where it starts in the object.
    pub stored_at: u64,
    /// Its length there.
    pub stored_bytes: u32,
    /// Where its content starts in the tar stream.
    pub tar_at: u64,
    /// The length of its content.
    pub tar_bytes: u32,
}

/// A file in an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexedFile {
    /// Its path in the tar stream.
    pub path: PathBuf,
    /// Where its first byte stands in the tar stream.
    pub tar_at: u64,
    /// Its length.
    pub bytes: u64,
    /// Whether its group may read it.
    pub group_reads: bool,
    /// What it lacks, where it holds some blocks of a file only.
    pub partial: Option<Partial>,
}

/// Some blocks of a file, in the form of [`PartialFile`]; the others are in the backup before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partial {
    /// Which blocks, and how long the whole file is.
    pub file: PartialFile,
    /// The place, among the data objects of the backup before, of the one that has the file.
    pub parent_object: u32,
}

impl IndexedFile {
    /// Returns the path of the whole file.
    pub fn whole_path(&self) -> PathBuf {
        let whole = self.partial.as_ref().and_then(|_| whole_path(&self.path));
        whole.unwrap_or_else(|| self.path.clone())
    }

    /// Returns the length of the whole file.
    pub fn whole_bytes(&self) -> u64 {
        self.partial.as_ref().map_or(self.bytes, |partial| partial.file.whole_bytes())
    }

    /// Returns the place of a block of the whole file among the blocks that are stored here; `None` for one that is not.
    pub fn place_of(&self, block: u32) -> Option<usize> {
        match &self.partial {
            None => (u64::from(block) < self.blocks()).then_some(block as usize),
            Some(Partial { file, .. }) => {
                let header = PartialFile::header_bytes(file.blocks.len() as u64) / BLOCK_BYTES as u64;
                file.blocks.binary_search(&block).ok().map(|place| header as usize + place)
            }
        }
    }

    fn blocks(&self) -> u64 {
        self.bytes.div_ceil(BLOCK_BYTES as u64)
    }
}

/// What the end of an object says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackupIndex {
    frames: Vec<Frame>,
    folders: Vec<PathBuf>,
    files: Vec<IndexedFile>,
    /// Of each file the number of its first digest.
    first_digests: Vec<usize>,
    digests: Vec<BlockDigest>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    format: u32,
    block_bytes: u64,
    folders: Vec<DocumentPath>,
    files: Vec<DocumentFile>,
}

#[derive(Serialize, Deserialize)]
struct DocumentFile {
    #[serde(flatten)]
    path: DocumentPath,
    offset: u64,
    bytes: u64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    group_reads: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    partial: Option<DocumentPartial>,
}

/// What a file of some blocks lacks. The blocks are given as runs: the first, and how many.
#[derive(Serialize, Deserialize)]
struct DocumentPartial {
    length_blocks: u32,
    blocks: Vec<(u32, u32)>,
    parent_object: u32,
}

impl DocumentPartial {
    fn of(Partial { file, parent_object }: &Partial) -> Self {
        let runs = file.blocks.chunk_by(|a, b| a + 1 == *b);
        let blocks = runs.filter_map(|run| Some((*run.first()?, run.len() as u32))).collect();
        Self { length_blocks: file.length_blocks, blocks, parent_object: *parent_object }
    }

    /// Returns what it says of a file of `stored_bytes`.
    fn read(&self, stored_bytes: u64) -> Result<Partial> {
        let contradicts = || damaged("lists other blocks of a file than the file has");
        let count = self.blocks.iter().map(|(_, count)| u64::from(*count)).sum::<u64>();
        if count > u64::from(PARTIAL_BLOCKS_MAX) {
            return Err(contradicts());
        }
        if PartialFile::header_bytes(count) + count * BLOCK_BYTES as u64 != stored_bytes {
            return Err(contradicts());
        }
        let mut blocks: Vec<u32> = Vec::with_capacity(count as usize);
        for (first, count) in &self.blocks {
            let end = first.checked_add(*count).ok_or_else(contradicts)?;
            if blocks.last().is_some_and(|last| last >= first) {
                return Err(contradicts());
            }
            blocks.extend(*first..end);
        }
        let file = PartialFile { blocks, length_blocks: self.length_blocks };
        if file.whole_bytes() > u64::from(PARTIAL_BLOCKS_MAX) * BLOCK_BYTES as u64 {
            return Err(damaged("lists some blocks of a file that is longer than any"));
        }
        Ok(Partial { file, parent_object: self.parent_object })
    }
}

/// A path, in hex where it is no UTF-8.
#[derive(Serialize, Deserialize)]
struct DocumentPath {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encoded_path: Option<String>,
}

impl DocumentPath {
    fn of(path: &Path) -> Self {
        match path.to_str() {
            Some(path) => Self { path: Some(path.to_owned()), encoded_path: None },
            None => Self { path: None, encoded_path: Some(hex::encode(path.as_os_str().as_bytes())) },
        }
    }

    /// Returns the path, sure to name something below the folder it is joined to.
    fn read(&self) -> Result<PathBuf> {
        let path = match (&self.path, &self.encoded_path) {
            (Some(path), None) => PathBuf::from(path),
            (None, Some(encoded)) => hex::decode(encoded)
                .map(|bytes| PathBuf::from(OsString::from_vec(bytes)))
                .map_err(|_| damaged("encodes a path wrongly"))?,
            _ => return Err(damaged("names something by no path, or by two")),
        };
        check_path(&path).map_err(|error| damaged(&format!("names what no backup holds: {error}")))?;
        Ok(path)
    }
}

impl BackupIndex {
    /// Adds a frame behind those that are there.
    pub fn add_frame(&mut self, stored_bytes: u32, tar_bytes: u32) {
        let (stored_at, tar_at) = self.frames.last().map_or((0, 0), |last| {
            (last.stored_at + u64::from(last.stored_bytes), last.tar_at + u64::from(last.tar_bytes))
        });
        self.frames.push(Frame { stored_at, stored_bytes, tar_at, tar_bytes });
    }

    /// Adds a folder.
    pub fn add_folder(&mut self, path: PathBuf) {
        self.folders.push(path);
    }

    /// Returns the folders.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// Adds a file behind those that are there. Its digests are to be added in the same order.
    pub fn add_file(&mut self, file: IndexedFile) {
        let first = match (self.first_digests.last(), self.files.last()) {
            (Some(first), Some(last)) => first + last.blocks() as usize,
            _ => 0,
        };
        self.first_digests.push(first);
        self.files.push(file);
    }

    /// Adds the digests of the next blocks.
    pub fn add_digests(&mut self, digests: &[BlockDigest]) {
        self.digests.extend_from_slice(digests);
    }

    /// Returns the files with the digests of their blocks.
    pub fn files(&self) -> impl Iterator<Item = (&IndexedFile, &[BlockDigest])> {
        (0..self.files.len()).filter_map(|place| self.file(place))
    }

    /// Returns the file at a place, counted from 0, with the digests of its blocks.
    pub fn file(&self, place: usize) -> Option<(&IndexedFile, &[BlockDigest])> {
        let (file, first) = self.files.get(place).zip(self.first_digests.get(place))?;
        Some((file, self.digests.get(*first..*first + file.blocks() as usize).unwrap_or_default()))
    }

    /// Returns whether some of the files are stored in part.
    pub fn has_partial(&self) -> bool {
        self.files.iter().any(|file| file.partial.is_some())
    }

    /// Returns the frames that hold a range of the tar stream, in order.
    pub fn frames_of(&self, tar: Range<u64>) -> &[Frame] {
        let from =
            self.frames.partition_point(|frame| frame.tar_at + u64::from(frame.tar_bytes) <= tar.start);
        let until = self.frames.partition_point(|frame| frame.tar_at < tar.end);
        self.frames.get(from..until).unwrap_or_default()
    }

    /// Returns the bytes that stand behind an object's frames: the index and zstd's seek table, each in a frame that
    /// decompressors pass over.
    ///
    /// `None` when that is more than [`INDEX_BYTES_MAX`]: one of the files is too large to have its blocks listed.
    ///
    /// # Errors
    /// [`Error::LocalIo`] when compressing fails.
    ///
    /// Source: facebook/zstd, `contrib/seekable_format/zstd_seekable_compression_format.md`.
    pub fn encode(&self) -> Result<Option<Vec<u8>>> {
        let files = self.files.iter().map(|file| DocumentFile {
            path: DocumentPath::of(&file.path),
            offset: file.tar_at,
            bytes: file.bytes,
            group_reads: file.group_reads,
            partial: file.partial.as_ref().map(DocumentPartial::of),
        });
        let document = Document {
            format: 1,
            block_bytes: BLOCK_BYTES as u64,
            folders: self.folders.iter().map(|path| DocumentPath::of(path)).collect(),
            files: files.collect(),
        };
        let text = serde_json::to_vec(&document).map_err(|error| Error::invalid(error.to_string()))?;
        let text = zstd::bulk::compress(&text, 3)
            .map_err(|error| Error::from_io("compressing the index of a data object", error))?;
        let digests_bytes = self.digests.len() * size_of::<BlockDigest>();
        let length = 4 + text.len() + digests_bytes;
        let seek_bytes = 8 * self.frames.len() + SEEK_FOOTER_BYTES;
        if (length + seek_bytes) as u64 + 16 > INDEX_BYTES_MAX {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(length + seek_bytes + 16);
        bytes.extend(INDEX_MAGIC.to_le_bytes());
        bytes.extend((length as u32).to_le_bytes());
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(text);
        self.digests.iter().for_each(|digest| bytes.extend(digest));
        bytes.extend(SEEK_MAGIC.to_le_bytes());
        bytes.extend((seek_bytes as u32).to_le_bytes());
        for frame in &self.frames {
            bytes.extend(frame.stored_bytes.to_le_bytes());
            bytes.extend(frame.tar_bytes.to_le_bytes());
        }
        bytes.extend((self.frames.len() as u32).to_le_bytes());
        bytes.push(0);
        bytes.extend(SEEK_END.to_le_bytes());
        Ok(Some(bytes))
    }

    /// Reads what [`BackupIndex::encode`] wrote, from the end of an object of `stored_bytes` with `tar_bytes` of tar.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for anything that contradicts itself or the object; [`Error::Invalid`] for a newer format.
    pub fn decode(bytes: &[u8], stored_bytes: u64, tar_bytes: u64) -> Result<Self> {
        let (content, seek) = split_frame(bytes, INDEX_MAGIC)?;
        let (table, rest) = split_frame(seek, SEEK_MAGIC)?;
        if !rest.is_empty() {
            return Err(damaged("goes on behind its seek table"));
        }
        let mut index = Self::default();
        index.read_frames(table)?;
        let end = index.frames.last().copied();
        let end = end.map_or((0, 0), |last| {
            (last.stored_at + u64::from(last.stored_bytes), last.tar_at + u64::from(last.tar_bytes))
        });
        if end != (stored_bytes.saturating_sub(bytes.len() as u64), tar_bytes) {
            return Err(damaged("lists other frames than the object's"));
        }
        let text_bytes = number(content, 0).ok_or_else(|| damaged("is cut off"))? as usize;
        let text = content.get(4..4 + text_bytes).ok_or_else(|| damaged("is cut off"))?;
        let digests = &content[4 + text_bytes..];
        let text = zstd::bulk::decompress(text, INDEX_BYTES_MAX as usize)
            .map_err(|error| damaged(&format!("cannot be unpacked: {error}")))?;
        let document: Document =
            serde_json::from_slice(&text).map_err(|error| damaged(&format!("cannot be read: {error}")))?;
        if document.format != 1 || document.block_bytes != BLOCK_BYTES as u64 {
            return Err(Error::invalid(format!(
                "a data object's index has format {} and blocks of {} bytes; this version reads format 1 with {BLOCK_BYTES}",
                document.format, document.block_bytes
            ))
            .with_next("Use the version of walship that took the backup, or a newer one."));
        }
        if document.folders.len() > FOLDERS_MAX {
            return Err(damaged("names more folders than any cluster has"));
        }
        index.folders = document.folders.iter().map(DocumentPath::read).collect::<Result<_>>()?;
        let mut tar_at = 0;
        let mut blocks = 0u64;
        for file in document.files {
            let end = file.offset.checked_add(file.bytes).filter(|end| *end <= tar_bytes);
            let end =
                end.filter(|_| file.offset >= tar_at).ok_or_else(|| damaged("lists files out of order"))?;
            let path = file.path.read()?;
            let partial = file.partial.map(|partial| partial.read(file.bytes)).transpose()?;
            if partial.is_some() && whole_path(&path).is_none_or(|whole| check_path(&whole).is_err()) {
                return Err(damaged("lists some blocks of a file under the name of a whole one"));
            }
            let DocumentFile { offset, bytes, group_reads, .. } = file;
            let file = IndexedFile { path, tar_at: offset, bytes, group_reads, partial };
            tar_at = end;
            blocks += file.blocks();
            index.add_file(file);
        }
        if digests.len() as u64 != blocks * size_of::<BlockDigest>() as u64 {
            return Err(damaged("has another number of digests than its files have blocks"));
        }
        let (digests, _) = digests.as_chunks();
        index.digests = digests.to_vec();
        Ok(index)
    }

    fn read_frames(&mut self, table: &[u8]) -> Result<()> {
        let cut_off = || damaged("is cut off");
        let entries = table.len().checked_sub(SEEK_FOOTER_BYTES).ok_or_else(cut_off)?;
        let count = number(table, entries).ok_or_else(cut_off)? as usize;
        if entries % 8 != 0 || entries / 8 != count || table[entries + 4] != 0 {
            return Err(damaged("has a seek table that contradicts itself"));
        }
        if number(table, entries + 5) != Some(SEEK_END) {
            return Err(damaged("has no seek table"));
        }
        for at in (0..entries).step_by(8) {
            let (stored, tar) = number(table, at).zip(number(table, at + 4)).ok_or_else(cut_off)?;
            if stored > FRAME_BYTES_MAX || tar > FRAME_BYTES_MAX || (stored == 0 && tar > 0) {
                return Err(damaged("has a frame that is too long to be held"));
            }
            self.add_frame(stored, tar);
        }
        Ok(())
    }
}

/// Returns a skippable frame's content, and what stands behind it.
fn split_frame(bytes: &[u8], magic: u32) -> Result<(&[u8], &[u8])> {
    if number(bytes, 0) != Some(magic) {
        return Err(damaged("is not where it should be"));
    }
    let length = number(bytes, 4).ok_or_else(|| damaged("is cut off"))? as usize;
    bytes[8..].split_at_checked(length).ok_or_else(|| damaged("is cut off"))
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4).map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]))
}

fn damaged(what: &str) -> Error {
    Error::corrupt(format!("a data object's index {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> (BackupIndex, u64, u64) {
        let mut index = BackupIndex::default();
        index.add_folder("base/5".into());
        let file =
            |path, tar_at, bytes| IndexedFile { path, tar_at, bytes, group_reads: bytes == 0, partial: None };
        index.add_file(file("base/5/1".into(), 512, 20_000));
        index.add_file(file("empty".into(), 21_504, 0));
        let odd = OsString::from_vec(b"b\xFF".to_vec());
        index.add_file(file(odd.into(), 22_016, 5));
        index.add_digests(&block_digests(&[7; 20_000]).collect::<Vec<_>>());
        index.add_digests(&block_digests(b"12345").collect::<Vec<_>>());
        index.add_frame(100, 8704);
        index.add_frame(50, 8192);
        index.add_frame(60, 8192);
        (index, 210, 25_088)
    }

    #[test]
    fn what_is_written_is_read() {
        let (index, frames_bytes, tar_bytes) = sample();
        let bytes = index.encode().unwrap().unwrap();
        let read = BackupIndex::decode(&bytes, frames_bytes + bytes.len() as u64, tar_bytes).unwrap();
        assert_eq!(read, index);
        let files: Vec<_> = read.files().map(|(file, digests)| (file.bytes, digests.len())).collect();
        assert_eq!(files, [(20_000, 3), (0, 0), (5, 1)]);
        let at = |range| read.frames_of(range).iter().map(|frame| frame.stored_at).collect::<Vec<_>>();
        assert_eq!(at(0..1), [0]);
        assert_eq!(at(8703..8705), [0, 100]);
        assert_eq!(at(8704..16_896), [100]);
        assert_eq!(at(25_087..90_000), [150]);
        assert_eq!(at(25_088..90_000), [0u64; 0]);
    }

    #[test]
    fn frames_and_index_decompress_as_one_stream() {
        let (mut index, mut object) = (BackupIndex::default(), Vec::new());
        for part in [&[1u8; 100_000][..], &[2; 5], &[3; 70_000]] {
            let frame = zstd::bulk::compress(part, 1).unwrap();
            index.add_frame(frame.len() as u32, part.len() as u32);
            object.extend(frame);
        }
        object.extend(index.encode().unwrap().unwrap());
        let plain = zstd::stream::decode_all(&object[..]).unwrap();
        assert_eq!(plain.len(), 170_005);
        assert_eq!((plain[99_999], plain[100_000], plain[100_005]), (1, 2, 3));
        assert_eq!(&object[object.len() - 9..object.len() - 5], 3u32.to_le_bytes());
    }

    #[test]
    fn some_blocks_of_a_file_are_found_by_their_numbers() {
        let file = PartialFile { blocks: vec![3, 4, 9], length_blocks: 8 };
        let bytes = file.stored_bytes();
        let partial = Some(Partial { file, parent_object: 7 });
        let file = IndexedFile {
            path: "base/5/INCREMENTAL.1".into(),
            tar_at: 512,
            bytes,
            group_reads: false,
            partial,
        };
        assert_eq!((file.whole_path().as_path(), file.whole_bytes()), (Path::new("base/5/1"), 10 * 8192));
        let places = [2, 3, 4, 9, 10].map(|block| file.place_of(block));
        assert_eq!(places, [None, Some(1), Some(2), Some(3), None]);
        let mut index = BackupIndex::default();
        index.add_file(file.clone());
        index.add_digests(&block_digests(&[0; 4 * 8192]).collect::<Vec<_>>());
        index.add_frame(100, 34_816);
        let bytes = index.encode().unwrap().unwrap();
        let stored = 100 + bytes.len() as u64;
        assert_eq!(BackupIndex::decode(&bytes, stored, 34_816).unwrap(), index);
        let document = DocumentPartial::of(file.partial.as_ref().unwrap());
        assert_eq!(document.blocks, [(3, 2), (9, 1)]);
        for blocks in [vec![(3, 2)], vec![(3, 2), (4, 1)], vec![(u32::MAX, 3)], vec![(9, 1), (3, 2)]] {
            assert!(DocumentPartial { blocks, ..document }.read(file.bytes).is_err());
        }
        // So many blocks would not even be held.
        let endless = DocumentPartial { blocks: vec![(0, u32::MAX)], ..document };
        let bytes = PartialFile::header_bytes(u32::MAX.into()) + u64::from(u32::MAX) * BLOCK_BYTES as u64;
        assert!(endless.read(bytes).is_err());
        let document = DocumentPartial { blocks: vec![(3, 2), (9, 1)], ..endless };
        for (length_blocks, first) in [(PARTIAL_BLOCKS_MAX + 1, 3), (8, PARTIAL_BLOCKS_MAX)] {
            let long = DocumentPartial { length_blocks, blocks: vec![(first, 3)], ..document };
            assert!(long.read(file.bytes).is_err());
        }
    }

    #[test]
    fn contradictions_are_damage() {
        let (index, frames_bytes, tar_bytes) = sample();
        let bytes = index.encode().unwrap().unwrap();
        let stored = frames_bytes + bytes.len() as u64;
        for (bytes, stored, tar) in [
            (&bytes[..], stored + 1, tar_bytes),
            (&bytes[..], stored, tar_bytes + 1),
            (&bytes[1..], stored - 1, tar_bytes),
            (&bytes[..bytes.len() - 1], stored - 1, tar_bytes),
            (&[], frames_bytes, tar_bytes),
        ] {
            assert!(matches!(BackupIndex::decode(bytes, stored, tar), Err(Error::Corrupt(_))));
        }
    }

    proptest! {
        #[test]
        fn decoding_is_total(at in 0usize..400, value: u8, cut in 0usize..400) {
            let (index, frames_bytes, tar_bytes) = sample();
            let mut bytes = index.encode().unwrap().unwrap();
            let stored = frames_bytes + bytes.len() as u64;
            let place = at % bytes.len();
            bytes[place] = value;
            let _ = BackupIndex::decode(&bytes, stored, tar_bytes);
            bytes.truncate(cut);
            let _ = BackupIndex::decode(&bytes, stored, tar_bytes);
        }
    }
}
