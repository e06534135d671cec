//! `backup_manifest`: the server's own list of a base backup's files, with sizes and checksums.

use std::collections::HashSet;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{Lsn, ParseError, TimelineId};

/// How a file's checksum was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChecksumAlgorithm {
    /// CRC-32C.
    Crc32c,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

/// One file of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFile {
    /// Its path below the data directory; always relative, without `.` and `..`.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// When it was changed last; `None` where the manifest does not say that as PostgreSQL does.
    pub modified: Option<DateTime<Utc>>,
    /// Its checksum, if the manifest has any.
    pub checksum: Option<(ChecksumAlgorithm, Vec<u8>)>,
}

impl ManifestFile {
    /// Returns its CRC-32C; `None` when it has a checksum of another kind or none.
    pub fn crc32c(&self) -> Option<u32> {
        match &self.checksum {
            Some((ChecksumAlgorithm::Crc32c, bytes)) => bytes[..].try_into().ok().map(u32::from_le_bytes),
            _ => None,
        }
    }

    /// Returns whether `crc` is the file's CRC-32C; `None` when it has a checksum of another kind or none.
    pub fn matches_crc32c(&self, crc: u32) -> Option<bool> {
        match &self.checksum {
            // PostgreSQL writes the bytes as they lie in its memory: the other way round on other machines.
            Some((ChecksumAlgorithm::Crc32c, bytes)) => {
                Some(bytes[..] == crc.to_le_bytes() || bytes[..] == crc.to_be_bytes())
            }
            _ => None,
        }
    }
}

/// A stretch of WAL that the backup needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalRange {
    /// The timeline.
    pub timeline: TimelineId,
    /// Its start.
    pub start: Lsn,
    /// Its exclusive end.
    pub end: Lsn,
}

/// What a `backup_manifest` says, its own checksum verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupManifest {
    /// The format: 1, or 2 from PostgreSQL 17 on.
    pub version: u32,
    /// The cluster's system identifier (from version 2 on).
    pub system_identifier: Option<u64>,
    /// The files, in the manifest's order; no path twice.
    pub files: Vec<ManifestFile>,
    /// The WAL that is needed; never empty.
    pub wal_ranges: Vec<WalRange>,
}

#[derive(Deserialize)]
struct RawManifest {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u32,
    #[serde(rename = "System-Identifier")]
    system_identifier: Option<u64>,
    #[serde(rename = "Files")]
    files: Vec<RawFile>,
    #[serde(rename = "WAL-Ranges")]
    wal_ranges: Vec<RawRange>,
}

#[derive(Deserialize)]
struct RawFile {
    #[serde(rename = "Path")]
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Last-Modified")]
    modified: Option<String>,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

#[derive(Deserialize)]
struct RawRange {
    #[serde(rename = "Timeline")]
    timeline: u32,
    #[serde(rename = "Start-LSN")]
    start: String,
    #[serde(rename = "End-LSN")]
    end: String,
}

impl BackupManifest {
    /// The longest manifest that is read: room for some five million files.
    pub const MAX_BYTES: usize = 1 << 30;

    /// Parses a manifest and verifies its own SHA-256 checksum.
    ///
    /// # Errors
    /// [`ParseError`] for a wrong or missing checksum, text that is no manifest of version 1 or 2, a
    /// path that leads out of the backup or comes twice, or WAL ranges that are empty or backwards.
    /// Source: `src/common/parse_manifest.c`.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        if bytes.len() > Self::MAX_BYTES {
            return Err(ParseError::new(format!("the backup manifest has {} bytes", bytes.len())));
        }
        verify_own_checksum(bytes)?;
        let raw: RawManifest = serde_json::from_slice(bytes)
            .map_err(|error| ParseError::new(format!("the backup manifest cannot be read: {error}")))?;
        if !(1..=2).contains(&raw.version) {
            return Err(ParseError::new(format!("backup manifest version {} is not known", raw.version)));
        }
        let files = raw.files.into_iter().map(file).collect::<Result<Vec<_>, _>>()?;
        let mut seen = HashSet::with_capacity(files.len());
        if let Some(twice) = files.iter().find(|file| !seen.insert(file.path.as_path())) {
            return Err(ParseError::new(format!("the backup manifest names {:?} twice", twice.path)));
        }
        let wal_ranges = raw.wal_ranges.iter().map(range).collect::<Result<Vec<_>, _>>()?;
        if wal_ranges.is_empty() {
            return Err(ParseError::new("the backup manifest names no WAL"));
        }
        Ok(Self { version: raw.version, system_identifier: raw.system_identifier, files, wal_ranges })
    }
}

/// Writes a manifest as the server does, for files that the server did not send.
#[derive(Debug)]
pub struct ManifestWriter {
    text: Vec<u8>,
    files: usize,
}

impl ManifestWriter {
    /// Returns a manifest without files: of version 2 where a system identifier is given, which servers before
    /// PostgreSQL 17 do not know, else of version 1.
    ///
    /// Source: `src/backend/backup/backup_manifest.c`, InitializeBackupManifest.
    pub fn new(system_identifier: Option<u64>) -> Self {
        let text = match system_identifier {
            Some(id) => {
                format!(
                    "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": {id},\n\"Files\": ["
                )
            }
            None => "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [".to_owned(),
        };
        Self { text: text.into_bytes(), files: 0 }
    }

    /// Adds a file with its CRC-32C, if that is known.
    pub fn add(&mut self, path: &Path, bytes: u64, modified: DateTime<Utc>, crc32c: Option<u32>) {
        let path = match path.to_str() {
            Some(path) => format!("\"Path\": {}", serde_json::Value::from(path)),
            None => format!("\"Encoded-Path\": \"{}\"", hex::encode(path.as_os_str().as_bytes())),
        };
        let checksum = crc32c.map_or(String::new(), |crc| {
            let digits = hex::encode(crc.to_le_bytes());
            format!(", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{digits}\"")
        });
        let line = format!(
            "{}\n{{ {path}, \"Size\": {bytes}, \"Last-Modified\": \"{}\"{checksum} }}",
            if self.files > 0 { "," } else { "" },
            modified.format(MODIFIED_FORMAT),
        );
        self.text.extend(line.bytes());
        self.files += 1;
    }

    /// Ends the manifest with the WAL that the backup needs, and its own checksum.
    pub fn finish(mut self, ranges: &[WalRange]) -> Vec<u8> {
        let one = |range: &WalRange| {
            format!(
                "{{ \"Timeline\": {}, \"Start-LSN\": \"{}\", \"End-LSN\": \"{}\" }}",
                range.timeline.get(),
                range.start,
                range.end
            )
        };
        let ranges: Vec<String> = ranges.iter().map(one).collect();
        self.text.extend(format!("\n],\n\"WAL-Ranges\": [\n{}\n],\n", ranges.join(",\n")).bytes());
        let digest = hex::encode(Sha256::digest(&self.text));
        self.text.extend(format!("\"Manifest-Checksum\": \"{digest}\"}}\n").bytes());
        self.text
    }
}

/// How a manifest gives times: in UTC, which it calls GMT.
const MODIFIED_FORMAT: &str = "%Y-%m-%d %H:%M:%S GMT";

/// The last line holds the SHA-256 of everything before it.
fn verify_own_checksum(bytes: &[u8]) -> Result<(), ParseError> {
    let bad = |what: &str| ParseError::new(format!("the backup manifest {what}"));
    let body = bytes.strip_suffix(b"\n").ok_or_else(|| bad("ends in the middle of a line"))?;
    let cut = body.iter().rposition(|b| *b == b'\n').ok_or_else(|| bad("has only one line"))? + 1;
    let line = std::str::from_utf8(&body[cut..]).map_err(|_| bad("has a last line that is no text"))?;
    let digits = line
        .strip_prefix("\"Manifest-Checksum\": \"")
        .and_then(|rest| rest.strip_suffix("\"}"))
        .ok_or_else(|| bad("has no checksum of its own in its last line"))?;
    let expected = hex::decode(digits).map_err(|_| bad("has a checksum that is no hex"))?;
    if expected[..] != Sha256::digest(&bytes[..cut])[..] {
        return Err(bad("does not match its own checksum"));
    }
    Ok(())
}

fn file(raw: RawFile) -> Result<ManifestFile, ParseError> {
    let path = match (raw.path, raw.encoded_path) {
        (Some(path), None) => PathBuf::from(path),
        (None, Some(encoded)) => {
            let bytes = hex::decode(&encoded)
                .map_err(|_| ParseError::new("an encoded path in the backup manifest is no hex"))?;
            PathBuf::from(OsString::from_vec(bytes))
        }
        _ => return Err(ParseError::new("a file in the backup manifest has no path, or two")),
    };
    check_path(&path)?;
    let bad = || ParseError::new(format!("the checksum of {path:?} in the backup manifest makes no sense"));
    let checksum = match (raw.algorithm.as_deref(), raw.checksum) {
        (None, None) => None,
        (Some(name), Some(digits)) => {
            let (algorithm, length) = match name {
                "CRC32C" => (ChecksumAlgorithm::Crc32c, 4),
                "SHA224" => (ChecksumAlgorithm::Sha224, 28),
                "SHA256" => (ChecksumAlgorithm::Sha256, 32),
                "SHA384" => (ChecksumAlgorithm::Sha384, 48),
                "SHA512" => (ChecksumAlgorithm::Sha512, 64),
                _ => return Err(bad()),
            };
            let bytes = hex::decode(digits).map_err(|_| bad())?;
            if bytes.len() != length {
                return Err(bad());
            }
            Some((algorithm, bytes))
        }
        _ => return Err(bad()),
    };
    let modified = raw.modified.and_then(|text| NaiveDateTime::parse_from_str(&text, MODIFIED_FORMAT).ok());
    let modified = modified.map(|time| time.and_utc());
    Ok(ManifestFile { path, bytes: raw.size, modified, checksum })
}

fn range(raw: &RawRange) -> Result<WalRange, ParseError> {
    let timeline = TimelineId::try_from(raw.timeline)?;
    let (start, end): (Lsn, Lsn) = (raw.start.parse()?, raw.end.parse()?);
    if !start.is_valid() || end <= start {
        return Err(ParseError::new(format!("the backup manifest names WAL from {start} to {end}")));
    }
    Ok(WalRange { timeline, start, end })
}

/// Checks that a path names a file below the folder it is joined to, whatever that is.
///
/// # Errors
/// [`ParseError`] for an absolute or empty path, one with `.`, `..`, an empty part or a zero byte,
/// and one that no file system takes.
pub fn check_path(path: &Path) -> Result<(), ParseError> {
    let bytes = path.as_os_str().as_bytes();
    let plain = !bytes.is_empty()
        && bytes.len() <= 4096
        && !bytes.contains(&0)
        && bytes.split(|b| *b == b'/').all(|part| !part.is_empty() && part != b"." && part.len() <= 255)
        && path.components().all(|part| matches!(part, Component::Normal(_)));
    if plain { Ok(()) } else { Err(ParseError::new(format!("{path:?} is not a path inside a backup"))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn manifest(body: &str) -> Vec<u8> {
        let mut text = format!("{body},\n").into_bytes();
        let digest = hex::encode(Sha256::digest(&text));
        text.extend(format!("\"Manifest-Checksum\": \"{digest}\"}}\n").bytes());
        text
    }

    fn with(files: &str, ranges: &str) -> Vec<u8> {
        manifest(&format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 7123456789012345678,\n\
             \"Files\": [\n{files}\n],\n\"WAL-Ranges\": [\n{ranges}\n]"
        ))
    }

    const RANGE: &str = r#"{ "Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "0/2000100" }"#;

    #[test]
    fn a_manifest_is_read_whole() {
        let bytes = with(
            r#"{ "Path": "global/pg_control", "Size": 8192, "Last-Modified": "2026-11-20 10:00:00 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "0a0b0c0d" },
               { "Encoded-Path": "62ff", "Size": 0, "Last-Modified": "x" }"#,
            RANGE,
        );
        let manifest = BackupManifest::parse(&bytes).unwrap();
        assert_eq!((manifest.version, manifest.system_identifier), (2, Some(7_123_456_789_012_345_678)));
        assert_eq!(manifest.files[0].path, Path::new("global/pg_control"));
        assert_eq!(manifest.files[0].matches_crc32c(0x0d0c_0b0a), Some(true));
        assert_eq!(manifest.files[0].matches_crc32c(1), Some(false));
        assert_eq!(manifest.files[1].path.as_os_str().as_bytes(), b"b\xff");
        assert_eq!(manifest.wal_ranges[0].end, Lsn(0x200_0100));
    }

    #[test]
    fn what_is_written_is_read() {
        for id in [None, Some(7_123_456_789_012_345_678)] {
            let mut writer = ManifestWriter::new(id);
            let odd = OsString::from_vec(b"b\xFF".to_vec());
            writer.add(Path::new("unknown"), 5, DateTime::UNIX_EPOCH, None);
            for path in [Path::new("base/5/\"odd\\"), Path::new(&odd)] {
                writer.add(path, 5, DateTime::UNIX_EPOCH, Some(0x0d0c_0b0a));
            }
            let range = WalRange { timeline: TimelineId::FIRST, start: Lsn(0x28), end: Lsn(0x100) };
            let read = BackupManifest::parse(&writer.finish(&[range])).unwrap();
            assert_eq!((read.version, read.system_identifier), (if id.is_some() { 2 } else { 1 }, id));
            assert_eq!((read.files[0].crc32c(), read.files[0].modified), (None, Some(DateTime::UNIX_EPOCH)));
            assert_eq!(read.files[1].path, Path::new("base/5/\"odd\\"));
            assert_eq!(read.files[2].path.as_os_str().as_bytes(), b"b\xff");
            assert_eq!(read.files[1].matches_crc32c(0x0d0c_0b0a), Some(true));
            assert_eq!(read.files[1].crc32c(), Some(0x0d0c_0b0a));
            assert_eq!(read.wal_ranges, [range]);
        }
    }

    #[test]
    fn damage_and_malice_are_refused() {
        let sound = with(r#"{ "Path": "a", "Size": 1 }"#, RANGE);
        assert!(BackupManifest::parse(&sound).is_ok());
        for at in 0..sound.len() {
            let mut damaged = sound.clone();
            damaged[at] ^= 1;
            assert!(BackupManifest::parse(&damaged).is_err(), "byte {at}");
            assert!(BackupManifest::parse(&sound[..at]).is_err(), "cut at {at}");
        }
        for path in ["/etc/passwd", "..", "a/../b", "a/..", "./a", "a//b", "", "a/", "a\\u0000b"] {
            let files = format!("{{ \"Path\": \"{path}\", \"Size\": 1 }}");
            assert!(BackupManifest::parse(&with(&files, RANGE)).is_err(), "{path}");
        }
        let encoded = hex::encode("../x");
        let files = format!("{{ \"Encoded-Path\": \"{encoded}\", \"Size\": 1 }}");
        assert!(BackupManifest::parse(&with(&files, RANGE)).is_err());
        for files in [
            r#"{ "Path": "a", "Size": 1 }, { "Path": "a", "Size": 2 }"#,
            r#"{ "Path": "a", "Size": -1 }"#,
            r#"{ "Path": "a", "Size": 1, "Checksum-Algorithm": "CRC32C", "Checksum": "00" }"#,
            r#"{ "Path": "a", "Size": 1, "Checksum-Algorithm": "MD5", "Checksum": "00" }"#,
            r#"{ "Size": 1 }"#,
        ] {
            assert!(BackupManifest::parse(&with(files, RANGE)).is_err(), "{files}");
        }
        for range in [
            "",
            r#"{ "Timeline": 0, "Start-LSN": "0/1", "End-LSN": "0/2" }"#,
            r#"{ "Timeline": 1, "Start-LSN": "0/2", "End-LSN": "0/2" }"#,
        ] {
            assert!(BackupManifest::parse(&with(r#"{ "Path": "a", "Size": 1 }"#, range)).is_err(), "{range}");
        }
    }

    proptest! {
        #[test]
        fn parsing_is_total(text in "(?s).{0,200}", files in "(?s).{0,100}") {
            let _ = BackupManifest::parse(text.as_bytes());
            let _ = BackupManifest::parse(&manifest(&text));
            let _ = BackupManifest::parse(&with(&files, RANGE));
        }
    }
}
