//! The work that is measured: what every archived segment goes through.

use std::io::Write;

use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
use walship::codec::{Compression, Envelope, ObjectHead, ObjectKind, decode_body, encode_body};
use walship::pg::{SegmentSize, WalFileName};
use walship::wal::SegmentSummary;
use walship::wal::scan::{SegmentScanner, Verdict};

use crate::wal::Segment;

/// Scans one segment as archiving does: every page header, every record, every CRC.
///
/// # Panics
/// When the segment is not whole.
pub fn scan(segment: &Segment) -> SegmentSummary {
    let mut scanner = SegmentScanner::new(segment.name, SegmentSize::DEFAULT);
    scanner.push(&segment.bytes);
    let scan = scanner.finish();
    assert_eq!(scan.verdict, Verdict::Whole, "{}", segment.name);
    scan.summary
}

/// Makes the whole object of one segment: scan, summary, digest, checksum, compressed body.
///
/// # Panics
/// When the segment is not whole.
pub fn encode(segment: &Segment, compression: Compression) -> (Envelope, Vec<u8>, Vec<u8>) {
    let mut scanner = SegmentScanner::new(segment.name, SegmentSize::DEFAULT);
    let plain_bytes = segment.bytes.len() as u64;
    let mut body = Vec::new();
    let mut source = segment.bytes.as_slice();
    let encoded =
        encode_body(&mut source, plain_bytes, compression, &mut body, &mut |bytes| scanner.push(bytes))
            .expect("memory neither fails nor changes");
    let scan = scanner.finish();
    assert_eq!(scan.verdict, Verdict::Whole, "{}", segment.name);
    let envelope = Envelope {
        kind: ObjectKind::Segment,
        name: WalFileName::Segment(segment.name),
        codec: compression.codec(),
        segment_size: SegmentSize::DEFAULT,
        system_identifier: scan.summary.system_identifier,
        plain_bytes,
        body_bytes: encoded.body_bytes,
        body_crc: encoded.body_crc,
        digest: encoded.digest,
    };
    let head = ObjectHead::encode(&envelope, Some(&scan.summary)).expect("a summary fits");
    (envelope, head, body)
}

/// Decodes an object's body and checks all that its envelope says.
///
/// # Panics
/// When it is damaged.
pub fn decode(envelope: &Envelope, mut body: &[u8], sink: &mut dyn Write) {
    decode_body(envelope, &mut body, sink).expect("the object was just made");
}

/// Compresses with lz4_flex alone: one frame as in an object, without the content checksum.
///
/// # Panics
/// Never: memory does not fail.
pub fn bare_lz4_flex(plain: &[u8]) -> Vec<u8> {
    let info = FrameInfo::new()
        .block_mode(BlockMode::Independent)
        .block_size(BlockSize::Max1MB)
        .content_size(Some(plain.len() as u64));
    let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
    encoder.write_all(plain).expect("memory does not fail");
    encoder.finish().expect("memory does not fail")
}

/// Compresses with the C library alone: the same kind of frame.
///
/// # Panics
/// Never: memory does not fail.
pub fn bare_lz4_c(plain: &[u8]) -> Vec<u8> {
    let mut encoder = lz4::EncoderBuilder::new()
        .level(0)
        .block_mode(lz4::BlockMode::Independent)
        .block_size(lz4::BlockSize::Max1MB)
        .checksum(lz4::ContentChecksum::NoChecksum)
        .content_size(plain.len() as u64)
        .build(Vec::new())
        .expect("memory does not fail");
    encoder.write_all(plain).expect("memory does not fail");
    let (frame, result) = encoder.finish();
    result.expect("memory does not fail");
    frame
}

/// Compresses with zstd alone: one frame without content checksum.
///
/// # Panics
/// Never: memory does not fail.
pub fn bare_zstd(plain: &[u8], level: i32) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), level).expect("the level is legal");
    encoder.set_pledged_src_size(Some(plain.len() as u64)).expect("nothing was written yet");
    encoder.write_all(plain).expect("memory does not fail");
    encoder.finish().expect("memory does not fail")
}
