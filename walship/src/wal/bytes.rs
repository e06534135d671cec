//! Little-endian reads that answer `None` instead of panicking.

/// Reads a `u16` at `offset`.
#[inline]
pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let part = bytes.get(offset..)?.first_chunk::<2>()?;
    Some(u16::from_le_bytes(*part))
}

/// Reads a `u32` at `offset`.
#[inline]
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let part = bytes.get(offset..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*part))
}

/// Reads an `i32` at `offset`.
#[inline]
pub(crate) fn i32_at(bytes: &[u8], offset: usize) -> Option<i32> {
    u32_at(bytes, offset).map(|value| value as i32)
}

/// Reads a `u64` at `offset`.
#[inline]
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    let part = bytes.get(offset..)?.first_chunk::<8>()?;
    Some(u64::from_le_bytes(*part))
}

/// Reads an `i64` at `offset`.
#[inline]
pub(crate) fn i64_at(bytes: &[u8], offset: usize) -> Option<i64> {
    u64_at(bytes, offset).map(|value| value as i64)
}

/// Reads the bytes from `offset` up to a NUL; `None` without one.
pub(crate) fn c_string_at(bytes: &[u8], offset: usize) -> Option<&[u8]> {
    let rest = bytes.get(offset..)?;
    let end = rest.iter().position(|&byte| byte == 0)?;
    rest.get(..end)
}

/// Rounds up to PostgreSQL's MAXALIGN, 8.
#[inline]
pub(crate) fn align8(value: u64) -> u64 {
    value.saturating_add(7) & !7
}
