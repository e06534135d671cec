//! WAL that will not be archived: recorded in every repository first, and only then let go.
//!
//! Nothing here happens by itself. An operator says that a segment is given up, or a streaming client that
//! the server has removed WAL before it came; every reader of the archive respects the record. A segment
//! that can be stored is stored, whatever the ledger says.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::catalog::{GapCause, GapKind, GapRecord};
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, TimelineId, WalFileName};
use crate::repository::{ClusterRepository, LineageRepository, RecordedBy, new_gap_id};

use super::DataDirectory;
use super::fetch::OpenClusters;
use super::push::{EncodedFile, PushOptions, PushReport, encode_aside, push_encoded};

/// What is said of a stretch of WAL that will not be archived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// The timeline.
    pub timeline: TimelineId,
    /// Its first byte.
    pub start: Lsn,
    /// The position after its last byte.
    pub end: Lsn,
    /// Why it is missing.
    pub cause: GapCause,
    /// The digest of the one segment that is missing, in hex, where other content is stored under its name.
    pub segment_digest: Option<String>,
}

/// One repository's part in the giving up of a segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The lineage's folder.
    pub location: String,
    /// The digest of what is stored there under the segment's name, in hex.
    pub stored_digest: Option<String>,
    /// Whether that is other content than the local file's; known only where that can be read.
    pub other_content: bool,
    /// The record that is there already.
    pub recorded: Option<GapRecord>,
}

/// What is to be known before a segment is given up.
#[derive(Debug)]
pub struct Survey {
    /// One for each repository.
    pub places: Vec<Place>,
    lineages: Vec<LineageRepository>,
    segment: SegmentName,
    segment_digest: Option<String>,
}

/// What became of a file that is pushed by the archiver.
#[derive(Debug)]
pub enum Pushed {
    /// It is durable in every repository.
    Stored(PushReport),
    /// It cannot be stored, and every repository says that it was given up.
    GivenUp {
        /// Why it was not stored.
        failure: Error,
        /// Why it was given up.
        record: GapRecord,
    },
}

/// Returns what every repository says about a segment that is to be given up. `local` is the file, where
/// it could be read.
///
/// # Errors
/// The first thing that a repository cannot say: nothing can be given up then.
pub async fn survey(
    clusters: &[ClusterRepository],
    segment: SegmentName,
    path: Option<&Path>,
    local: Option<&EncodedFile>,
    lineage: Option<u32>,
) -> Result<Survey> {
    let lineages = lineages(clusters, path, lineage).await?;
    let Some(first) = lineages.first().map(|lineage| lineage.lineage().clone()) else {
        return Err(Error::invalid("no repository is configured"));
    };
    if !segment.is_legal(first.segment_size) {
        return Err(Error::invalid(format!(
            "{segment} is not the name of a segment of {}",
            first.segment_size
        )));
    }
    let ours = local.filter(|local| local.is_whole()).map(EncodedFile::digest);
    let mut places = Vec::new();
    for lineage in &lineages {
        let other = lineage.lineage();
        if (other.system_identifier, other.segment_size) != (first.system_identifier, first.segment_size) {
            return Err(Error::mismatch(format!(
                "{} belongs to system identifier {}, another repository's lineage to {}",
                lineage.location(),
                other.system_identifier,
                first.system_identifier
            ))
            .with_next("Name the lineage with --lineage, or the file by its path in pg_wal."));
        }
        let stored = match lineage.summarized(segment).await {
            Err(Error::Corrupt(_)) => None,
            stored => stored?.map(|stored| stored.digest),
        };
        places.push(Place {
            location: lineage.location(),
            other_content: stored.is_some() && ours.is_some() && stored != ours,
            stored_digest: stored,
            recorded: given_up_in(lineage, segment).await?,
        });
    }
    let segment_digest = ours.filter(|_| places.iter().any(|place| place.other_content));
    Ok(Survey { places, lineages, segment, segment_digest })
}

impl Survey {
    /// Returns the record to write: the one that a repository has already, else a new one.
    pub fn record(&self, reason: &str, now: DateTime<Utc>) -> GapRecord {
        if let Some(record) = self.places.iter().find_map(|place| place.recorded.clone()) {
            return record;
        }
        let size = self
            .lineages
            .first()
            .map_or(crate::pg::SegmentSize::DEFAULT, |lineage| lineage.lineage().segment_size);
        let stretch = Stretch {
            timeline: self.segment.timeline,
            start: self.segment.start(size),
            end: self.segment.end(size),
            cause: GapCause { kind: GapKind::GivenUp, text: reason.to_owned() },
            segment_digest: self.segment_digest.clone(),
        };
        new_record(&stretch, now)
    }

    /// Returns the lineages, one for each repository.
    pub fn lineages(&self) -> &[LineageRepository] {
        &self.lineages
    }

    /// Writes the record into every repository that has none; one after the other, so that a call that was
    /// broken off can be made again.
    ///
    /// # Errors
    /// What the first repository says that cannot take it. The segment is given up only when all have it.
    pub async fn write(&self, record: &GapRecord) -> Result<()> {
        for (lineage, place) in self.lineages.iter().zip(&self.places) {
            if place.recorded.is_none() {
                lineage.put_gap(record).await.map_err(|error| {
                    error
                        .with_safe(
                            "the segment is not given up: that takes the record in every repository; PostgreSQL \
                             keeps it and asks again",
                        )
                        .with_next("See to the repository, then repeat the command: it goes on where it stopped.")
                })?;
            }
        }
        Ok(())
    }
}

/// Returns a new record of a stretch, in the name of this machine and user.
pub fn new_record(stretch: &Stretch, now: DateTime<Utc>) -> GapRecord {
    // Stored times have microseconds at most; what is written and what is read back must be equal.
    let recorded = DateTime::from_timestamp_micros(now.timestamp_micros()).unwrap_or(now);
    let RecordedBy { host, user } = RecordedBy::now();
    GapRecord {
        format: 1,
        id: new_gap_id(now, rand::random()),
        timeline: stretch.timeline,
        start_lsn: stretch.start,
        end_lsn: stretch.end,
        cause: stretch.cause.clone(),
        segment_digest: stretch.segment_digest.clone(),
        recorded,
        host,
        user,
    }
}

/// Records in every repository that a server removed WAL before it could be streamed; returns the record. Where
/// a record of all of it is there already, as after a call that was broken off, none is added.
///
/// # Errors
/// What the first repository says that cannot take it. Until this returned `Ok` nobody may act as if the
/// stretch were archived.
/// # Durability
/// After `Ok` the record survives a crash in every repository.
pub async fn record_lost(
    lineages: &[LineageRepository],
    timeline: TimelineId,
    start: Lsn,
    end: Lsn,
    why: &str,
    now: DateTime<Utc>,
) -> Result<GapRecord> {
    let cause = GapCause { kind: GapKind::Lost, text: why.to_owned() };
    let record = new_record(&Stretch { timeline, start, end, cause, segment_digest: None }, now);
    for lineage in lineages {
        let recorded = lineage.gaps_of(timeline).await?;
        if !recorded.iter().any(|gap| gap.misses_all_of(start, end)) {
            lineage.put_gap(&record).await?;
        }
    }
    Ok(record)
}

impl Pushed {
    /// Returns what PostgreSQL's log is to hold of the push of the file at `path`, one line each.
    pub fn warnings(&self, path: &Path) -> Vec<String> {
        match self {
            Self::Stored(report) => {
                report.warnings.iter().map(|warning| format!("warning: {warning}")).collect()
            }
            Self::GivenUp { failure, record } => {
                let file = path.file_name().unwrap_or_default().display();
                vec![
                    format!("WARNING: {file} is NOT archived: {failure}"),
                    format!("WARNING: every repository says that it was {record}"),
                    "WARNING: no restore can cross it; PostgreSQL is told to go on without it".to_owned(),
                ]
            }
        }
    }
}

/// Pushes what `encoded` holds; where that fails for good, looks whether the segment was given up.
/// `clusters` must be all that are configured.
///
/// # Errors
/// Why the file was not stored, unless every repository says that it was given up. An outage or a refusal
/// of a repository is never a reason not to store.
pub async fn push_or_given_up(
    clusters: &[ClusterRepository],
    encoded: Result<EncodedFile>,
    path: &Path,
    options: &PushOptions,
) -> Result<Pushed> {
    let failure = match encoded {
        Ok(encoded) => match push_encoded(clusters, &encoded, options).await {
            Ok(report) => return Ok(Pushed::Stored(report)),
            Err(failure @ (Error::Conflict(_) | Error::Mismatch(_) | Error::Corrupt(_))) => failure,
            Err(failure) => return Err(failure),
        },
        Err(failure) if file_is_at_fault(&failure, path) => failure,
        Err(failure) => return Err(failure),
    };
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
    let Some(WalFileName::Segment(segment)) = name else { return Err(failure) };
    // What cannot be looked up is no leave to let go: the push's own failure is what counts then.
    match record_in_every(clusters, segment, path, options.lineage).await {
        Ok(Some(record)) => Ok(Pushed::GivenUp { failure, record }),
        Ok(None) | Err(_) => Err(failure),
    }
}

/// Pushes the file at `path` into every repository that can be opened; as [`push_or_given_up`] when all
/// can. The file is read and compressed meanwhile. The outage of one repository keeps nothing from the others, but
/// success is when every one has the file.
///
/// # Errors
/// As [`push_or_given_up`], or why a repository could not be opened.
pub async fn push_where_open(
    repositories: &dyn OpenClusters,
    path: &Path,
    options: &PushOptions,
) -> Result<Pushed> {
    push_encoding_where_open(repositories, encode_aside(path, options), path, options).await
}

/// As [`push_where_open`], for a file that `encoding` reads and compresses ([`encode_aside`]).
///
/// # Errors
/// As [`push_where_open`].
pub(crate) async fn push_encoding_where_open(
    repositories: &dyn OpenClusters,
    encoding: impl Future<Output = Result<EncodedFile>>,
    path: &Path,
    options: &PushOptions,
) -> Result<Pushed> {
    let (encoded, opened) = tokio::join!(encoding, futures_util::future::join_all(repositories.open()));
    let (mut clusters, mut failure) = (Vec::new(), None);
    for cluster in opened {
        match cluster {
            Ok(cluster) => clusters.push(cluster),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    if let Some(error) = failure {
        if let Ok(encoded) = encoded {
            push_encoded(&clusters, &encoded, options).await?;
        }
        return Err(error);
    }
    push_or_given_up(&clusters, encoded, path, options).await
}

/// Whether a local failure lies in the file: a full disk or a bad spool folder is no reason to let go of it.
fn file_is_at_fault(failure: &Error, path: &Path) -> bool {
    match failure {
        Error::LocalIo(_) | Error::Denied(_) => {
            let read = File::open(path).and_then(|file| io::copy(&mut file.take(2 << 30), &mut io::sink()));
            read.is_err()
        }
        Error::Unavailable(_) => false,
        _ => true,
    }
}

async fn record_in_every(
    clusters: &[ClusterRepository],
    segment: SegmentName,
    path: &Path,
    lineage: Option<u32>,
) -> Result<Option<GapRecord>> {
    let mut first = None;
    for lineage in lineages(clusters, Some(path), lineage).await? {
        match given_up_in(&lineage, segment).await? {
            Some(record) => first = first.or(Some(record)),
            None => return Ok(None),
        }
    }
    Ok(first)
}

async fn lineages(
    clusters: &[ClusterRepository],
    path: Option<&Path>,
    chosen: Option<u32>,
) -> Result<Vec<LineageRepository>> {
    let directory = path.and_then(DataDirectory::of_wal_file);
    let found = clusters.iter().map(|cluster| super::place::lineage(cluster, directory.as_ref(), chosen));
    futures_util::future::join_all(found).await.into_iter().collect()
}

/// Returns the record by which an operator gave up the whole segment.
async fn given_up_in(lineage: &LineageRepository, segment: SegmentName) -> Result<Option<GapRecord>> {
    let size = lineage.lineage().segment_size;
    for gap in lineage.gaps_of(segment.timeline).await? {
        if !gap.touches(segment, size) {
            continue;
        }
        let record = lineage.read_gap(&gap).await?;
        if record.cause.kind == GapKind::GivenUp && record.covers(segment, size) {
            return Ok(Some(record));
        }
    }
    Ok(None)
}
