//! A stored summary beside what the WAL says.

use serde_json::Value;
use walship::wal::event::{EventKind, WalEvent};
use walship::wal::summary::{SegmentEnding, SegmentSummary};

/// Returns in which fields a stored summary differs from what was found in the WAL now; `None` where it says nothing
/// else. What an older release left out, or what did not fit, is no difference.
pub fn summary_difference(stored: &SegmentSummary, found: &SegmentSummary) -> Option<String> {
    if stored == found {
        return None;
    }
    let mut found = found.clone();
    if let SegmentEnding::Undecoded { .. } = stored.ending {
        // Nothing more is said of what the release that wrote it could not follow.
        let facts = |summary: &SegmentSummary| {
            (summary.segment, summary.segment_size, summary.system_identifier, summary.page_magic)
        };
        return (facts(stored) != facts(&found))
            .then(|| "segment, size, system identifier or version".to_owned());
    }
    if stored.deletes.is_none() {
        found.deletes = None;
    }
    if stored.events_truncated && stored.events.is_empty() {
        found.events.clear();
        found.events_truncated = true;
    }
    if stored.events.len() == found.events.len() {
        for (theirs, ours) in stored.events.iter().zip(&mut found.events) {
            as_then(theirs, ours);
        }
    }
    if *stored == found {
        return None;
    }
    let (Ok(Value::Object(stored)), Ok(Value::Object(found))) =
        (serde_json::to_value(stored), serde_json::to_value(&found))
    else {
        return Some("everything".to_owned());
    };
    let keys: std::collections::BTreeSet<&String> = stored.keys().chain(found.keys()).collect();
    let differing: Vec<&str> =
        keys.into_iter().filter(|key| stored.get(*key) != found.get(*key)).map(String::as_str).collect();
    Some(differing.join(", "))
}

/// Makes an event say what an older release said of it, where the stored one does.
fn as_then(stored: &WalEvent, found: &mut WalEvent) {
    if stored == found || (stored.lsn, stored.end_lsn, stored.xid) != (found.lsn, found.end_lsn, found.xid) {
        return;
    }
    match (&stored.kind, &mut found.kind) {
        (EventKind::Commit { dropped_objects: None, .. }, EventKind::Commit { dropped_objects, .. }) => {
            *dropped_objects = None;
        }
        // What WAL begins with was told as the checkpoint that it is.
        (EventKind::Checkpoint { time, shutdown: true, .. }, EventKind::WalBegins { time: begun })
            if time == begun =>
        {
            found.kind = stored.kind.clone();
        }
        _ => {}
    }
}
