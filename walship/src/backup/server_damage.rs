//! What the server says of damaged pages, read: it has no other form for it than texts. Pure.

use std::path::Path;

use crate::catalog::{DamagedPage, DamagedPages};
use crate::pg::page::RelationFile;

/// How many pages a file of a relation has, unless PostgreSQL was built otherwise.
const FILE_BLOCKS: u32 = 131_072;

/// Returns the pages that the server's warnings name. It names at most five of a file, and counts the others.
///
/// The texts are translated: a page is the first thing in quotes that is a relation's file, and the numbers behind it.
/// What is not understood counts as one page.
///
/// Source: `src/backend/backup/basebackup.c`, sendFile.
pub(super) fn damaged_pages(texts: &[String]) -> DamagedPages {
    let pages: Vec<DamagedPage> = texts.iter().filter_map(|text| page(text)).collect();
    // The sum of all files comes without a path, whose digits are no count.
    let counted = texts.iter().filter(|text| !text.contains('/'));
    let counts = counted.flat_map(|text| words(text)).filter_map(|word| word.parse::<u64>().ok());
    let total = counts.max().unwrap_or_default().max(pages.len() as u64).max(1);
    DamagedPages { total, ..pages.into() }
}

fn page(text: &str) -> Option<DamagedPage> {
    let quoted = |text: &str| text.contains('/').then(|| text.trim_start_matches("./").to_owned());
    let path =
        text.split(['"', '\u{bb}', '\u{ab}', '\u{201c}', '\u{201d}', '\u{201e}', '\'']).find_map(quoted)?;
    let file = RelationFile::of(Path::new(&path))?;
    let behind = &text[text.find(&path)? + path.len()..];
    let mut numbers = words(behind);
    let block = numbers.by_ref().find_map(|word| word.parse::<u32>().ok())?;
    let mut sums = numbers.filter(|word| word.len() <= 4 && !word.contains(|c: char| c.is_ascii_lowercase()));
    let mut sum = || u16::from_str_radix(sums.next()?, 16).ok();
    let (computed, stored) = (sum()?, sum()?);
    let block = file.segment.wrapping_mul(FILE_BLOCKS).wrapping_add(block);
    Some(DamagedPage { path: path.into(), block, stored, computed, database: None, relation: None })
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|line| (*line).to_owned()).collect()
    }

    #[test]
    fn pages_are_found_in_the_servers_words() {
        let found = damaged_pages(&texts(&[
            "checksum verification failed in file \"./base/5/16384.1\", block 3: calculated 613 but expected 30D5",
            "checksum verification failed in file \"./base/5/16384.1\", block 7: calculated ECF3 but expected DCAD",
            "file \"./base/5/16384.1\" has a total of 12 checksum verification failures",
            "14 total checksum verification failures",
            "checksum verification failure during base backup",
        ]));
        assert_eq!(found.total, 14);
        let pages: Vec<_> = found.pages.iter().map(|page| (page.block, page.computed, page.stored)).collect();
        assert_eq!(pages, [(131_075, 0x613, 0x30D5), (131_079, 0xECF3, 0xDCAD)]);
        assert_eq!(found.pages[0].path, Path::new("base/5/16384.1"));
        let german = "Pr\u{fc}fsumme in Datei \u{bb}./base/5/16384\u{ab}, Block 3 falsch: berechnet 613, aber 30D5 erwartet";
        assert_eq!(damaged_pages(&texts(&[german])).pages[0].block, 3);
        assert_eq!(damaged_pages(&texts(&["???"])).total, 1);
    }
}
