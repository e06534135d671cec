//! LZ4 frames, compressed from where the bytes lie.
//!
//! lz4_flex's own encoder of frames copies everything into a block of its own first. Here what is handed in is cut
//! into blocks as it comes, and the compressor reads it there. Stock tools take blocks of any length up to
//! the one that the frame's header names.
//!
//! Source: `doc/lz4_Frame_format.md` of LZ4.

use std::hash::Hasher as _;
use std::io::{self, Write};

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use twox_hash::XxHash32;

use super::compress::LZ4_MAGIC;

/// The longest block, and what the header names: 1 MiB.
const BLOCK_BYTES_MAX: usize = 1 << 20;
const BLOCK_CODE: u8 = 6 << 4;

/// Version 1, independent blocks, with content size.
const FLAGS: u8 = 1 << 6 | 1 << 5 | 1 << 3;
const FLAG_CONTENT_CHECKSUM: u8 = 1 << 2;

/// In a block's length: it is stored as it was.
const UNCOMPRESSED: u32 = 1 << 31;

/// Writes one frame of independent blocks into `W`.
pub(super) struct Lz4Encoder<W: Write> {
    sink: W,
    table: CompressTable,
    /// A block's compressed form.
    block: Vec<u8>,
    checksum: Option<XxHash32>,
    /// What the header promised and did not come yet.
    left: u64,
}

impl<W: Write> Lz4Encoder<W> {
    /// Begins a frame of `plain_bytes` bytes.
    pub(super) fn new(plain_bytes: u64, with_checksum: bool, mut sink: W) -> io::Result<Self> {
        let mut descriptor = [0; 10];
        descriptor[0] = FLAGS | if with_checksum { FLAG_CONTENT_CHECKSUM } else { 0 };
        descriptor[1] = BLOCK_CODE;
        descriptor[2..].copy_from_slice(&plain_bytes.to_le_bytes());
        sink.write_all(&LZ4_MAGIC)?;
        sink.write_all(&descriptor)?;
        // The second byte of the descriptor's hash.
        sink.write_all(&[XxHash32::oneshot(0, &descriptor).to_le_bytes()[1]])?;
        Ok(Self {
            sink,
            table: CompressTable::large(),
            block: Vec::new(),
            checksum: with_checksum.then(|| XxHash32::with_seed(0)),
            left: plain_bytes,
        })
    }

    /// Compresses these bytes as blocks of their own: the more at once, the fewer bytes are left of them.
    pub(super) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.left = self
            .left
            .checked_sub(bytes.len() as u64)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "more bytes than were promised"))?;
        if let Some(checksum) = &mut self.checksum {
            checksum.write(bytes);
        }
        for plain in bytes.chunks(BLOCK_BYTES_MAX) {
            let room = get_maximum_output_size(plain.len());
            if self.block.len() < room {
                self.block.resize(room, 0);
            }
            let length = compress_into_with_table(plain, &mut self.block, &mut self.table)
                .map_err(io::Error::other)?;
            let (length, block) = if length < plain.len() {
                (length as u32, &self.block[..length])
            } else {
                (plain.len() as u32 | UNCOMPRESSED, plain)
            };
            self.sink.write_all(&length.to_le_bytes())?;
            self.sink.write_all(block)?;
        }
        Ok(())
    }

    /// Ends the frame.
    pub(super) fn finish(mut self) -> io::Result<W> {
        if self.left > 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "fewer bytes than were promised"));
        }
        // A block of no length.
        self.sink.write_all(&[0; 4])?;
        if let Some(checksum) = self.checksum {
            self.sink.write_all(&checksum.finish_32().to_le_bytes())?;
        }
        Ok(self.sink)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use proptest::prelude::*;

    use super::*;

    fn frame(pieces: &[Vec<u8>], with_checksum: bool) -> Vec<u8> {
        let plain_bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        let mut encoder = Lz4Encoder::new(plain_bytes, with_checksum, Vec::new()).unwrap();
        pieces.iter().for_each(|piece| encoder.write_all(piece).unwrap());
        encoder.finish().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        /// The decoder of lz4_flex checks every checksum and length; it knows nothing of this encoder.
        #[test]
        fn another_decoder_reads_it(
            lengths in proptest::collection::vec(0usize..3 << 20, 0..4),
            noise in any::<bool>(),
            with_checksum in any::<bool>(),
        ) {
            let mut state = 1u32;
            let pieces: Vec<Vec<u8>> = lengths.iter().map(|length| {
                let byte = |at: usize| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    if noise { (state >> 24) as u8 } else { (at / 100) as u8 }
                };
                (0..*length).map(byte).collect()
            }).collect();
            let mut read = Vec::new();
            lz4_flex::frame::FrameDecoder::new(&*frame(&pieces, with_checksum)).read_to_end(&mut read).unwrap();
            prop_assert_eq!(read, pieces.concat());
        }
    }

    #[test]
    fn lengths_are_as_promised() {
        let mut more = Lz4Encoder::new(2, false, Vec::new()).unwrap();
        assert!(more.write_all(b"abc").is_err());
        let mut fewer = Lz4Encoder::new(2, false, Vec::new()).unwrap();
        fewer.write_all(b"a").unwrap();
        assert!(fewer.finish().is_err());
    }
}
