//! BLAKE3 digests of many short blocks, sixteen blocks side by side.
//!
//! A processor with AVX-512 works on sixteen chunks of 1024 bytes at once, and a block of 8192 has eight: hashed one after
//! the other, blocks leave half of it idle, and more than that while the few nodes above the chunks are made. So the
//! first chunks of sixteen blocks are hashed together, then their second ones, and so on up to the roots.
//!
//! The crate's call for that is public and not promised to stay: should it go, [`digest_of_each`] is `blake3::hash` of each
//! block, at half the speed.
//!
//! Source: the BLAKE3 paper, sections 2.1 to 2.4.

use blake3::platform::Platform;
use blake3::{BLOCK_LEN, CHUNK_LEN, IncrementCounter, OUT_LEN};

/// The length of a block.
const BLOCK_BYTES: usize = CHUNKS * CHUNK_LEN;

/// How many chunks a block has: a power of two.
const CHUNKS: usize = 8;

/// How many blocks are hashed at once.
const LANES: usize = 16;

/// What the flags of the paper's table 3 are.
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;

/// What hashing without a key begins with: the first 32 bits of the fractional parts of the roots of the first primes.
const IV: [u32; 8] =
    [0x6A09_E667, 0xBB67_AE85, 0x3C6E_F372, 0xA54F_F53A, 0x510E_527F, 0x9B05_688C, 0x1F83_D9AB, 0x5BE0_CD19];

type Hash = [u8; OUT_LEN];

/// Returns the digest of each block of 8192 bytes, the last one of which may be shorter.
pub(super) fn digest_of_each(bytes: &[u8]) -> impl Iterator<Item = Hash> {
    let platform = Platform::detect();
    let (groups, rest) = bytes.as_chunks::<{ LANES * BLOCK_BYTES }>();
    let many = groups.iter().flat_map(move |group| digests_of_group(platform, group));
    many.chain(rest.chunks(BLOCK_BYTES).map(|block| *blake3::hash(block).as_bytes()))
}

fn digests_of_group(platform: Platform, group: &[u8; LANES * BLOCK_BYTES]) -> [Hash; LANES] {
    // What each block's tree has on the level that was made last, chunks first.
    let mut nodes = [[[0; OUT_LEN]; LANES]; CHUNKS];
    let (blocks, _) = group.as_chunks::<BLOCK_BYTES>();
    for (number, node) in nodes.iter_mut().enumerate() {
        let chunks: [&[u8; CHUNK_LEN]; LANES] =
            std::array::from_fn(|lane| &blocks[lane].as_chunks::<CHUNK_LEN>().0[number]);
        let counter = number as u64;
        platform.hash_many(
            &chunks,
            &IV,
            counter,
            IncrementCounter::No,
            0,
            CHUNK_START,
            CHUNK_END,
            node.as_flattened_mut(),
        );
    }
    let mut width = CHUNKS / 2;
    while width > 0 {
        let flags = if width == 1 { PARENT | ROOT } else { PARENT };
        for number in 0..width {
            let (left, right) = (&nodes[2 * number], &nodes[2 * number + 1]);
            let mut pairs = [[0; BLOCK_LEN]; LANES];
            for (pair, (left, right)) in pairs.iter_mut().zip(left.iter().zip(right)) {
                pair[..OUT_LEN].copy_from_slice(left);
                pair[OUT_LEN..].copy_from_slice(right);
            }
            let pairs = pairs.each_ref();
            let node = nodes[number].as_flattened_mut();
            platform.hash_many(&pairs, &IV, 0, IncrementCounter::No, flags, 0, 0, node);
        }
        width /= 2;
    }
    nodes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one_by_one(bytes: &[u8]) -> Vec<Hash> {
        bytes.chunks(BLOCK_BYTES).map(|block| *blake3::hash(block).as_bytes()).collect()
    }

    #[test]
    fn every_kind_of_processor_makes_the_digests_of_single_blocks() {
        let bytes: Vec<u8> = (0..LANES * BLOCK_BYTES).map(|at| (at / 7 + at / 8192) as u8).collect();
        let group: &[u8; LANES * BLOCK_BYTES] = bytes.first_chunk().unwrap();
        for platform in [Platform::Portable, Platform::detect()] {
            assert_eq!(digests_of_group(platform, group).to_vec(), one_by_one(&bytes), "{platform:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn digests_are_those_of_single_blocks(seed: u64, length in 0usize..5 * LANES * BLOCK_BYTES / 2) {
            let mut bytes = vec![0; length];
            blake3::Hasher::new_keyed(&[7; 32]).update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
            let found: Vec<_> = digest_of_each(&bytes).collect();
            prop_assert!(found == one_by_one(&bytes));
        }
    }
}
