//! `backup_label`: the small file that tells a restored server where to start.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::{Lsn, Oid, ParseError, SegmentName, TimelineId};

/// What a `backup_label` file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// Where replay starts: the redo location of the checkpoint.
    pub start_lsn: Lsn,
    /// The segment that holds it, on the timeline that was current then.
    pub start_segment: SegmentName,
    /// Where the checkpoint record is.
    pub checkpoint_lsn: Lsn,
    /// Whether it was taken from a standby.
    pub from_standby: bool,
    /// The label given by whoever took it.
    pub label: String,
    /// The server's start time, as it wrote it.
    pub start_time: String,
    /// The timeline replay starts on.
    pub timeline: TimelineId,
    /// For an incremental backup: where the backup before it started.
    pub incremental_from: Option<Lsn>,
}

impl BackupLabel {
    /// The longest file that is read.
    pub const MAX_BYTES: usize = 64 << 10;

    /// Parses the file's text.
    ///
    /// # Errors
    /// [`ParseError`] for text without a start, a checkpoint or a source, or with lines that disagree.
    /// Source: `src/backend/access/transam/xlogbackup.c`, build_backup_content;
    /// `xlogrecovery.c`, read_backup_label.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        if text.len() > Self::MAX_BYTES {
            return Err(ParseError::new(format!("backup_label has {} bytes", text.len())));
        }
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let need = |name: &str| {
            field(name).ok_or_else(|| ParseError::new(format!("backup_label has no line {name:?}")))
        };
        let bad = |name: &str| ParseError::new(format!("backup_label's line {name:?} makes no sense"));
        let start = need("START WAL LOCATION")?;
        let (lsn, file) = start.split_once(" (file ").ok_or_else(|| bad("START WAL LOCATION"))?;
        let start_lsn: Lsn = lsn.parse()?;
        let start_segment: SegmentName =
            file.strip_suffix(')').ok_or_else(|| bad("START WAL LOCATION"))?.parse()?;
        let timeline = match field("START TIMELINE") {
            Some(text) => text.parse().ok().and_then(TimelineId::new).ok_or_else(|| bad("START TIMELINE"))?,
            None => start_segment.timeline,
        };
        if timeline != start_segment.timeline {
            return Err(bad("START TIMELINE"));
        }
        Ok(Self {
            start_lsn,
            start_segment,
            checkpoint_lsn: need("CHECKPOINT LOCATION")?.parse()?,
            from_standby: match need("BACKUP FROM")? {
                "standby" => true,
                "primary" | "master" => false,
                _ => return Err(bad("BACKUP FROM")),
            },
            label: field("LABEL").unwrap_or_default().to_owned(),
            start_time: field("START TIME").unwrap_or_default().to_owned(),
            timeline,
            incremental_from: field("INCREMENTAL FROM LSN").map(str::parse).transpose()?,
        })
    }
}

/// What the lines begin with that make a label that of an incremental backup.
const INCREMENTAL_LINES: [&str; 2] = ["INCREMENTAL FROM LSN: ", "INCREMENTAL FROM TLI: "];

/// Returns the lines that make a label that of an incremental backup, by where the backup before it started.
///
/// Source: `src/backend/access/transam/xlogbackup.c`, build_backup_content.
pub fn incremental_lines(start_lsn: Lsn, timeline: TimelineId) -> String {
    let [lsn, tli] = INCREMENTAL_LINES;
    format!("{lsn}{start_lsn}\n{tli}{timeline}\n")
}

/// Returns a label without those lines: that of the directory that was put together. With them PostgreSQL does not
/// start (from 17 on), or takes some blocks of files for the files.
///
/// Source: `src/bin/pg_combinebackup/backup_label.c`, write_backup_label.
pub fn without_incremental_lines(label: &[u8]) -> Vec<u8> {
    let is_one = |line: &&[u8]| INCREMENTAL_LINES.iter().any(|begin| line.starts_with(begin.as_bytes()));
    label.split_inclusive(|byte| *byte == b'\n').filter(|line| !is_one(line)).flatten().copied().collect()
}

/// Returns the line of `tablespace_map` for a tablespace at `location`: newlines and backslashes stand behind a backslash.
///
/// Source: `src/backend/access/transam/xlog.c`, do_pg_backup_start.
pub fn tablespace_map_line(oid: Oid, location: &Path) -> Vec<u8> {
    let mut line = format!("{oid} ").into_bytes();
    for byte in location.as_os_str().as_bytes() {
        if matches!(byte, b'\n' | b'\r' | b'\\') {
            line.push(b'\\');
        }
        line.push(*byte);
    }
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
        CHECKPOINT LOCATION: 0/2000060\n\
        BACKUP METHOD: streamed\n\
        BACKUP FROM: primary\n\
        START TIME: 2026-11-20 10:11:12 UTC\n\
        LABEL: nightly: one\n\
        START TIMELINE: 1\n";

    #[test]
    fn the_lines_of_an_incremental_backup_come_and_go() {
        let timeline = TimelineId::new(3).unwrap();
        let text = TEXT.to_owned() + &incremental_lines(Lsn(0x100_0028), timeline);
        assert!(text.ends_with("INCREMENTAL FROM LSN: 0/1000028\nINCREMENTAL FROM TLI: 3\n"));
        assert_eq!(BackupLabel::parse(&text).unwrap().incremental_from, Some(Lsn(0x100_0028)));
        assert_eq!(without_incremental_lines(text.as_bytes()), TEXT.as_bytes());
        assert_eq!(without_incremental_lines(TEXT.as_bytes()), TEXT.as_bytes());
    }

    #[test]
    fn a_label_is_read_and_its_lines_must_agree() {
        let label = BackupLabel::parse(TEXT).unwrap();
        assert_eq!((label.start_lsn, label.checkpoint_lsn), (Lsn(0x200_0028), Lsn(0x200_0060)));
        assert_eq!(label.label, "nightly: one");
        assert!(!label.from_standby && label.incremental_from.is_none());
        for (old, new) in [
            ("START TIMELINE: 1", "START TIMELINE: 2"),
            ("START TIMELINE: 1", "START TIMELINE: x"),
            ("primary", "elsewhere"),
            ("(file ", ""),
            ("CHECKPOINT LOCATION", "CHECKPOINT"),
            ("0/2000028", "zz"),
        ] {
            assert!(BackupLabel::parse(&TEXT.replace(old, new)).is_err(), "{new}");
        }
    }

    proptest! {
        #[test]
        fn parsing_is_total(text in "(?s).{0,300}", cut in 0usize..TEXT.len()) {
            let _ = BackupLabel::parse(&text);
            let _ = BackupLabel::parse(&format!("{}{text}", &TEXT[..cut]));
        }
    }
}
