//! The envelope and the summary frame: what stands before the compressed bytes of a WAL object.

use crate::error::{Error, Result};
use crate::pg::{SegmentSize, WalFileName};
use crate::wal::SegmentSummary;

use super::{Codec, Digest, PLAIN_BYTES_MAX};

/// The version of the repository format that this code writes, and the highest it reads.
pub const FORMAT_VERSION: u16 = 1;

const ENVELOPE_MAGIC: u32 = 0x184D_2A57;
const SUMMARY_MAGIC: u32 = 0x184D_2A58;
const SIGNATURE: [u8; 8] = *b"WALSHIP\0";
const FRAME_HEADER_BYTES: usize = 8;
const NAME_BYTES: usize = 48;

/// What a WAL object holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ObjectKind {
    /// A whole segment.
    Segment,
    /// A `.partial` file.
    Partial,
    /// A timeline history file.
    History,
    /// A backup history file.
    BackupHistory,
    /// A file with a whole segment's name whose WAL does not reach the end.
    Incomplete,
}

impl ObjectKind {
    const ALL: [Self; 5] =
        [Self::Segment, Self::Partial, Self::History, Self::BackupHistory, Self::Incomplete];

    /// Returns whether a file of this kind can have this name.
    pub fn fits(self, name: WalFileName) -> bool {
        matches!(
            (self, name),
            (Self::Segment | Self::Incomplete, WalFileName::Segment(_))
                | (Self::Partial, WalFileName::Partial(_))
                | (Self::History, WalFileName::History(_))
                | (Self::BackupHistory, WalFileName::BackupHistory(..))
        )
    }

    /// Returns the kind of a file with this name, if it is whole.
    pub fn of(name: WalFileName) -> Self {
        match name {
            WalFileName::Segment(_) => Self::Segment,
            WalFileName::Partial(_) => Self::Partial,
            WalFileName::History(_) => Self::History,
            WalFileName::BackupHistory(..) => Self::BackupHistory,
        }
    }

    /// Returns the longest original file of this kind that is stored or decoded.
    pub fn plain_bytes_max(self) -> u64 {
        match self {
            Self::Segment | Self::Partial | Self::Incomplete => PLAIN_BYTES_MAX,
            Self::History => 1 << 20,
            Self::BackupHistory => 64 << 10,
        }
    }
}

/// The fixed-size header of a stored WAL file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// What the object holds.
    pub kind: ObjectKind,
    /// PostgreSQL's name of the file.
    pub name: WalFileName,
    /// How the body is compressed.
    pub codec: Codec,
    /// The lineage's segment size.
    pub segment_size: SegmentSize,
    /// The system identifier in the file; 0 where it says none.
    pub system_identifier: u64,
    /// The length of the original file.
    pub plain_bytes: u64,
    /// The length of the compressed body.
    pub body_bytes: u64,
    /// The CRC-32 of the compressed body.
    pub body_crc: u32,
    /// The BLAKE3 digest of the original file.
    pub digest: Digest,
}

/// What stands before the body: the envelope and, for segments, the summary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectHead {
    /// The envelope.
    pub envelope: Envelope,
    /// What the segment holds; `None` for files that are no segments.
    pub summary: Option<SegmentSummary>,
    /// The length of envelope and summary as stored: where the body starts.
    pub head_bytes: u64,
}

impl ObjectHead {
    /// The length of the envelope, its frame header included.
    pub const ENVELOPE_BYTES: usize = 160;
    /// The longest head: what one ranged GET must ask for to have envelope and summary.
    pub const BYTES_MAX: usize = Self::ENVELOPE_BYTES + FRAME_HEADER_BYTES + SegmentSummary::MAX_BYTES;

    /// Returns the length of the whole object.
    pub fn object_bytes(&self) -> u64 {
        self.head_bytes + self.envelope.body_bytes
    }

    /// Returns the bytes that stand before the body.
    ///
    /// A summary that does not fit is stored without its events, which says "read the segment".
    ///
    /// # Errors
    /// [`Error::Invalid`] when the summary does not fit even so.
    pub fn encode(envelope: &Envelope, summary: Option<&SegmentSummary>) -> Result<Vec<u8>> {
        let summary = summary.map(summary_frame).transpose()?.unwrap_or_default();
        let summary_crc = if summary.is_empty() { 0 } else { crc32fast::hash(&summary) };
        let mut name = [0; NAME_BYTES];
        let text = envelope.name.to_string();
        name[..text.len()].copy_from_slice(text.as_bytes());

        let mut bytes = Vec::with_capacity(Self::ENVELOPE_BYTES + summary.len());
        bytes.extend(ENVELOPE_MAGIC.to_le_bytes());
        bytes.extend(((Self::ENVELOPE_BYTES - FRAME_HEADER_BYTES) as u32).to_le_bytes());
        bytes.extend(SIGNATURE);
        bytes.extend(FORMAT_VERSION.to_le_bytes());
        bytes.push(kind_code(envelope.kind));
        bytes.push(codec_code(envelope.codec));
        bytes.extend((summary.len() as u32).to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(envelope.plain_bytes.to_le_bytes());
        bytes.extend(envelope.body_bytes.to_le_bytes());
        bytes.extend(envelope.system_identifier.to_le_bytes());
        bytes.extend((envelope.segment_size.bytes() as u32).to_le_bytes());
        bytes.extend(envelope.body_crc.to_le_bytes());
        bytes.extend(envelope.digest.0);
        bytes.extend(name);
        bytes.extend(summary_crc.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        debug_assert_eq!(bytes.len(), Self::ENVELOPE_BYTES);
        bytes.extend(summary);
        Ok(bytes)
    }

    /// Reads the head of an object from its first bytes ([`ObjectHead::BYTES_MAX`] are enough).
    ///
    /// # Errors
    /// [`Error::Corrupt`] for anything that [`ObjectHead::encode`] would not write;
    /// [`Error::Mismatch`] for a newer format version or an encrypted object.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (envelope, summary_bytes, summary_crc) = decode_envelope(bytes)?;
        let head_bytes = Self::ENVELOPE_BYTES + summary_bytes;
        let summary = match summary_bytes {
            0 => None,
            _ => {
                let frame = bytes
                    .get(Self::ENVELOPE_BYTES..head_bytes)
                    .ok_or_else(|| Error::corrupt("its summary is cut off"))?;
                Some(decode_summary(frame, summary_crc)?)
            }
        };
        Ok(Self { envelope, summary, head_bytes: head_bytes as u64 })
    }

    /// Reads the envelope alone from an object's first bytes: it has a checksum of its own.
    ///
    /// # Errors
    /// As [`ObjectHead::decode`].
    pub fn envelope_of(bytes: &[u8]) -> Result<Envelope> {
        decode_envelope(bytes).map(|(envelope, ..)| envelope)
    }
}

fn summary_frame(summary: &SegmentSummary) -> Result<Vec<u8>> {
    let failed = |error| Error::invalid("the segment's summary cannot be written").with_source(error);
    let mut json = serde_json::to_vec(summary).map_err(failed)?;
    if json.len() > SegmentSummary::MAX_BYTES {
        let cut = SegmentSummary { events: Vec::new(), events_truncated: true, ..summary.clone() };
        json = serde_json::to_vec(&cut).map_err(failed)?;
    }
    if json.len() > SegmentSummary::MAX_BYTES {
        return Err(Error::invalid(format!("the segment's summary has {} bytes", json.len())));
    }
    let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + json.len());
    frame.extend(SUMMARY_MAGIC.to_le_bytes());
    frame.extend((json.len() as u32).to_le_bytes());
    frame.extend(json);
    Ok(frame)
}

fn decode_summary(frame: &[u8], crc: u32) -> Result<SegmentSummary> {
    if crc32fast::hash(frame) != crc {
        return Err(Error::corrupt("the checksum of its summary is wrong"));
    }
    let mut fields = Fields(frame);
    let json_bytes = frame.len() - FRAME_HEADER_BYTES;
    if fields.u32()? != SUMMARY_MAGIC || fields.u32()? as usize != json_bytes {
        return Err(Error::corrupt("its summary frame is malformed"));
    }
    serde_json::from_slice(fields.0)
        .map_err(|error| Error::corrupt(format!("its summary cannot be read: {error}")))
}

/// Returns the envelope, the summary frame's length and its CRC.
fn decode_envelope(bytes: &[u8]) -> Result<(Envelope, usize, u32)> {
    let bytes =
        bytes.get(..ObjectHead::ENVELOPE_BYTES).ok_or_else(|| Error::corrupt("its envelope is cut off"))?;
    let (covered, crc) = bytes.split_at(ObjectHead::ENVELOPE_BYTES - 4);
    let mut fields = Fields(covered);
    let frame_bytes = (ObjectHead::ENVELOPE_BYTES - FRAME_HEADER_BYTES) as u32;
    if fields.u32()? != ENVELOPE_MAGIC || fields.u32()? != frame_bytes || fields.array()? != SIGNATURE {
        return Err(Error::corrupt("it does not start with an envelope"));
    }
    if Fields(crc).u32()? != crc32fast::hash(covered) {
        return Err(Error::corrupt("the checksum of its envelope is wrong"));
    }
    let version = fields.u16()?;
    if version > FORMAT_VERSION {
        return Err(Error::mismatch(format!(
            "it was written in format {version}; this program reads up to {FORMAT_VERSION}"
        ))
        .with_next("Use the newest walship that writes to this repository."));
    }
    let kind = fields.u8()?;
    let codec = fields.u8()?;
    let summary_bytes = fields.u32()? as usize;
    let key_id = fields.u64()?;
    let plain_bytes = fields.u64()?;
    let body_bytes = fields.u64()?;
    let system_identifier = fields.u64()?;
    let segment_size = u64::from(fields.u32()?);
    let body_crc = fields.u32()?;
    let digest = Digest(fields.array()?);
    let name: [u8; NAME_BYTES] = fields.array()?;
    let summary_crc = fields.u32()?;
    let reserved = fields.u64()?;

    let kind = ObjectKind::ALL.into_iter().find(|known| kind_code(*known) == kind);
    let codec = [Codec::Lz4, Codec::Zstd].into_iter().find(|known| codec_code(*known) == codec);
    let segment_size = SegmentSize::new(segment_size);
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
    let (text, padding) = name.split_at(length);
    let name: Option<WalFileName> = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    let (Some(kind), Some(codec), Some(segment_size), Some(name)) = (kind, codec, segment_size, name) else {
        return Err(Error::corrupt("its envelope holds a kind, codec, segment size or name that is none"));
    };
    if key_id != 0 {
        return Err(Error::mismatch(format!("it is encrypted with key {key_id}, which is not known here"))
            .with_next("Use a walship that knows encryption, with that key."));
    }
    // A body longer than this is no output of either codec: frames grow by less than a hundredth.
    let body_bytes_max = plain_bytes.saturating_add(plain_bytes / 64).saturating_add(4096);
    let sane = version > 0
        && kind.fits(name)
        && padding.iter().all(|byte| *byte == 0)
        && reserved == 0
        && plain_bytes <= kind.plain_bytes_max()
        && (kind != ObjectKind::Segment || plain_bytes == segment_size.bytes())
        && body_bytes <= body_bytes_max
        && (summary_bytes == 0
            || (FRAME_HEADER_BYTES + 2..=FRAME_HEADER_BYTES + SegmentSummary::MAX_BYTES)
                .contains(&summary_bytes));
    if !sane {
        return Err(Error::corrupt("its envelope contradicts itself or its bounds"));
    }
    let envelope = Envelope {
        kind,
        name,
        codec,
        segment_size,
        system_identifier,
        plain_bytes,
        body_bytes,
        body_crc,
        digest,
    };
    Ok((envelope, summary_bytes, summary_crc))
}

fn kind_code(kind: ObjectKind) -> u8 {
    match kind {
        ObjectKind::Segment => 1,
        ObjectKind::Partial => 2,
        ObjectKind::History => 3,
        ObjectKind::BackupHistory => 4,
        ObjectKind::Incomplete => 5,
    }
}

fn codec_code(codec: Codec) -> u8 {
    match codec {
        Codec::Lz4 => 1,
        Codec::Zstd => 2,
    }
}

/// Little-endian fields, taken from the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (field, rest) =
            self.0.split_first_chunk::<N>().ok_or_else(|| Error::corrupt("its envelope is cut off"))?;
        self.0 = rest;
        Ok(*field)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}
