//! The stream of a base backup taken in: cut into members, checksummed, packed; then compared with
//! the server's own manifest.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::catalog::{BackupObject, DamagedPages, Tablespace, listed};
use crate::codec::backup_index::{BLOCK_BYTES, PARTIAL_BLOCKS_MAX, Partial};
use crate::error::{Error, Result};
use crate::pg::backup_label::without_incremental_lines;
use crate::pg::backup_manifest::{BackupManifest, ManifestFile, ManifestWriter};
use crate::pg::incremental::{PartialFile, whole_path};
use crate::pg::page::{PAGE_BYTES, RelationFile};
use crate::pg::{BackupLabel, Oid, ParseError};
use crate::replication::base_backup::AnnouncedTablespace;

use super::cut_off::CutOff;
use super::members::{BLOCK, Member, MemberKind, Splitter, Step};
use super::pack::Packer;
use super::parent::Parent;

/// More files than any cluster has; what is remembered of each takes memory.
const FILES_MAX: usize = 20_000_000;

/// Of so many prepared transactions the names are kept.
pub(super) const TWO_PHASE_MAX: usize = 1000;

/// What stands before the blocks of the longest file of which some are stored.
const HEADER_BYTES_MAX: usize = 8 * PARTIAL_BLOCKS_MAX as usize;

/// So much of a two-phase state file holds its header and the transaction's name (at most 200 bytes).
pub(super) const TWO_PHASE_BYTES: usize = 512;

/// Everything that is known once the stream has ended.
pub(crate) struct Received {
    pub(crate) objects: Vec<BackupObject>,
    pub(crate) manifest: BackupManifest,
    pub(crate) manifest_bytes: Vec<u8>,
    pub(crate) label: BackupLabel,
    /// The beginnings of the files in `pg_twophase`; `None` when they are too many to keep.
    pub(crate) two_phase: Option<Vec<Vec<u8>>>,
    pub(crate) tablespaces: Vec<Tablespace>,
    pub(crate) data_bytes: u64,
    /// Pages that did not stand the check.
    pub(crate) damaged: DamagedPages,
}

pub(crate) struct Intake {
    splitter: Splitter,
    manifest: Vec<u8>,
    inner: Inner,
}

struct Inner {
    packer: Packer,
    tablespace: Option<Oid>,
    tablespaces: Vec<Tablespace>,
    sums: HashMap<PathBuf, Sum>,
    current: Option<Current>,
    label: Vec<u8>,
    two_phase: Vec<Vec<u8>>,
    data_bytes: u64,
    base: Option<Base>,
    /// The beginning of a file of some blocks, until it says which.
    beginning: Option<Beginning>,
    /// Of each such file, by its path in the server's manifest: that of the whole file, and its length.
    partials: HashMap<PathBuf, (PathBuf, u64)>,
}

/// What an incremental backup that the server sends builds on.
pub(super) struct Base {
    parent: Arc<Parent>,
    cut_off: CutOff,
    /// The lengths of the parent's files.
    lengths: HashMap<PathBuf, u64>,
}

impl Base {
    /// # Errors
    /// [`Error::Corrupt`] when the parent's manifest is none.
    pub(super) fn new(parent: Arc<Parent>, cut_off: CutOff, manifest: Vec<u8>) -> Result<Self> {
        let manifest = parse_manifest(&manifest)?;
        let lengths = manifest.files.into_iter().map(|file| (file.path, file.bytes)).collect();
        Ok(Self { parent, cut_off, lengths })
    }

    /// Returns how many blocks of a file can be as the parent has them.
    fn unchanged_blocks(&self, whole: &Path, said: u32) -> u32 {
        let before = self.lengths.get(whole).map_or(0, |bytes| bytes / PAGE_BYTES as u64);
        let before = u32::try_from(before).unwrap_or(u32::MAX);
        let said = said.min(before);
        RelationFile::of(whole).map_or(said, |file| self.cut_off.unchanged_blocks(&file, said))
    }
}

struct Beginning {
    header: [u8; BLOCK],
    member: Member,
    /// The whole file's path in the manifest.
    whole: PathBuf,
    parent_object: u32,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Sum {
    bytes: u64,
    crc: u32,
}

struct Current {
    path: PathBuf,
    sum: Sum,
    kept: Kept,
}

/// What is kept of a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Nothing,
    Label,
    /// The beginning of the last file of `two_phase`.
    TwoPhase,
}

impl Kept {
    fn of(path: &Path) -> Self {
        if path == Path::new("backup_label") {
            Self::Label
        } else if path.parent() == Some(Path::new("pg_twophase")) {
            Self::TwoPhase
        } else {
            Self::Nothing
        }
    }
}

impl Intake {
    /// With a `base`, what the server sends is what has changed since.
    pub(super) fn new(packer: Packer, announced: &[AnnouncedTablespace], base: Option<Base>) -> Self {
        let tablespaces = announced
            .iter()
            .filter_map(|space| space.outside.clone())
            .map(|(oid, path)| Tablespace { oid, path, bytes: 0 })
            .collect();
        let inner = Inner {
            packer,
            tablespace: None,
            tablespaces,
            sums: HashMap::new(),
            current: None,
            label: Vec::new(),
            two_phase: Vec::new(),
            data_bytes: 0,
            base,
            beginning: None,
            partials: HashMap::new(),
        };
        Self { splitter: Splitter::new(), manifest: Vec::new(), inner }
    }

    /// Another archive begins: a tablespace's, or the data directory's.
    pub(crate) fn begin_archive(&mut self, tablespace: Option<Oid>) -> Result<()> {
        self.end_archive()?;
        self.splitter = Splitter::new();
        self.inner.tablespace = tablespace;
        self.inner.packer.begin_archive(tablespace);
        Ok(())
    }

    /// The archive that was begun last is over.
    pub(crate) fn end_archive(&self) -> Result<()> {
        self.splitter.finish().map_err(Error::from).map_err(damaged)
    }

    pub(crate) async fn data(&mut self, bytes: &Bytes) -> Result<()> {
        let Self { splitter, inner, .. } = self;
        splitter.push(bytes, &mut |step| inner.step(step)).map_err(damaged)?;
        inner.packer.pump().await
    }

    pub(crate) fn manifest_data(&mut self, bytes: &[u8]) -> Result<()> {
        if self.manifest.len() + bytes.len() > BackupManifest::MAX_BYTES {
            return Err(Error::corrupt("the server's backup manifest is too long to be held"));
        }
        self.manifest.extend_from_slice(bytes);
        Ok(())
    }

    /// Gives up.
    pub(crate) async fn abandon(self) {
        self.inner.packer.abandon().await;
    }

    /// Stores what is left, and compares everything with the server's manifest.
    pub(crate) async fn finish(self) -> Result<Received> {
        let Self { manifest: manifest_bytes, mut inner, .. } = self;
        let checked = parse_manifest(&manifest_bytes)
            .and_then(|manifest| compare(&manifest, std::mem::take(&mut inner.sums)).map(|()| manifest));
        let label = String::from_utf8_lossy(&inner.label).into_owned();
        let checked = checked.and_then(|manifest| {
            let label = BackupLabel::parse(&label).map_err(Error::from).map_err(damaged)?;
            Ok((manifest, label))
        });
        match checked {
            Ok((manifest, label)) => {
                let mut received = Received {
                    objects: inner.packer.finish().await?,
                    manifest,
                    manifest_bytes,
                    label,
                    two_phase: (inner.two_phase.len() <= TWO_PHASE_MAX).then_some(inner.two_phase),
                    tablespaces: inner.tablespaces,
                    data_bytes: inner.data_bytes,
                    damaged: DamagedPages::default(),
                };
                if inner.base.is_some() {
                    let without = without_incremental_lines(&inner.label);
                    make_whole(&mut received, &inner.partials, &without)?;
                }
                Ok(received)
            }
            Err(error) => {
                inner.packer.abandon().await;
                Err(error)
            }
        }
    }
}

impl Inner {
    /// Takes a member's header; that of a file of some blocks when it is known which.
    fn begin(&mut self, header: &[u8; BLOCK], member: Member) -> Result<()> {
        let partial = self.base.as_ref().filter(|_| member.kind == MemberKind::File && member.bytes > 0);
        let whole = partial.and_then(|base| {
            let whole = listed(self.tablespace, &whole_path(&member.path)?);
            RelationFile::of(&whole)?;
            Some((base.parent.object_of(&whole), whole))
        });
        let Some((parent_object, whole)) = whole else {
            self.packer.header(header, member, None);
            return Ok(());
        };
        let parent_object = parent_object.ok_or_else(|| {
            Error::mismatch(format!(
                "the server sends some blocks of {whole:?}, which the backup before does not hold"
            ))
            .with_safe("no backup was recorded; older backups are untouched")
            .with_next("Take a full backup: without --incremental.")
        })?;
        self.beginning = Some(Beginning { header: *header, member, whole, parent_object, bytes: Vec::new() });
        Ok(())
    }

    fn content(&mut self, data: &[u8]) -> Result<()> {
        let (Some(mut beginning), Some(base)) = (self.beginning.take(), &self.base) else {
            self.packer.data(data);
            return Ok(());
        };
        beginning.bytes.extend_from_slice(data);
        let Some(mut file) = PartialFile::read(&beginning.bytes, beginning.member.bytes)? else {
            if beginning.bytes.len() > HEADER_BYTES_MAX {
                return Err(too_long(&beginning.whole));
            }
            self.beginning = Some(beginning);
            return Ok(());
        };
        let Beginning { header, member, whole, parent_object, mut bytes } = beginning;
        let unchanged = base.unchanged_blocks(&whole, file.length_blocks);
        file.shorten(unchanged, &mut bytes);
        if file.whole_bytes() > u64::from(PARTIAL_BLOCKS_MAX) * BLOCK_BYTES as u64 {
            return Err(too_long(&whole));
        }
        self.partials.insert(listed(self.tablespace, &member.path), (whole, file.whole_bytes()));
        self.packer.header(&header, member, Some(Partial { file, parent_object }));
        self.packer.data(&bytes);
        Ok(())
    }

    fn step(&mut self, step: Step<'_>) -> Result<()> {
        match step {
            Step::Header(block, member) => {
                self.begin(block, member.clone())?;
                if member.kind == MemberKind::File {
                    let path = listed(self.tablespace, &member.path);
                    let kept = Kept::of(&path);
                    if kept == Kept::TwoPhase && self.two_phase.len() <= TWO_PHASE_MAX {
                        self.two_phase.push(Vec::new());
                    }
                    self.current = Some(Current { path, sum: Sum { bytes: 0, crc: 0 }, kept });
                }
            }
            Step::Data(data) => {
                self.content(data)?;
                self.data_bytes += data.len() as u64;
                if let Some(space) =
                    self.tablespaces.iter_mut().find(|space| Some(space.oid) == self.tablespace)
                {
                    space.bytes += data.len() as u64;
                }
                if let Some(current) = &mut self.current {
                    current.sum.bytes += data.len() as u64;
                    current.sum.crc = crc32c::crc32c_append(current.sum.crc, data);
                    let (kept, room) = match (current.kept, self.two_phase.last_mut()) {
                        (Kept::Label, _) => (&mut self.label, BackupLabel::MAX_BYTES),
                        (Kept::TwoPhase, Some(file)) => (file, TWO_PHASE_BYTES),
                        _ => return Ok(()),
                    };
                    kept.extend_from_slice(&data[..data.len().min(room - kept.len())]);
                }
            }
            Step::Padding(data) => self.packer.padding(data),
            Step::End => {
                self.packer.end_member();
                if let Some(current) = self.current.take() {
                    if self.sums.len() >= FILES_MAX {
                        return Err(Error::invalid(format!("the cluster has more than {FILES_MAX} files")));
                    }
                    if self.sums.insert(current.path.clone(), current.sum).is_some() {
                        return Err(ParseError::new(format!("{:?} comes twice", current.path)).into());
                    }
                }
            }
        }
        Ok(())
    }
}

fn too_long(path: &Path) -> Error {
    Error::mismatch(format!("{path:?} is too long a file to store some of its blocks"))
        .with_safe("no backup was recorded; older backups are untouched")
        .with_next("Take a full backup: without --incremental.")
}

/// Makes of the manifest of what the server sent that of the directory that is put together: whole files, whose checksums
/// nobody knows, and a label without the lines of an incremental backup.
fn make_whole(
    received: &mut Received,
    partials: &HashMap<PathBuf, (PathBuf, u64)>,
    label: &[u8],
) -> Result<()> {
    let sent = &received.manifest;
    let mut writer = ManifestWriter::new(sent.system_identifier);
    for file in &sent.files {
        let modified = file.modified.unwrap_or_default();
        match partials.get(&file.path) {
            Some((path, bytes)) => writer.add(path, *bytes, modified, None),
            None if file.path == Path::new("backup_label") => {
                writer.add(&file.path, label.len() as u64, modified, Some(crc32c::crc32c(label)));
            }
            None => writer.add(&file.path, file.bytes, modified, file.crc32c()),
        }
    }
    received.manifest_bytes = writer.finish(&sent.wal_ranges);
    received.manifest = parse_manifest(&received.manifest_bytes)?;
    let files = &received.manifest.files;
    received.data_bytes = files.iter().map(|file| file.bytes).sum();
    for tablespace in &mut received.tablespaces {
        let folder = listed(Some(tablespace.oid), Path::new(""));
        let inside = files.iter().filter(|file| file.path.starts_with(&folder));
        tablespace.bytes = inside.map(|file| file.bytes).sum();
    }
    Ok(())
}

fn parse_manifest(bytes: &[u8]) -> Result<BackupManifest> {
    BackupManifest::parse(bytes).map_err(Error::from).map_err(damaged)
}

fn damaged(error: Error) -> Error {
    match error {
        Error::Invalid(_) => Error::corrupt(format!("the base backup arrived damaged: {error}"))
            .with_safe("no backup was recorded; older backups are untouched")
            .with_next(
                "Take the backup again; if it happens again, check the network and the server's memory.",
            ),
        other => other,
    }
}

/// Compares what was received with what the server says it sent: sizes, checksums, nothing missing,
/// nothing more.
fn compare(manifest: &BackupManifest, mut received: HashMap<PathBuf, Sum>) -> Result<()> {
    let mut wrong = Vec::new();
    for file in &manifest.files {
        match received.remove(&file.path) {
            None => wrong.push(format!("{:?} is missing", file.path)),
            Some(sum) => wrong.extend(difference(file, sum)),
        }
    }
    wrong.extend(received.keys().map(|path| format!("{path:?} is not in the manifest")));
    if wrong.is_empty() {
        return Ok(());
    }
    let count = wrong.len();
    wrong.sort();
    wrong.truncate(5);
    Err(damaged(Error::invalid(format!(
        "{count} files differ from the server's manifest: {}",
        wrong.join(", ")
    ))))
}

fn difference(file: &ManifestFile, sum: Sum) -> Option<String> {
    if file.bytes != sum.bytes {
        return Some(format!("{:?} has {} bytes instead of {}", file.path, sum.bytes, file.bytes));
    }
    match file.matches_crc32c(sum.crc) {
        Some(true) => None,
        Some(false) => Some(format!("{:?} has another checksum", file.path)),
        None => Some(format!("{:?} has no CRC-32C in the manifest", file.path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::backup_manifest::ChecksumAlgorithm;
    use crate::pg::{Lsn, TimelineId, WalRange};

    #[test]
    fn every_difference_from_the_manifest_is_found() {
        let file = |path: &str, content: &[u8]| ManifestFile {
            path: path.into(),
            bytes: content.len() as u64,
            modified: None,
            checksum: Some((ChecksumAlgorithm::Crc32c, crc32c::crc32c(content).to_le_bytes().to_vec())),
        };
        let manifest = BackupManifest {
            version: 1,
            system_identifier: None,
            files: vec![file("PG_VERSION", b"15\n"), file("base/1/2", b"page")],
            wal_ranges: vec![WalRange { timeline: TimelineId::FIRST, start: Lsn(1), end: Lsn(2) }],
        };
        let received = |files: &[(&str, &[u8])]| -> HashMap<PathBuf, Sum> {
            files
                .iter()
                .map(|(path, content)| {
                    ((*path).into(), Sum { bytes: content.len() as u64, crc: crc32c::crc32c(content) })
                })
                .collect()
        };
        let sound: &[(&str, &[u8])] = &[("PG_VERSION", b"15\n"), ("base/1/2", b"page")];
        assert!(compare(&manifest, received(sound)).is_ok());
        for (files, what) in [
            (&[("PG_VERSION", &b"15\n"[..])][..], "is missing"),
            (&[("PG_VERSION", b"15\n"), ("base/1/2", b"pagE")], "another checksum"),
            (&[("PG_VERSION", b"15\n"), ("base/1/2", b"pag")], "3 bytes instead of 4"),
            (&[("PG_VERSION", b"15\n"), ("base/1/2", b"page"), ("x", b"")], "not in the manifest"),
        ] {
            let error = compare(&manifest, received(files)).unwrap_err();
            assert!(matches!(error, Error::Corrupt(_)) && error.to_string().contains(what), "{error}");
        }
    }
}
