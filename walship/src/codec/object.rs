//! One pass over a file's bytes: digest, checksum, compression and whoever wants to watch.

use std::io::{self, BufRead, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, Result};

use super::beside::beside;
use super::compress::{Compressor, Decompressor};
use super::{Compression, Digest, Envelope};

/// The longest original file that is ever stored or decoded: the largest WAL segment.
pub const PLAIN_BYTES_MAX: u64 = 1 << 30;

/// What encoding a body has found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoded {
    /// The length of the original.
    pub plain_bytes: u64,
    /// The BLAKE3 digest of the original.
    pub digest: Digest,
    /// The length of the compressed body.
    pub body_bytes: u64,
    /// The CRC-32 of the compressed body.
    pub body_crc: u32,
}

/// A WAL file, ready to be stored: what goes before the body, and the body.
#[derive(Debug, Clone)]
pub struct EncodedObject {
    /// The envelope.
    pub envelope: Envelope,
    /// Envelope and summary as stored.
    pub head: Bytes,
    /// What follows them.
    pub body: EncodedBody,
}

/// Where the compressed bytes of an [`EncodedObject`] are.
#[derive(Debug, Clone)]
pub enum EncodedBody {
    /// In memory.
    Memory(Bytes),
    /// The whole content of a local file, which must not change while the object is in use.
    Spooled(PathBuf),
}

/// Reads `source` once to its end and writes its compressed form to `sink`; `observe` sees every byte.
///
/// Digest and `observe` work on a second thread beside the compressor, which takes longer than both.
///
/// # Errors
/// [`Error::Mismatch`] when the source does not hold exactly `plain_bytes` bytes (a file that changes
/// while it is read); [`Error::LocalIo`] when reading or writing fails.
pub fn encode_body(
    source: &mut dyn Read,
    plain_bytes: u64,
    compression: Compression,
    sink: &mut dyn Write,
    observe: &mut (dyn FnMut(&[u8]) + Send),
) -> Result<Encoded> {
    let mut compressor = start(compression, plain_bytes, sink)?;
    let mut hasher = blake3::Hasher::new();
    let mut watch = |bytes: &[u8]| {
        hasher.update(bytes);
        observe(bytes);
    };
    beside(plain_bytes, &mut watch, |watcher| {
        let mut read_bytes = 0u64;
        loop {
            let mut chunk = watcher.buffer();
            let buffer = Arc::make_mut(&mut chunk);
            let filled = fill(source, buffer).map_err(|error| Error::from_io("reading", error))?;
            read_bytes += filled as u64;
            if read_bytes > plain_bytes || (filled < buffer.len() && read_bytes < plain_bytes) {
                return Err(other_length(plain_bytes, read_bytes));
            }
            let last = filled < buffer.len();
            watcher.watch(&chunk, filled);
            compressor.write_all(&chunk[..filled]).map_err(sink_failed)?;
            watcher.done(chunk);
            if last {
                return Ok(());
            }
        }
    })?;
    finish(compressor, hasher, plain_bytes).map(|(encoded, _)| encoded)
}

/// A body that is encoded as its original comes, on the thread that hands it in: several of them side by side use
/// several cores without handing any bytes from one to another.
pub struct BodyEncoder<W: Write> {
    compressor: Compressor<Counting<W>>,
    hasher: blake3::Hasher,
    plain_bytes: u64,
    taken: u64,
}

impl<W: Write> BodyEncoder<W> {
    /// Returns an encoder of `plain_bytes` bytes that writes their compressed form to `sink`.
    ///
    /// # Errors
    /// [`Error::LocalIo`] when writing fails.
    pub fn new(plain_bytes: u64, compression: Compression, sink: W) -> Result<Self> {
        let compressor = start(compression, plain_bytes, sink)?;
        Ok(Self { compressor, hasher: blake3::Hasher::new(), plain_bytes, taken: 0 })
    }

    /// Takes the next bytes. With LZ4 they are compressed by themselves: a hundred KiB at once are well used.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when they are more than were said; [`Error::LocalIo`] when writing fails.
    pub fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.taken += bytes.len() as u64;
        if self.taken > self.plain_bytes {
            return Err(other_length(self.plain_bytes, self.taken));
        }
        self.hasher.update(bytes);
        self.compressor.write_all(bytes).map_err(sink_failed)
    }

    /// Returns what was found out, and the sink.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when fewer bytes came than were said; [`Error::LocalIo`] when writing fails.
    pub fn finish(self) -> Result<(Encoded, W)> {
        if self.taken < self.plain_bytes {
            return Err(other_length(self.plain_bytes, self.taken));
        }
        finish(self.compressor, self.hasher, self.plain_bytes)
    }
}

fn start<W: Write>(compression: Compression, plain_bytes: u64, sink: W) -> Result<Compressor<Counting<W>>> {
    let sink = Counting { inner: sink, bytes: 0, crc: crc32fast::Hasher::new() };
    Compressor::new(compression, plain_bytes, sink).map_err(sink_failed)
}

fn finish<W: Write>(
    compressor: Compressor<Counting<W>>,
    hasher: blake3::Hasher,
    plain_bytes: u64,
) -> Result<(Encoded, W)> {
    let mut sink = compressor.finish().map_err(sink_failed)?;
    sink.inner.flush().map_err(sink_failed)?;
    let digest = Digest(*hasher.finalize().as_bytes());
    let encoded = Encoded { plain_bytes, digest, body_bytes: sink.bytes, body_crc: sink.crc.finalize() };
    Ok((encoded, sink.inner))
}

fn sink_failed(error: io::Error) -> Error {
    Error::from_io("writing compressed data", error)
}

fn other_length(expected: u64, came: u64) -> Error {
    Error::mismatch(format!(
        "it was expected to hold {expected} bytes, but {} came",
        if came > expected { "more".to_owned() } else { format!("only {came}") }
    ))
    .with_next("Something changes the file while it is read; find out what writes to it.")
}

/// Reads the compressed body from `body` and writes the original to `sink`, checking everything that
/// `envelope` says: lengths, checksum, digest. Never writes more than the envelope's plain length.
///
/// # Errors
/// [`Error::Corrupt`] when any check fails (what was written to `sink` is then worthless);
/// [`Error::LocalIo`] when `sink` fails.
pub fn decode_body(envelope: &Envelope, body: &mut dyn BufRead, sink: &mut dyn Write) -> Result<()> {
    let damaged =
        |error: io::Error| Error::corrupt(format!("its compressed data cannot be decoded: {error}"));
    let mut source = Checking { inner: body, left: envelope.body_bytes, crc: crc32fast::Hasher::new() };
    let mut hasher = blake3::Hasher::new();
    let mut written = 0u64;
    let mut decompressor = Decompressor::new(envelope.codec, &mut source).map_err(damaged)?;
    let mut digest = |bytes: &[u8]| {
        hasher.update(bytes);
    };
    beside(envelope.plain_bytes, &mut digest, |watcher| {
        loop {
            let mut chunk = watcher.buffer();
            let read = decompressor.read(Arc::make_mut(&mut chunk).as_mut_slice()).map_err(damaged)?;
            if read == 0 {
                return Ok(());
            }
            written += read as u64;
            if written > envelope.plain_bytes {
                return Err(Error::corrupt(format!(
                    "it decodes to more than the {} bytes that its envelope declares",
                    envelope.plain_bytes
                )));
            }
            watcher.watch(&chunk, read);
            sink.write_all(&chunk[..read]).map_err(|error| Error::from_io("writing decoded data", error))?;
            watcher.done(chunk);
        }
    })?;
    decompressor.into_source();
    if source.left != 0 {
        return Err(Error::corrupt(format!(
            "{} bytes of its body are missing or lie behind the end of the compressed data",
            source.left
        )));
    }
    if source.crc.finalize() != envelope.body_crc {
        return Err(Error::corrupt("the checksum of its body is wrong"));
    }
    if written != envelope.plain_bytes {
        return Err(Error::corrupt(format!(
            "it decodes to {written} bytes, its envelope declares {}",
            envelope.plain_bytes
        )));
    }
    let digest = Digest(*hasher.finalize().as_bytes());
    if digest != envelope.digest {
        return Err(Error::corrupt(format!(
            "its content has the digest {digest}, its envelope declares {}",
            envelope.digest
        )));
    }
    Ok(())
}

/// Reads until `buffer` is full or the source ends; returns how many bytes came.
pub(crate) fn fill(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// A writer that counts and checksums what goes through it.
struct Counting<W> {
    inner: W,
    bytes: u64,
    crc: crc32fast::Hasher,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.bytes += written as u64;
        self.crc.update(&buffer[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A reader of at most `left` bytes that checksums what is consumed.
struct Checking<'a> {
    inner: &'a mut dyn BufRead,
    left: u64,
    crc: crc32fast::Hasher,
}

impl BufRead for Checking<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.left == 0 {
            return Ok(&[]);
        }
        let buffer = self.inner.fill_buf()?;
        let usable = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        Ok(&buffer[..usable])
    }

    fn consume(&mut self, bytes: usize) {
        // The bytes that are consumed are still what the inner reader has buffered.
        if let Ok(buffer) = self.inner.fill_buf() {
            self.crc.update(&buffer[..bytes.min(buffer.len())]);
        }
        self.inner.consume(bytes);
        self.left = self.left.saturating_sub(bytes as u64);
    }
}

impl Read for Checking<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let read = available.len().min(buffer.len());
        buffer[..read].copy_from_slice(&available[..read]);
        self.consume(read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests;
