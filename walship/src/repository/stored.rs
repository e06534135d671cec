//! One WAL object: put under a key that may be taken, read back with everything checked.

use std::io::{self, BufRead, Read, Write};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use tokio::runtime::Handle;

use crate::codec::{EncodedBody, EncodedObject, Envelope, ObjectHead, ObjectKind, decode_body};
use crate::error::{Error, Result};
use crate::pg::WalFileName;
use crate::storage::{ObjectKey, PutBody, PutOutcome, Storage, list_all};

use super::segments::Put;
use super::{LineageRepository, layout};

/// What the first request of a read asks for: all of a segment of 16 MiB, even an incompressible one.
const FIRST_READ_BYTES: u64 = (16 << 20) + (256 << 10);

/// What every further request asks for.
const NEXT_READ_BYTES: u64 = 16 << 20;

/// More copies than damage ever makes.
const COPIES_MAX: usize = 1000;

/// Where decoded bytes go. Asked again for each stored copy that is tried.
pub(super) trait Target: Send + 'static {
    type Output: Send + 'static;

    /// Decodes with a writer that starts empty.
    fn run(&mut self, decode: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<Self::Output>;
}

/// Decodes into nothing: to check.
pub(super) struct ToNowhere;

impl Target for ToNowhere {
    type Output = ();

    fn run(&mut self, decode: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<()> {
        decode(&mut io::sink())
    }
}

/// Decodes into memory.
pub(super) struct ToMemory;

impl Target for ToMemory {
    type Output = Vec<u8>;

    fn run(&mut self, decode: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        decode(&mut bytes)?;
        Ok(bytes)
    }
}

/// Decodes into a file, from its start.
pub(super) struct ToFile(pub(super) std::fs::File);

impl Target for ToFile {
    type Output = ();

    fn run(&mut self, decode: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<()> {
        use std::io::Seek as _;
        let failed = |error| Error::from_io("preparing a temporary file", error);
        self.0.set_len(0).map_err(failed)?;
        self.0.rewind().map_err(failed)?;
        decode(&mut self.0)
    }
}

impl LineageRepository {
    /// Puts an encoded object under `key`; compares when the key is taken.
    pub(super) async fn put_object(&self, key: &ObjectKey, object: &EncodedObject) -> Result<Put> {
        let body = put_body(object);
        for _ in 0..3 {
            if self.storage.put_if_absent(key, body.clone()).await? == PutOutcome::Stored {
                return Ok(Put::Stored);
            }
            match self.compare(key, &object.envelope).await? {
                Compared::Same => return Ok(Put::AlreadyStored),
                Compared::Gone => {}
                Compared::Damaged(damage) => return self.put_copy(key, object, damage).await,
            }
        }
        Err(Error::unavailable(format!("{} comes and goes", self.shown(key))))
    }

    /// Puts a good copy beside a damaged object, unless one is there. Fails when another file has a valid
    /// copy there.
    async fn put_copy(&self, key: &ObjectKey, object: &EncodedObject, damage: Error) -> Result<Put> {
        if self.has_copy(key, &object.envelope).await? {
            return Ok(Put::AlreadyStored);
        }
        let copy = layout::copy_of(key, &object.envelope.digest)?;
        if self.storage.put_if_absent(&copy, put_body(object)).await? == PutOutcome::Exists {
            return match self.compare(&copy, &object.envelope).await? {
                Compared::Same => Ok(Put::AlreadyStored),
                _ => Err(damage.context("the object and its copy are both damaged")),
            };
        }
        // Copies of different files have different keys: of two archivers at once, the later one sees both.
        self.has_copy(key, &object.envelope).await?;
        Ok(Put::StoredBesideDamaged { copy: self.shown(&copy), damage: damage.to_string() })
    }

    /// Compares with every copy and returns whether one is the same and sound; one that says to be of another
    /// file is a conflict.
    async fn has_copy(&self, key: &ObjectKey, ours: &Envelope) -> Result<bool> {
        let mut found = false;
        for copy in self.copies(key).await? {
            found |= matches!(self.compare(&copy, ours).await?, Compared::Same);
        }
        Ok(found)
    }

    /// Finds out what a taken key holds, after making it durable.
    async fn compare(&self, key: &ObjectKey, ours: &Envelope) -> Result<Compared> {
        let Some(meta) = self.storage.confirm(key).await? else { return Ok(Compared::Gone) };
        let expected = Expected { name: ours.name, kind: ours.kind };
        let mut read = self.read_one(key, expected, ToNowhere).await;
        if let Err(Error::Corrupt(_)) = read {
            // Damaged where it is stored, or only on its way?
            read = self.read_one(key, expected, ToNowhere).await;
        }
        let damage = match read {
            Ok(None) => return Ok(Compared::Gone),
            Ok(Some((head, ()))) if head.envelope.digest != ours.digest => {
                return Err(self.conflict(ours, &head.envelope, None));
            }
            Ok(Some((head, ()))) if head.object_bytes() == meta.bytes => return Ok(Compared::Same),
            Ok(Some(_)) => Error::corrupt(format!("{} has another length than it says", self.shown(key))),
            Err(damage @ Error::Corrupt(_)) => damage,
            Err(error) => return Err(error),
        };
        // A sound envelope tells what was stored there, however much of the rest is lost. Another file beside it
        // would be read in its place: WAL of one history between neighbours of another.
        match self.named_envelope(key, expected).await? {
            Some(stored) if stored.digest != ours.digest => Err(self.conflict(ours, &stored, Some(&damage))),
            _ => Ok(Compared::Damaged(damage)),
        }
    }

    /// Returns the envelope of an object whose rest may be damaged; `None` when it is damaged too, or says
    /// that the object is another one than its key does.
    async fn named_envelope(&self, key: &ObjectKey, expected: Expected) -> Result<Option<Envelope>> {
        let first = self.storage.get_range(key, 0, ObjectHead::ENVELOPE_BYTES as u64).await?;
        match first.as_deref().map(ObjectHead::envelope_of) {
            Some(Ok(envelope)) => Ok(self.foreign(&envelope, expected).is_none().then_some(envelope)),
            None | Some(Err(Error::Corrupt(_))) => Ok(None),
            Some(Err(error)) => Err(error),
        }
    }

    fn conflict(&self, ours: &Envelope, stored: &Envelope, damage: Option<&Error>) -> Error {
        let damaged =
            damage.map_or_else(String::new, |damage| format!("; what is stored is damaged, too: {damage}"));
        Error::conflict(format!(
            "{} is already stored in {} with other content (stored digest {}, local {}){damaged}",
            ours.name,
            self.location(),
            stored.digest,
            ours.digest
        ))
        .with_safe("nothing was overwritten; PostgreSQL keeps its copy in pg_wal and will ask again")
        .with_next(format!(
            "Check that only one cluster archives to \"{}\": a restored copy or an old primary must archive \
             elsewhere or not at all. If this server is the right one, give it a lineage of its own with \
             `walship init --new-lineage`; \"When a segment is stored with other content\" in \
             docs/repository-format.md has the steps.",
            self.cluster
        ))
    }

    /// Reads the object under `key`, else the first of its copies that passes all checks; `None` when
    /// the store says that exactly this key is not there.
    pub(super) async fn read_valid<T: Target>(
        &self,
        key: &ObjectKey,
        expected: Expected,
        mut target: impl FnMut() -> Result<T>,
    ) -> Result<Option<(ObjectHead, T::Output)>> {
        let damage = match self.read_one(key, expected, target()?).await {
            Err(damage @ Error::Corrupt(_)) => damage,
            other => return other,
        };
        for copy in self.copies(key).await? {
            match self.read_one(&copy, expected, target()?).await {
                Ok(Some(found)) => return Ok(Some(found)),
                Ok(None) | Err(Error::Corrupt(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(damage)
    }

    /// Reads and checks envelope and summary only, with one ranged GET.
    pub(super) async fn read_head(&self, key: &ObjectKey, expected: Expected) -> Result<Option<ObjectHead>> {
        let damage = match self.head_one(key, expected).await {
            Err(damage @ Error::Corrupt(_)) => damage,
            other => return other,
        };
        for copy in self.copies(key).await? {
            match self.head_one(&copy, expected).await {
                Ok(Some(found)) => return Ok(Some(found)),
                Ok(None) | Err(Error::Corrupt(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(damage)
    }

    async fn head_one(&self, key: &ObjectKey, expected: Expected) -> Result<Option<ObjectHead>> {
        let first = self.storage.get_range(key, 0, ObjectHead::BYTES_MAX as u64).await?;
        first.map(|first| self.checked_head(key, &first, expected)).transpose()
    }

    async fn copies(&self, key: &ObjectKey) -> Result<Vec<ObjectKey>> {
        let listed = list_all(&*self.storage, &layout::copies_prefix(key), COPIES_MAX).await?;
        Ok(listed.into_iter().map(|meta| meta.key).collect())
    }

    fn checked_head(&self, key: &ObjectKey, first: &[u8], expected: Expected) -> Result<ObjectHead> {
        let head = ObjectHead::decode(first).map_err(|error| error.context(self.shown(key)))?;
        match self.foreign(&head.envelope, expected) {
            Some(wrong) => Err(Error::corrupt(format!("{}: {wrong}", self.shown(key)))),
            None => Ok(head),
        }
    }

    /// Returns what is wrong with an envelope that is not that of the expected object.
    fn foreign(&self, envelope: &Envelope, expected: Expected) -> Option<String> {
        let ours = self.lineage.system_identifier;
        if envelope.name != expected.name || envelope.kind != expected.kind {
            Some(format!("it holds {} ({:?})", envelope.name, envelope.kind))
        } else if envelope.segment_size != self.lineage.segment_size {
            Some(format!("it belongs to a cluster with segments of {}", envelope.segment_size))
        } else if envelope.system_identifier != 0 && envelope.system_identifier != ours {
            Some(format!("it belongs to system identifier {}", envelope.system_identifier))
        } else {
            None
        }
    }

    pub(super) async fn read_one<T: Target>(
        &self,
        key: &ObjectKey,
        expected: Expected,
        mut target: T,
    ) -> Result<Option<(ObjectHead, T::Output)>> {
        let Some(first) = self.storage.get_range(key, 0, FIRST_READ_BYTES).await? else { return Ok(None) };
        let head = self.checked_head(key, &first, expected)?;
        let object_bytes = head.object_bytes();
        let trailing = match first.len() as u64 {
            read if read > object_bytes => true,
            // The first answer ends where the object should: is there more?
            read if read == FIRST_READ_BYTES && read == object_bytes => {
                self.has_byte_at(key, object_bytes).await?
            }
            _ => false,
        };
        if trailing {
            return Err(Error::corrupt(format!("{} is longer than it says", self.shown(key))));
        }
        let ends_later = object_bytes > first.len() as u64;
        if ends_later && self.has_byte_at(key, object_bytes).await? {
            return Err(Error::corrupt(format!("{} is longer than it says", self.shown(key))));
        }
        let mut chunk = first;
        let next_offset = chunk.len() as u64;
        chunk.advance(usize::try_from(head.head_bytes).unwrap_or(usize::MAX).min(chunk.len()));
        let mut body = StoredBody {
            storage: self.storage.clone(),
            runtime: Handle::current(),
            key: key.clone(),
            chunk,
            next_offset,
            end: object_bytes,
            failure: None,
        };
        let shown = self.shown(key);
        let decoded = tokio::task::spawn_blocking(move || {
            let output = target.run(&mut |sink| {
                let decoded = decode_body(&head.envelope, &mut body, sink);
                // An outage in the middle is no damage.
                match body.failure.take() {
                    Some(failure) => Err(failure),
                    None => decoded.map_err(|error| match error {
                        Error::Corrupt(_) => error.context(&shown),
                        error => error,
                    }),
                }
            })?;
            Ok((head, output))
        });
        decoded
            .await
            .map_err(|error| Error::unavailable(format!("decoding was broken off: {error}")))?
            .map(Some)
    }

    async fn has_byte_at(&self, key: &ObjectKey, offset: u64) -> Result<bool> {
        Ok(self.storage.get_range(key, offset, 1).await?.is_some_and(|bytes| !bytes.is_empty()))
    }

    pub(super) fn shown(&self, key: &ObjectKey) -> String {
        format!("{}/{key}", self.storage.location())
    }
}

/// What a key says of its object.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected {
    pub(super) name: WalFileName,
    pub(super) kind: ObjectKind,
}

enum Compared {
    Same,
    Gone,
    Damaged(Error),
}

fn put_body(object: &EncodedObject) -> PutBody {
    match &object.body {
        EncodedBody::Memory(body) => PutBody::Memory(vec![object.head.clone(), body.clone()]),
        EncodedBody::Spooled(file) => PutBody::Spooled {
            head: object.head.clone(),
            file: file.clone(),
            file_bytes: object.envelope.body_bytes,
        },
    }
}

/// A stored body as a blocking reader: the bytes at hand first, then ranges as they are needed.
struct StoredBody {
    storage: Arc<dyn Storage>,
    runtime: Handle,
    key: ObjectKey,
    chunk: Bytes,
    next_offset: u64,
    end: u64,
    failure: Option<Error>,
}

impl BufRead for StoredBody {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.chunk.is_empty() && self.next_offset < self.end {
            // An emptied piece would hold its memory while the next one comes.
            self.chunk = Bytes::new();
            let length = NEXT_READ_BYTES.min(self.end - self.next_offset);
            let read = self.runtime.block_on(self.storage.get_range(&self.key, self.next_offset, length));
            match read {
                Ok(Some(bytes)) if !bytes.is_empty() => {
                    self.next_offset += bytes.len() as u64;
                    self.chunk = bytes;
                }
                // Shorter than it says: the decoder finds the end too early.
                Ok(_) => self.end = self.next_offset,
                Err(error) => {
                    self.failure = Some(error);
                    return Err(io::Error::other("the store failed"));
                }
            }
        }
        Ok(&self.chunk)
    }

    fn consume(&mut self, bytes: usize) {
        self.chunk.advance(bytes.min(self.chunk.len()));
    }
}

impl Read for StoredBody {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let read = available.len().min(buffer.len());
        buffer[..read].copy_from_slice(&available[..read]);
        self.consume(read);
        Ok(read)
    }
}
