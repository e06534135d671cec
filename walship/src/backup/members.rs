//! The server's tar stream, cut into members while it flows. Pure and total.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use crate::pg::ParseError;
use crate::pg::backup_manifest::check_path;

/// The size of a tar block.
pub(crate) const BLOCK: usize = 512;

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemberKind {
    File,
    Folder,
    Link,
}

/// One member of a tar stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    /// Its path; checked to stay inside the folder it is unpacked in.
    pub(crate) path: PathBuf,
    pub(crate) kind: MemberKind,
    /// The length of its content.
    pub(crate) bytes: u64,
}

/// What comes next in the stream. `Header`, `Data` and `Padding` together are the stream's bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step<'a> {
    Header(&'a [u8; BLOCK], Member),
    Data(&'a [u8]),
    Padding(&'a [u8]),
    End,
}

/// Cuts a tar stream that comes in pieces of any length.
#[derive(Debug)]
pub(crate) struct Splitter {
    header: [u8; BLOCK],
    filled: usize,
    data_left: u64,
    padding_left: usize,
    in_member: bool,
    ended: bool,
}

impl Splitter {
    pub(crate) fn new() -> Self {
        Self { header: [0; BLOCK], filled: 0, data_left: 0, padding_left: 0, in_member: false, ended: false }
    }

    /// Takes the next bytes and hands the steps they complete to `sink`.
    ///
    /// # Errors
    /// A [`ParseError`] for anything that PostgreSQL does not put into a backup's tar stream, as the
    /// sink's own error type; the sink's errors.
    pub(crate) fn push<E: From<ParseError>>(
        &mut self,
        mut input: &[u8],
        sink: &mut dyn FnMut(Step<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        while !input.is_empty() {
            if self.ended {
                return if input.iter().all(|b| *b == 0) {
                    Ok(())
                } else {
                    Err(ParseError::new("the tar stream goes on after its end").into())
                };
            }
            if self.data_left > 0 {
                let take = usize::try_from(self.data_left).unwrap_or(usize::MAX).min(input.len());
                sink(Step::Data(&input[..take]))?;
                self.data_left -= take as u64;
                input = &input[take..];
            } else if self.padding_left > 0 {
                let take = self.padding_left.min(input.len());
                sink(Step::Padding(&input[..take]))?;
                self.padding_left -= take;
                input = &input[take..];
            } else {
                let take = (BLOCK - self.filled).min(input.len());
                self.header[self.filled..self.filled + take].copy_from_slice(&input[..take]);
                self.filled += take;
                input = &input[take..];
                if self.filled < BLOCK {
                    continue;
                }
                self.filled = 0;
                // The end of a tar stream is two blocks of zeros (servers before 15 send none).
                if self.header.iter().all(|b| *b == 0) {
                    self.ended = true;
                    continue;
                }
                let member = parse_header(&self.header)?;
                self.data_left = member.bytes;
                self.padding_left = (BLOCK - (member.bytes % BLOCK as u64) as usize) % BLOCK;
                self.in_member = true;
                sink(Step::Header(&self.header, member))?;
            }
            if self.in_member && self.data_left == 0 && self.padding_left == 0 {
                self.in_member = false;
                sink(Step::End)?;
            }
        }
        Ok(())
    }

    /// Says that the stream is over.
    ///
    /// # Errors
    /// [`ParseError`] when that is in the middle of a member.
    pub(crate) fn finish(&self) -> Result<(), ParseError> {
        if self.in_member || self.filled > 0 {
            return Err(ParseError::new("the tar stream ends in the middle of a file"));
        }
        Ok(())
    }
}

fn parse_header(block: &[u8; BLOCK]) -> Result<Member, ParseError> {
    let bad = |what: &str| ParseError::new(format!("the tar stream has a header {what}"));
    let header = tar::Header::from_byte_slice(block);
    let sum: u32 = block
        .iter()
        .enumerate()
        .map(|(at, b)| if (148..156).contains(&at) { 32 } else { u32::from(*b) })
        .sum();
    if header.cksum().ok() != Some(sum) {
        return Err(bad("with a wrong checksum"));
    }
    let kind = match header.entry_type() {
        tar::EntryType::Regular => MemberKind::File,
        tar::EntryType::Directory => MemberKind::Folder,
        tar::EntryType::Symlink => MemberKind::Link,
        other => return Err(bad(&format!("of the unexpected type {:?}", other.as_byte()))),
    };
    let size = header.entry_size().map_err(|_| bad("without a size"))?;
    if size > 1 << 50 || (kind != MemberKind::File && size != 0) {
        return Err(bad("with an absurd size"));
    }
    let path = header.path_bytes();
    // PostgreSQL ends the names of folders with a slash; other spellings of one path are refused.
    let trimmed = path.strip_suffix(b"/").unwrap_or(&path);
    let trimmed = trimmed.strip_prefix(b"./").unwrap_or(trimmed);
    let path = PathBuf::from(OsStr::from_bytes(trimmed));
    check_path(&path)?;
    let inside_tablespaces = path.parent().is_some_and(|parent| parent.as_os_str() == "pg_tblspc");
    if kind == MemberKind::Link && !inside_tablespaces {
        return Err(bad("of a link outside pg_tblspc"));
    }
    Ok(Member { path, kind, bytes: size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn append(archive: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8]) {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        archive.append_data(&mut header, path, content).unwrap();
    }

    fn raw(path: &str, kind: tar::EntryType) -> [u8; BLOCK] {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_cksum();
        *header.as_bytes()
    }

    /// The members with their content, and the stream as it was handed on.
    type Split = (Vec<(Member, Vec<u8>)>, Vec<u8>);

    fn split(bytes: &[u8], piece: usize) -> Result<Split, ParseError> {
        let mut splitter = Splitter::new();
        let (mut members, mut whole) = (Vec::new(), Vec::new());
        for chunk in bytes.chunks(piece) {
            splitter.push::<ParseError>(chunk, &mut |step| {
                match step {
                    Step::Header(block, member) => {
                        whole.extend(block);
                        members.push((member, Vec::new()));
                    }
                    Step::Data(data) => {
                        whole.extend(data);
                        members.last_mut().unwrap().1.extend(data);
                    }
                    Step::Padding(data) => whole.extend(data),
                    Step::End => {}
                }
                Ok(())
            })?;
        }
        splitter.finish()?;
        Ok((members, whole))
    }

    #[test]
    fn members_come_out_whole_whatever_the_pieces() {
        let mut archive = tar::Builder::new(Vec::new());
        append(&mut archive, "backup_label", b"START");
        append(&mut archive, "base/5/1259", &[7; 1024]);
        append(&mut archive, "global/empty", b"");
        let bytes = archive.into_inner().unwrap();
        for piece in [1, 7, 511, 512, 513, 100_000] {
            let (members, whole) = split(&bytes, piece).unwrap();
            let found: Vec<_> =
                members.iter().map(|(member, data)| (member.path.to_str().unwrap(), data.len())).collect();
            assert_eq!(found, [("backup_label", 5), ("base/5/1259", 1024), ("global/empty", 0)]);
            // Without its end blocks (PostgreSQL 14 sends none) it is the same stream.
            assert_eq!(whole, bytes[..bytes.len() - 1024]);
            assert_eq!(split(&whole, piece).unwrap().1, whole);
        }
        assert!(split(&bytes[..700], 100).is_err());
    }

    #[test]
    fn what_postgresql_never_sends_is_refused() {
        use tar::EntryType;
        assert!(split(&raw("pg_tblspc/16384", EntryType::Symlink), 512).is_ok());
        assert!(split(&raw("pg_wal/", EntryType::Directory), 512).is_ok());
        for (path, kind) in [
            ("/etc/passwd", EntryType::Regular),
            ("../x", EntryType::Regular),
            ("base/../../x", EntryType::Regular),
            ("base", EntryType::Symlink),
            ("base/5/1", EntryType::Link),
            ("dev", EntryType::Char),
            ("fifo", EntryType::Fifo),
            ("", EntryType::Regular),
        ] {
            assert!(split(&raw(path, kind), 512).is_err(), "{path} {kind:?}");
        }
        let mut damaged = raw("base/5/1", EntryType::Regular);
        damaged[3] ^= 1;
        assert!(split(&damaged, 512).is_err());
    }

    proptest! {
        #[test]
        fn splitting_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..2000), piece in 1usize..600) {
            let _ = split(&bytes, piece);
        }
    }
}
