//! What a backup stores, and how long it takes, when one page in a hundred has changed since the last.

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::backup::{Taken, take};
use super::bases::{Kind, Taker};
use super::database::{Database, Rows, gigabytes, rest};
use super::restored::{PAGE_BYTES, relation_files};
use super::seconds;
use super::tools::{Place, Store};
use crate::tables::Effort;

const TAKERS: [Taker; 2] = [Taker::WalshipLocal, Taker::PgBackRestBundled];

const STORES: [Store; 2] = [Store::Folder, Store::S3(0)];

/// One row is changed in so many pages of the largest table: with what that changes in its index, one page in a hundred.
const STRIDE: u32 = 170;

/// A full backup, and an incremental one after one page in a hundred has changed.
pub fn incrementals(effort: Effort) -> String {
    let original = Database::new(Rows::Pgbench, effort);
    let scratch = tempfile::Builder::new().prefix("walship-changed").tempdir().expect("a temporary folder");
    let database = original.copy_to(scratch.path());
    let server = database.server();
    let gigabytes = gigabytes(&server);
    let mut text = format!("\n{}\n", database.title(&server));
    let mut contenders = Vec::new();
    for store in STORES {
        for taker in TAKERS {
            let look = taker.look(store);
            let taken = look.clone().ok().map(|_| {
                let mut place = Place::new(taker.tool(), store, &server);
                let full = take(taker, Kind::Full, &mut place, &server);
                eprintln!("{}, {}: {:?}", taker.title(), store.title(), full.run);
                (place, full)
            });
            contenders.push((store, taker, look, taken));
        }
    }
    server.psql(&format!(
        "UPDATE pgbench_accounts SET abalance = abalance + 1 \
         WHERE (ctid::text::point)[0]::int8 % {STRIDE} = 7 AND (ctid::text::point)[1] = 1"
    ));
    server.psql("CHECKPOINT");
    // The WAL of the changes is nobody's backup.
    rest(&server);
    let _ = writeln!(text, "\n{}", changed(original.data(), server.data_dir()));
    text += "\n| | s | beside its full backup | CPU s per GB | peak MiB | stored MB | of its full backup | settings |\n\
             |---|---|---|---|---|---|---|---|\n";
    for (store, taker, look, taken) in contenders {
        let name = format!("{}, {}", taker.title(), store.title());
        let (settings, (mut place, full)) = match (look, taken) {
            (Ok(settings), Some(taken)) => (settings, taken),
            (look, _) => {
                let _ = writeln!(text, "| {name} | {} | | | | | | |", look.err().unwrap_or_default());
                continue;
            }
        };
        let next = take(taker, Kind::Incremental, &mut place, &server);
        eprintln!("{name}: {:?}", next.run);
        let ratio = |value: fn(&Taken) -> f64| value(&next) / value(&full).max(1e-9);
        let _ = writeln!(
            text,
            "| {name} | {:.2} | {:.2} | {:.2} | {} | {:.2} | {:.1} % | {settings} |",
            seconds(next.run.wall),
            ratio(|taken| seconds(taken.run.wall)),
            seconds(next.run.cpu) / gigabytes,
            next.run.peak_bytes >> 20,
            next.stored_bytes as f64 / 1e6,
            100.0 * ratio(|taken| taken.stored_bytes as f64),
        );
    }
    text
}

/// Says how many pages differ between two data directories.
fn changed(before: &Path, now: &Path) -> String {
    let (mut pages, mut changed) = (0u64, 0u64);
    for path in relation_files(now) {
        let old = before.join(path.strip_prefix(now).expect("the file lies below"));
        let (new, old) = (File::open(&path).expect("the file is ours"), File::open(old).ok());
        let (mut page, mut other) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        let mut at = 0;
        while new.read_exact_at(&mut page, at).is_ok() {
            let known = old.as_ref().is_some_and(|old| old.read_exact_at(&mut other, at).is_ok());
            changed += u64::from(!known || page != other);
            pages += 1;
            at += PAGE_BYTES as u64;
        }
    }
    let percent = 100.0 * changed as f64 / pages.max(1) as f64;
    format!("{changed} of {pages} pages ({percent:.2} %) are others than at the full backup")
}
