//! Tar bytes on their way to be compressed: cut so that no frame, and no batch, ends inside a block of a file. Pure.

use std::ops::Range;
use std::path::PathBuf;

use crate::codec::backup_index::{BLOCK_BYTES, BlockDigest, IndexedFile, Partial, block_digests};

use super::members::{BLOCK, Member, MemberKind};

/// The tar bytes are cut into pieces of at most so many; a frame is one of them, or some (see [`FrameCompressor`]).
const PIECE_BYTES_MAX: usize = 64 << 10;

/// A member that ends in a piece at least this full ends the piece.
const PIECE_BYTES_MIN: usize = PIECE_BYTES_MAX / 2;

/// A frame holds at most so many bytes of tar.
const FRAME_BYTES_MAX: usize = 256 << 10;

/// A frame is to hold so many bytes when it is compressed. Short ones, so that a changed page is fetched with few others;
/// longer ones would compress better (ADR 0020).
const FRAME_STORED_BYTES: usize = 24 << 10;

/// So many bytes of tar are compressed by one thread in one go. They stay in its core's cache from reading to compressing.
const BATCH_BYTES: usize = 1 << 20;

/// What a batch may have beyond that: headers and paddings.
const BATCH_SLACK_BYTES: usize = 4 * BLOCK;

/// Consecutive frames.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// Room; what is behind `filled` means nothing.
    tar: Vec<u8>,
    filled: usize,
    /// Where a frame may end.
    ends: Vec<usize>,
    /// Where files' bytes stand. Each piece starts at the start of a block.
    data: Vec<Range<usize>>,
    /// The folders and files that begin in it.
    folders: Vec<PathBuf>,
    files: Vec<IndexedFile>,
}

/// A batch as it is stored.
#[derive(Debug)]
pub(crate) struct Compressed {
    pub(crate) bytes: Vec<u8>,
    /// Each frame's length, and that of its content.
    pub(crate) frames: Vec<(u32, u32)>,
    pub(crate) folders: Vec<PathBuf>,
    pub(crate) files: Vec<IndexedFile>,
    pub(crate) digests: Vec<BlockDigest>,
}

/// Compresses frames, and keeps what that takes from one batch to the next.
///
/// A frame takes pieces as long as they are expected to be compressed to [`FRAME_STORED_BYTES`], by what became of the
/// frame before. So rows that compress well lie in long frames, which costs less, and others in short ones.
pub(crate) struct FrameCompressor {
    zstd: zstd::bulk::Compressor<'static>,
    frame: Vec<u8>,
    /// How many bytes of tar the next frame is to hold.
    wanted: usize,
}

impl FrameCompressor {
    /// # Errors
    /// What zstd fails with.
    pub(crate) fn new(level: i32) -> std::io::Result<Self> {
        let mut zstd = zstd::bulk::Compressor::new(level)?;
        zstd.include_checksum(true)?;
        Ok(Self { zstd, frame: Vec::new(), wanted: PIECE_BYTES_MAX })
    }

    /// Returns how many of the pieces that end at `ends`, of which the first starts at `start`, make the next frame.
    fn pieces(&self, start: usize, ends: &[usize]) -> usize {
        ends.iter().take_while(|end| *end - start <= self.wanted).count().clamp(1, ends.len())
    }

    fn compress(&mut self, tar: &[u8]) -> std::io::Result<&[u8]> {
        self.frame.clear();
        self.frame.reserve(zstd::zstd_safe::compress_bound(tar.len()));
        self.zstd.compress_to_buffer(tar, &mut self.frame)?;
        let wanted = tar.len() * FRAME_STORED_BYTES / self.frame.len().max(1);
        self.wanted = wanted.clamp(PIECE_BYTES_MAX, FRAME_BYTES_MAX);
        Ok(&self.frame)
    }
}

impl Batch {
    pub(crate) fn tar_bytes(&self) -> u64 {
        self.filled as u64
    }

    /// Compresses the frames and makes the blocks' digests; returns the batch's memory as well, for another one.
    ///
    /// # Errors
    /// What zstd fails with.
    pub(crate) fn compress(self, compressor: &mut FrameCompressor) -> std::io::Result<(Compressed, Vec<u8>)> {
        let (mut bytes, mut frames) = (Vec::new(), Vec::with_capacity(self.ends.len()));
        let (mut start, mut ends) = (0, &*self.ends);
        while !ends.is_empty() {
            let (now, later) = ends.split_at(compressor.pieces(start, ends));
            let end = now.last().copied().unwrap_or(start);
            let frame = compressor.compress(&self.tar[start..end])?;
            // Both are far below 4 GiB.
            frames.push((frame.len() as u32, (end - start) as u32));
            bytes.extend_from_slice(frame);
            (start, ends) = (end, later);
        }
        let digests = self.data.into_iter().flat_map(|piece| block_digests(&self.tar[piece])).collect();
        let compressed = Compressed { bytes, frames, folders: self.folders, files: self.files, digests };
        Ok((compressed, self.tar))
    }

    /// Returns room for so many bytes more.
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        let end = self.filled + bytes;
        if self.tar.len() < end {
            self.tar.resize(end.max(BATCH_BYTES + BATCH_SLACK_BYTES), 0);
        }
        &mut self.tar[self.filled..end]
    }

    fn append(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.filled += bytes.len();
    }
}

/// Returns the mode in a member's header: octal digits; 0 where there are none.
fn mode_of(header: &[u8; BLOCK]) -> u32 {
    let digits = header[100..108].iter().copied().skip_while(|byte| *byte == b' ');
    let digits = digits.take_while(|byte| (b'0'..=b'7').contains(byte));
    digits.fold(0, |mode, digit| mode << 3 | u32::from(digit - b'0'))
}

/// Collects the tar stream of one object into batches. Who takes a full one gives memory for the next: a former batch's,
/// or none.
#[derive(Debug, Default)]
pub(crate) struct Cutter {
    batch: Batch,
    /// The bytes of tar in the batches before.
    before: u64,
    /// How much of the open member's content has come.
    member_bytes: u64,
}

impl Cutter {
    /// Begins in the memory of a former batch.
    pub(crate) fn new(memory: Vec<u8>) -> Self {
        Self { batch: Batch { tar: memory, ..Batch::default() }, ..Self::default() }
    }

    /// Returns how many bytes of tar there were.
    pub(crate) fn tar_bytes(&self) -> u64 {
        self.before + self.batch.tar_bytes()
    }

    /// Takes a member's header, and what the member lacks where it is some blocks of a file only.
    pub(crate) fn header(
        &mut self,
        block: &[u8; BLOCK],
        member: Member,
        partial: Option<Partial>,
        full: &mut impl FnMut(Batch) -> Vec<u8>,
    ) {
        self.make_room(BLOCK, full);
        self.member_bytes = 0;
        self.batch.append(block);
        let Member { path, kind, bytes } = member;
        match kind {
            MemberKind::File => {
                let tar_at = self.tar_bytes();
                let group_reads = mode_of(block) & 0o040 != 0;
                self.batch.files.push(IndexedFile { path, tar_at, bytes, group_reads, partial });
            }
            MemberKind::Folder => self.batch.folders.push(path),
            MemberKind::Link => {}
        }
    }

    /// Takes bytes of the open member.
    pub(crate) fn data(&mut self, mut bytes: &[u8], full: &mut impl FnMut(Batch) -> Vec<u8>) {
        while !bytes.is_empty() {
            let room = self.room(bytes.len(), full);
            let (now, later) = bytes.split_at(room.len());
            room.copy_from_slice(now);
            self.took(now.len());
            bytes = later;
        }
    }

    /// Returns room for the next bytes of the open member: at least one and at most `wanted`, up to the end of a block.
    /// What is in it means nothing; [`Cutter::took`] says that it was filled.
    pub(crate) fn room(&mut self, wanted: usize, full: &mut impl FnMut(Batch) -> Vec<u8>) -> &mut [u8] {
        let in_block = (self.member_bytes % BLOCK_BYTES as u64) as usize;
        let most = if in_block == 0 {
            self.make_room(BLOCK_BYTES, full);
            let left = PIECE_BYTES_MAX - self.piece_bytes();
            left - left % BLOCK_BYTES
        } else {
            BLOCK_BYTES - in_block
        };
        self.batch.room(wanted.min(most))
    }

    /// The first `length` bytes of the room are the member's next ones.
    pub(crate) fn took(&mut self, length: usize) {
        let at = self.batch.filled;
        self.batch.filled += length;
        match self.batch.data.last_mut() {
            Some(piece) if self.member_bytes > 0 && piece.end == at => piece.end += length,
            _ => self.batch.data.push(at..at + length),
        }
        self.member_bytes += length as u64;
    }

    /// Takes what fills up the open member's last tar block.
    pub(crate) fn padding(&mut self, bytes: &[u8]) {
        self.batch.append(bytes);
    }

    /// The open member is whole: a place to end a piece.
    pub(crate) fn end_member(&mut self) {
        if self.piece_bytes() >= PIECE_BYTES_MIN {
            self.end_piece();
        }
    }

    /// Ends the tar stream and returns what is left.
    pub(crate) fn finish(mut self) -> Batch {
        self.batch.append(&[0; 2 * BLOCK]);
        self.end_piece();
        self.batch
    }

    fn piece_bytes(&self) -> usize {
        self.batch.filled - self.batch.ends.last().unwrap_or(&0)
    }

    fn end_piece(&mut self) {
        if self.piece_bytes() > 0 {
            self.batch.ends.push(self.batch.filled);
        }
    }

    /// Ends the piece, and then perhaps the batch, when `bytes` more would be too many.
    fn make_room(&mut self, bytes: usize, full: &mut impl FnMut(Batch) -> Vec<u8>) {
        if self.piece_bytes() + bytes > PIECE_BYTES_MAX {
            self.end_piece();
        }
        if self.piece_bytes() == 0 && self.batch.filled + PIECE_BYTES_MAX > BATCH_BYTES {
            let before = self.tar_bytes();
            let memory = full(std::mem::take(&mut self.batch));
            *self = Self { before, member_bytes: self.member_bytes, ..Self::new(memory) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Cuts members of these lengths, handed over in pieces, and returns the batches.
    /// Each batch begins in memory that has something in it.
    fn cut(lengths: &[usize], piece: usize) -> (Vec<Batch>, Vec<u8>) {
        let (mut cutter, mut batches, mut whole) = (Cutter::default(), Vec::new(), Vec::new());
        let mut full = |batch| {
            batches.push(batch);
            vec![0xEE; batches.len() % 3 * 700_000]
        };
        for (number, length) in lengths.iter().enumerate() {
            let content: Vec<u8> = (0..*length).map(|at| (at / 997 + number) as u8).collect();
            let header = [number as u8; BLOCK];
            let member =
                Member { path: number.to_string().into(), kind: MemberKind::File, bytes: *length as u64 };
            cutter.header(&header, member, None, &mut full);
            whole.extend(header);
            // Half of the members are copied, the others written where they are to lie.
            for bytes in content.chunks(piece).filter(|_| number % 2 == 0) {
                cutter.data(bytes, &mut full);
            }
            let mut left = if number % 2 == 0 { &[][..] } else { &content[..] };
            while !left.is_empty() {
                let room = cutter.room(left.len().min(piece), &mut full);
                let (now, later) = left.split_at(room.len());
                room.copy_from_slice(now);
                cutter.took(now.len());
                left = later;
            }
            whole.extend(&content);
            let padding = vec![0; length.next_multiple_of(BLOCK) - length];
            cutter.padding(&padding);
            whole.extend(&padding);
            cutter.end_member();
        }
        assert_eq!(cutter.tar_bytes(), whole.len() as u64);
        batches.push(cutter.finish());
        whole.extend([0; 2 * BLOCK]);
        (batches, whole)
    }

    #[test]
    fn a_header_says_who_may_read() {
        let mut header = [0; BLOCK];
        assert_eq!(mode_of(&header), 0);
        header[100..108].copy_from_slice(b"0000640\0");
        assert_eq!(mode_of(&header), 0o640);
        header[100..108].copy_from_slice(b"   750 \0");
        assert_eq!(mode_of(&header), 0o750);
    }

    #[test]
    fn what_compresses_well_lies_in_long_frames_and_the_rest_in_short_ones() {
        let mut compressor = FrameCompressor::new(1).unwrap();
        let mut frames = |content: &[u8]| {
            let (mut cutter, mut batches) = (Cutter::default(), Vec::new());
            let mut full = |batch| {
                batches.push(batch);
                Vec::new()
            };
            let member = Member { path: "1".into(), kind: MemberKind::File, bytes: content.len() as u64 };
            cutter.header(&[0; BLOCK], member, None, &mut full);
            cutter.data(content, &mut full);
            cutter.end_member();
            batches.push(cutter.finish());
            let compressed = batches.into_iter().map(|batch| batch.compress(&mut compressor).unwrap().0);
            let lengths: Vec<u32> =
                compressed.flat_map(|batch| batch.frames).map(|(_, tar)| tar >> 10).collect();
            // The first one is as long as what came before wanted it, the last one is what is left.
            lengths[1..lengths.len() - 1].to_vec()
        };
        let noise: Vec<u8> = (0..4 << 20).map(|_| rand::random()).collect();
        assert!(frames(&noise).iter().all(|kib| *kib <= 64));
        assert!(frames(&vec![7; 4 << 20]).iter().filter(|kib| **kib >= 248).count() >= 12);
        // Digits: a little less than half.
        let digits: Vec<u8> = noise.iter().map(|byte| b'0' + byte % 10).collect();
        assert!(frames(&digits).iter().all(|kib| *kib <= 64));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn nothing_is_lost_and_every_block_has_its_digest(
            lengths in proptest::collection::vec(prop_oneof![0usize..40_000, 3_000_000usize..9_000_000], 0..6),
            piece in prop_oneof![700usize..9000, Just(1 << 20)],
        ) {
            let (batches, whole) = cut(&lengths, piece);
            let (mut stored, mut digests, mut files, mut at) = (Vec::new(), Vec::new(), Vec::new(), 0u64);
            let mut compressor = FrameCompressor::new(1).unwrap();
            for batch in batches {
                prop_assert!(batch.filled <= BATCH_BYTES + BATCH_SLACK_BYTES);
                at += batch.tar_bytes();
                let (compressed, _) = batch.compress(&mut compressor).unwrap();
                prop_assert!(compressed.frames.iter().all(|(_, tar)| (*tar as usize) <= FRAME_BYTES_MAX));
                let (mut from, sizes) = (0, &compressed.frames);
                for (bytes, plain) in sizes {
                    let frame = &compressed.bytes[from..from + *bytes as usize];
                    prop_assert_eq!(zstd::bulk::decompress(frame, 1 << 20).unwrap().len(), *plain as usize);
                    from += *bytes as usize;
                }
                stored.extend(compressed.bytes);
                digests.extend(compressed.digests);
                files.extend(compressed.files);
            }
            prop_assert_eq!(at, whole.len() as u64);
            prop_assert!(zstd::stream::decode_all(&stored[..]).unwrap() == whole);
            let mut expected = Vec::new();
            for (file, length) in files.iter().zip(&lengths) {
                let content = &whole[file.tar_at as usize..file.tar_at as usize + length];
                expected.extend(block_digests(content));
            }
            prop_assert_eq!(files.len(), lengths.len());
            prop_assert!(digests == expected);
        }
    }
}
