use std::io::Read as _;

use super::*;
use crate::pg::TimelineId;

const SIZE: SegmentSize = SegmentSize::MIN;
const IDENTIFIER: u64 = 42;

fn name(number: u64) -> SegmentName {
    SegmentName::from_number(TimelineId::FIRST, number, SIZE).unwrap()
}

fn open(folder: &Path) -> Result<Spool> {
    SpoolFolder::lock(folder, "main")?.open(IDENTIFIER, SIZE, 1 << 20)
}

fn append(spool: &Spool, number: u64, at: u64, bytes: &[u8]) -> Result<()> {
    spool.append(name(number), Lsn(name(number).start(SIZE).0 + at), bytes.to_vec(), Compression::Lz4)
}

fn read(spool: &Spool, number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    spool.reader(name(number)).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn what_was_appended_is_there_again() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("spool");
    let spool = open(&place).unwrap();
    append(&spool, 5, 0, b"abc").unwrap();
    append(&spool, 5, 3, b"defg").unwrap();
    append(&spool, 6, 0, b"x").unwrap();
    for (number, at) in [(5, 0), (5, 6), (5, 8), (7, 1)] {
        assert!(matches!(append(&spool, number, at, b"no"), Err(Error::Invalid(_))), "{number} {at}");
    }
    let before = spool.segments();
    assert_eq!(
        before.iter().map(|held| (held.segment, held.end)).collect::<Vec<_>>(),
        [(name(5), 7), (name(6), 1)]
    );
    let seen = waiting(&place, "main").unwrap().unwrap();
    assert_eq!((seen.segments, seen.file_bytes, seen.in_use), (2, spool.file_bytes(), true));
    assert!(matches!(SpoolFolder::lock(&place, "main"), Err(Error::Denied(_))), "it is in use");
    assert!(SpoolFolder::lock(&place, "other").is_ok());
    drop(spool);
    assert_eq!(waiting(&place, "main").unwrap().map(|waiting| waiting.in_use), Some(false));

    let locked = SpoolFolder::lock(&place, "main").unwrap();
    assert_eq!(locked.system_identifiers().unwrap(), [IDENTIFIER]);
    assert_eq!(locked.segment_size(IDENTIFIER).unwrap(), Some(SIZE));
    assert_eq!(locked.segment_size(1).unwrap(), None);
    let spool = locked.open(IDENTIFIER, SIZE, 1 << 20).unwrap();
    assert_eq!(spool.segments(), before);
    let bytes = read(&spool, 5);
    assert_eq!((bytes.len(), &bytes[..9]), (1 << 20, &b"abcdefg\0\0"[..]));
    append(&spool, 5, 7, b"h").unwrap();
    // The timeline ended earlier than the WAL that was received of it.
    spool.end_timeline(name(5), 5).unwrap();
    assert!(append(&spool, 5, 8, b"i").is_err());
    assert_eq!(&read(&spool, 5)[..7], b"abcde\0\0");
    drop(spool);
    let spool = open(&place).unwrap();
    let last = spool.segment(name(5)).unwrap();
    assert_eq!((last.timeline_end, last.end), (Some(5), 8), "what was received behind it is held, too");
    for number in [5, 6, 7] {
        spool.remove(name(number)).unwrap();
    }
    assert_eq!((spool.segments(), spool.file_bytes()), (vec![], 0));
    assert_eq!(waiting(&place, "main").unwrap(), None);
    assert_eq!(waiting(&folder.path().join("none"), "main").unwrap(), None);
}

#[test]
fn a_file_reads_like_any_of_the_format() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(&folder.path().join("spool")).unwrap();
    append(&spool, 5, 0, b"abc").unwrap();
    append(&spool, 5, 3, b"def").unwrap();
    let mut parts = spool.parts(name(5)).unwrap().unwrap();
    let first = parts.next_part().unwrap().unwrap();
    assert_eq!((first.bytes, first.system_identifier), (b"abc".to_vec(), IDENTIFIER));
    assert_eq!(parts.next_part().unwrap().unwrap().start.0, name(5).start(SIZE).0 + 3);
    assert_eq!(parts.next_part().unwrap(), None);
}

/// At whatever byte a crash cut the last append off, what was acknowledged before is there, and goes on.
#[test]
fn a_part_that_was_not_written_whole_is_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("spool");
    let spool = open(&place).unwrap();
    append(&spool, 5, 0, b"abc").unwrap();
    let acknowledged = spool.file_bytes();
    append(&spool, 5, 3, b"defghijk").unwrap();
    let file = spool.file_of(&spool.segment(name(5)).unwrap());
    let whole = fs::read(&file).unwrap();
    drop(spool);
    for cut in acknowledged..whole.len() as u64 {
        for zeros in [false, true] {
            let mut bytes = whole[..cut as usize].to_vec();
            if zeros {
                // The length is durable, the bytes are not.
                bytes.resize(whole.len(), 0);
            }
            fs::write(&file, &bytes).unwrap();
            let spool = open(&place).unwrap();
            assert_eq!(spool.segment(name(5)).unwrap().end, 3, "cut at {cut}");
            assert_eq!(fs::metadata(&file).unwrap().len(), acknowledged);
            append(&spool, 5, 3, b"other").unwrap();
            assert_eq!(&read(&spool, 5)[..9], b"abcother\0");
        }
    }
}

#[test]
fn damage_of_what_was_acknowledged_is_not_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("spool");
    let spool = open(&place).unwrap();
    append(&spool, 5, 0, b"abc").unwrap();
    let first = spool.file_bytes();
    append(&spool, 5, 3, b"def").unwrap();
    let file = spool.file_of(&spool.segment(name(5)).unwrap());
    let whole = fs::read(&file).unwrap();
    drop(spool);
    for at in 0..first as usize {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&file, &bytes).unwrap();
        let error = open(&place).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{at}: {error}");
        assert_eq!(fs::read(&file).unwrap(), bytes, "the file is left as it is");
    }
}

/// Neither is a last part that something was written behind, in the next segment or by the timeline's end, nor one
/// that is there as it was written.
#[test]
fn a_last_part_that_was_acknowledged_is_not_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    for case in 0..3 {
        let place = folder.path().join(case.to_string());
        let spool = open(&place).unwrap();
        append(&spool, 5, 0, b"abc").unwrap();
        append(&spool, 5, 3, b"def").unwrap();
        match case {
            0 => append(&spool, 6, 0, b"x").unwrap(),
            1 => spool.end_timeline(name(5), 4).unwrap(),
            _ => {}
        }
        let file = spool.file_of(&spool.segment(name(5)).unwrap());
        drop(spool);
        let mut bytes = fs::read(&file).unwrap();
        let last = bytes.len() / 2;
        if case < 2 {
            let end = bytes.len() - 1;
            bytes[end] ^= 1;
        } else {
            // Written by a newer program, sound as far as this one can tell.
            bytes[last + 16] = 9;
            let crc = crc32fast::hash(&bytes[last..last + 96]).to_le_bytes();
            bytes[last + 96..last + 100].copy_from_slice(&crc);
        }
        fs::write(&file, &bytes).unwrap();
        let error = open(&place).unwrap_err();
        let expected = if case < 2 { "checksum of its body" } else { "newest walship" };
        assert!(error.report().contains(expected), "{case}: {}", error.report());
        assert_eq!(fs::read(&file).unwrap(), bytes);
    }
}

#[test]
fn a_file_that_holds_a_torn_part_only_says_nothing_of_the_segment_size() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("spool");
    let spool = open(&place).unwrap();
    append(&spool, 5, 0, b"abc").unwrap();
    let file = spool.file_of(&spool.segment(name(5)).unwrap());
    drop(spool);
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..50]).unwrap();
    let locked = SpoolFolder::lock(&place, "main").unwrap();
    assert_eq!(locked.segment_size(IDENTIFIER).unwrap(), None);
    let spool = locked.open(IDENTIFIER, SIZE, 1 << 20).unwrap();
    append(&spool, 6, 0, b"abc").unwrap();
    assert_eq!(spool.into_folder().segment_size(IDENTIFIER).unwrap(), Some(SIZE));
}

#[test]
fn room_is_counted_in_bytes_of_files() {
    let folder = tempfile::tempdir().unwrap();
    let spool = SpoolFolder::lock(&folder.path().join("spool"), "main").unwrap();
    let spool = spool.open(IDENTIFIER, SIZE, 300).unwrap();
    assert!(spool.has_room());
    append(&spool, 5, 0, &[1; 100]).unwrap();
    append(&spool, 6, 0, b"abc").unwrap();
    append(&spool, 6, 3, b"abc").unwrap();
    assert!(!spool.has_room(), "{}", spool.file_bytes());
    spool.remove(name(6)).unwrap();
    assert!(spool.has_room());
}

#[test]
fn somebody_elses_folder_and_none_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("a/b");
    assert!(SpoolFolder::lock(&missing, "main").is_err());
    fs::write(folder.path().join("file"), "").unwrap();
    assert!(matches!(SpoolFolder::lock(&folder.path().join("file"), "main"), Err(Error::Denied(_))));
}
