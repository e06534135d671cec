//! A backup's data object, looked at as it comes: every file against the manifest, every page against its checksum.
//! Blocking.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha224, Sha256, Sha384, Sha512};
use walship::codec::backup_index::{BLOCK_BYTES, BlockDigest, block_digests};
use walship::pg::backup_label::without_incremental_lines;
use walship::pg::backup_manifest::{ChecksumAlgorithm, ManifestFile};
use walship::pg::incremental::{PartialFile, whole_path};
use walship::pg::page::{PAGE_BYTES, PageState, RelationFile, judge};

use super::backup::{Case, FLAWS_MAX};
use crate::execute::unpack::{Arriving, member_path};

/// How many pages a relation's file holds before the next one begins: 1 GiB.
const BLOCKS_PER_FILE: u32 = 131_072;

/// How much of a file is read at once: whole blocks.
const BUFFER_BYTES: usize = 64 * BLOCK_BYTES;

/// How many damaged pages are named.
const PAGES_MAX: usize = 20;

/// Where recovery starts; in an incremental backup it has lines more than in the manifest.
const BACKUP_LABEL: &str = "backup_label";

/// The longest list of blocks that a file of some blocks begins with: that of one of 32 GiB.
const HEADER_BYTES_MAX: usize = 20 << 20;

/// What an object turned out to hold.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Why it is not what was stored.
    pub(super) damage: Option<String>,
    /// What in it is not what other documents say.
    pub(super) flaws: Vec<String>,
    /// Pages with a wrong checksum that was not known: their file and number; the first of them.
    pub(super) pages: Vec<(PathBuf, u32)>,
    /// How many there are.
    pub(super) pages_total: u64,
    /// Its files in order.
    pub(super) files: Vec<FoundFile>,
}

/// A file of an object.
#[derive(Debug)]
pub(super) struct FoundFile {
    pub(super) path: PathBuf,
    pub(super) tar_at: u64,
    pub(super) bytes: u64,
    pub(super) digests: Vec<BlockDigest>,
}

impl Found {
    /// Returns whether it is not what was stored.
    pub(super) fn is_damaged(&self) -> bool {
        self.damage.is_some()
    }

    fn flaw(&mut self, what: String) {
        // One more than is told, so that it is known that there are more.
        if self.flaws.len() <= 10 * FLAWS_MAX {
            self.flaws.push(what);
        }
    }
}

/// Looks at an object from its first byte to its last.
pub(super) fn check_object(case: &Case, place: u32, arriving: Arriving) -> Found {
    let mut found = Found::default();
    let Some(object) = case.record.objects.get(place as usize) else { return found };
    let mut hashed = Hashed { inner: arriving, bytes: 0 };
    let read = read_tar(case, place, &mut hashed, &mut found);
    // The digest covers every stored byte, whatever they are.
    let rest = io::copy(&mut hashed, &mut io::sink());
    let digest = hashed.inner.hasher.finalize().to_hex().to_string();
    found.damage = if rest.is_err() {
        Some("it cannot be read to its end".to_owned())
    } else if hashed.bytes != object.stored_bytes {
        let more = if hashed.bytes > object.stored_bytes { " or more" } else { "" };
        Some(format!("it has {}{more} bytes, the backup's record says {}", hashed.bytes, object.stored_bytes))
    } else if digest != object.digest {
        Some(format!("it has the digest {digest}, the backup's record says {}", object.digest))
    } else {
        None
    };
    if let Err(what) = read {
        found.flaw(what);
    }
    found
}

/// Counts what is read.
struct Hashed {
    inner: Arriving,
    bytes: u64,
}

impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.bytes += read as u64;
        Ok(read)
    }
}

fn read_tar(case: &Case, place: u32, stored: &mut Hashed, found: &mut Found) -> Result<(), String> {
    let object = &case.record.objects[place as usize];
    let unreadable = |error: io::Error| format!("it cannot be unpacked: {error}");
    let decoder = zstd::stream::read::Decoder::new(stored).map_err(unreadable)?;
    let mut archive = tar::Archive::new(decoder.take(object.tar_bytes.saturating_add(1)));
    for entry in archive.entries().map_err(unreadable)?.raw(true) {
        let mut entry = entry.map_err(unreadable)?;
        let Some(name) = member_path(&entry)? else { continue };
        match entry.header().entry_type() {
            tar::EntryType::Directory | tar::EntryType::Symlink => {}
            tar::EntryType::Regular => {
                let tar_at = entry.raw_file_position();
                read_file(case, place, &name, tar_at, &mut entry, found)?;
            }
            other => return Err(format!("{name:?} is neither a file nor a folder ({other:?})")),
        }
    }
    let mut padded = archive.into_inner();
    io::copy(&mut padded, &mut io::sink()).map_err(unreadable)?;
    match padded.limit() {
        1 => Ok(()),
        left => Err(format!(
            "its tar stream has {} bytes, the backup's record says {}",
            object.tar_bytes.saturating_add(1) - left,
            object.tar_bytes
        )),
    }
}

fn read_file(
    case: &Case,
    place: u32,
    name: &Path,
    tar_at: u64,
    entry: &mut tar::Entry<'_, impl Read>,
    found: &mut Found,
) -> Result<(), String> {
    let object = &case.record.objects[place as usize];
    let bytes = entry.size();
    let whole = case.record.parent.is_some().then(|| whole_path(name)).flatten();
    let is_partial = whole.is_some();
    let listed = object.listed(whole.as_deref().unwrap_or(name));
    let mut pages = Pages::of(case, &listed, is_partial, bytes);
    let expected = case.manifest.as_ref().map(|manifest| manifest.get(&listed));
    let expected_file = expected.flatten();
    let mut checksum = Checksum::of(expected_file);
    let is_label = case.record.parent.is_some() && listed == Path::new(BACKUP_LABEL);
    let mut label = Vec::new();
    let mut file = FoundFile { path: name.to_owned(), tar_at, bytes, digests: Vec::new() };
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut read = 0;
    loop {
        let length =
            fill(entry, &mut buffer).map_err(|error| format!("{listed:?} cannot be unpacked: {error}"))?;
        if length == 0 {
            break;
        }
        let chunk = &buffer[..length];
        read += length as u64;
        file.digests.extend(block_digests(chunk));
        checksum.add(chunk);
        if is_label && label.len() < BUFFER_BYTES {
            label.extend_from_slice(chunk);
        }
        if let Some(pages) = &mut pages {
            pages.add(case, chunk, found)?;
        }
    }
    if read != bytes {
        return Err(format!("{listed:?} ends after {read} of {bytes} bytes"));
    }
    found.files.push(file);
    let counts =
        case.from.as_ref().is_none_or(|from| from.get(&listed).is_some_and(|(last, _)| *last == place));
    let Some(expected) = expected else { return Ok(()) };
    match expected {
        // What a backup that did not complete left there does not count.
        _ if !counts => {}
        None if case.from.is_some() => {}
        None => found.flaw(format!("it holds {}, which the manifest does not list", listed.display())),
        Some(file) if is_label => {
            let label = without_incremental_lines(&label);
            let same = file.bytes == label.len() as u64
                && file.matches_crc32c(crc32c::crc32c(&label)) != Some(false);
            if !same {
                found.flaw(format!("{BACKUP_LABEL} is not what the manifest says"));
            }
        }
        Some(file) if is_partial => {
            let length = pages.and_then(|pages| pages.partial).map(|partial| partial.whole_bytes());
            if length != Some(file.bytes) {
                found.flaw(format!("{} does not have the length that the manifest says", listed.display()));
            }
        }
        Some(file) if file.bytes != bytes => {
            found.flaw(format!("{} has {bytes} bytes, the manifest says {}", listed.display(), file.bytes));
        }
        Some(file) => {
            if !checksum.is(file) {
                found.flaw(format!("{} does not match the checksum in the manifest", listed.display()));
            }
        }
    }
    Ok(())
}

/// Reads as much as there is room for; less only at the end.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// The pages of a relation's file, as they come.
struct Pages {
    listed: PathBuf,
    relation: Option<RelationFile>,
    is_partial: bool,
    bytes: u64,
    at: u64,
    /// What a file of some blocks begins with, until that is known.
    header: Vec<u8>,
    partial: Option<PartialFile>,
}

impl Pages {
    /// Returns how the pages of a file are looked at; `None` for one without.
    fn of(case: &Case, listed: &Path, is_partial: bool, bytes: u64) -> Option<Self> {
        let relation = RelationFile::of(listed).filter(|_| case.record.data_checksums);
        (relation.is_some() || is_partial).then(|| Self {
            listed: listed.to_owned(),
            relation,
            is_partial,
            bytes,
            at: 0,
            header: Vec::new(),
            partial: None,
        })
    }

    fn add(&mut self, case: &Case, chunk: &[u8], found: &mut Found) -> Result<(), String> {
        if self.is_partial && self.partial.is_none() {
            self.header.extend_from_slice(chunk);
            let read = PartialFile::read(&self.header, self.bytes)
                .map_err(|error| format!("{}: {error}", self.listed.display()))?;
            match read {
                Some(partial) => {
                    let begin = PartialFile::header_bytes(partial.blocks.len() as u64);
                    self.partial = Some(partial);
                    let header = std::mem::take(&mut self.header);
                    let begin = usize::try_from(begin).unwrap_or(usize::MAX).min(header.len());
                    self.pages(case, &header[begin..], found);
                }
                None if self.header.len() > HEADER_BYTES_MAX => {
                    return Err(format!("{} lists more blocks than any file has", self.listed.display()));
                }
                None => {}
            }
            return Ok(());
        }
        self.pages(case, chunk, found);
        Ok(())
    }

    fn pages(&mut self, case: &Case, bytes: &[u8], found: &mut Found) {
        let Some(relation) = self.relation else { return };
        for page in bytes.chunks(PAGE_BYTES) {
            let number = self.at;
            self.at += 1;
            // What the server was about to lengthen is lengthened again by replay.
            if page.len() < PAGE_BYTES {
                return;
            }
            let number = match &self.partial {
                None => u32::try_from(number).ok(),
                Some(partial) => usize::try_from(number).ok().and_then(|at| partial.blocks.get(at).copied()),
            };
            let Some(number) = number else { return };
            let block = relation.segment.wrapping_mul(BLOCKS_PER_FILE).wrapping_add(number);
            if !matches!(judge(page, block, case.record.start_lsn), PageState::Damaged { .. }) {
                continue;
            }
            let known = case.more_known_pages || case.known_pages.contains(&(self.listed.clone(), block));
            if known {
                continue;
            }
            found.pages_total += 1;
            if found.pages.len() < PAGES_MAX {
                found.pages.push((self.listed.clone(), block));
            }
        }
    }
}

/// A checksum of the kind that the manifest has.
enum Checksum {
    None,
    Crc32c(u32),
    Sha224(Sha224),
    Sha256(Sha256),
    Sha384(Sha384),
    Sha512(Sha512),
}

impl Checksum {
    fn of(file: Option<&ManifestFile>) -> Self {
        match file.and_then(|file| file.checksum.as_ref()).map(|(algorithm, _)| *algorithm) {
            None => Self::None,
            Some(ChecksumAlgorithm::Crc32c) => Self::Crc32c(0),
            Some(ChecksumAlgorithm::Sha224) => Self::Sha224(Sha224::new()),
            Some(ChecksumAlgorithm::Sha256) => Self::Sha256(Sha256::new()),
            Some(ChecksumAlgorithm::Sha384) => Self::Sha384(Sha384::new()),
            Some(ChecksumAlgorithm::Sha512) => Self::Sha512(Sha512::new()),
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        match self {
            Self::None => {}
            Self::Crc32c(crc) => *crc = crc32c::crc32c_append(*crc, bytes),
            Self::Sha224(hasher) => hasher.update(bytes),
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha384(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// Returns whether it is the file's.
    fn is(self, file: &ManifestFile) -> bool {
        let digest = match self {
            Self::None => return true,
            Self::Crc32c(crc) => return file.matches_crc32c(crc) != Some(false),
            Self::Sha224(hasher) => hasher.finalize().to_vec(),
            Self::Sha256(hasher) => hasher.finalize().to_vec(),
            Self::Sha384(hasher) => hasher.finalize().to_vec(),
            Self::Sha512(hasher) => hasher.finalize().to_vec(),
        };
        file.checksum.as_ref().is_some_and(|(_, expected)| *expected == digest)
    }
}
