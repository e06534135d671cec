//! `BASE_BACKUP`: the command for each major version, and its answer as one stream of parts.
//!
//! It passes on what the server sends and checks the order of it; what the bytes are (tar, a
//! manifest) is for `backup`. Source: PostgreSQL documentation, "Streaming Replication Protocol".

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use postgres_protocol::message::frontend;

use super::connection::Connection;
use super::message::BackendMessage;
use super::server_error::ServerError;
use crate::error::{Error, Result};
use crate::pg::{Lsn, Oid, TimelineId};

/// How the checkpoint at the backup's start is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkpoint {
    /// At once, with the I/O that takes.
    Fast,
    /// Over minutes, as the server's own checkpoints.
    Spread,
}

/// The digest in the server's manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ManifestChecksums {
    /// CRC-32C: finds damage, costs next to nothing.
    Crc32c,
    /// SHA-256: also finds intent, costs the server a core.
    Sha256,
}

/// What to ask the server for.
#[derive(Debug, Clone)]
pub struct BaseBackupOptions {
    /// The label.
    pub label: String,
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// The most kilobytes a second, 32 to 1048576.
    pub max_rate_kb: Option<u32>,
    /// Whether tablespace links come as a file `tablespace_map` (else as links in the tar).
    pub tablespace_map: bool,
    /// The manifest's digests.
    pub manifest_checksums: ManifestChecksums,
    /// Whether the server verifies page checksums while it reads.
    pub verify_checksums: bool,
    /// Whether it sends only what has changed since the backup whose manifest it was given ([`upload_manifest`]); from
    /// PostgreSQL 17 on.
    pub incremental: bool,
}

impl BaseBackupOptions {
    /// Returns the command for a server of this major version.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a label or rate that the server would refuse.
    pub fn command(&self, major: u32) -> Result<String> {
        if self.label.len() > 1000 || self.label.contains(['\0', '\n', '\r']) {
            return Err(Error::invalid("the label of a backup is one line of at most 1000 bytes"));
        }
        if self.max_rate_kb.is_some_and(|rate| !(32..=1_048_576).contains(&rate)) {
            return Err(Error::invalid("the transfer rate must be between 32 kB/s and 1 GB/s"));
        }
        let label = self.label.replace('\'', "''");
        let checksums = match self.manifest_checksums {
            ManifestChecksums::Crc32c => "CRC32C",
            ManifestChecksums::Sha256 => "SHA256",
        };
        let mut command = String::new();
        if major >= 15 {
            let checkpoint = match self.checkpoint {
                Checkpoint::Fast => "fast",
                Checkpoint::Spread => "spread",
            };
            let _ = write!(
                command,
                "BASE_BACKUP (LABEL '{label}', PROGRESS, CHECKPOINT '{checkpoint}', WAL false, WAIT false, \
                 TABLESPACE_MAP {}, VERIFY_CHECKSUMS {}, MANIFEST 'yes', MANIFEST_CHECKSUMS '{checksums}'",
                self.tablespace_map, self.verify_checksums
            );
            if let Some(rate) = self.max_rate_kb {
                let _ = write!(command, ", MAX_RATE {rate}");
            }
            if self.incremental {
                command.push_str(", INCREMENTAL");
            }
            command.push(')');
        } else {
            let _ = write!(command, "BASE_BACKUP LABEL '{label}' PROGRESS");
            if self.checkpoint == Checkpoint::Fast {
                command.push_str(" FAST");
            }
            command.push_str(" NOWAIT");
            if let Some(rate) = self.max_rate_kb {
                let _ = write!(command, " MAX_RATE {rate}");
            }
            if self.tablespace_map {
                command.push_str(" TABLESPACE_MAP");
            }
            if !self.verify_checksums {
                command.push_str(" NOVERIFY_CHECKSUMS");
            }
            let _ = write!(command, " MANIFEST 'yes' MANIFEST_CHECKSUMS '{checksums}'");
        }
        Ok(command)
    }
}

/// So much of a manifest is sent in one message.
const UPLOAD_BYTES: usize = 64 << 10;

/// Gives the server the manifest of the backup that the next one of this session is to build on.
///
/// # Errors
/// What the server says: that it is no manifest that it can build on, for one; [`Error::Unavailable`] when the connection
/// breaks.
///
/// Source: `src/backend/replication/walsender.c`, UploadManifest.
pub async fn upload_manifest(connection: &mut Connection, manifest: &[u8], patience: Duration) -> Result<()> {
    connection.send_query("UPLOAD_MANIFEST").await?;
    let mut failure = None;
    loop {
        match connection.next_message(patience).await? {
            BackendMessage::CopyIn => {
                let mut bytes = BytesMut::new();
                for part in manifest.chunks(UPLOAD_BYTES) {
                    frontend::CopyData::new(part)
                        .map_err(|error| Error::invalid(format!("the manifest cannot be sent: {error}")))?
                        .write(&mut bytes);
                    connection.send(&bytes).await?;
                    bytes.clear();
                }
                frontend::copy_done(&mut bytes);
                connection.send(&bytes).await?;
            }
            BackendMessage::Error(error) => {
                let error = error.into_error(&format!("UPLOAD_MANIFEST on {}", connection.host()));
                failure.get_or_insert(error);
            }
            BackendMessage::ReadyForQuery => return failure.map_or(Ok(()), Err),
            BackendMessage::CommandComplete(_) | BackendMessage::Other => {}
            _ => return Err(out_of_order("a message comes where a manifest is taken")),
        }
    }
}

/// A tablespace as the server announces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnnouncedTablespace {
    /// Its oid and path; `None` for the data directory itself.
    pub outside: Option<(Oid, String)>,
    /// The server's estimate of its size.
    pub estimated_bytes: u64,
}

/// What the server says before the first byte of data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupStart {
    /// Where replay starts.
    pub lsn: Lsn,
    /// On which timeline.
    pub timeline: TimelineId,
    /// What is going to be sent, the data directory among it.
    pub tablespaces: Vec<AnnouncedTablespace>,
}

/// One step of a base backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupPart {
    /// A tar stream begins: of a tablespace, or (`None`) of the data directory.
    Archive(Option<Oid>),
    /// Bytes of the tar stream.
    Data(Bytes),
    /// The manifest begins.
    Manifest,
    /// Bytes of the manifest.
    ManifestData(Bytes),
    /// It is over, and consistent from here on.
    End {
        /// The end of the WAL that is needed.
        lsn: Lsn,
        /// Its timeline.
        timeline: TimelineId,
        /// What the server says of data pages whose checksum is wrong: it has sent them as they are.
        damage: Vec<String>,
    },
}

/// The SQLSTATE of damaged data.
const DATA_CORRUPTED: &str = "XX001";

/// So many of the server's warnings are kept.
const WARNINGS_MAX: usize = 1000;

/// A base backup that is being received.
#[derive(Debug)]
pub struct BaseBackup<'a> {
    connection: &'a mut Connection,
    patience: Duration,
    /// Before 15: the archives whose COPY has not begun. From 15 on: the archives not announced yet.
    expected: VecDeque<Option<Oid>>,
    one_copy: bool,
    in_copy: bool,
    in_manifest: bool,
    had_manifest: bool,
}

impl<'a> BaseBackup<'a> {
    /// Starts a base backup on a replication session.
    ///
    /// `start_patience` bounds the wait for the server's checkpoint, `patience` any later silence.
    ///
    /// # Errors
    /// What the server says; [`Error::Corrupt`] for an answer out of order.
    pub async fn start(
        connection: &'a mut Connection,
        options: &BaseBackupOptions,
        start_patience: Duration,
        patience: Duration,
    ) -> Result<(BackupStart, Self)> {
        let major = connection.server_version()? / 10_000;
        connection.send_query(&options.command(major)?).await?;
        let mut backup = BaseBackup {
            connection,
            patience: start_patience,
            expected: VecDeque::new(),
            one_copy: major >= 15,
            in_copy: false,
            in_manifest: false,
            had_manifest: false,
        };
        let (lsn, timeline) = backup.position().await?;
        backup.patience = patience;
        let tablespaces = backup.tablespaces().await?;
        backup.expected =
            tablespaces.iter().map(|space| space.outside.as_ref().map(|(oid, _)| *oid)).collect();
        Ok((BackupStart { lsn, timeline, tablespaces }, backup))
    }

    /// Returns the next part; after [`BackupPart::End`] nothing may be asked any more.
    ///
    /// # Errors
    /// What the server says;
    /// [`Error::Corrupt`] for parts out of order; [`Error::Unavailable`] when the connection breaks.
    pub async fn next(&mut self) -> Result<BackupPart> {
        loop {
            match self.message().await? {
                BackendMessage::CopyData(data) if self.in_copy => {
                    if let Some(part) = self.copy_data(data)? {
                        return Ok(part);
                    }
                }
                BackendMessage::CopyOut if !self.in_copy && !self.had_manifest => {
                    self.in_copy = true;
                    if !self.one_copy {
                        return Ok(match self.expected.pop_front() {
                            Some(archive) => BackupPart::Archive(archive),
                            None => self.begin_manifest(),
                        });
                    }
                }
                BackendMessage::CopyDone if self.in_copy => {
                    self.in_copy = false;
                    if self.one_copy && !self.expected.is_empty() {
                        return Err(out_of_order("it ends before all tablespaces were sent"));
                    }
                    if self.had_manifest {
                        return self.end().await;
                    }
                    if self.one_copy {
                        return Err(out_of_order("it holds no manifest"));
                    }
                }
                BackendMessage::CommandComplete(_) if !self.in_copy => {}
                _ => return Err(out_of_order("a message comes where none belongs")),
            }
        }
    }

    fn copy_data(&mut self, mut data: Bytes) -> Result<Option<BackupPart>> {
        if !self.one_copy {
            return Ok(Some(self.content(data)));
        }
        if data.is_empty() {
            return Err(out_of_order("an empty message"));
        }
        match data.get_u8() {
            b'd' => Ok(Some(self.content(data))),
            b'n' if !self.in_manifest => {
                let end = data.iter().position(|b| *b == 0);
                let name = end.and_then(|end| std::str::from_utf8(&data[..end]).ok()).unwrap_or_default();
                let stem = name.strip_suffix(".tar").unwrap_or_default();
                let archive = if stem == "base" { None } else { Some(stem.parse().ok().unwrap_or(0)) };
                match self.expected.iter().position(|expected| *expected == archive) {
                    Some(index) => self.expected.remove(index),
                    None => return Err(out_of_order(&format!("an archive {name:?} that was not announced"))),
                };
                Ok(Some(BackupPart::Archive(archive)))
            }
            b'm' if !self.in_manifest => Ok(Some(self.begin_manifest())),
            b'p' => Ok(None),
            _ => Err(out_of_order("a message of an unknown type")),
        }
    }

    fn content(&self, data: Bytes) -> BackupPart {
        if self.in_manifest { BackupPart::ManifestData(data) } else { BackupPart::Data(data) }
    }

    fn begin_manifest(&mut self) -> BackupPart {
        self.in_manifest = true;
        self.had_manifest = true;
        BackupPart::Manifest
    }

    /// Reads where the backup ends, and what comes behind.
    ///
    /// Source: `src/backend/backup/basebackup.c`, perform_base_backup: damaged pages are an error, after everything
    /// was sent.
    async fn end(&mut self) -> Result<BackupPart> {
        let (lsn, timeline) = self.position().await?;
        let mut damage = Vec::new();
        loop {
            match self.connection.next_message(self.patience).await? {
                BackendMessage::ReadyForQuery => return Ok(BackupPart::End { lsn, timeline, damage }),
                BackendMessage::CommandComplete(_) => {}
                BackendMessage::Error(error) if error.severity == "ERROR" && error.code == DATA_CORRUPTED => {
                    damage = self.warnings(WARNINGS_MAX);
                    damage.push(error.message);
                }
                BackendMessage::Error(error) => return Err(self.failed(error)),
                _ => return Err(out_of_order("a message comes after the end")),
            }
        }
    }

    /// Reads a result of one position: where the backup starts or ends.
    async fn position(&mut self) -> Result<(Lsn, TimelineId)> {
        let rows = self.result().await?;
        let parse = |row: &Vec<Option<String>>| {
            let lsn: Lsn = row.first()?.as_deref()?.parse().ok()?;
            let timeline = TimelineId::new(row.get(1)?.as_deref()?.parse().ok()?)?;
            lsn.is_valid().then_some((lsn, timeline))
        };
        rows.first().and_then(parse).ok_or_else(|| out_of_order("a position that makes no sense"))
    }

    async fn tablespaces(&mut self) -> Result<Vec<AnnouncedTablespace>> {
        let rows = self.result().await?;
        let parse = |row: &Vec<Option<String>>| {
            let outside = match (row.first()?, row.get(1)?) {
                (None, _) => None,
                (Some(oid), Some(path)) => Some((oid.parse().ok().filter(|oid| *oid > 0)?, path.clone())),
                (Some(_), None) => return None,
            };
            let kilobytes: u64 = row.get(2)?.as_deref().unwrap_or("0").parse().ok()?;
            Some(AnnouncedTablespace { outside, estimated_bytes: kilobytes.saturating_mul(1024) })
        };
        let found: Option<Vec<_>> = rows.iter().map(parse).collect();
        found
            .filter(|found| found.iter().filter(|space| space.outside.is_none()).count() == 1)
            .ok_or_else(|| out_of_order("a list of tablespaces that makes no sense"))
    }

    /// Reads one result set to its end.
    async fn result(&mut self) -> Result<Vec<Vec<Option<String>>>> {
        let mut rows = Vec::new();
        loop {
            match self.message().await? {
                BackendMessage::RowDescription(_) if rows.is_empty() => {}
                BackendMessage::DataRow(row) if rows.len() < 100_000 => rows.push(row),
                BackendMessage::CommandComplete(_) => return Ok(rows),
                _ => return Err(out_of_order("a message comes where a result belongs")),
            }
        }
    }

    async fn message(&mut self) -> Result<BackendMessage> {
        match self.connection.next_message(self.patience).await? {
            BackendMessage::Error(error) => Err(self.failed(error)),
            message => Ok(message),
        }
    }

    fn failed(&mut self, mut error: ServerError) -> Error {
        let warnings = self.warnings(20);
        if !warnings.is_empty() {
            let warned = format!("it had warned before: {}", warnings.join("; "));
            error.detail = Some(error.detail.map_or(warned.clone(), |detail| format!("{detail}; {warned}")));
        }
        error.into_error(&format!("the base backup from {}", self.connection.host()))
    }

    /// Returns the first warnings of the session.
    fn warnings(&mut self, max: usize) -> Vec<String> {
        let notices = self.connection.take_notices().into_iter();
        notices.filter(|one| one.severity == "WARNING").take(max).map(|one| one.message).collect()
    }
}

fn out_of_order(what: &str) -> Error {
    Error::corrupt(format!("the server's base backup cannot be followed: {what}"))
        .with_next("Check that this is PostgreSQL itself, not a pooler; try again.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_the_one_of_each_major() {
        let mut options = BaseBackupOptions {
            label: "it's".into(),
            checkpoint: Checkpoint::Fast,
            max_rate_kb: Some(1024),
            tablespace_map: false,
            manifest_checksums: ManifestChecksums::Crc32c,
            verify_checksums: true,
            incremental: false,
        };
        assert_eq!(
            options.command(14).unwrap(),
            "BASE_BACKUP LABEL 'it''s' PROGRESS FAST NOWAIT MAX_RATE 1024 MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'"
        );
        assert_eq!(
            options.command(15).unwrap(),
            "BASE_BACKUP (LABEL 'it''s', PROGRESS, CHECKPOINT 'fast', WAL false, WAIT false, TABLESPACE_MAP false, \
             VERIFY_CHECKSUMS true, MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C', MAX_RATE 1024)"
        );
        options.incremental = true;
        assert!(options.command(17).unwrap().ends_with(", MAX_RATE 1024, INCREMENTAL)"));
        options.max_rate_kb = Some(31);
        assert!(options.command(15).is_err());
        options.max_rate_kb = None;
        options.label = "two\nlines".into();
        assert!(options.command(15).is_err());
    }
}
