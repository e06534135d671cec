//! Page checksums of a stopped server: by `pg_checksums`, and by our own look where there is none.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use walship::pg::Lsn;
use walship::pg::page::{PAGE_BYTES, PageState, RelationFile, judge};
use walship::{Error, Result};

use super::{ProofOptions, path_text};
use crate::drill::Proof;
use crate::execute::restore::blocking;
use crate::execute::scratch::{Environment, run};
use crate::execute::start::find_tool;
use crate::plan::RestorePlan;

/// Its status when it found something, or could not be run.
const FOUND: i32 = 1;

/// How many pages are named.
const NAMED_MAX: usize = 5;

/// How many pages a relation's file holds before the next one begins: 1 GiB.
const BLOCKS_PER_FILE: u32 = 131_072;

/// How many pages are read at once.
const PAGES_AT_ONCE: usize = 128;

pub(super) async fn prove(data_dir: &Path, plan: &RestorePlan, options: &ProofOptions) -> Result<Proof> {
    if !plan.backup.data_checksums {
        return Ok(Proof::skipped("pages", "the cluster has no page checksums"));
    }
    let major = plan.backup.server_version / 10_000;
    let patience = options.proof_patience;
    let Ok(program) = find_tool("pg_checksums", options.pg_bin.as_deref(), major).await else {
        let data_dir = data_dir.to_owned();
        return blocking(move || look(&data_dir, patience)).await;
    };
    let arguments = ["--check".to_owned(), "-D".to_owned(), path_text(data_dir)];
    let ran = run(&program, &arguments, Environment::Private, patience).await?;
    Ok(match ran.code {
        Some(0) => {
            let blocks = ran.printed.lines().find_map(|line| line.strip_prefix("Blocks scanned:"));
            let blocks = blocks.map_or_else(String::new, |blocks| format!(", {} of them", blocks.trim()));
            Proof::proven("pages", format!("all page checksums are right{blocks} (pg_checksums)"))
        }
        Some(FOUND) => Proof::failed("pages", format!("pg_checksums: {}", ran.last_lines(6))),
        _ => Proof::failed("pages", format!("pg_checksums {}", ran.ended())),
    })
}

/// Looks at every page of every relation.
fn look(data_dir: &Path, patience: Duration) -> Result<Proof> {
    let deadline = Instant::now() + patience;
    let (mut pages, mut bad) = (0u64, Vec::new());
    let mut damaged = 0u64;
    let mut folders = vec![PathBuf::from("global"), PathBuf::from("base"), PathBuf::from("pg_tblspc")];
    while let Some(folder) = folders.pop() {
        let failed = |error| Error::from_io(format!("reading {}", folder.display()), error);
        for entry in fs::read_dir(data_dir.join(&folder)).map_err(failed)? {
            let below = folder.join(entry.map_err(failed)?.file_name());
            let path = data_dir.join(&below);
            // Tablespaces are links.
            if path.is_dir() {
                folders.push(below);
                continue;
            }
            let Some(relation) = RelationFile::of(&below) else { continue };
            let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
            let mut file = File::open(&path).map_err(failed)?;
            let mut buffer = vec![0u8; PAGE_BYTES * PAGES_AT_ONCE];
            let mut block = relation.segment.wrapping_mul(BLOCKS_PER_FILE);
            loop {
                if Instant::now() > deadline {
                    let after = format!("not all pages were looked at within {} s", patience.as_secs());
                    return Ok(Proof::failed("pages", after));
                }
                let count = fill(&mut file, &mut buffer).map_err(failed)?;
                for page in buffer[..count].chunks(PAGE_BYTES) {
                    // Whatever its LSN: no server writes it now.
                    if let PageState::Damaged { .. } = judge(page, block, Lsn(u64::MAX)) {
                        damaged += 1;
                        if bad.len() < NAMED_MAX {
                            bad.push(format!("block {block} of {}", below.display()));
                        }
                    }
                    pages += 1;
                    block = block.wrapping_add(1);
                }
                if count < buffer.len() {
                    break;
                }
            }
        }
    }
    Ok(match damaged {
        0 => Proof::proven(
            "pages",
            format!(
                "all page checksums are right, {pages} of them (looked at by pitr: there is no pg_checksums)"
            ),
        ),
        _ => Proof::failed("pages", format!("{damaged} of {pages} pages are damaged: {}", bad.join(", "))),
    })
}

/// Reads as much as there is room for; less only at the end.
fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drill::Verdict;

    #[test]
    fn a_page_that_is_not_what_it_says_is_found() {
        let home = tempfile::tempdir().unwrap();
        for folder in ["global", "base/1", "pg_tblspc"] {
            fs::create_dir_all(home.path().join(folder)).unwrap();
        }
        fs::write(home.path().join("base/1/PG_VERSION"), "15\n").unwrap();
        fs::write(home.path().join("base/1/1259"), vec![0u8; 2 * PAGE_BYTES]).unwrap();
        let look = || look(home.path(), Duration::from_secs(60)).unwrap();
        assert_eq!(look().verdict, Verdict::Proven);
        let mut pages = vec![0u8; 2 * PAGE_BYTES];
        pages[PAGE_BYTES + 14] = 1;
        fs::write(home.path().join("base/1/1259"), &pages).unwrap();
        let found = look();
        assert_eq!(found.verdict, Verdict::Failed);
        assert!(
            found.detail.contains("1 of 2") && found.detail.contains("block 1 of base/1/1259"),
            "{found:?}"
        );
        // A torn end is damage as well.
        fs::write(home.path().join("base/1/1259"), [0u8; 100]).unwrap();
        assert_eq!(look().verdict, Verdict::Failed);
    }
}
