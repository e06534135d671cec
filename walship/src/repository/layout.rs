//! Object keys: the one place that spells them and reads them back.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::codec::{Digest, ObjectKind};
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use crate::storage::ObjectKey;
use crate::wal::rollup::{LEVEL_MAX, Place};

/// The operator's name for a cluster: `[a-z0-9][a-z0-9_-]{0,62}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterName(String);

impl ClusterName {
    /// Returns the name's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let first_ok = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let ok = (1..=63).contains(&text.len())
            && text.as_bytes().first().is_some_and(first_ok)
            && text.bytes().all(|b| first_ok(&b) || b == b'_' || b == b'-')
            // Folder repositories keep temporaries there.
            && text != "tmp";
        if !ok {
            return Err(Error::invalid(format!("{text:?} cannot be the name of a cluster")).with_next(
                "Use up to 63 of a-z, 0-9, \"_\" and \"-\", starting with a letter or digit (not \"tmp\").",
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for ClusterName {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<ClusterName> for String {
    fn from(name: ClusterName) -> Self {
        name.0
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The repository document.
pub(super) fn repository_document() -> Result<ObjectKey> {
    ObjectKey::new("walship.json")
}

/// The document of one cluster.
pub(super) fn cluster_document(cluster: &ClusterName) -> Result<ObjectKey> {
    ObjectKey::new(format!("{cluster}/cluster.json"))
}

/// What the keys of all lineage documents of a cluster start with.
pub(super) fn lineages_prefix(cluster: &ClusterName) -> String {
    format!("{cluster}/lineages/")
}

/// The document of one lineage.
pub(super) fn lineage_document(cluster: &ClusterName, number: u32) -> Result<ObjectKey> {
    ObjectKey::new(format!("{cluster}/lineages/{number:04}.json"))
}

/// Returns the number of the lineage whose document has this key.
pub(super) fn lineage_number(cluster: &ClusterName, key: &ObjectKey) -> Option<u32> {
    let rest = key.as_str().strip_prefix(&lineages_prefix(cluster))?;
    let digits = rest.strip_suffix(".json")?;
    let number = digits.parse().ok().filter(|number| *number > 0)?;
    (format!("{number:04}") == digits).then_some(number)
}

/// The keys below one lineage: `<cluster>/<lineage>/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LineageLayout {
    base: String,
}

/// A WAL object's key, read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WalKey {
    /// The file's own name.
    pub(super) name: WalFileName,
    /// What the key says it holds.
    pub(super) kind: ObjectKind,
    /// Whether it is a good copy beside a damaged object.
    pub(super) is_copy: bool,
}

/// A roll-up's key, read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RollupKey {
    /// What it stands for.
    pub(super) place: Place,
    /// How many segments it covers.
    pub(super) segments: u64,
    /// The first half of the digest of its JSON, in hex.
    pub(super) digest: String,
}

/// What the key of a document about what is proven says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ProvenKey {
    /// The verification's id.
    pub(super) id: String,
    /// Which of its documents it is.
    pub(super) number: u32,
    /// The place that it is said of and the digest of its bytes; `None` for one by an older version.
    pub(super) named: Option<(String, String)>,
}

/// The key of a gap's record, read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GapKey {
    pub(super) timeline: TimelineId,
    pub(super) start: Lsn,
    pub(super) end: Lsn,
    pub(super) id: String,
    /// The first half of the digest of the segment that is missing, in hex, where it is known.
    pub(super) digest: Option<String>,
}

impl LineageLayout {
    pub(super) fn new(cluster: &ClusterName, lineage: u32) -> Self {
        Self { base: format!("{cluster}/{lineage:04}") }
    }

    /// The lineage's folder.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    fn key(&self, rest: impl fmt::Display) -> Result<ObjectKey> {
        ObjectKey::new(format!("{}/{rest}", self.base))
    }

    /// The key of a WAL file. `digest` is that of its plaintext: part of the key where several
    /// different files may have the same name.
    pub(super) fn wal(&self, name: WalFileName, kind: ObjectKind, digest: &Digest) -> Result<ObjectKey> {
        let end = match kind {
            ObjectKind::Segment => ".wal".to_owned(),
            ObjectKind::Incomplete => format!(".incomplete.{}", digest.short()),
            ObjectKind::Partial => format!(".{}", digest.short()),
            ObjectKind::History | ObjectKind::BackupHistory => String::new(),
        };
        self.key(format_args!("wal/{}{name}{end}", folder(name)))
    }

    /// The key of a whole segment.
    pub(super) fn segment(&self, name: SegmentName) -> Result<ObjectKey> {
        let name = WalFileName::Segment(name);
        self.key(format_args!("wal/{}{name}.wal", folder(name)))
    }

    /// The key of a history file.
    pub(super) fn history(&self, timeline: TimelineId) -> Result<ObjectKey> {
        self.key(format_args!("wal/{}", WalFileName::History(timeline)))
    }

    /// What the keys of all `.partial` or all incomplete objects of a segment start with.
    pub(super) fn variants_prefix(&self, name: SegmentName, kind: ObjectKind) -> String {
        let word = if kind == ObjectKind::Partial { "partial" } else { "incomplete" };
        format!("{}/wal/{}{name}.{word}.", self.base, folder(WalFileName::Segment(name)))
    }

    /// What the keys of all tail parts start with.
    pub(super) fn all_tails_prefix(&self) -> String {
        format!("{}/tail/", self.base)
    }

    /// What the keys of all tail parts of one timeline start with.
    pub(super) fn timeline_tails_prefix(&self, timeline: TimelineId) -> String {
        format!("{}/tail/{}/", self.base, timeline.hex())
    }

    /// What the keys of all tail parts of a segment start with.
    pub(super) fn tails_prefix(&self, name: SegmentName) -> String {
        format!("{}{name}/", self.timeline_tails_prefix(name.timeline))
    }

    /// The key of the tail part with these offsets in its segment.
    pub(super) fn tail(&self, name: SegmentName, start: u64, end: u64) -> Result<ObjectKey> {
        ObjectKey::new(format!("{}{start:08X}-{end:08X}", self.tails_prefix(name)))
    }

    /// Reads the segment and the offsets in a tail part's key back; `None` for anything that this format does not
    /// name.
    pub(super) fn parse_tail(&self, key: &ObjectKey) -> Option<(SegmentName, u64, u64)> {
        let (folders, offsets) = key.as_str().rsplit_once('/')?;
        let name = folders.rsplit('/').next()?.parse().ok()?;
        let (start, end) = offsets.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        (start < end && self.tail(name, start, end).ok().as_ref() == Some(key)).then_some((name, start, end))
    }

    /// What all WAL keys start with.
    pub(super) fn wal_prefix(&self) -> String {
        format!("{}/wal/", self.base)
    }

    /// What all keys of segments on one timeline start with.
    pub(super) fn timeline_prefix(&self, timeline: TimelineId) -> String {
        format!("{}/wal/{}/", self.base, timeline.hex())
    }

    /// A text that sorts after every key of this segment and before every key of later ones.
    pub(super) fn after_segment(&self, name: SegmentName) -> String {
        // Its keys go on with a dot, which sorts before the slash.
        format!("{}/wal/{}{name}/", self.base, folder(WalFileName::Segment(name)))
    }

    /// A text that sorts after all that is stored of a timeline, and before everything of later ones.
    pub(super) fn after_timeline(&self, timeline: TimelineId) -> String {
        format!("{}/wal/{}/~", self.base, timeline.hex())
    }

    /// Reads a key back; `None` for anything that this format does not name.
    pub(super) fn parse_wal(&self, key: &ObjectKey) -> Option<WalKey> {
        let rest = key.as_str().strip_prefix(&self.base)?.strip_prefix("/wal/")?;
        let file = rest.rsplit('/').next()?;
        let (file, is_copy) = match file.rsplit_once(".r") {
            Some((file, digest)) if is_short_digest(digest) => (file, true),
            _ => (file, false),
        };
        let (name, kind) = if let Some(name) = file.strip_suffix(".wal") {
            (WalFileName::Segment(name.parse().ok()?), ObjectKind::Segment)
        } else if let Ok(name @ (WalFileName::History(_) | WalFileName::BackupHistory(..))) = file.parse() {
            (name, ObjectKind::of(name))
        } else {
            let (file, digest) = file.rsplit_once('.')?;
            let (segment, word) = file.rsplit_once('.')?;
            let segment = segment.parse().ok().filter(|_| is_short_digest(digest))?;
            match word {
                "partial" => (WalFileName::Partial(segment), ObjectKind::Partial),
                "incomplete" => (WalFileName::Segment(segment), ObjectKind::Incomplete),
                _ => return None,
            }
        };
        let in_its_folder = rest.strip_suffix(rest.rsplit('/').next()?)? == folder(name);
        in_its_folder.then_some(WalKey { name, kind, is_copy })
    }

    /// What the keys of all roll-ups of one level of a timeline start with.
    pub(super) fn rollups_prefix(&self, timeline: TimelineId, level: u8) -> String {
        format!("{}/index/{}/{level}/", self.base, timeline.hex())
    }

    /// A text that sorts before all roll-ups of this place and later ones, and after all before it.
    pub(super) fn rollups_from(&self, place: Place, size: SegmentSize) -> String {
        let prefix = self.rollups_prefix(place.timeline, place.level);
        format!("{prefix}{:016X}", place.start_lsn(size).0)
    }

    /// The key of a roll-up.
    pub(super) fn rollup(&self, key: &RollupKey, size: SegmentSize) -> Result<ObjectKey> {
        let RollupKey { place, segments, digest } = key;
        let prefix = self.rollups_prefix(place.timeline, place.level);
        let digest = digest.get(..32).unwrap_or(digest);
        ObjectKey::new(format!("{prefix}{:016X}-{segments:010X}-{digest}.json.zst", place.start_lsn(size).0))
    }

    /// Reads a roll-up's key back; `None` for anything that this format does not name.
    pub(super) fn parse_rollup(&self, key: &ObjectKey, size: SegmentSize) -> Option<RollupKey> {
        let rest = key.as_str().strip_prefix(&self.base)?.strip_prefix("/index/")?;
        let mut parts = rest.split('/');
        let timeline = TimelineId::new(u32::from_str_radix(parts.next()?, 16).ok()?)?;
        let level = parts.next()?.parse().ok().filter(|level| (1..=LEVEL_MAX).contains(level))?;
        let mut words = parts.next()?.strip_suffix(".json.zst")?.split('-');
        let start = u64::from_str_radix(words.next()?, 16).ok()?;
        let segments = u64::from_str_radix(words.next()?, 16).ok()?;
        let digest = words.next().filter(|digest| is_short_digest(digest))?.to_owned();
        let place = Place { timeline, level, first: start / size.bytes() };
        let found = RollupKey { place, segments, digest };
        (self.rollup(&found, size).ok().as_ref() == Some(key)).then_some(found)
    }

    /// What the keys of all lists of backups start with.
    pub(super) fn backup_lists_prefix(&self) -> String {
        format!("{}/index/backups/", self.base)
    }

    /// The key of a list of so many backups.
    pub(super) fn backup_list(&self, backups: usize, digest: &Digest) -> Result<ObjectKey> {
        self.key(format_args!("index/backups/{backups:08X}-{}.json.zst", digest.short()))
    }

    /// A text that sorts before every key of this segment and after every key of earlier ones.
    pub(super) fn before_segment(&self, name: SegmentName) -> String {
        format!("{}/wal/{}{name}", self.base, folder(WalFileName::Segment(name)))
    }

    /// What the keys of all gaps' records start with.
    pub(super) fn gaps_prefix(&self) -> String {
        format!("{}/gaps/", self.base)
    }

    /// What the keys of the records of all gaps of one timeline start with.
    pub(super) fn timeline_gaps_prefix(&self, timeline: TimelineId) -> String {
        format!("{}/gaps/{}/", self.base, timeline.hex())
    }

    /// The key of a gap's record.
    pub(super) fn gap(&self, key: &GapKey) -> Result<ObjectKey> {
        let GapKey { timeline, start, end, id, digest } = key;
        check_id(id, "a gap")?;
        let digest = match digest.as_deref().map(|digest| digest.get(..32).unwrap_or(digest)) {
            Some(digest) if is_short_digest(digest) => format!("-{digest}"),
            Some(digest) => return Err(Error::invalid(format!("{digest:?} is not a digest"))),
            None => String::new(),
        };
        if end <= start {
            return Err(Error::invalid(format!("a gap from {start} to {end} holds nothing")));
        }
        self.key(format_args!("gaps/{}/{:016X}-{:016X}-{id}{digest}.json", timeline.hex(), start.0, end.0))
    }

    /// Reads the key of a gap's record back; `None` for anything that this format does not name.
    pub(super) fn parse_gap(&self, key: &ObjectKey) -> Option<GapKey> {
        let rest = key.as_str().strip_prefix(&self.gaps_prefix())?;
        let (timeline, name) = rest.split_once('/')?;
        let timeline = TimelineId::new(u32::from_str_radix(timeline, 16).ok()?)?;
        // The id has a dash of its own.
        let words: Vec<&str> = name.strip_suffix(".json")?.split('-').collect();
        let (start, end, id, digest) = match &*words {
            [start, end, when, random] => (start, end, format!("{when}-{random}"), None),
            [start, end, when, random, digest] => {
                (start, end, format!("{when}-{random}"), Some((*digest).to_owned()))
            }
            _ => return None,
        };
        let lsn = |text: &str| u64::from_str_radix(text, 16).ok().map(Lsn);
        let found = GapKey { timeline, start: lsn(start)?, end: lsn(end)?, id, digest };
        (self.gap(&found).ok().as_ref() == Some(key)).then_some(found)
    }

    /// What the keys of all complete backups' records start with.
    pub(super) fn backup_records_prefix(&self) -> String {
        format!("{}/backups/catalog/", self.base)
    }

    /// What the keys of everything about backups start with.
    pub(super) fn backups_prefix(&self) -> String {
        format!("{}/backups/", self.base)
    }

    /// The key of a backup's record.
    pub(super) fn backup_record(
        &self,
        id: &str,
        tli: TimelineId,
        start: Lsn,
        stop: Lsn,
    ) -> Result<ObjectKey> {
        check_backup_id(id)?;
        self.key(format_args!("backups/catalog/{}-{:016X}-{:016X}-{id}.json", tli.hex(), start.0, stop.0))
    }

    /// What the keys of the records of all `deeds` (`restores`, `drills`, `extracts`) start with.
    pub(super) fn history_prefix(&self, deeds: &str) -> String {
        format!("{}/history/{deeds}/", self.base)
    }

    /// The key of the record of one of them.
    pub(super) fn history_record(&self, deeds: &str, id: &str) -> Result<ObjectKey> {
        check_id(id, "a record")?;
        self.key(format_args!("history/{deeds}/{id}.json"))
    }

    /// The key of a drill's report: `report.json`, `report.txt`, `report.html`.
    pub(super) fn drill_report(&self, id: &str, file: &str) -> Result<ObjectKey> {
        check_id(id, "a drill")?;
        self.key(format_args!("drills/{id}/{file}"))
    }

    /// What the keys of all documents about what is proven start with.
    pub(super) fn proven_prefix(&self) -> String {
        format!("{}/verifications/", self.base)
    }

    /// The key of such a document.
    pub(super) fn proven(&self, key: &ProvenKey) -> Result<ObjectKey> {
        check_id(&key.id, "a verification")?;
        let ProvenKey { id, number, named } = key;
        match named {
            Some((place, digest)) => {
                self.key(format_args!("verifications/{id}/{number:08}-{place}-{digest}.json"))
            }
            None => self.key(format_args!("verifications/{id}/{number:08}.json")),
        }
    }

    /// Reads the key of such a document back.
    pub(super) fn parse_proven(&self, key: &ObjectKey) -> Option<ProvenKey> {
        let (id, name) = key.as_str().strip_prefix(&self.proven_prefix())?.split_once('/')?;
        let words: Vec<&str> = name.strip_suffix(".json")?.split('-').collect();
        let (number, named) = match &*words {
            [number] => (number, None),
            [number, place, digest] => (number, Some(((*place).to_owned(), (*digest).to_owned()))),
            _ => return None,
        };
        let found = ProvenKey { id: id.to_owned(), number: number.parse().ok()?, named };
        (self.proven(&found).ok().as_ref() == Some(key)).then_some(found)
    }

    /// What the keys of all documents about holds start with.
    pub(super) fn holds_prefix(&self) -> String {
        format!("{}/holds/", self.base)
    }

    /// The key of a hold.
    pub(super) fn hold(&self, id: &str) -> Result<ObjectKey> {
        check_id(id, "a hold")?;
        self.key(format_args!("holds/{id}.json"))
    }

    /// The key of the document that releases a hold.
    pub(super) fn hold_released(&self, id: &str) -> Result<ObjectKey> {
        check_id(id, "a hold")?;
        self.key(format_args!("holds/{id}.released.json"))
    }

    /// What the keys of all marks of backups that are being removed start with.
    pub(super) fn expiring_prefix(&self) -> String {
        format!("{}/expiring/", self.base)
    }

    /// What the keys of the marks of one backup start with.
    pub(super) fn marks_prefix(&self, id: &str) -> Result<String> {
        check_backup_id(id)?;
        Ok(format!("{}/expiring/{id}.", self.base))
    }

    /// The key of the mark by which a removal says that it removes a backup.
    pub(super) fn mark(&self, id: &str, run: &str) -> Result<ObjectKey> {
        check_backup_id(id)?;
        check_id(run, "a removal")?;
        self.key(format_args!("expiring/{id}.{run}.json"))
    }

    /// Returns the backup and the removal of a mark.
    pub(super) fn parse_mark(&self, key: &ObjectKey) -> Option<(String, String)> {
        let name = key.as_str().strip_prefix(&self.expiring_prefix())?.strip_suffix(".json")?;
        let (id, run) = name.split_once('.')?;
        let sound = check_backup_id(id).and_then(|()| check_id(run, "a removal"));
        sound.ok().map(|()| (id.to_owned(), run.to_owned()))
    }

    /// What the keys of the locks of removals start with.
    pub(super) fn expire_locks_prefix(&self) -> String {
        format!("{}/locks/expire/", self.base)
    }

    /// The key of the lock with this number.
    pub(super) fn expire_lock(&self, number: u32) -> Result<ObjectKey> {
        self.key(format_args!("locks/expire/{number:08}.json"))
    }

    /// The key of the object by which is tried whether the store removes anything.
    pub(super) fn removal_canary(&self, run: &str) -> Result<ObjectKey> {
        check_id(run, "a removal")?;
        self.key(format_args!("locks/expire-canary/{run}"))
    }

    /// The key of the record of a removal.
    pub(super) fn expire_record(&self, id: &str) -> Result<ObjectKey> {
        check_id(id, "a removal")?;
        self.key(format_args!("history/expires/{id}.json"))
    }

    /// The key of what a removal came to.
    pub(super) fn expire_outcome(&self, id: &str) -> Result<ObjectKey> {
        check_id(id, "a removal")?;
        self.key(format_args!("history/expires/{id}.done.json"))
    }

    /// The key of what says which backups a removal has removed.
    pub(super) fn expire_removed(&self, id: &str) -> Result<ObjectKey> {
        check_id(id, "a removal")?;
        self.key(format_args!("history/expires/{id}.backups.json"))
    }

    /// What the keys of all of a backup's own objects start with.
    pub(super) fn backup_prefix(&self, id: &str) -> Result<String> {
        check_backup_id(id)?;
        Ok(format!("{}/backups/{id}/", self.base))
    }

    /// The key of one of a backup's own objects: `started.json`, `manifest.json.zst`, `data/000001.tar`.
    pub(super) fn backup_object(&self, id: &str, object: &str) -> Result<ObjectKey> {
        check_backup_id(id)?;
        self.key(format_args!("backups/{id}/{object}"))
    }
}

/// The folders between `wal/` and a file; empty for history files.
fn folder(name: WalFileName) -> String {
    match name {
        WalFileName::Segment(segment)
        | WalFileName::Partial(segment)
        | WalFileName::BackupHistory(segment, _) => {
            format!("{}/{:08X}/", segment.timeline.hex(), segment.log)
        }
        WalFileName::History(_) => String::new(),
    }
}

fn is_short_digest(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The key under which a good copy of a damaged object is kept.
pub(super) fn copy_of(key: &ObjectKey, digest: &Digest) -> Result<ObjectKey> {
    ObjectKey::new(format!("{key}.r{}", digest.short()))
}

/// What the keys of all copies of an object start with.
pub(super) fn copies_prefix(key: &ObjectKey) -> String {
    format!("{key}.r")
}

/// Checks that `id` is a backup's id: `20261121T010203Z-0123456789abcdef`.
pub(super) fn check_backup_id(id: &str) -> Result<()> {
    check_id(id, "a backup")
}

fn check_id(id: &str, whose: &str) -> Result<()> {
    let shape = |(at, byte): (usize, u8)| match at {
        8 => byte == b'T',
        15 => byte == b'Z',
        16 => byte == b'-',
        0..=14 => byte.is_ascii_digit(),
        _ => byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte),
    };
    if id.len() == 33 && id.bytes().enumerate().all(shape) {
        return Ok(());
    }
    Err(Error::invalid(format!("{id:?} is not the id of {whose}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> LineageLayout {
        LineageLayout::new(&"main".parse().unwrap(), 1)
    }

    #[test]
    fn cluster_names_are_checked() {
        for text in ["main", "a", "0", "a-b_c", &"x".repeat(63)] {
            assert_eq!(text.parse::<ClusterName>().unwrap().as_str(), text);
        }
        for text in ["", "tmp", "Main", "-a", "_a", "a/b", "..", "a.b", &"x".repeat(64), "\u{e9}"] {
            assert!(text.parse::<ClusterName>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn wal_keys_are_spelled_and_read_back() {
        let digest = Digest::of(b"x");
        let short = digest.short();
        for (name, kind, expected) in [
            (
                "000000010000000A0000004C",
                ObjectKind::Segment,
                "00000001/0000000A/000000010000000A0000004C.wal".into(),
            ),
            (
                "000000010000000A0000004C",
                ObjectKind::Incomplete,
                format!("00000001/0000000A/000000010000000A0000004C.incomplete.{short}"),
            ),
            (
                "000000010000000A0000004C.partial",
                ObjectKind::Partial,
                format!("00000001/0000000A/000000010000000A0000004C.partial.{short}"),
            ),
            (
                "000000010000000A0000004C.00000028.backup",
                ObjectKind::BackupHistory,
                "00000001/0000000A/000000010000000A0000004C.00000028.backup".into(),
            ),
            ("00000002.history", ObjectKind::History, "00000002.history".into()),
        ] {
            let name: WalFileName = name.parse().unwrap();
            let key = layout().wal(name, kind, &digest).unwrap();
            assert_eq!(key.as_str(), format!("main/0001/wal/{expected}"));
            assert_eq!(layout().parse_wal(&key), Some(WalKey { name, kind, is_copy: false }), "{key}");
            let copy = copy_of(&key, &digest).unwrap();
            assert_eq!(layout().parse_wal(&copy), Some(WalKey { name, kind, is_copy: true }), "{copy}");
        }
    }

    #[test]
    fn strange_keys_are_not_read() {
        for text in [
            "main/0002/wal/00000001/0000000A/000000010000000A0000004C.wal",
            "main/0001/wal/00000001/0000000B/000000010000000A0000004C.wal",
            "main/0001/wal/000000010000000A0000004C.wal",
            "main/0001/wal/00000001/0000000A/000000010000000A0000004C",
            "main/0001/wal/00000001/0000000A/000000010000000A0000004C.gz",
            "main/0001/wal/00000001/0000000A/000000010000000A0000004C.partial",
            "main/0001/wal/00000001/0000000A/000000010000000A0000004C.partial.xyz",
            "main/0001/wal/00000001/00000002.history",
        ] {
            assert_eq!(layout().parse_wal(&ObjectKey::new(text).unwrap()), None, "{text}");
        }
    }

    #[test]
    fn later_keys_sort_after_the_marks() {
        let layout = layout();
        let digest = Digest::of(b"x");
        let segment: SegmentName = "0000000100000000000000FF".parse().unwrap();
        let mark = layout.after_segment(segment);
        for kind in [ObjectKind::Segment, ObjectKind::Incomplete] {
            let key = layout.wal(WalFileName::Segment(segment), kind, &digest).unwrap();
            assert!(key.as_str() < mark.as_str());
            assert!(copy_of(&key, &digest).unwrap().as_str() < mark.as_str());
            for later in ["000000010000000100000000", "00000001FFFFFFFF00000000"] {
                let key = layout.wal(later.parse().unwrap(), kind, &digest).unwrap();
                assert!(key.as_str() > mark.as_str(), "{key}");
            }
        }
        let history = layout.history(TimelineId::new(2).unwrap()).unwrap();
        let older = layout.segment("00000001FFFFFFFF00000001".parse().unwrap()).unwrap();
        let end = layout.after_timeline(TimelineId::FIRST);
        assert!(older.as_str() < end.as_str() && end.as_str() < history.as_str());
    }

    #[test]
    fn roll_up_keys_are_spelled_and_read_back() {
        let size = SegmentSize::DEFAULT;
        let place = Place { timeline: TimelineId::new(10).unwrap(), level: 2, first: 0x3_0000 };
        let found = RollupKey { place, segments: 0x1_0000, digest: Digest::of(b"x").short() };
        let key = layout().rollup(&found, size).unwrap();
        let expected = format!("main/0001/index/0000000A/2/0000030000000000-0000010000-{}", found.digest);
        assert_eq!(key.as_str(), format!("{expected}.json.zst"));
        assert_eq!(layout().parse_rollup(&key, size), Some(found.clone()));
        assert!(layout().rollups_from(place, size).as_str() < key.as_str());
        let later = Place { first: 0x4_0000, ..place };
        assert!(layout().rollups_from(later, size).as_str() > key.as_str());
        for text in [
            expected,
            key.as_str().replace("/2/", "/9/"),
            key.as_str().replace("/2/", "/02/"),
            key.as_str().replace("0000000A", "A"),
            key.as_str().replace("0000030000000000", "0000030000000001"),
            key.as_str().replace("0000010000-", "10000-"),
            format!("{key}.x"),
        ] {
            assert_eq!(layout().parse_rollup(&ObjectKey::new(&*text).unwrap(), size), None, "{text}");
        }
    }

    #[test]
    fn keys_of_what_is_proven_are_read_back() {
        let id = "20261121T010203Z-0123456789abcdef".to_owned();
        let named = Some((Digest::of(b"x").short(), Digest::of(b"y").short()));
        for named in [None, named] {
            let found = ProvenKey { id: id.clone(), number: 12, named };
            let key = layout().proven(&found).unwrap();
            assert_eq!(layout().parse_proven(&key), Some(found));
            for text in [
                key.as_str().replace("00000012", "12"),
                format!("{key}.x"),
                key.as_str().replace("cdef/", "/"),
            ] {
                assert_eq!(layout().parse_proven(&ObjectKey::new(&*text).unwrap()), None, "{text}");
            }
        }
    }

    #[test]
    fn backup_ids_are_checked() {
        assert!(check_backup_id("20261121T010203Z-0123456789abcdef").is_ok());
        for id in
            ["", "..", "20261121T010203Z-0123456789abcdeF", "20261121T010203Z-0123456789abcde", "catalog"]
        {
            assert!(check_backup_id(id).is_err(), "{id}");
        }
    }

    #[test]
    fn lineage_numbers_are_read_back() {
        let cluster: ClusterName = "main".parse().unwrap();
        for number in [1, 42, 9999, 10_000] {
            assert_eq!(lineage_number(&cluster, &lineage_document(&cluster, number).unwrap()), Some(number));
        }
        for text in [
            "main/lineages/0000.json",
            "main/lineages/1.json",
            "main/lineages/+001.json",
            "main/lineages/0001",
        ] {
            assert_eq!(
                lineage_number(
                    &cluster,
                    &ObjectKey::new(text).unwrap_or_else(|_| ObjectKey::new("x").unwrap())
                ),
                None
            );
        }
    }
}
