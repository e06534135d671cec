//! Real WAL of every supported major, as `scripts/make-wal-fixtures` had a server write it: what the decoder
//! makes of it, and what it makes of it when it is damaged.

// Helpers of tests may fail loudly, as the tests themselves.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use walship::codec::{Compression, Digest, Envelope, ObjectHead, ObjectKind, decode_body, encode_body};
use walship::pg::{
    BackupLabel, ControlData, Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalFileName,
};
use walship::wal::decode::decode;
use walship::wal::layout::rmgr;
use walship::wal::reader::Reader;
use walship::wal::scan::{SegmentScanner, Verdict};
use walship::wal::summary::{SegmentSummary, join};
use walship::wal::{SegmentScan, events_of};

const MAJORS: std::ops::RangeInclusive<u32> = 14..=18;

struct Fixture {
    major: u32,
    segments: Vec<(SegmentName, Vec<u8>)>,
    control: Vec<u8>,
    expected: serde_json::Value,
}

impl Fixture {
    fn load(major: u32) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(major.to_string());
        let unpacked = |name: &str| zstd::decode_all(fs::File::open(folder.join(name)).unwrap()).unwrap();
        let mut names: Vec<SegmentName> = fs::read_dir(&folder)
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_suffix(".zst")?.parse().ok())
            .collect();
        names.sort();
        assert_eq!(names.len(), 2);
        let segments = names.into_iter().map(|name| (name, unpacked(&format!("{name}.zst")))).collect();
        let expected = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
        Self { major, segments, control: unpacked("pg_control.zst"), expected }
    }

    fn all() -> impl Iterator<Item = Self> {
        MAJORS.map(Self::load)
    }

    fn start(&self) -> Lsn {
        self.segments[0].0.start(SegmentSize::MIN)
    }
}

/// One line for each record, in the fixtures' form, and where it ends.
fn lines(start: Lsn, parts: &[&[u8]]) -> Vec<(Lsn, String)> {
    let mut reader = Reader::new(start, TimelineId::FIRST, SegmentSize::MIN);
    let mut lines = Vec::new();
    for part in parts {
        reader.push(part, |record, layout| {
            let header = &record.header;
            let name = rmgr::name(header.rmgr).unwrap_or("custom");
            let mut line = String::new();
            writeln!(line, "{} {} {name} {} {}", record.lsn, header.total_len, header.xid, header.prev)
                .unwrap();
            lines.push((record.end_lsn, line));
            let _ = decode(record, layout);
        });
    }
    lines
}

fn scan(name: SegmentName, bytes: &[u8]) -> SegmentScan {
    let mut scanner = SegmentScanner::new(name, SegmentSize::MIN);
    scanner.push(bytes);
    scanner.finish()
}

#[test]
fn real_wal_of_every_major_is_read_as_pg_waldump_reads_it() {
    for fixture in Fixture::all() {
        let major = fixture.major;
        let parts: Vec<&[u8]> = fixture.segments.iter().map(|(_, bytes)| bytes.as_slice()).collect();
        let lines = lines(fixture.start(), &parts);
        let text: String = lines.iter().map(|(_, line)| line.as_str()).collect();
        assert_eq!(lines.len() as u64, fixture.expected["records"], "{major}");
        assert_eq!(Digest::of(text.as_bytes()).to_string(), fixture.expected["digest"], "{major}");

        let named: Vec<_> = fixture.segments.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
        let found = events_of(&named, SegmentSize::MIN);
        assert_eq!(found.broken, None);
        assert_eq!(serde_json::to_value(&found.events).unwrap(), fixture.expected["events"], "{major}");
        for kind in ["commit", "abort", "prepare", "restore_point", "checkpoint", "backup_end", "switch"] {
            assert!(
                found.events.iter().any(|event| serde_json::to_value(event).unwrap()["event"] == kind),
                "{kind}"
            );
        }

        let scans: Vec<_> = named.iter().map(|(name, bytes)| scan(*name, bytes)).collect();
        assert!(scans.iter().all(|scan| scan.verdict == Verdict::Whole), "{major}");
        let control = ControlData::parse(&fixture.control).unwrap();
        assert_eq!(control.major(), Some(major));
        assert_eq!(scans[0].summary.system_identifier, control.system_identifier);
        assert_eq!(control.segment_size, SegmentSize::MIN);
    }
}

/// Numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.roll() % limit.max(1) as u64) as usize
    }

    /// Damages `bytes` in one to four places as disks, networks and enemies do; returns the first of them.
    fn damage(&mut self, bytes: &mut Vec<u8>) -> usize {
        let mut first = bytes.len();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            let len = 1 + self.below(64).min(bytes.len().saturating_sub(at + 1));
            match self.below(7) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at..at + len].fill(0),
                2 => bytes[at..at + len].fill(0xFF),
                3 => bytes[at] = self.roll() as u8,
                4 => bytes.truncate(at.max(1)),
                5 => {
                    // A stretch from elsewhere: what is right in itself, in the wrong place.
                    let from = self.below(bytes.len() - len + 1);
                    let stretch = bytes[from..from + len].to_vec();
                    bytes[at..at + len].copy_from_slice(&stretch);
                }
                _ => {
                    // A length or a count at its edge.
                    let edges = [0, 1, 23, 24, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF_u32];
                    let edge = edges[self.below(edges.len())].to_le_bytes();
                    let at = at & !3;
                    let end = (at + 4).min(bytes.len());
                    bytes[at..end].copy_from_slice(&edge[..end - at]);
                }
            }
            first = first.min(at & !3);
        }
        first
    }
}

#[test]
fn damaged_wal_ends_at_the_damage_and_nothing_is_invented() {
    // The pages at the beginning hold every kind of record; all of the segment would take long.
    const LEN: usize = 160 << 10;
    for fixture in Fixture::all() {
        let (name, whole) = &fixture.segments[0];
        let good = &whole[..LEN];
        let truth = lines(fixture.start(), &[good]);
        let mut dice = Dice(u64::from(fixture.major));
        for round in 0..150 {
            let mut bad = good.to_vec();
            let first = fixture.start().0 + dice.damage(&mut bad) as u64;
            let read = lines(fixture.start(), &[&bad]);
            // Whatever ended before the damage is there; what is behind it is the truth or nothing.
            let before = truth.iter().take_while(|(end, _)| {
                end.0 <= first && (end.0 - fixture.start().0) as usize <= bad.len() / 8192 * 8192
            });
            assert!(read.len() >= before.count(), "{} round {round}", fixture.major);
            assert!(truth.starts_with(&read), "{} round {round}: {:?}", fixture.major, read.last());

            bad.resize(1 << 20, 0);
            let found = scan(*name, &bad);
            assert!(serde_json::to_vec(&found.summary).unwrap().len() <= SegmentSummary::MAX_BYTES);
            let _ = join(&found.summary, &scan(fixture.segments[1].0, &fixture.segments[1].1).summary);
        }
    }
}

/// Gives every page header and record its right CRC and links again, so that damage gets past the checks.
#[test]
fn records_with_damaged_contents_and_right_crcs_are_survived() {
    for fixture in Fixture::all() {
        let good = &fixture.segments[0].1[..256 << 10];
        let mut dice = Dice(1 << 20 | u64::from(fixture.major));
        for _ in 0..150 {
            let mut bad = good.to_vec();
            // Records that lie on one page, found by the reader itself.
            let mut places = Vec::new();
            let mut reader = Reader::new(fixture.start(), TimelineId::FIRST, SegmentSize::MIN);
            reader.push(good, |record, _| {
                let at = (record.lsn.0 - fixture.start().0) as usize;
                let in_place = good.get(at..at + record.bytes.len()) == Some(record.bytes);
                if in_place && record.is_whole() && record.bytes.len() > 24 {
                    places.push((at, record.bytes.len()));
                }
            });
            for _ in 0..20 {
                let (at, len) = places[dice.below(places.len())];
                let record = &mut bad[at..at + len];
                let byte = 24 + dice.below(len - 24);
                record[byte] = dice.roll() as u8;
                if dice.below(4) == 0 {
                    record[16] = dice.roll() as u8 & 0xB0;
                }
                let crc = crc32c::crc32c_append(crc32c::crc32c(&record[24..]), &record[..20]);
                record[20..24].copy_from_slice(&crc.to_le_bytes());
            }
            bad.resize(1 << 20, 0);
            let found = scan(fixture.segments[0].0, &bad);
            assert!(found.summary.counts.records > 100, "{:?}", found.verdict);
            assert!(serde_json::to_vec(&found.summary).unwrap().len() <= SegmentSummary::MAX_BYTES);
            let _ = events_of(&[(fixture.segments[0].0, &bad)], SegmentSize::MIN);
        }
    }
}

#[test]
fn damaged_objects_of_real_segments_are_refused() {
    for fixture in Fixture::all() {
        let (name, plain) = &fixture.segments[0];
        let summary = scan(*name, plain).summary;
        let mut dice = Dice(1 << 30 | u64::from(fixture.major));
        for compression in [Compression::Lz4, Compression::Zstd(1)] {
            let mut body = Vec::new();
            let encoded =
                encode_body(&mut plain.as_slice(), plain.len() as u64, compression, &mut body, &mut |_| ())
                    .unwrap();
            let envelope = Envelope {
                kind: ObjectKind::Segment,
                name: WalFileName::Segment(*name),
                codec: compression.codec(),
                segment_size: SegmentSize::MIN,
                system_identifier: summary.system_identifier,
                plain_bytes: encoded.plain_bytes,
                body_bytes: encoded.body_bytes,
                body_crc: encoded.body_crc,
                digest: encoded.digest,
            };
            let mut back = Vec::new();
            decode_body(&envelope, &mut body.as_slice(), &mut back).unwrap();
            assert_eq!(back, *plain);
            let head = ObjectHead::encode(&envelope, Some(&summary)).unwrap();
            for _ in 0..40 {
                let mut bad = body.clone();
                dice.damage(&mut bad);
                let mut sink = Vec::new();
                let read = decode_body(&envelope, &mut bad.as_slice(), &mut sink);
                assert!(read.is_err() || bad == body);
                assert!(sink.len() <= plain.len());
                let mut bad = head.to_vec();
                dice.damage(&mut bad);
                assert!(ObjectHead::decode(&bad).is_err() || bad == *head);
            }
        }
    }
}

#[test]
fn damaged_small_files_are_refused_or_read_as_something_legal() {
    const HISTORY: &str =
        "1\t0/3000158\tno recovery target specified\n\n2\t0/5A001F8\tbefore 2031-05-01 12:00:00+00\n";
    const LABEL: &str = "START WAL LOCATION: A/4C000028 (file 000000020000000A0000004C)\nCHECKPOINT LOCATION: A/4C000060\n\
        BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2031-05-01 12:00:00 UTC\nLABEL: walship\nSTART TIMELINE: 2\n";
    let three = TimelineId::new(3).unwrap();
    assert_eq!(TimelineHistory::parse(three, HISTORY).unwrap().ancestors.len(), 2);
    assert!(BackupLabel::parse(LABEL).is_ok());
    let mut dice = Dice(3);
    for _ in 0..4000 {
        let mut text = HISTORY.as_bytes().to_vec();
        dice.damage(&mut text);
        if let Ok(history) = TimelineHistory::parse(three, &String::from_utf8_lossy(&text)) {
            assert!(history.ancestors.iter().all(|entry| entry.timeline < three));
            assert!(history.ancestors.is_sorted_by_key(|entry| entry.timeline));
        }
        let mut text = LABEL.as_bytes().to_vec();
        dice.damage(&mut text);
        if let Ok(label) = BackupLabel::parse(&String::from_utf8_lossy(&text)) {
            assert!(label.start_lsn > Lsn(0));
        }
    }
    for fixture in Fixture::all() {
        let mut dice = Dice(u64::from(fixture.major));
        for _ in 0..1000 {
            let mut control = fixture.control.clone();
            // All but its first 300 bytes are zeros.
            let mut used = control[..300].to_vec();
            dice.damage(&mut used);
            control[..used.len()].copy_from_slice(&used);
            let covered = control[..288] == fixture.control[..288];
            assert!(ControlData::parse(&control).is_err() || covered, "{}", fixture.major);
        }
    }
}
