//! Tar bytes on their way to be compressed: cut into frames so that no frame, and no batch, ends inside a
//! block of a file. Pure.

use std::ops::Range;
use std::path::PathBuf;

use crate::codec::backup_index::{BLOCK_BYTES, BlockDigest, IndexedFile, Partial, block_digests};

use super::members::{BLOCK, Member, MemberKind};

/// A frame holds at most so many bytes of tar. Small, so that a changed page is fetched with few others; longer ones would
/// compress better (ADR 0020).
const FRAME_BYTES_MAX: usize = 128 << 10;

/// A member that ends in a frame at least this full ends the frame.
const FRAME_BYTES_MIN: usize = 64 << 10;

/// So many bytes of tar are compressed by one thread in one go.
const BATCH_BYTES: usize = 4 << 20;

/// Consecutive frames.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    tar: Vec<u8>,
    /// Where each frame ends.
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

impl Batch {
    pub(crate) fn tar_bytes(&self) -> u64 {
        self.tar.len() as u64
    }

    /// Compresses the frames and makes the blocks' digests.
    ///
    /// # Errors
    /// What zstd fails with.
    pub(crate) fn compress(self, level: i32) -> std::io::Result<Compressed> {
        let mut compressor = zstd::bulk::Compressor::new(level)?;
        compressor.include_checksum(true)?;
        let (mut bytes, mut frames) =
            (Vec::with_capacity(self.tar.len() / 2), Vec::with_capacity(self.ends.len()));
        let mut start = 0;
        for end in self.ends {
            let frame = compressor.compress(&self.tar[start..end])?;
            // Both are far below 4 GiB.
            frames.push((frame.len() as u32, (end - start) as u32));
            bytes.extend(frame);
            start = end;
        }
        let digests = self.data.into_iter().flat_map(|piece| block_digests(&self.tar[piece])).collect();
        Ok(Compressed { bytes, frames, folders: self.folders, files: self.files, digests })
    }
}

/// Returns the mode in a member's header: octal digits; 0 where there are none.
fn mode_of(header: &[u8; BLOCK]) -> u32 {
    let digits = header[100..108].iter().copied().skip_while(|byte| *byte == b' ');
    let digits = digits.take_while(|byte| (b'0'..=b'7').contains(byte));
    digits.fold(0, |mode, digit| mode << 3 | u32::from(digit - b'0'))
}

/// Collects the tar stream of one object into batches.
#[derive(Debug, Default)]
pub(crate) struct Cutter {
    batch: Batch,
    /// The bytes of tar in the batches before.
    before: u64,
    /// How much of the open member's content has come.
    member_bytes: u64,
}

impl Cutter {
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
        full: &mut impl FnMut(Batch),
    ) {
        self.make_room(BLOCK, full);
        self.member_bytes = 0;
        self.batch.tar.extend_from_slice(block);
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
    pub(crate) fn data(&mut self, mut bytes: &[u8], full: &mut impl FnMut(Batch)) {
        while !bytes.is_empty() {
            let in_block = (self.member_bytes % BLOCK_BYTES as u64) as usize;
            if in_block == 0 {
                self.make_room(BLOCK_BYTES, full);
            }
            let (now, later) = bytes.split_at((BLOCK_BYTES - in_block).min(bytes.len()));
            let at = self.batch.tar.len();
            self.batch.tar.extend_from_slice(now);
            match self.batch.data.last_mut() {
                Some(piece) if self.member_bytes > 0 && piece.end == at => piece.end += now.len(),
                _ => self.batch.data.push(at..at + now.len()),
            }
            self.member_bytes += now.len() as u64;
            bytes = later;
        }
    }

    /// Takes what fills up the open member's last tar block.
    pub(crate) fn padding(&mut self, bytes: &[u8]) {
        self.batch.tar.extend_from_slice(bytes);
    }

    /// The open member is whole: a place to end a frame.
    pub(crate) fn end_member(&mut self) {
        if self.frame_bytes() >= FRAME_BYTES_MIN {
            self.end_frame();
        }
    }

    /// Ends the tar stream and returns what is left.
    pub(crate) fn finish(mut self) -> Batch {
        self.batch.tar.extend_from_slice(&[0; 2 * BLOCK]);
        self.end_frame();
        self.batch
    }

    fn frame_bytes(&self) -> usize {
        self.batch.tar.len() - self.batch.ends.last().unwrap_or(&0)
    }

    fn end_frame(&mut self) {
        if self.frame_bytes() > 0 {
            self.batch.ends.push(self.batch.tar.len());
        }
    }

    /// Ends the frame, and then perhaps the batch, when `bytes` more would be too many.
    fn make_room(&mut self, bytes: usize, full: &mut impl FnMut(Batch)) {
        if self.frame_bytes() + bytes > FRAME_BYTES_MAX {
            self.end_frame();
        }
        if self.frame_bytes() == 0 && self.batch.tar.len() + FRAME_BYTES_MAX > BATCH_BYTES {
            self.before = self.tar_bytes();
            let fresh = Batch { tar: Vec::with_capacity(BATCH_BYTES), ..Batch::default() };
            full(std::mem::replace(&mut self.batch, fresh));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Cuts members of these lengths, handed over in pieces, and returns the batches.
    fn cut(lengths: &[usize], piece: usize) -> (Vec<Batch>, Vec<u8>) {
        let (mut cutter, mut batches, mut whole) = (Cutter::default(), Vec::new(), Vec::new());
        for (number, length) in lengths.iter().enumerate() {
            let content: Vec<u8> = (0..*length).map(|at| (at / 997 + number) as u8).collect();
            let header = [number as u8; BLOCK];
            let member =
                Member { path: number.to_string().into(), kind: MemberKind::File, bytes: *length as u64 };
            cutter.header(&header, member, None, &mut |full| batches.push(full));
            whole.extend(header);
            for bytes in content.chunks(piece) {
                cutter.data(bytes, &mut |full| batches.push(full));
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn nothing_is_lost_and_every_block_has_its_digest(
            lengths in proptest::collection::vec(prop_oneof![0usize..40_000, 3_000_000usize..9_000_000], 0..6),
            piece in prop_oneof![700usize..9000, Just(1 << 20)],
        ) {
            let (batches, whole) = cut(&lengths, piece);
            let (mut stored, mut digests, mut files, mut at) = (Vec::new(), Vec::new(), Vec::new(), 0u64);
            for batch in batches {
                prop_assert!(batch.tar.len() <= BATCH_BYTES + 4 * BLOCK);
                at += batch.tar_bytes();
                let compressed = batch.compress(1).unwrap();
                prop_assert!(compressed.frames.iter().all(|(_, tar)| (*tar as usize) <= FRAME_BYTES_MAX + 4 * BLOCK));
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
