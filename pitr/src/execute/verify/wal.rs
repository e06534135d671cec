//! Consecutive segments, read whole one after the other: each by itself, and whether WAL goes on from one to the next.

use std::io::{self, Write};

use walship::catalog::{Catalog, ReadPlace, StoredTail};
use walship::codec::{Digest, ObjectKind};
use walship::pg::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use walship::repository::{LineageRepository, WalObject};
use walship::wal::SegmentSummary;
use walship::wal::event::EventKind;
use walship::wal::reader::Reader;
use walship::wal::scan::{SegmentScan, SegmentScanner, Verdict};
use walship::{Error, Result};

use super::run::{Done, Job};
use crate::execute::restore::blocking;
use crate::verify::{Finding, FindingKind, Needed, Takes, Unread};

/// Reads everything that is stored under `wal/` of the segments from `from` on and before `until`, while that is allowed.
///
/// # Errors
/// What is no damage: an outage.
pub(super) async fn read_wal(job: &Job, timeline: TimelineId, from: u64, until: u64) -> Result<Done> {
    let size = job.size();
    let listed = job.repository.wal_objects(timeline, from, until).await?;
    let mut done = Done::default();
    for location in listed.strangers {
        let what = "the format names no such object";
        done.findings.push(Finding::note(FindingKind::Stranger, &job.location, location, what));
    }
    let mut carried = match SegmentName::from_number(timeline, from, size) {
        Some(first) => lead_in(job, first).await?,
        None => None,
    };
    for number in from..until {
        if !job.is_allowed() {
            done.left += until - number;
            break;
        }
        let Some(name) = SegmentName::from_number(timeline, number, size) else { break };
        let of_segment = |object: &&WalObject| segment_of(object.name) == Some(name);
        let objects: Vec<&WalObject> = listed.objects.iter().filter(of_segment).collect();
        carried = match read_segment(job, name, &objects, carried, &mut done).await {
            Ok(next) => next,
            // One object that cannot be read (permissions, a bad sector) must not hide what is beside it.
            Err(error) if job.repository.confirm_marker().await.is_ok() => {
                done.unread.push(Unread { object: name.to_string(), why: error.to_string() });
                done.left += 1;
                None
            }
            Err(error) => return Err(error),
        };
    }
    Ok(done)
}

fn segment_of(name: WalFileName) -> Option<SegmentName> {
    match name {
        WalFileName::Segment(name) | WalFileName::Partial(name) | WalFileName::BackupHistory(name, _) => {
            Some(name)
        }
        WalFileName::History(_) => None,
    }
}

/// Returns a reader that stands at the end of the segment before; `None` where there is none to go on from.
async fn lead_in(job: &Job, first: SegmentName) -> Result<Option<Reader>> {
    let Some(before) = predecessor(&job.catalog, first) else { return Ok(None) };
    let number = before.number(job.size());
    let listed = job.repository.wal_objects(before.timeline, number, number + 1).await?;
    for object in listed.objects.iter().filter(|object| object.kind == ObjectKind::Segment) {
        match job.repository.read_wal_object(object, Sink::new(before, job.size(), None)).await {
            Ok(Some((_, sink))) => return Ok(sink.finish().1),
            // It is told of where that segment is read itself; a good copy may lie beside it.
            Ok(None) | Err(Error::Corrupt(_)) => {}
            Err(error) => job.repository.confirm_marker().await.map_err(|_| error)?,
        }
    }
    let size = job.size();
    let whole = job.catalog.in_parts.contains_key(&before).then_some(size.bytes());
    let Some(end) = whole else { return Ok(None) };
    match read_parts(job, Sink::new(before, size, None), end).await {
        Ok(sink) => Ok(sink.and_then(|sink| sink.finish().1)),
        Err(error) => job.repository.confirm_marker().await.map(|()| None).map_err(|_| error),
    }
}

/// Reads the first bytes of a segment that is stored in parts; `None` where less is stored of it.
async fn read_parts(job: &Job, mut sink: Sink, end: u64) -> Result<Option<Sink>> {
    let _one_at_a_time = job.in_memory.lock().await;
    let Some(bytes) = job.repository.tail_bytes(sink.name, end).await? else { return Ok(None) };
    blocking(move || {
        sink.write_all(&bytes).map_err(|error| Error::from_io("reading parts of a segment", error))?;
        Ok(Some(sink))
    })
    .await
}

/// Reads a segment that is stored in parts only. That they are sound was told when the catalog was read.
async fn read_in_parts(
    job: &Job,
    name: SegmentName,
    carried: Option<Reader>,
    done: &mut Done,
) -> Result<Option<Reader>> {
    let Some(sink) = read_parts(job, Sink::new(name, job.size(), carried), job.size().bytes()).await? else {
        done.vanished.push(name);
        return Ok(None);
    };
    done.objects += 1;
    let (scan, reader, join) = sink.finish_joined();
    if let Some(wrong) = misfit(job, name, &scan) {
        let takes = Takes::Segments { first: name, last: name };
        let object = format!("parts of {name}");
        done.findings.push(Finding::damage(FindingKind::Damaged, &job.location, object, wrong, takes));
        return Ok(None);
    }
    done.findings.extend(broken(job, name, &scan, join));
    Ok(reader)
}

/// Looks whether the open segment goes on where this one, behind which it comes, ends; `reader` stands there.
async fn check_open(
    job: &Job,
    name: SegmentName,
    reader: &mut Option<Reader>,
    done: &mut Done,
) -> Result<()> {
    let size = job.size();
    let behind = |tail: &&StoredTail| predecessor(&job.catalog, tail.segment) == Some(name);
    for tail in job.catalog.tails.iter().flat_map(|tails| tails.values()).filter(behind) {
        let (segment, start) = (tail.segment, tail.segment.start(size));
        // What lies there is not its WAL at all: that was told.
        if tail.until_lsn <= start {
            continue;
        }
        // Where its own timeline goes on whole, that of another one begins here.
        let carried = match segment.timeline == name.timeline {
            true => reader.take(),
            false => lead_in(job, segment).await?,
        };
        let Some(carried) = carried else { continue };
        let end = tail.end_lsn.0.saturating_sub(start.0).min(size.bytes());
        let sink = match read_parts(job, Sink::new(segment, size, Some(carried)), end).await {
            Ok(Some(sink)) => sink,
            Ok(None) => continue,
            Err(error) => {
                job.repository.confirm_marker().await?;
                let object = format!("parts of {segment}");
                done.unread.push(Unread { object, why: error.to_string() });
                continue;
            }
        };
        if let Some(stop) = sink.join() {
            let what = format!("its WAL does not go on where that of the segment before ends: {stop}");
            let object = format!("parts of {segment}");
            let takes = Takes::Tail(segment);
            done.findings.push(Finding::damage(FindingKind::Broken, &job.location, object, what, takes));
        }
    }
    Ok(())
}

/// Returns the stored segment whose WAL the segment goes on with: on its own timeline, or on the one that it left.
fn predecessor(catalog: &Catalog, name: SegmentName) -> Option<SegmentName> {
    let size = catalog.lineage.segment_size;
    let own = name.previous(size)?;
    if catalog.segments.contains(own) {
        return Some(own);
    }
    let history = catalog.history(name.timeline)?;
    let owner = history.timeline_of(Lsn(name.start(size).0.checked_sub(1)?));
    Some(own.on(owner)).filter(|parent| parent.timeline < name.timeline && catalog.segments.contains(*parent))
}

/// Reads all objects of a segment; returns the reader to go on with.
async fn read_segment(
    job: &Job,
    name: SegmentName,
    objects: &[&WalObject],
    carried: Option<Reader>,
    done: &mut Done,
) -> Result<Option<Reader>> {
    let (mut next, mut carried) = (None, Some(carried));
    let mut damages: Vec<(String, String)> = Vec::new();
    // The digest and the place of the first that is sound: readers take that.
    let mut sound: Option<(Digest, String)> = None;
    let first = done.findings.len();
    let (segments, others): (Vec<&WalObject>, Vec<&WalObject>) =
        objects.iter().copied().partition(|object| object.kind == ObjectKind::Segment);
    let in_parts = segments.is_empty() && job.catalog.in_parts.contains_key(&name);
    if segments.is_empty() && job.catalog.segments.contains(name) && !in_parts {
        done.vanished.push(name);
        return Ok(None);
    }
    for object in segments {
        let carried = match carried.take() {
            Some(carried) => carried,
            None => lead_in(job, name).await?,
        };
        match read_twice(job, object, Sink::new(name, job.size(), carried)).await {
            Ok(None) => done.vanished.push(name),
            Ok(Some((head, sink))) => {
                done.objects += 1;
                let (scan, reader, join) = sink.finish_joined();
                let location = job.repository.wal_location(object);
                if let Some(undecoded) = undecoded(&scan) {
                    done.findings.push(Finding::note(
                        FindingKind::Damaged,
                        &job.location,
                        name.to_string(),
                        format!("its WAL cannot be decoded by this version: {undecoded}"),
                    ));
                }
                match (judge(job, name, &head.summary, &scan), &sound) {
                    (Some(wrong), _) => damages.push((location, wrong)),
                    (None, None) => {
                        next = reader;
                        done.findings.extend(broken(job, name, &scan, join));
                        sound = Some((head.envelope.digest, location));
                    }
                    (None, Some((digest, known))) if *digest != head.envelope.digest => {
                        let what =
                            format!("it holds other WAL than {known}, and both are sound by themselves");
                        let takes = Takes::Segments { first: name, last: name };
                        let kind = FindingKind::Contradiction;
                        done.findings.push(Finding::damage(kind, &job.location, location, what, takes));
                    }
                    (None, Some(_)) => {}
                }
            }
            Err(Error::Corrupt(error)) => {
                done.objects += 1;
                damages.push((job.repository.wal_location(object), error.to_string()));
            }
            Err(error) => return Err(error),
        }
    }
    if let Some(carried) = carried.take().filter(|_| in_parts) {
        next = read_in_parts(job, name, carried, done).await?;
    }
    if next.is_some() {
        check_open(job, name, &mut next, done).await?;
    }
    let mut unread = None;
    for object in others {
        if let Err(error) = check_other(job, name, object, done).await {
            unread.get_or_insert(error);
        }
    }
    for (location, what) in damages {
        done.findings.push(if sound.is_some() {
            let what = format!("{what}; a good copy lies beside it and is read in its place");
            Finding::note(FindingKind::Damaged, &job.location, location, what)
        } else {
            let takes = Takes::Segments { first: name, last: name };
            Finding::damage(FindingKind::Damaged, &job.location, location, what, takes)
        });
    }
    // What vanished was not read: whatever is there now is new. And where not all was read, only damage is known.
    let is_damaged = done.findings.iter().skip(first).any(Finding::is_damage);
    let was_read = sound.is_some() || done.vanished.last() != Some(&name);
    if was_read && (unread.is_none() || is_damaged) {
        done.read(ReadPlace::Segment(name), first);
    }
    unread.map_or(Ok(next), Err)
}

/// Reads an object once more where it was damaged: it may have been on its way alone.
async fn read_twice(
    job: &Job,
    object: &WalObject,
    sink: Sink,
) -> Result<Option<(walship::codec::ObjectHead, Sink)>> {
    let (name, size) = (sink.name, sink.size);
    match job.repository.read_wal_object(object, sink).await {
        Err(Error::Corrupt(_)) => {
            let carried = lead_in(job, name).await?;
            job.repository.read_wal_object(object, Sink::new(name, size, carried)).await
        }
        read => read,
    }
}

/// Returns what is wrong with a segment whose object is sound.
fn judge(
    job: &Job,
    name: SegmentName,
    stored: &Option<SegmentSummary>,
    scan: &SegmentScan,
) -> Option<String> {
    misfit(job, name, scan).or_else(|| match stored {
        None => Some("it has no summary".to_owned()),
        Some(stored) => crate::verify::summary_difference(stored, &scan.summary)
            .map(|fields| format!("its summary says something else than its WAL: {fields}")),
    })
}

/// Returns why WAL is not that of the whole segment.
fn misfit(job: &Job, name: SegmentName, scan: &SegmentScan) -> Option<String> {
    let ours = job.catalog.lineage.system_identifier;
    match &scan.verdict {
        Verdict::Whole | Verdict::Undecoded { .. } => {}
        Verdict::Incomplete { valid_to, reason } => {
            return Some(format!("its WAL is valid up to {valid_to} only: {reason}"));
        }
        Verdict::Mismatch { what } => return Some(format!("it is not segment {name}: {what}")),
    }
    let theirs = scan.summary.system_identifier;
    (![0, ours].contains(&theirs)).then(|| format!("it is of system identifier {theirs}"))
}

fn undecoded(scan: &SegmentScan) -> Option<&str> {
    match &scan.verdict {
        Verdict::Undecoded { reason } => Some(reason),
        _ => None,
    }
}

/// Returns that WAL does not go on from the segment before.
fn broken(job: &Job, name: SegmentName, scan: &SegmentScan, join: Option<String>) -> Option<Finding> {
    let what = join?;
    if undecoded(scan).is_some() {
        return None;
    }
    let begins = scan.summary.events.iter().any(|event| matches!(event.kind, EventKind::WalBegins { .. }));
    Some(if begins {
        let what = "WAL begins anew in it: pg_resetwal was run; no recovery crosses that";
        Finding::note(FindingKind::Broken, &job.location, name.to_string(), what)
    } else {
        let takes = Takes::Segments { first: name, last: name };
        let what = format!("its WAL does not go on where that of the segment before ends: {what}");
        Finding::damage(FindingKind::Broken, &job.location, name.to_string(), what, takes)
    })
}

/// Checks an object that is no part of the chain: nothing depends on it, but somebody may want it.
async fn check_other(job: &Job, name: SegmentName, object: &WalObject, done: &mut Done) -> Result<()> {
    done.objects += 1;
    let location = job.repository.wal_location(object);
    match job.repository.read_wal_object(object, io::sink()).await {
        Ok(_) => {}
        Err(Error::Corrupt(error)) => {
            // What is not whole may hold WAL that is nowhere else.
            let is_piece = matches!(object.kind, ObjectKind::Partial | ObjectKind::Incomplete);
            done.findings.push(if is_piece && !job.catalog.segments.contains(name) {
                Finding::damage(
                    FindingKind::Damaged,
                    &job.location,
                    location,
                    error.to_string(),
                    Takes::Nothing,
                )
            } else {
                Finding::note(FindingKind::Damaged, &job.location, location, error.to_string())
            });
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Checks that two timelines hold the same bytes up to where the younger one begins, where both have that segment.
pub(super) async fn check_forks(
    repository: &LineageRepository,
    catalog: &Catalog,
    needed: &Needed,
    location: &str,
) -> (Vec<Finding>, Vec<Unread>) {
    let size = catalog.lineage.segment_size;
    let (mut findings, mut unread) = (Vec::new(), Vec::new());
    for history in catalog.histories.values() {
        let Some(fork) = history.ancestors.last() else { continue };
        let own = SegmentName::containing(history.timeline, fork.switch_lsn, size);
        let (parent, until) = (own.on(fork.timeline), size.offset_of(fork.switch_lsn));
        if until == 0
            || !needed.has_segment(own, size)
            || !catalog.segments.contains(own)
            || !catalog.segments.contains(parent)
        {
            continue;
        }
        let mut digests = Vec::new();
        for name in [own, parent] {
            match prefix(repository, name, size, until).await {
                Ok(digest) => digests.extend(digest),
                Err(error) => unread.push(Unread { object: name.to_string(), why: error.to_string() }),
            }
        }
        if let [ours, theirs] = digests[..]
            && ours != theirs
        {
            findings.push(Finding::damage(
                FindingKind::Contradiction,
                location,
                own.to_string(),
                format!(
                    "it holds other WAL than {parent} before {}, where timeline {} left timeline {}",
                    fork.switch_lsn, history.timeline, fork.timeline
                ),
                Takes::Segments { first: own, last: own },
            ));
        }
    }
    (findings, unread)
}

/// Returns the digest of the first bytes of a segment; `None` where it cannot be read.
async fn prefix(
    repository: &LineageRepository,
    name: SegmentName,
    size: SegmentSize,
    bytes: u64,
) -> Result<Option<[u8; 32]>> {
    let number = name.number(size);
    let listed = repository.wal_objects(name.timeline, number, number + 1).await?;
    for object in listed.objects.iter().filter(|object| object.kind == ObjectKind::Segment) {
        match repository.read_wal_object(object, Prefix { hasher: blake3::Hasher::new(), left: bytes }).await
        {
            Ok(Some((_, prefix))) => return Ok(Some(*prefix.hasher.finalize().as_bytes())),
            Ok(None) | Err(Error::Corrupt(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// A digest of the first bytes.
struct Prefix {
    hasher: blake3::Hasher,
    left: u64,
}

impl Write for Prefix {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let length = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        self.hasher.update(&buffer[..length]);
        self.left -= length as u64;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a segment by itself, and as what the one before goes on with.
struct Sink {
    name: SegmentName,
    size: SegmentSize,
    scanner: SegmentScanner,
    /// What stands at the end of the segment before.
    carried: Option<Reader>,
    /// Whether a record that begins here was reached from there.
    joined: bool,
}

impl Sink {
    fn new(name: SegmentName, size: SegmentSize, mut carried: Option<Reader>) -> Self {
        if let Some(reader) = &mut carried {
            reader.set_timeline_limit(name.timeline);
        }
        Self { name, size, scanner: SegmentScanner::new(name, size), carried, joined: false }
    }

    /// Returns what was found, and the reader to go on with: none behind WAL that cannot be followed.
    fn finish(self) -> (SegmentScan, Option<Reader>) {
        let (scan, reader, _) = self.finish_joined();
        (scan, reader)
    }

    /// Returns why the segment does not go on with the one before.
    fn join(&self) -> Option<String> {
        let stop = self.carried.as_ref().and_then(Reader::stop).filter(|_| !self.joined);
        stop.map(|stop| format!("{} at {}", stop.reason, stop.lsn))
    }

    /// Returns also why the segment does not go on with the one before.
    fn finish_joined(self) -> (SegmentScan, Option<Reader>, Option<String>) {
        let join = self.join();
        let (scan, reader) = self.scanner.finish_with_reader();
        let whole = scan.verdict == Verdict::Whole;
        // A record may begin before this segment and end behind it: only who came from before knows of it.
        let next = match self.carried {
            Some(carried) if !self.joined && join.is_none() => Some(carried),
            _ => Some(reader),
        };
        (scan, next.filter(|_| whole), join)
    }
}

impl Write for Sink {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.scanner.push(buffer);
        let start = self.name.start(self.size);
        if let Some(carried) = &mut self.carried
            && !self.joined
        {
            let joined = &mut self.joined;
            carried.push(buffer, |record, _| *joined |= record.lsn >= start);
        }
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
