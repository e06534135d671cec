//! The two codecs, each with its encoder and its bounded decoder.

use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::str::FromStr;

use lz4_flex::frame::FrameDecoder;

use super::lz4::Lz4Encoder;
use crate::error::{Error, Result};
use crate::pg::SegmentSize;

/// The magic of an LZ4 frame, as it stands in the file.
pub(super) const LZ4_MAGIC: [u8; 4] = 0x184D_2204_u32.to_le_bytes();
/// The magic of a zstd frame, as it stands in the file.
const ZSTD_MAGIC: [u8; 4] = 0xFD2F_B528_u32.to_le_bytes();
/// The largest zstd window that is decoded: 32 MiB of memory. Level 19 asks for 8.
const ZSTD_WINDOW_LOG_MAX: u32 = 25;

/// A frame format that stock tools read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// LZ4 frame (`lz4 -d`).
    Lz4,
    /// Zstandard frame (`zstd -d`).
    Zstd,
}

/// A codec and how hard it tries: `lz4`, `zstd` (level 1), `zstd:3`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// LZ4; it has one level.
    #[default]
    Lz4,
    /// zstd at a level from 1 to 19.
    Zstd(u8),
}

impl Compression {
    /// Returns the codec.
    pub fn codec(self) -> Codec {
        match self {
            Self::Lz4 => Codec::Lz4,
            Self::Zstd(_) => Codec::Zstd,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

impl FromStr for Compression {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let level = match text {
            "lz4" => return Ok(Self::Lz4),
            "zstd" => Some(1),
            _ => text
                .strip_prefix("zstd:")
                .and_then(|level| level.parse().ok())
                .filter(|level| (1..=19).contains(level)),
        };
        level.map(Self::Zstd).ok_or_else(|| {
            Error::invalid(format!("{text:?} is not a compression"))
                .with_next("Write lz4, zstd, or zstd:N with N from 1 to 19.")
        })
    }
}

impl<'de> serde::Deserialize<'de> for Compression {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'_, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A compressor that writes one frame, with content size and content checksum, into `W`.
pub(super) enum Compressor<W: Write> {
    Lz4(Lz4Encoder<W>),
    Zstd(zstd::stream::write::Encoder<'static, W>),
}

impl<W: Write> Compressor<W> {
    pub(super) fn new(compression: Compression, plain_bytes: u64, sink: W) -> io::Result<Self> {
        Ok(match compression {
            Compression::Lz4 => {
                // LZ4's checksum (XXH32) costs a third of compressing. The envelope holds a digest and a
                // CRC, and for stock tools every WAL record has its own; smaller files have nothing else.
                let checks_itself = plain_bytes >= SegmentSize::MIN.bytes();
                Self::Lz4(Lz4Encoder::new(plain_bytes, !checks_itself, sink)?)
            }
            Compression::Zstd(level) => {
                let mut encoder = zstd::stream::write::Encoder::new(sink, i32::from(level))?;
                encoder.include_checksum(true)?;
                encoder.include_contentsize(true)?;
                encoder.set_pledged_src_size(Some(plain_bytes))?;
                Self::Zstd(encoder)
            }
        })
    }

    pub(super) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Lz4(encoder) => encoder.write_all(bytes),
            Self::Zstd(encoder) => encoder.write_all(bytes),
        }
    }

    pub(super) fn finish(self) -> io::Result<W> {
        match self {
            Self::Lz4(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
        }
    }
}

/// A decompressor of exactly one frame; it ends at that frame's end.
pub(super) enum Decompressor<R: BufRead> {
    Lz4(Box<FrameDecoder<R>>),
    Zstd(zstd::stream::read::Decoder<'static, R>),
}

impl<R: BufRead> Decompressor<R> {
    /// Returns a decompressor whose source stands at a frame of `codec` (checked by its magic: a
    /// skippable or legacy frame in its place is refused).
    pub(super) fn new(codec: Codec, mut source: R) -> io::Result<Self> {
        let magic = match codec {
            Codec::Lz4 => LZ4_MAGIC,
            Codec::Zstd => ZSTD_MAGIC,
        };
        if !source.fill_buf()?.starts_with(&magic) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no frame of the codec starts here"));
        }
        Ok(match codec {
            Codec::Lz4 => Self::Lz4(Box::new(FrameDecoder::new(source))),
            Codec::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?.single_frame();
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Self::Zstd(decoder)
            }
        })
    }

    /// Reads decompressed bytes; 0 at the frame's end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Lz4(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }

    /// Returns the source, standing behind what was read of it.
    pub(super) fn into_source(self) -> R {
        match self {
            Self::Lz4(decoder) => decoder.into_inner(),
            Self::Zstd(decoder) => decoder.finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressions_are_named() {
        for (text, expected) in [
            ("lz4", Some(Compression::Lz4)),
            ("zstd", Some(Compression::Zstd(1))),
            ("zstd:19", Some(Compression::Zstd(19))),
            ("zstd:0", None),
            ("zstd:20", None),
            ("zstd:-1", None),
            ("lz4:1", None),
            ("", None),
        ] {
            assert_eq!(text.parse::<Compression>().ok(), expected, "{text:?}");
        }
    }
}
