//! What is made up for tests: segments without WAL (an envelope, a summary, a few bytes), and records.

use chrono::{DateTime, Utc};

use super::record_head;
use crate::catalog::{DrillRecord, Lineage};
use crate::codec::{Codec, Digest, EncodedBody, EncodedObject, Envelope, ObjectHead, ObjectKind};
use crate::error::Result;
use crate::pg::{Lsn, SegmentName, WalFileName};
use crate::wal::summary::{Counts, SegmentEnding, SegmentSummary, StopTime};

/// Returns the summary of a full segment of PostgreSQL 17 in which transaction `xid` commits at its start
/// and `xid` + 1 in its middle, at these times.
pub fn made_up_summary(
    lineage: &Lineage,
    name: SegmentName,
    xid: u32,
    times: [DateTime<Utc>; 2],
) -> SegmentSummary {
    let size = lineage.segment_size;
    let start = name.start(size);
    let stop =
        |at: usize, lsn: u64| StopTime { time: times[at], lsn: Lsn(lsn), xid: xid.wrapping_add(at as u32) };
    let both = [stop(0, start.0 + 40), stop(1, start.0 + size.bytes() / 2)];
    SegmentSummary {
        segment: name,
        segment_size: size,
        system_identifier: lineage.system_identifier,
        page_magic: 0xD116,
        first_page_timeline: name.timeline,
        first_record: Some(both[0].lsn),
        end_of_wal: name.end(size),
        ending: SegmentEnding::Full,
        leading: None,
        unfinished: None,
        counts: Counts { records: 100, commits: 2, ..Counts::default() },
        min_time: both.into_iter().min_by_key(|stop| stop.time),
        max_time: both.into_iter().max_by_key(|stop| stop.time),
        ended_xids: Some((xid, xid.wrapping_add(1))),
        deletes: Some(Default::default()),
        events: Vec::new(),
        events_truncated: false,
    }
}

/// Returns an object with this summary whose body is no WAL: its head can be read, its content cannot.
///
/// # Errors
/// As of [`ObjectHead::encode`].
pub fn made_up_object(summary: &SegmentSummary) -> Result<EncodedObject> {
    let body = format!("{} {:?}", summary.segment, summary.max_time).into_bytes();
    let envelope = Envelope {
        kind: ObjectKind::Segment,
        name: WalFileName::Segment(summary.segment),
        codec: Codec::Lz4,
        segment_size: summary.segment_size,
        system_identifier: summary.system_identifier,
        plain_bytes: summary.segment_size.bytes(),
        body_bytes: body.len() as u64,
        body_crc: crc32fast::hash(&body),
        digest: Digest::of(&body),
    };
    let head = ObjectHead::encode(&envelope, Some(summary))?;
    Ok(EncodedObject { envelope, head: head.into(), body: EncodedBody::Memory(body.into()) })
}

/// Returns the record of a drill to the end of the archive that came to this.
pub fn made_up_drill(started: DateTime<Utc>, outcome: &str) -> DrillRecord {
    DrillRecord {
        head: record_head(started, None, 7),
        millis: 1,
        outcome: outcome.into(),
        problems: Vec::new(),
        target: "--latest".into(),
        backup: None,
        restored_bytes: 0,
        recovery_millis: None,
        newest_commit_age_millis: None,
        read_here: None,
    }
}
