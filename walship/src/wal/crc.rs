//! CRC-32C over WAL records: most of the cost of reading WAL.
//!
//! An everyday record is so short that a call made for megabytes spends its time on preparations: what
//! is not there to be cut into lanes, tails byte by byte. Short records have a path of their own.

use super::record::RecordHeader;

/// Longer records are left to the crate, which works on several stretches of them at once.
#[cfg(target_arch = "x86_64")]
const SHORT_MAX: usize = 512;

/// Returns the CRC-32C that belongs into the header of the record `bytes` (header included).
///
/// Source: `xlogreader.c`, ValidXLogRecord: the data first, then the header up to the CRC field.
#[inline]
pub(crate) fn record_crc(bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() <= SHORT_MAX
        && let Some(token) = <archmage::X64V2Token as archmage::SimdToken>::summon()
        && let Some(crc) = short_record_crc(token, bytes)
    {
        return crc;
    }
    long_record_crc(bytes)
}

#[inline(never)]
fn long_record_crc(bytes: &[u8]) -> u32 {
    let (head, data) = bytes.split_at(RecordHeader::LEN.min(bytes.len()));
    finish_crc(crc32c::crc32c(data), head)
}

/// Completes a CRC over a record's data with its header.
#[inline]
pub(crate) fn finish_crc(data_crc: u32, head: &[u8]) -> u32 {
    crc32c::crc32c_append(data_crc, &head[..RecordHeader::CRC_OFFSET.min(head.len())])
}

/// [`record_crc`] with the processor's instruction, and without a loop over the odd bytes at the end;
/// `None` for less than a header.
#[cfg(target_arch = "x86_64")]
#[archmage::arcane]
fn short_record_crc(_token: archmage::X64V2Token, bytes: &[u8]) -> Option<u32> {
    use std::arch::x86_64::{_mm_crc32_u32, _mm_crc32_u64};

    let (head, data) = bytes.split_first_chunk::<{ RecordHeader::LEN }>()?;
    let mut crc = u64::from(u32::MAX);
    if let Some(before_last) = data.len().checked_sub(1) {
        let (words, _) = data.as_chunks::<8>();
        let words = words.get(..before_last / 8)?;
        for word in words {
            crc = _mm_crc32_u64(crc, u64::from_le_bytes(*word));
        }
        // One to eight bytes are left. Zeros before a message do not change a register of zero: so they
        // are shifted to the end of one word, together with as much of the register as they push out.
        let left_bits = 8 * (data.len() - 8 * words.len()) as u32;
        let free_bits = 64 - left_bits;
        let word = u64::from_le_bytes(*bytes.last_chunk::<8>()?);
        let message = (word >> free_bits << free_bits) ^ (crc << free_bits);
        // Twice the half: a shift by all 64 bits is not one.
        crc = (crc >> (left_bits / 2) >> (left_bits / 2)) ^ _mm_crc32_u64(0, message);
    }
    let (words, _) = head.as_chunks::<8>();
    crc = _mm_crc32_u64(crc, u64::from_le_bytes(words[0]));
    crc = _mm_crc32_u64(crc, u64::from_le_bytes(words[1]));
    let (info_and_rmgr, _) = words[2].split_first_chunk::<4>()?;
    Some(!_mm_crc32_u32(crc as u32, u32::from_le_bytes(*info_and_rmgr)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_every_length_have_the_crc_of_the_two_parts() {
        let bytes: Vec<u8> = (0..1200u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for start in 0..9 {
            for len in (0..1000).chain([1100]) {
                let record = &bytes[start..start + len];
                let head = &record[..20.min(len)];
                let data = &record[24.min(len)..];
                let expected = crc32c::crc32c_append(crc32c::crc32c(data), head);
                assert_eq!(record_crc(record), expected, "{start} {len}");
            }
        }
    }

    /// From a CRC-32C table of someone else: the check value of the polynomial.
    #[test]
    fn the_polynomial_is_castagnoli_s() {
        let mut record = vec![0; RecordHeader::LEN];
        record[..9].copy_from_slice(b"123456789");
        assert_eq!(finish_crc(0, b"123456789"), 0xE306_9283);
        assert_eq!(record_crc(&record), crc32c::crc32c(&record[..20]));
    }
}
