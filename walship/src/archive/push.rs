//! Push: one local WAL file into every repository, after the checks that let it take its key.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Read, Seek as _, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;
use tempfile::{NamedTempFile, TempPath};
use tokio::sync::OwnedSemaphorePermit;

use crate::codec::{
    BodyEncoder, Compression, Digest, Encoded, EncodedBody, EncodedObject, Envelope, ObjectHead, ObjectKind,
    PLAIN_BYTES_MAX, encode_body,
};
use crate::error::{Error, Result};
use crate::pg::{SegmentName, SegmentSize, TimelineHistory, TimelineId, WalFileName};
use crate::repository::{ClusterRepository, LineageRepository, Put, index};
use crate::wal::page::PageHeader;
use crate::wal::scan::{SegmentScan, SegmentScanner, Verdict};

use super::DataDirectory;

/// Segments up to this size are compressed into memory, larger ones into a temporary file: incompressible
/// ones of 64 MiB would be the whole of the memory that a push may take.
const IN_MEMORY_BYTES_MAX: u64 = 32 << 20;

/// A body in memory that comes from so many bytes has pages of its own: those that are not written to take no
/// memory, and all go back to the system with it. glibc keeps what is shorter than 32 MiB for later, for each
/// thread anew, which adds up in a process that encodes segment after segment.
const OWN_PAGES_FROM: u64 = 8 << 20;
const OWN_PAGES_BYTES: u64 = 33 << 20;

/// How a file is pushed.
#[derive(Debug, Clone)]
pub struct PushOptions {
    /// How it is compressed.
    pub compression: Compression,
    /// The lineage; `None`: the one of the file's system identifier, for files that say none that of
    /// their data directory, else the newest.
    pub lineage: Option<u32>,
    /// Where the compressed bodies of large segments lie meanwhile.
    pub spool_dir: PathBuf,
}

/// What became of a pushed file. It is durable in every repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PushReport {
    /// The file's name.
    pub file: String,
    /// Whether the file stands under its name; otherwise it was kept apart as incomplete.
    pub whole: bool,
    /// Its length.
    pub bytes: u64,
    /// Its length as stored, compressed.
    pub stored_bytes: u64,
    /// Its BLAKE3 digest.
    pub digest: String,
    /// Where it is, and what was done for that.
    pub repositories: Vec<RepositoryReport>,
    /// What an operator should know although the push succeeded.
    pub warnings: Vec<String>,
}

/// One repository's part in a [`PushReport`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RepositoryReport {
    /// The lineage's folder.
    pub location: String,
    /// `stored`, `already stored` or `stored beside a damaged object`.
    pub outcome: &'static str,
}

/// A WAL file, read, checked and compressed: not yet anywhere.
#[derive(Debug)]
pub struct EncodedFile {
    path: PathBuf,
    name: WalFileName,
    encoded: Encoded,
    compression: Compression,
    body: EncodedBody,
    /// For segments and `.partial` files.
    scan: Option<SegmentScan>,
    /// For history files.
    history: Option<TimelineHistory>,
    _spooled: Option<TempPath>,
    /// The room that it was given, for as long as it is there.
    _room: Option<OwnedSemaphorePermit>,
}

/// Pushes the file at `path` into every cluster repository.
///
/// # Errors
/// [`Error::Mismatch`] for a file that is not what its name says or belongs to another cluster,
/// [`Error::Conflict`] when its name is taken by other content, and whatever disk and stores say.
/// # Durability
/// After `Ok` the file survives a crash in every repository.
pub async fn push_file(
    clusters: &[ClusterRepository],
    path: &Path,
    options: &PushOptions,
) -> Result<PushReport> {
    let encoded = encode_aside(path, options).await?;
    push_encoded(clusters, &encoded, options).await
}

/// Reads, checks and compresses the file at `path` on a thread of its own, at once, whatever else is awaited.
pub(crate) fn encode_aside(
    path: &Path,
    options: &PushOptions,
) -> impl Future<Output = Result<EncodedFile>> + use<> {
    let (path, options) = (path.to_owned(), options.clone());
    let encoding = tokio::task::spawn_blocking(move || encode_file(&path, &options));
    async move { encoding.await.map_err(|error| Error::local_io(format!("compressing was broken off: {error}")))? }
}

/// Reads, checks and compresses the file at `path`. Blocking.
///
/// # Errors
/// As [`push_file`], without those of stores.
pub fn encode_file(path: &Path, options: &PushOptions) -> Result<EncodedFile> {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| Error::invalid(format!("{} is not the name of a file", path.display())))?
        .parse::<WalFileName>()?;
    encode(path, name, options).map_err(|error| error.context(format!("pushing {}", path.display())))
}

fn encode(path: &Path, name: WalFileName, options: &PushOptions) -> Result<EncodedFile> {
    let mut file = open(path)?;
    let plain_bytes = file.metadata().map_err(|error| Error::from_io("looking at it", error))?.len();
    let bytes_max = ObjectKind::of(name).plain_bytes_max();
    if plain_bytes > bytes_max {
        return Err(Error::mismatch(format!(
            "it has {plain_bytes} bytes, more than any such file ({bytes_max})"
        )));
    }
    let size = declared_size(&mut file, plain_bytes)?;
    let encoded = encode_bytes(path, name, &mut file, plain_bytes, size, options)?;
    if let Some(scan) = &encoded.scan {
        check_ancestry(path, scan)?;
    }
    if let (WalFileName::Segment(_), Some(SegmentScan { verdict: Verdict::Incomplete { .. }, .. })) =
        (name, &encoded.scan)
    {
        check_reads_the_same(&mut file, plain_bytes, encoded.encoded.digest)?;
    }
    Ok(encoded)
}

/// Checks and compresses a WAL file of which the bytes come from elsewhere than a file: `plain_bytes` of
/// them from `source`, in a lineage with segments of `size`. Blocking, as long as `source` takes.
///
/// # Errors
/// As [`push_file`], without those of stores; [`Error::Mismatch`] when `source` gives another number of bytes.
pub fn encode_stream(
    name: WalFileName,
    source: &mut dyn Read,
    plain_bytes: u64,
    size: SegmentSize,
    options: &PushOptions,
) -> Result<EncodedFile> {
    encode_bytes(Path::new(&name.to_string()), name, source, plain_bytes, size, options)
        .map_err(|error| error.context(name))
}

fn encode_bytes(
    path: &Path,
    name: WalFileName,
    source: &mut dyn Read,
    plain_bytes: u64,
    size: SegmentSize,
    options: &PushOptions,
) -> Result<EncodedFile> {
    let mut watcher = Watcher::new(name, size);
    let mut sink = Sink::new(plain_bytes, options, None)?;
    let mut observe = |bytes: &[u8]| watcher.push(bytes);
    let encoded = encode_body(source, plain_bytes, options.compression, &mut sink, &mut observe)?;
    encoded_file(path, name, encoded, sink, watcher, options.compression)
}

/// A segment that is encoded while it comes, on the thread that hands it in.
pub(crate) struct SegmentEncoder {
    name: SegmentName,
    compression: Compression,
    body: BodyEncoder<Sink>,
    watcher: Watcher,
    /// Bytes that came in small pieces, until they are worth compressing.
    gathered: Vec<u8>,
}

/// Pieces from this length on are encoded where they lie; what is shorter is gathered to this length.
const DIRECT_BYTES_MIN: usize = 64 << 10;
const GATHERED_BYTES: usize = 256 << 10;

impl SegmentEncoder {
    /// Returns an encoder that writes into `memory`, where that is large enough.
    ///
    /// # Errors
    /// [`Error::LocalIo`] when there is no room to spool a large segment.
    pub(crate) fn new(
        name: SegmentName,
        size: SegmentSize,
        options: &PushOptions,
        memory: Option<Vec<u8>>,
    ) -> Result<Self> {
        let sink = Sink::new(size.bytes(), options, memory)?;
        Ok(Self {
            name,
            compression: options.compression,
            body: BodyEncoder::new(size.bytes(), options.compression, sink)?,
            watcher: Watcher::new(WalFileName::Segment(name), size),
            gathered: Vec::new(),
        })
    }

    /// Takes the segment's next bytes.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when they are more than the segment has; [`Error::LocalIo`] when spooling fails.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.gathered.is_empty() && bytes.len() >= DIRECT_BYTES_MIN {
                return self.encode(bytes);
            }
            let (taken, rest) = bytes.split_at(bytes.len().min(GATHERED_BYTES - self.gathered.len()));
            self.gathered.extend_from_slice(taken);
            bytes = rest;
            if self.gathered.len() == GATHERED_BYTES {
                self.encode_gathered()?;
            }
        }
        Ok(())
    }

    /// Returns the encoded segment.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when bytes are missing, or are not that segment; [`Error::LocalIo`] when spooling fails.
    pub(crate) fn finish(mut self) -> Result<EncodedFile> {
        self.encode_gathered()?;
        let (encoded, sink) = self.body.finish()?;
        let name = WalFileName::Segment(self.name);
        let path = PathBuf::from(name.to_string());
        encoded_file(&path, name, encoded, sink, self.watcher, self.compression)
            .map_err(|error| error.context(name))
    }

    fn encode_gathered(&mut self) -> Result<()> {
        let mut gathered = std::mem::take(&mut self.gathered);
        let encoded = self.encode(&gathered);
        gathered.clear();
        self.gathered = gathered;
        encoded
    }

    fn encode(&mut self, bytes: &[u8]) -> Result<()> {
        self.watcher.push(bytes);
        self.body.push(bytes).map_err(|error| error.context(WalFileName::Segment(self.name)))
    }
}

/// What looks at a file's bytes while they are encoded.
enum Watcher {
    /// Of a segment or a part of one.
    Scan(Box<SegmentScanner>),
    /// Of a small text.
    Text(Vec<u8>),
}

impl Watcher {
    fn new(name: WalFileName, size: SegmentSize) -> Self {
        match name {
            WalFileName::Segment(segment) | WalFileName::Partial(segment) => {
                Self::Scan(Box::new(SegmentScanner::new(segment, size)))
            }
            WalFileName::History(_) | WalFileName::BackupHistory(..) => Self::Text(Vec::new()),
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        match self {
            Self::Scan(scanner) => scanner.push(bytes),
            Self::Text(text) => text.extend_from_slice(bytes),
        }
    }
}

/// Returns how many bytes of memory the compressed body of `plain_bytes` bytes takes at most; none where it is
/// spooled to a file.
pub(crate) fn encoded_in_memory_max(plain_bytes: u64) -> u64 {
    if plain_bytes > IN_MEMORY_BYTES_MAX { 0 } else { plain_bytes + plain_bytes / 64 + 4096 }
}

/// Where a compressed body goes.
enum Sink {
    Memory(Vec<u8>),
    Spooled(BufWriter<NamedTempFile>),
}

impl Sink {
    fn new(plain_bytes: u64, options: &PushOptions, memory: Option<Vec<u8>>) -> Result<Self> {
        if plain_bytes > IN_MEMORY_BYTES_MAX {
            let spool = NamedTempFile::new_in(&options.spool_dir).map_err(|error| {
                Error::from_io(format!("creating a temporary file in {}", options.spool_dir.display()), error)
            })?;
            return Ok(Self::Spooled(BufWriter::with_capacity(1 << 20, spool)));
        }
        let bytes_max = encoded_in_memory_max(plain_bytes);
        let bytes_max = if plain_bytes < OWN_PAGES_FROM { bytes_max } else { bytes_max.max(OWN_PAGES_BYTES) };
        let bytes_max = usize::try_from(bytes_max).unwrap_or(0);
        let used_before = memory.filter(|memory| memory.is_empty() && memory.capacity() >= bytes_max);
        Ok(Self::Memory(used_before.unwrap_or_else(|| Vec::with_capacity(bytes_max))))
    }

    fn finish(self) -> Result<(EncodedBody, Option<TempPath>)> {
        match self {
            Self::Memory(bytes) => Ok((EncodedBody::Memory(Bytes::from(bytes)), None)),
            Self::Spooled(writer) => {
                let failed = |error| Error::from_io("writing compressed data", error);
                let spooled =
                    writer.into_inner().map_err(|error| failed(error.into_error()))?.into_temp_path();
                Ok((EncodedBody::Spooled(spooled.to_path_buf()), Some(spooled)))
            }
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Memory(sink) => sink.write(bytes),
            Self::Spooled(sink) => sink.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::Memory(_) => Ok(()),
            Self::Spooled(sink) => sink.flush(),
        }
    }
}

fn encoded_file(
    path: &Path,
    name: WalFileName,
    encoded: Encoded,
    sink: Sink,
    watcher: Watcher,
    compression: Compression,
) -> Result<EncodedFile> {
    let (body, spooled) = sink.finish()?;
    let (scan, history) = match (watcher, name) {
        (Watcher::Scan(scanner), _) => (Some(scanner.finish()), None),
        (Watcher::Text(text), WalFileName::History(timeline)) => {
            (None, Some(check_history(timeline, &text)?))
        }
        (Watcher::Text(_), _) => (None, None),
    };
    if let Some(SegmentScan { verdict: Verdict::Mismatch { what }, .. }) = &scan {
        return Err(Error::mismatch(format!("it is not the WAL that its name says: {what}"))
            .with_safe("nothing was stored; PostgreSQL keeps the file in pg_wal and will ask again")
            .with_next(
                "Compare it with `pg_waldump`: it may be truncated, damaged, or from another cluster or place. Where \
                 it is lost for good, `walship wal give-up --help` says how the archiver goes on.",
            ));
    }
    Ok(EncodedFile {
        path: path.to_owned(),
        name,
        encoded,
        compression,
        body,
        scan,
        history,
        _spooled: spooled,
        _room: None,
    })
}

/// Opens a regular file: no link, no device, no waiting for a pipe.
fn open(path: &Path) -> Result<File> {
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|error| {
        Error::from_io("opening it", error)
            .with_safe("nothing was stored")
            .with_next("Check the path: archive_command needs %p, relative to the data directory.")
    })?;
    let metadata = file.metadata().map_err(|error| Error::from_io("looking at it", error))?;
    if !metadata.is_file() {
        return Err(Error::invalid("it is not a regular file"));
    }
    Ok(file)
}

/// Returns the segment size that the file's first page declares, or where it declares none, that of the file.
fn declared_size(file: &mut File, plain_bytes: u64) -> Result<SegmentSize> {
    let mut start = Vec::new();
    file.take(PageHeader::LONG_LEN as u64)
        .read_to_end(&mut start)
        .and_then(|_| file.rewind())
        .map_err(|error| Error::from_io("reading it", error))?;
    let declared = PageHeader::parse(&start)
        .filter(PageHeader::is_plausible_first)
        .and_then(|header| SegmentSize::new(u64::from(header.long?.segment_size)));
    Ok(declared.or(SegmentSize::new(plain_bytes)).unwrap_or(SegmentSize::DEFAULT))
}

/// Reads a file once more, if possible from the disk. Before a segment is kept apart as incomplete, which
/// leaves a hole, it is to be sure that it was not only read badly.
fn check_reads_the_same(file: &mut File, plain_bytes: u64, digest: Digest) -> Result<()> {
    // Only advice.
    let _ = posix_fadvise(&*file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    let mut hasher = blake3::Hasher::new();
    file.rewind()
        .and_then(|()| hasher.update_reader(file.take(plain_bytes + 1)).map(drop))
        .map_err(|error| Error::from_io("reading it once more", error))?;
    if Digest(*hasher.finalize().as_bytes()) == digest {
        return Ok(());
    }
    Err(Error::local_io("the file reads differently each time")
        .with_safe("nothing was stored; PostgreSQL keeps the file in pg_wal and will ask again")
        .with_next(
            "Find out whether something writes to it; else check the disk and the memory of this machine.",
        ))
}

fn check_history(timeline: TimelineId, text: &[u8]) -> Result<TimelineHistory> {
    let text = std::str::from_utf8(text).map_err(|_| Error::mismatch("it is not text"))?;
    let history =
        TimelineHistory::parse(timeline, text).map_err(|error| Error::mismatch(error.to_string()))?;
    if history.ancestors.is_empty() {
        return Err(Error::mismatch(format!("it names no ancestor of timeline {timeline}")));
    }
    Ok(history)
}

/// The first segment of a timeline carries its parent's pages: those of an ancestor, where the history
/// file lies beside the segment and can tell.
fn check_ancestry(path: &Path, scan: &SegmentScan) -> Result<()> {
    let (own, first) = (scan.summary.segment.timeline, scan.summary.first_page_timeline);
    if first == own {
        return Ok(());
    }
    let beside = path.with_file_name(WalFileName::History(own).to_string());
    let Ok(file) = File::open(beside) else { return Ok(()) };
    let mut text = String::new();
    let read = file.take(TimelineHistory::MAX_BYTES as u64 + 1).read_to_string(&mut text);
    match read.ok().and_then(|_| TimelineHistory::parse(own, &text).ok()) {
        Some(history) if !history.contains(first) => Err(Error::mismatch(format!(
            "its first page belongs to timeline {first}, which is no ancestor of timeline {own}"
        ))),
        _ => Ok(()),
    }
}

/// Stores an encoded file in every cluster repository.
///
/// # Errors
/// As [`push_file`]. A failure is returned after every repository was tried: the first that may pass, else the
/// first.
pub async fn push_encoded(
    clusters: &[ClusterRepository],
    file: &EncodedFile,
    options: &PushOptions,
) -> Result<PushReport> {
    let puts = clusters.iter().map(|cluster| push_to(cluster, file, options.lineage));
    report(file, futures_util::future::join_all(puts).await)
}

/// Stores an encoded file in every one of these lineages.
///
/// # Errors
/// As [`push_encoded`].
pub async fn push_to_lineages(lineages: &[LineageRepository], file: &EncodedFile) -> Result<PushReport> {
    let puts = lineages.iter().map(|lineage| put_in(lineage, file));
    report(file, futures_util::future::join_all(puts).await)
}

fn report(file: &EncodedFile, answers: Vec<Result<(String, Put)>>) -> Result<PushReport> {
    let mut failure: Option<Error> = None;
    let mut outcomes = Vec::new();
    for outcome in answers {
        match outcome {
            Ok(outcome) => outcomes.push(outcome),
            Err(error) => {
                let lasting = |error: &Error| {
                    matches!(error, Error::Conflict(_) | Error::Mismatch(_) | Error::Corrupt(_))
                };
                // Where storing may still succeed in one repository, nobody may take the other's no for all.
                if failure.as_ref().is_none_or(|first| lasting(first) && !lasting(&error)) {
                    failure = Some(error);
                }
            }
        }
    }
    if let Some(error) = failure {
        return Err(error.context(format!("pushing {}", file.path.display())));
    }
    let mut report = PushReport {
        file: file.name.to_string(),
        whole: file.kind() != ObjectKind::Incomplete,
        bytes: file.encoded.plain_bytes,
        stored_bytes: file.encoded.body_bytes,
        digest: file.encoded.digest.to_string(),
        repositories: Vec::new(),
        warnings: file.warnings(),
    };
    for (location, put) in outcomes {
        let outcome = match put {
            Put::Stored => "stored",
            Put::AlreadyStored => "already stored",
            Put::StoredBesideDamaged { copy, damage } => {
                report
                    .warnings
                    .push(format!("a stored object is damaged ({damage}); a good copy is now at {copy}"));
                "stored beside a damaged object"
            }
        };
        report.repositories.push(RepositoryReport { location, outcome });
    }
    Ok(report)
}

async fn push_to(
    cluster: &ClusterRepository,
    file: &EncodedFile,
    lineage: Option<u32>,
) -> Result<(String, Put)> {
    let lineage = match (&file.scan, lineage) {
        (Some(scan), None) => {
            cluster.lineage_of(scan.summary.system_identifier, scan.summary.segment_size).await?
        }
        (_, lineage) => {
            let directory = DataDirectory::of_wal_file(&file.path);
            super::place::lineage(cluster, directory.as_ref(), lineage).await?
        }
    };
    put_in(&lineage, file).await
}

async fn put_in(lineage: &LineageRepository, file: &EncodedFile) -> Result<(String, Put)> {
    let object = file.object(lineage)?;
    if let Some(scan) = &file.scan {
        check_stored_ancestry(lineage, scan).await?;
    }
    let _index = IndexBeside::start(lineage, file);
    Ok((lineage.location(), lineage.put_wal_file(&object).await?))
}

/// Extends the index by what was archived before a file, while that file is being put, and no longer: a push is
/// neither delayed nor failed by what is only a cache.
struct IndexBeside(tokio::task::JoinHandle<()>);

impl IndexBeside {
    /// Returns `None` for a file that has nothing to do with the index.
    fn start(lineage: &LineageRepository, file: &EncodedFile) -> Option<Self> {
        let lineage = lineage.clone();
        let log = |extended: Result<()>| {
            if let Err(error) = extended {
                tracing::debug!(%error, "the index was not extended");
            }
        };
        Some(Self(match (file.name, &file.scan, &file.history) {
            (WalFileName::Segment(name), Some(scan), _) => {
                let is_first = scan.summary.first_page_timeline != name.timeline;
                tokio::spawn(async move {
                    log(index::write::extend(&lineage, name).await);
                    log(index::write::extend_parent(&lineage, name, is_first).await);
                })
            }
            (WalFileName::History(_), _, Some(history)) => {
                let history = history.clone();
                tokio::spawn(async move { log(index::write::extend_left(&lineage, &history).await) })
            }
            _ => return None,
        }))
    }
}

impl Drop for IndexBeside {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn check_stored_ancestry(lineage: &LineageRepository, scan: &SegmentScan) -> Result<()> {
    let (own, first) = (scan.summary.segment.timeline, scan.summary.first_page_timeline);
    if first == own {
        return Ok(());
    }
    match lineage.history(own).await? {
        Some(history) if !history.contains(first) => Err(Error::mismatch(format!(
            "its first page belongs to timeline {first}, which is no ancestor of timeline {own}"
        ))),
        _ => Ok(()),
    }
}

impl EncodedFile {
    /// Returns the file's name.
    pub fn name(&self) -> WalFileName {
        self.name
    }

    /// Returns the same bytes as the `.partial` file of their segment: what a timeline's last segment is
    /// archived as.
    #[must_use]
    pub fn into_partial(mut self) -> Self {
        if let WalFileName::Segment(segment) = self.name {
            self.name = WalFileName::Partial(segment);
        }
        self
    }

    /// Returns the file's length.
    pub fn plain_bytes(&self) -> u64 {
        self.encoded.plain_bytes
    }

    /// Keeps `room` until this is dropped.
    pub(crate) fn hold(&mut self, room: OwnedSemaphorePermit) {
        self._room = Some(room);
    }

    /// Returns how many bytes of memory its compressed body takes.
    pub(crate) fn bytes_in_memory(&self) -> u64 {
        match &self.body {
            EncodedBody::Memory(bytes) => bytes.len() as u64,
            EncodedBody::Spooled(_) => 0,
        }
    }

    /// Returns the memory of its compressed body, empty, when nobody else holds it any more.
    pub(crate) fn into_memory(self) -> Option<Vec<u8>> {
        let EncodedBody::Memory(bytes) = self.body else { return None };
        let mut memory = bytes.try_into_mut().ok()?;
        memory.clear();
        Some(Vec::from(memory))
    }

    /// Returns what the file holds, for segments and `.partial` files.
    pub fn scan(&self) -> Option<&SegmentScan> {
        self.scan.as_ref()
    }

    /// Returns whether it is what its name says: a segment to its end, or another file.
    pub fn is_whole(&self) -> bool {
        self.kind() != ObjectKind::Incomplete
    }

    /// Returns the digest of its content, in hex.
    pub fn digest(&self) -> String {
        self.encoded.digest.to_string()
    }

    fn kind(&self) -> ObjectKind {
        match (self.name, &self.scan) {
            (WalFileName::Segment(_), Some(SegmentScan { verdict: Verdict::Incomplete { .. }, .. })) => {
                ObjectKind::Incomplete
            }
            (name, _) => ObjectKind::of(name),
        }
    }

    fn warnings(&self) -> Vec<String> {
        match (self.name, self.scan.as_ref().map(|scan| &scan.verdict)) {
            (WalFileName::Segment(name), Some(Verdict::Incomplete { valid_to, reason })) => vec![format!(
                "{name} is not a whole segment: valid WAL ends at {valid_to} ({reason}). Its bytes were kept apart \
                 and will not be served as the segment"
            )],
            (_, Some(Verdict::Undecoded { reason })) => {
                vec![format!("{} was stored without knowing what it holds: {reason}", self.name)]
            }
            _ => Vec::new(),
        }
    }

    /// Returns the object to store in `lineage`.
    fn object(&self, lineage: &LineageRepository) -> Result<EncodedObject> {
        let scan = self.scan.as_ref();
        let envelope = Envelope {
            kind: self.kind(),
            name: self.name,
            codec: self.compression.codec(),
            segment_size: scan.map_or(lineage.lineage().segment_size, |scan| scan.summary.segment_size),
            system_identifier: scan.map_or(0, |scan| scan.summary.system_identifier),
            plain_bytes: self.encoded.plain_bytes,
            body_bytes: self.encoded.body_bytes,
            body_crc: self.encoded.body_crc,
            digest: self.encoded.digest,
        };
        let head = ObjectHead::encode(&envelope, scan.map(|scan| &scan.summary))?;
        Ok(EncodedObject { envelope, head: head.into(), body: self.body.clone() })
    }
}

/// Returns the object that holds a segment's bytes, as a push would store it: for tests and tools that
/// have the bytes in memory.
///
/// # Errors
/// [`Error::Mismatch`] when the bytes are not that segment.
pub fn encode_segment(name: SegmentName, bytes: &[u8], compression: Compression) -> Result<EncodedObject> {
    let size = SegmentSize::new(bytes.len() as u64)
        .ok_or_else(|| Error::mismatch(format!("a segment never has {} bytes", bytes.len())))?;
    let mut scanner = SegmentScanner::new(name, size);
    let mut body = Vec::new();
    let encoded =
        encode_body(&mut &*bytes, size.bytes(), compression, &mut body, &mut |bytes| scanner.push(bytes))?;
    let scan = scanner.finish();
    let kind = match &scan.verdict {
        Verdict::Whole | Verdict::Undecoded { .. } => ObjectKind::Segment,
        Verdict::Incomplete { .. } => ObjectKind::Incomplete,
        Verdict::Mismatch { what } => return Err(Error::mismatch(what.clone())),
    };
    let envelope = Envelope {
        kind,
        name: WalFileName::Segment(name),
        codec: compression.codec(),
        segment_size: size,
        system_identifier: scan.summary.system_identifier,
        plain_bytes: encoded.plain_bytes,
        body_bytes: encoded.body_bytes,
        body_crc: encoded.body_crc,
        digest: encoded.digest,
    };
    let head = ObjectHead::encode(&envelope, Some(&scan.summary))?;
    Ok(EncodedObject { envelope, head: head.into(), body: EncodedBody::Memory(body.into()) })
}
const _: () = assert!(IN_MEMORY_BYTES_MAX <= PLAIN_BYTES_MAX);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_reads_differently_is_not_believed() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"as it is").unwrap();
        check_reads_the_same(&mut file, 8, Digest::of(b"as it is")).unwrap();
        let error = check_reads_the_same(&mut file, 8, Digest::of(b"as it was")).unwrap_err();
        assert!(matches!(error, Error::LocalIo(_)), "{error}");
    }
}
