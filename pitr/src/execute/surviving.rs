//! WAL of a server that is gone, in a `pg_wal` that is left of it: what of it the repository lacks, and storing
//! that.
//!
//! Whole segments are pushed as `archive_command` would have done it. Of the open one its valid beginning is
//! stored as a part, as `walship receive` stores parts of it: as a whole segment it would be a hole.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use walship::archive::push::{PushOptions, encode_file, push_to_lineages};
use walship::pg::control::ControlData;
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use walship::repository::LineageRepository;
use walship::wal::reader::Reader;
use walship::wal::scan::{SegmentScan, SegmentScanner, Verdict};
use walship::{Error, Result};

use super::existing;
use super::restore::blocking;
use crate::plan::RestorePlan;
use crate::target::shell_word;

/// How much is read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// More files than any `pg_wal` holds.
const FILES_MAX: usize = 1 << 20;

/// What a surviving `pg_wal` holds behind the archive's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surviving {
    folder: PathBuf,
    /// The last whole segments of the archive that are there too: the same content proves that the rest belongs
    /// behind it.
    common: Vec<SegmentName>,
    /// Whole segments that are not stored, in order.
    pub whole: Vec<SegmentName>,
    /// The segment behind them, and where the last whole record in it ends.
    pub open: Option<(SegmentName, Lsn)>,
    /// Whether a transaction ends in any of them: else they hold nothing but the server's own notes, as those of its shutdown.
    pub ends_transactions: bool,
}

impl Surviving {
    /// Returns whether nothing is there that the repository lacks.
    pub fn is_empty(&self) -> bool {
        self.whole.is_empty() && self.open.is_none()
    }

    /// Returns what it is, for people.
    pub fn describe(&self) -> String {
        let whole = match (self.whole.first(), self.whole.last()) {
            (Some(first), Some(last)) if first != last => {
                Some(format!("{first} to {last} ({} segments)", self.whole.len()))
            }
            (first, _) => first.map(|only| format!("segment {only}")),
        };
        let open = self.open.map(|(segment, to)| format!("the open segment {segment} up to {to}"));
        let all: Vec<String> = whole.into_iter().chain(open).collect();
        format!("{} in {}", all.join(" and "), self.folder.display())
    }

    /// Returns the folder that holds it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns its segments with how many bytes of each are WAL.
    fn pieces(&self, size: SegmentSize) -> impl Iterator<Item = (SegmentName, u64)> {
        let whole = self.whole.iter().map(move |name| (*name, size.bytes()));
        whole.chain(self.open.map(|(name, to)| (name, to.bytes_since(name.start(size)))))
    }
}

/// Fails when two folders hold different WAL under one name: only one of them can be pushed, and which is not ours to say.
///
/// # Errors
/// [`Error::Conflict`]; [`Error::LocalIo`] for files that cannot be read.
pub async fn check_agree(one: &Surviving, other: &Surviving, size: SegmentSize) -> Result<()> {
    for (name, length) in one.pieces(size) {
        let same_name = other.pieces(size).find(|(same, _)| *same == name);
        let Some(length) = same_name.map(|(_, bytes)| bytes.min(length)) else { continue };
        let (here, there) = (&one.folder, &other.folder);
        if beginning(here, name, length).await? != beginning(there, name, length).await? {
            return Err(Error::conflict(format!(
                "{name} in {} and in {} are different WAL, and the archive has neither",
                here.display(),
                there.display()
            ))
            .with_safe("nothing was pushed")
            .with_next(
                "Look at both with pg_waldump, and name the right one: --surviving-wal DIR --push-surviving --leave-surviving. \
                 Or restore without either: --leave-surviving alone.",
            ));
        }
    }
    Ok(())
}

/// Returns what of the plan's timeline a `pg_wal` (or the data directory around it) holds that the repository lacks.
/// Only reads.
///
/// # Errors
/// [`Error::Invalid`] when there is no such folder, when its server runs, when it holds a timeline that the
/// repository does not know, or WAL behind some that is missing; [`Error::Mismatch`] for WAL of another cluster;
/// [`Error::Corrupt`] for a segment that is damaged.
pub async fn survey(folder: &Path, repository: &LineageRepository, plan: &RestorePlan) -> Result<Surviving> {
    let lineage = repository.lineage();
    let (size, identifier) = (lineage.segment_size, lineage.system_identifier);
    let folder = wal_folder(folder, identifier)?;
    let timeline = plan.timeline;
    let last_whole = plan.chain.iter().rfind(|part| !part.open).map(|part| part.last);
    let last_stored = last_whole.filter(|last| last.timeline == timeline);
    // A whole segment's last record may end in the next one, and the plan then before it.
    let first = SegmentName::containing(timeline, plan.stop.final_lsn, size);
    let first = last_stored.map_or(first, |last| last.min(first));
    let mut search = Search {
        found: Surviving {
            folder,
            common: Vec::new(),
            whole: Vec::new(),
            open: None,
            ends_transactions: false,
        },
        size,
        identifier,
        last_stored,
        shipped_to: plan.tail.as_ref().map(|tail| tail.end_lsn),
        wanted: first,
        ended: None,
    };
    let known = plan.timelines_left_out.clone();
    blocking(move || {
        for name in
            segments(&search.found.folder, timeline, &known)?.into_iter().filter(|name| *name >= first)
        {
            search.take(name)?;
        }
        Ok(search.found)
    })
    .await
}

/// A look through segments, in order.
struct Search {
    found: Surviving,
    size: SegmentSize,
    identifier: u64,
    /// The last segment of the timeline that is stored whole.
    last_stored: Option<SegmentName>,
    /// Up to where parts of the one behind it are stored.
    shipped_to: Option<Lsn>,
    /// The segment that has to come next.
    wanted: SegmentName,
    /// Why WAL ended in the segment before that.
    ended: Option<String>,
}

impl Search {
    fn is_stored(&self, name: SegmentName) -> bool {
        self.last_stored.is_some_and(|last| name <= last)
    }

    fn take(&mut self, name: SegmentName) -> Result<()> {
        let size = self.size;
        let scan = scan(&self.found.folder.join(name.to_string()), name, size)?;
        if let Verdict::Mismatch { .. } = scan.verdict {
            // Recycled: it has the name of a segment to come and holds an older one.
            return Ok(());
        }
        self.check_place(name, scan.summary.system_identifier)?;
        let before = self.found.whole.last().or(self.found.common.last()).copied();
        self.found.ends_transactions |= !self.is_stored(name) && scan.summary.max_time.is_some();
        let torn = !self.is_stored(name) && begins_torn(&self.found.folder, before, name, size)?;
        match scan.verdict {
            Verdict::Whole if self.is_stored(name) => self.found.common.push(name),
            Verdict::Whole if torn => {
                return Err(self.unusable(name, "the record that reaches into it has a wrong checksum"));
            }
            Verdict::Whole => self.found.whole.push(name),
            Verdict::Incomplete { valid_to, reason } if !self.is_stored(name) => {
                let new = valid_to > name.start(size) && self.shipped_to.is_none_or(|to| valid_to > to);
                self.found.open = (new && !torn).then_some((name, valid_to));
                self.ended = Some(reason);
            }
            Verdict::Incomplete { reason, .. } | Verdict::Undecoded { reason } => {
                return Err(self.unusable(name, &reason));
            }
            Verdict::Mismatch { .. } => {}
        }
        self.wanted = next(name, size)?;
        Ok(())
    }

    /// Fails when a segment is not the cluster's, or does not come next.
    fn check_place(&mut self, name: SegmentName, identifier: u64) -> Result<()> {
        let folder = self.found.folder.display();
        if identifier != self.identifier {
            return Err(foreign(&self.found.folder.join(name.to_string()), identifier, self.identifier));
        }
        if let Some(reason) = &self.ended {
            return Err(self.unusable(name, &format!("WAL ends in the segment before it ({reason})")));
        }
        while self.wanted < name && self.is_stored(self.wanted) {
            self.wanted = next(self.wanted, self.size)?;
        }
        if name == self.wanted {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{folder} holds {name}, and not {} before it, which is not archived either",
            self.wanted
        ))
        .with_safe("nothing was pushed")
        .with_next(
            "Look for it elsewhere. Without --surviving-wal the restore goes on without what lies behind.",
        ))
    }

    fn unusable(&self, name: SegmentName, why: &str) -> Error {
        Error::corrupt(format!("{name} in {} cannot be used: {why}", self.found.folder.display()))
            .with_safe("nothing was pushed")
            .with_next(
                "Look at it with pg_waldump, and for another copy. Without --surviving-wal the restore goes on without it.",
            )
    }
}

fn foreign(path: &Path, identifier: u64, own: u64) -> Error {
    Error::mismatch(format!(
        "{} belongs to the cluster with system identifier {identifier}, not to {own}",
        path.display()
    ))
    .with_safe("nothing was pushed")
}

/// Stores what [`survey`] found in every repository.
///
/// # Errors
/// [`Error::Conflict`] or [`Error::Mismatch`] when the archive's last WAL is not that which is here; what the
/// stores say. What was stored by then stays, and is whole.
/// # Durability
/// After `Ok` all of it survives a crash in every repository.
pub async fn push(
    surviving: &Surviving,
    repository: &LineageRepository,
    plan: &RestorePlan,
    options: &PushOptions,
) -> Result<()> {
    if let Some(url) = repository.unreadable().first() {
        return Err(Error::unavailable(format!(
            "{url} cannot be read, and WAL is pushed into every repository or none"
        ))
        .with_safe("nothing was pushed"));
    }
    prove(surviving, repository, plan).await?;
    let lineages = repository.each();
    // Those that are stored come first: the same again is success, and anything else a conflict, before
    // anything is stored.
    for name in surviving.common.iter().chain(&surviving.whole) {
        let (path, options) = (surviving.folder.join(name.to_string()), options.clone());
        let file = blocking(move || encode_file(&path, &options)).await?;
        if !file.is_whole() {
            return Err(changed(&surviving.folder, *name));
        }
        push_to_lineages(&lineages, &file).await?;
    }
    let Some((segment, to)) = surviving.open else { return Ok(()) };
    let start = segment.start(repository.lineage().segment_size);
    let bytes = beginning(&surviving.folder, segment, to.bytes_since(start)).await?;
    for lineage in &lineages {
        lineage.put_tail(segment.timeline, start, bytes.clone(), options.compression).await?;
    }
    Ok(())
}

/// Fails when nothing shows that this WAL continues what is stored: a copy of the cluster that went on by itself
/// has the same identifier, timeline and names.
async fn prove(surviving: &Surviving, repository: &LineageRepository, plan: &RestorePlan) -> Result<()> {
    if !surviving.common.is_empty() {
        return Ok(());
    }
    let size = repository.lineage().segment_size;
    let folder = &surviving.folder;
    let Some(here) = surviving.whole.first().copied().or(surviving.open.map(|(segment, _)| segment)) else {
        return Ok(());
    };
    if let Some(tail) = plan.tail.as_ref().filter(|tail| tail.segment == here) {
        // Behind the last whole record nothing counts yet.
        let length = tail.until_lsn.bytes_since(here.start(size));
        if length > 0 {
            let stored = repository.tail_bytes(here, length).await?;
            let is_same = stored == Some(beginning(folder, here, length).await?);
            return if is_same { Ok(()) } else { Err(other(folder, here)) };
        }
    }
    let before = here.previous(size);
    let stored = match before {
        Some(before) => repository.segment_bytes(before).await?,
        None => None,
    };
    let bytes = beginning(folder, here, size.bytes()).await?;
    let joined = match (before, stored) {
        (Some(before), Some(stored)) => blocking(move || Ok(joined(before, &stored, &bytes, size))).await?,
        _ => Joined::Unknown,
    };
    match joined {
        Joined::Same => Ok(()),
        Joined::Other => Err(other(folder, here)),
        Joined::Unknown => Err(Error::invalid(format!(
            "nothing shows that {here} in {} continues what is stored of timeline {}",
            folder.display(),
            plan.timeline
        ))
        .with_safe("nothing was pushed")
        .with_next(
            "Look at it with pg_waldump, and push it with `walship wal push` when it is the right WAL.",
        )),
    }
}

/// Returns whether the record that reaches into a segment is not whole there: by itself that segment cannot tell, for
/// the record's checksum stands in the one before.
fn begins_torn(
    folder: &Path,
    before: Option<SegmentName>,
    name: SegmentName,
    size: SegmentSize,
) -> Result<bool> {
    let read = |name: SegmentName| {
        let path = folder.join(name.to_string());
        fs::read(&path).map_err(|error| Error::from_io(format!("reading {}", path.display()), error))
    };
    let Some(before) = before.filter(|before| before.next(size) == Some(name)) else { return Ok(false) };
    Ok(matches!(joined(before, &read(before)?, &read(name)?, size), Joined::Other))
}

/// How two segments lie to each other.
enum Joined {
    /// A record lies in both, and its checksum is right.
    Same,
    /// What begins in the first one does not go on in the second.
    Other,
    /// No record lies in both: each names only the place of the one before it, which may be the same in a copy.
    Unknown,
}

fn joined(before: SegmentName, stored: &[u8], bytes: &[u8], size: SegmentSize) -> Joined {
    let mut reader = Reader::new(before.start(size), before.timeline, size);
    let border = before.end(size);
    let (mut in_both, mut behind) = (false, false);
    for part in [stored, bytes] {
        reader.push(part, |record, _| {
            in_both |= record.lsn < border && record.end_lsn > border;
            behind |= record.end_lsn > border;
        });
    }
    match (in_both, behind) {
        (true, _) => Joined::Same,
        (false, true) => Joined::Unknown,
        (false, false) => Joined::Other,
    }
}

fn other(folder: &Path, name: SegmentName) -> Error {
    Error::mismatch(format!("{name} in {} does not continue the WAL that is stored", folder.display()))
        .with_safe("nothing was pushed")
        .with_next(
            "It belongs to a copy of the cluster that went on by itself. Restore without --surviving-wal, or look for the \
             pg_wal of the server that archived.",
        )
}

fn changed(folder: &Path, name: SegmentName) -> Error {
    Error::invalid(format!("{name} in {} is being changed: a server still runs on it", folder.display()))
        .with_safe("what was pushed is whole; the rest was not")
        .with_next("Stop that server first.")
}

/// Returns the first bytes of a segment.
async fn beginning(folder: &Path, segment: SegmentName, length: u64) -> Result<Vec<u8>> {
    let path = folder.join(segment.to_string());
    blocking(move || {
        let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
        let mut bytes = Vec::new();
        File::open(&path).map_err(failed)?.take(length).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 == length {
            return Ok(bytes);
        }
        Err(Error::local_io(format!("{} ended early", path.display())))
    })
    .await
}

/// Returns the folder of WAL that was meant, when it is that of the cluster and no server runs on it.
fn wal_folder(given: &Path, identifier: u64) -> Result<PathBuf> {
    let folder = std::path::absolute(given)
        .map_err(|error| Error::from_io(format!("resolving {}", given.display()), error))?;
    let inner = folder.join("pg_wal");
    let (folder, data_dir) = match inner.is_dir() {
        true => (inner, Some(folder)),
        false => {
            let around = folder.parent().map(Path::to_owned);
            (folder, around)
        }
    };
    if !folder.is_dir() {
        return Err(Error::invalid(format!("{} is no folder", folder.display()))
            .with_safe("nothing was started")
            .with_next("Name the pg_wal of the server that is gone, or its data directory."));
    }
    let data_dir = data_dir.filter(|dir| dir.join("PG_VERSION").is_file());
    // A pg_control that cannot be read proves nothing; each segment says whose it is.
    let control = data_dir.as_ref().and_then(|dir| fs::read(dir.join("global/pg_control")).ok());
    if let Some(control) = control.and_then(|bytes| ControlData::parse(&bytes).ok())
        && control.system_identifier != identifier
    {
        return Err(foreign(&folder, control.system_identifier, identifier));
    }
    if let Some(dir) = data_dir
        && existing::running(&dir)?.is_some()
    {
        return Err(Error::invalid(format!("a server runs on {}", dir.display()))
            .with_safe("nothing was pushed")
            .with_next(format!(
                "It archives its WAL itself. When it is to be replaced, stop it first: pg_ctl -D {} stop.",
                shell_word(&dir.to_string_lossy())
            )));
    }
    Ok(folder)
}

/// Returns the segments of a timeline in a folder, in order; `known` are other timelines of the repository.
fn segments(folder: &Path, timeline: TimelineId, known: &[TimelineId]) -> Result<Vec<SegmentName>> {
    let failed = |error| Error::from_io(format!("reading {}", folder.display()), error);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)?.take(FILES_MAX) {
        let name = entry.map_err(failed)?.file_name();
        match name.to_str().and_then(|name| name.parse::<WalFileName>().ok()) {
            Some(WalFileName::Segment(name)) if name.timeline == timeline => names.push(name),
            Some(WalFileName::History(newer)) if newer > timeline && !known.contains(&newer) => {
                return Err(Error::invalid(format!(
                    "{} holds timeline {newer}, which is not in the repository",
                    folder.display()
                ))
                .with_safe("nothing was pushed")
                .with_next(format!(
                    "Push {} and the segments of that timeline with `walship wal push`, then restore.",
                    folder.join(WalFileName::History(newer).to_string()).display()
                )));
            }
            _ => {}
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn next(name: SegmentName, size: SegmentSize) -> Result<SegmentName> {
    name.next(size).ok_or_else(|| Error::invalid(format!("no segment comes behind {name}")))
}

fn scan(path: &Path, name: SegmentName, size: SegmentSize) -> Result<SegmentScan> {
    let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
    let mut file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes != size.bytes() {
        return Err(Error::corrupt(format!("{} has {bytes} bytes, a segment has {size}", path.display()))
            .with_safe("nothing was pushed")
            .with_next(
                "Copy it again from where it comes. Without --surviving-wal the restore goes on without it.",
            ));
    }
    let mut scanner = SegmentScanner::new(name, size);
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk).map_err(failed)? {
            0 => return Ok(scanner.finish()),
            read => scanner.push(&chunk[..read]),
        }
    }
}
