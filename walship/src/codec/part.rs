//! A part of an open segment as a stored object: a clear head in a skippable frame, and the compressed bytes.

use std::io::Read as _;

use super::compress::{Compressor, Decompressor};
use super::{Codec, Compression, Digest, FORMAT_VERSION};
use crate::error::{Error, Result};
use crate::pg::{Lsn, SegmentName, SegmentSize, TimelineId};

const MAGIC: u32 = 0x184D_2A57;
const SIGNATURE: [u8; 8] = *b"WALTAIL\0";
const HEAD_BYTES: usize = 100;
const FRAME_HEADER_BYTES: usize = 8;

/// Consecutive bytes of one segment that was not complete when they were stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TailPart {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where the bytes begin.
    pub start: Lsn,
    /// The cluster's system identifier.
    pub system_identifier: u64,
    /// The lineage's segment size.
    pub segment_size: SegmentSize,
    /// The bytes: at least one, all of one segment, at most [`TailPart::BYTES_MAX`].
    pub bytes: Vec<u8>,
}

impl TailPart {
    /// The most bytes in one part.
    pub const BYTES_MAX: usize = 4 << 20;

    /// The longest object that holds one.
    pub const OBJECT_BYTES_MAX: u64 = (Self::BYTES_MAX + Self::BYTES_MAX / 64 + 8192) as u64;

    /// The length of what stands before an object's compressed bytes.
    pub const HEAD_BYTES: usize = HEAD_BYTES;

    /// Returns the length of the compressed bytes that follow on the head at the start of `bytes`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when no sound head stands there.
    pub fn body_bytes(bytes: &[u8]) -> Result<usize> {
        let head = checked_head(bytes)?;
        let length = u32_at(head, 56) as usize;
        if (HEAD_BYTES + length) as u64 > Self::OBJECT_BYTES_MAX {
            return Err(Error::corrupt("it says to be longer than any part"));
        }
        Ok(length)
    }

    /// Returns whether a whole object stands at the start of `bytes`, as it was written, whatever it means.
    pub fn was_written(bytes: &[u8]) -> bool {
        let body = Self::body_bytes(bytes).ok().and_then(|length| bytes.get(HEAD_BYTES..HEAD_BYTES + length));
        body.is_some_and(|body| crc32fast::hash(body) == u32_at(bytes, 60))
    }

    /// Returns the segment that the bytes belong to.
    pub fn segment(&self) -> SegmentName {
        SegmentName::containing(self.timeline, self.start, self.segment_size)
    }

    /// Returns where in the segment they begin.
    pub fn offset(&self) -> u64 {
        self.segment_size.offset_of(self.start)
    }

    fn is_sane(&self) -> bool {
        let end = self.offset() + self.bytes.len() as u64;
        !self.bytes.is_empty() && self.bytes.len() <= Self::BYTES_MAX && end <= self.segment_size.bytes()
    }

    /// Returns the object that holds the part.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it has no bytes, too many, or some of the next segment.
    pub fn encode(&self, compression: Compression) -> Result<Vec<u8>> {
        if !self.is_sane() {
            return Err(Error::invalid(format!(
                "{} bytes at {} are no part of a segment",
                self.bytes.len(),
                self.start
            )));
        }
        let failed = |error| Error::from_io("compressing in memory", error);
        let mut object = vec![0; HEAD_BYTES];
        object.reserve(self.bytes.len() / 2);
        let mut compressor = Compressor::new(compression, self.bytes.len() as u64, object).map_err(failed)?;
        compressor.write_all(&self.bytes).map_err(failed)?;
        let mut object = compressor.finish().map_err(failed)?;
        let body = &object[HEAD_BYTES..];
        let mut head = Vec::with_capacity(HEAD_BYTES);
        head.extend(MAGIC.to_le_bytes());
        head.extend(((HEAD_BYTES - FRAME_HEADER_BYTES) as u32).to_le_bytes());
        head.extend(SIGNATURE);
        head.extend(FORMAT_VERSION.to_le_bytes());
        head.push(codec_code(compression.codec()));
        head.push(0);
        head.extend((self.segment_size.bytes() as u32).to_le_bytes());
        head.extend(0u64.to_le_bytes());
        head.extend(self.system_identifier.to_le_bytes());
        head.extend(self.timeline.get().to_le_bytes());
        head.extend((self.bytes.len() as u32).to_le_bytes());
        head.extend(self.start.0.to_le_bytes());
        head.extend((body.len() as u32).to_le_bytes());
        head.extend(crc32fast::hash(body).to_le_bytes());
        head.extend(Digest::of(&self.bytes).0);
        head.extend(crc32fast::hash(&head).to_le_bytes());
        object[..HEAD_BYTES].copy_from_slice(&head);
        Ok(object)
    }

    /// Reads a whole object.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for anything that [`TailPart::encode`] would not write; [`Error::Mismatch`] for a
    /// newer format or an encrypted object.
    pub fn decode(object: &[u8]) -> Result<Self> {
        let corrupt = |what: &str| Error::corrupt(what.to_owned());
        let head = checked_head(object)?;
        let body = &object[HEAD_BYTES..];
        let u32_at = |at: usize| u32_at(head, at);
        let u64_at = |at: usize| {
            head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
        };
        let version = u16::from_le_bytes([head[16], head[17]]);
        if version > FORMAT_VERSION || u64_at(24) != 0 {
            return Err(Error::mismatch(format!(
                "it was written in format {version}, or is encrypted; this program reads up to {FORMAT_VERSION}"
            ))
            .with_next("Use the newest walship that writes to this repository."));
        }
        let codec = [Codec::Lz4, Codec::Zstd].into_iter().find(|known| codec_code(*known) == head[18]);
        let plain_bytes = u32_at(44) as usize;
        let (Some(codec), Some(segment_size), Some(timeline)) =
            (codec, SegmentSize::new(u64::from(u32_at(20))), TimelineId::new(u32_at(40)))
        else {
            return Err(corrupt("its head holds a codec, segment size or timeline that is none"));
        };
        if plain_bytes > Self::BYTES_MAX || u32_at(56) as usize != body.len() {
            return Err(corrupt("its length is not the one that it says"));
        }
        if u32_at(60) != crc32fast::hash(body) {
            return Err(corrupt("the checksum of its body is wrong"));
        }
        let part = Self {
            timeline,
            start: Lsn(u64_at(48)),
            system_identifier: u64_at(32),
            segment_size,
            bytes: decompress(codec, body, plain_bytes)?,
        };
        if Digest::of(&part.bytes).0 != head[64..96] || part.bytes.len() != plain_bytes || !part.is_sane() {
            return Err(corrupt("its content is not the one that its head declares"));
        }
        Ok(part)
    }
}

/// Returns the head at the start of `bytes` when it is sound.
fn checked_head(bytes: &[u8]) -> Result<&[u8]> {
    let corrupt = |what: &str| Error::corrupt(what.to_owned());
    let head = bytes.get(..HEAD_BYTES).ok_or_else(|| corrupt("its head is cut off"))?;
    let frame_bytes = (HEAD_BYTES - FRAME_HEADER_BYTES) as u32;
    if u32_at(head, 0) != MAGIC || u32_at(head, 4) != frame_bytes || head[8..16] != SIGNATURE {
        return Err(corrupt("it does not start with the head of a tail part"));
    }
    if u32_at(head, HEAD_BYTES - 4) != crc32fast::hash(&head[..HEAD_BYTES - 4]) {
        return Err(corrupt("the checksum of its head is wrong"));
    }
    Ok(head)
}

fn u32_at(head: &[u8], at: usize) -> u32 {
    head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Decompresses to at most one byte more than `plain_bytes`.
fn decompress(codec: Codec, body: &[u8], plain_bytes: usize) -> Result<Vec<u8>> {
    let failed =
        |error: std::io::Error| Error::corrupt(format!("its compressed data cannot be decoded: {error}"));
    struct Reading<'a>(Decompressor<&'a [u8]>);
    impl std::io::Read for Reading<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(buffer)
        }
    }
    let reading = Reading(Decompressor::new(codec, body).map_err(failed)?);
    let mut bytes = Vec::with_capacity(plain_bytes + 1);
    reading.take(plain_bytes as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn codec_code(codec: Codec) -> u8 {
    match codec {
        Codec::Lz4 => 1,
        Codec::Zstd => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn part(start: u64, bytes: Vec<u8>) -> TailPart {
        TailPart {
            timeline: TimelineId::FIRST,
            start: Lsn(start),
            system_identifier: 7,
            segment_size: SegmentSize::MIN,
            bytes,
        }
    }

    #[test]
    fn what_is_no_part_is_not_encoded() {
        for wrong in [part(0, vec![]), part((1 << 20) - 1, vec![1, 2]), part(0, vec![0; (1 << 20) + 1])] {
            assert!(wrong.encode(Compression::Lz4).is_err());
        }
        let last = part((5 << 20) - 1, vec![1]);
        assert_eq!(last.offset(), (1 << 20) - 1);
        assert_eq!(TailPart::decode(&last.encode(Compression::Lz4).unwrap()).unwrap(), last);
    }

    proptest! {
        #[test]
        fn parts_come_back_and_damage_is_noticed(
            start in 0u64..1 << 30,
            bytes in proptest::collection::vec(any::<u8>(), 1..3000),
            zstd in any::<bool>(),
            at in any::<prop::sample::Index>(),
            flip in 1u8..,
        ) {
            let start = start - start % (1 << 20);
            let part = part(start, bytes);
            let compression = if zstd { Compression::Zstd(1) } else { Compression::Lz4 };
            let mut object = part.encode(compression).unwrap();
            prop_assert_eq!(&TailPart::decode(&object).unwrap(), &part);
            let at = at.index(object.len());
            prop_assert!(TailPart::decode(&object[..at]).is_err());
            object[at] ^= flip;
            prop_assert!(TailPart::decode(&object).is_err());
        }

        #[test]
        fn decoding_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = TailPart::decode(&bytes);
        }
    }
}
