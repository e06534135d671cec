//! How long it takes until a data directory is there, from nothing and from one that is nearly right.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use walship_tests::postgres::PgServer;
use walship_tests::random::Random;
use walship_tests::seed;

use super::backup::prepare;
use super::bases::Taker;
use super::database::{Database, Rows, gigabytes};
use super::tools::{Place, Store, Tool};
use super::{Line, Run, seconds};
use crate::tables::Effort;

const TAKERS: [Taker; 6] = [
    Taker::WalshipLocal,
    Taker::PgBackRest,
    Taker::PgBackRestBundled,
    Taker::PgBasebackup,
    Taker::WalRusLocal,
    Taker::Barman,
];

/// What a slow link carries in a second.
const LINK_BYTES: u64 = 100_000_000;

/// One page in so many is another one before a restore over it.
const CHANGED: usize = 100;

pub(super) const PAGE_BYTES: usize = 8192;

/// A store, the way to it, and a database that is restored from it.
const TABLES: [(Rows, Store, Option<u64>); 6] = [
    (Rows::Pgbench, Store::Folder, None),
    (Rows::Pgbench, Store::S3(0), None),
    (Rows::Pgbench, Store::S3(0), Some(LINK_BYTES)),
    (Rows::Pgbench, Store::S3Tls, None),
    (Rows::Digits, Store::S3(0), Some(LINK_BYTES)),
    (Rows::Digits, Store::S3Tls, Some(LINK_BYTES)),
];

/// One who restores, with a backup of its own.
struct Contender {
    taker: Taker,
    place: Place,
    /// A data directory that was restored, to be damaged and restored over.
    data: PathBuf,
}

/// Restores from a folder, from S3, and from S3 behind a link of 100 MB/s.
pub fn restores(effort: Effort) -> String {
    let rounds = if effort.long_rounds > 1 { 3 } else { 1 };
    let mut text = String::new();
    let mut before = None;
    for (rows, store, link) in TABLES {
        let database = Database::new(rows, effort);
        let server = database.server();
        if before.replace(rows) != Some(rows) {
            let _ = write!(text, "\n{}\n", database.title(&server));
        }
        let gigabytes = gigabytes(&server);
        let lines = lines(&server, store, link, rounds);
        let _ = write!(text, "\n{}", table(&lines, store, link, gigabytes));
    }
    text
}

fn lines(server: &PgServer, store: Store, link: Option<u64>, rounds: usize) -> Vec<Line> {
    let scratch = tempfile::Builder::new().prefix("walship-restored").tempdir().expect("a temporary folder");
    let looks = TAKERS.map(|taker| taker.look(store));
    let mut contenders: Vec<Option<Contender>> = TAKERS
        .into_iter()
        .zip(&looks)
        .map(|(taker, look)| {
            look.as_ref().ok()?;
            let mut place = prepare(taker, store, server);
            if link.is_some() {
                place.limit(link);
            }
            let data = scratch.path().join(format!("{taker:?}"));
            Some(Contender { taker, place, data })
        })
        .collect();
    let mut lines: Vec<Line> = TAKERS
        .into_iter()
        .zip(looks)
        .map(|(taker, look)| Line {
            name: taker.restorer().to_owned(),
            settings: look.clone().unwrap_or_default(),
            runs: look.map(|_| Vec::new()),
        })
        .collect();
    // A restore over a directory follows one into nothing, by the same tool.
    let over: Vec<usize> = (0..TAKERS.len()).filter(|index| TAKERS[*index].has_delta()).collect();
    for index in &over {
        let Line { name, settings, runs } = &lines[*index];
        let name = format!("{name}, `--delta`");
        lines.push(Line { name, settings: settings.clone(), runs: runs.clone() });
    }
    // The round before the first warms up and does not count.
    for round in 0..=rounds {
        for turn in 0..TAKERS.len() {
            let index = (round + turn) % TAKERS.len();
            let Some(contender) = &mut contenders[index] else { continue };
            let new = contender.restore_anew(server, round);
            let mut ran = vec![(index, new)];
            if let Some(at) = over.iter().position(|own| *own == index) {
                ran.push((TAKERS.len() + at, contender.over(server, round)));
            }
            fs::remove_dir_all(&contender.data).expect("the folder is ours");
            for (line, run) in ran {
                eprintln!("{}, {}: {run:?}", lines[line].name, title(store, link));
                if let (Ok(runs), 1..) = (&mut lines[line].runs, round) {
                    runs.push(run);
                }
            }
        }
    }
    lines
}

impl Contender {
    fn restore_anew(&self, server: &PgServer, round: usize) -> Run {
        nix::unistd::sync();
        let run = self.taker.restore(&self.place, &self.data, false);
        self.check(server, round);
        run
    }

    fn over(&self, server: &PgServer, round: usize) -> Run {
        let changes = change_pages(&self.data, round as u64);
        nix::unistd::sync();
        let run = self.taker.restore(&self.place, &self.data, true);
        for change in &changes {
            assert!(change.is_undone(), "{change:?} is still there");
        }
        self.check(server, round);
        run
    }

    /// Once: what was restored is what was backed up.
    fn check(&self, server: &PgServer, round: usize) {
        if round > 0 {
            return;
        }
        let data = self.data.to_str().expect("scratch paths are UTF-8");
        if self.taker.tool() == Tool::Walship {
            let verified = server.run_tool("pg_verifybackup", &["-n", data]);
            assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
        }
        // The other tools keep no manifest that pg_verifybackup reads.
        for name in ["PG_VERSION", "backup_label", "global/pg_control"] {
            assert!(self.data.join(name).is_file(), "{data} lacks {name}");
        }
        let (pages, own) = (page_count(server.data_dir()), page_count(&self.data));
        assert_eq!(own, pages, "pages restored by {}", self.taker.restorer());
    }
}

/// Bytes of a page that were changed.
#[derive(Debug)]
struct Change {
    path: PathBuf,
    at: u64,
    original: [u8; 16],
}

impl Change {
    fn is_undone(&self) -> bool {
        let mut now = [0; 16];
        let file = File::open(&self.path);
        file.is_ok_and(|file| file.read_exact_at(&mut now, self.at).is_ok()) && now == self.original
    }
}

/// Changes some bytes in one page of a hundred, whichever the seed and the round name.
fn change_pages(data: &Path, round: u64) -> Vec<Change> {
    let mut random = Random::new(seed() + round);
    let mut pages: Vec<(usize, usize)> = Vec::new();
    let files = relation_files(data);
    for (file, path) in files.iter().enumerate() {
        let length = fs::metadata(path).expect("the file is ours").len() as usize;
        pages.extend((0..length / PAGE_BYTES).map(|page| (file, page)));
    }
    let count = pages.len() / CHANGED;
    random.shuffle(&mut pages);
    let change = |(file, page): (usize, usize)| {
        let path = files[file].clone();
        let at = (page * PAGE_BYTES + random.below(PAGE_BYTES - 16)) as u64;
        let file = OpenOptions::new().read(true).write(true).open(&path).expect("the file is ours");
        let mut original = [0; 16];
        file.read_exact_at(&mut original, at).expect("the page is whole");
        file.write_all_at(&original.map(|byte| !byte), at).expect("the file is ours");
        Change { path, at, original }
    };
    pages.into_iter().take(count).map(change).collect()
}

fn page_count(data: &Path) -> u64 {
    let files = relation_files(data);
    let lengths = files.iter().map(|path| fs::metadata(path).expect("the file is ours").len());
    lengths.sum::<u64>() / PAGE_BYTES as u64
}

/// Returns the files of all relations of all databases, forks included, in order.
pub(super) fn relation_files(data: &Path) -> Vec<PathBuf> {
    let below = |folder: &Path| {
        let entries = fs::read_dir(folder).expect("the folder is ours").flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let numbered = |path: &PathBuf| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.as_bytes()[0].is_ascii_digit())
    };
    let databases = below(&data.join("base"));
    let mut files: Vec<PathBuf> =
        databases.iter().flat_map(|database| below(database)).filter(numbered).collect();
    files.sort();
    files
}

fn title(store: Store, link: Option<u64>) -> String {
    match link {
        Some(bytes) => format!("{}, {} MB/s", store.title(), bytes / 1_000_000),
        None => store.title(),
    }
}

fn table(lines: &[Line], store: Store, link: Option<u64>, gigabytes: f64) -> String {
    let mut text = format!(
        "| {} | s | beside the first | CPU s per GB | beside the first | peak MiB | settings |\n\
         |---|---|---|---|---|---|---|\n",
        title(store, link)
    );
    for line in lines {
        if let Err(why) = &line.runs {
            let _ = writeln!(text, "| {} | {why} | | | | | |", line.name);
            continue;
        }
        let beside = |value: fn(&Run) -> f64| {
            line.beside(&lines[0], value).map_or_else(String::new, |ratio| format!("{ratio:.2}"))
        };
        let _ = writeln!(
            text,
            "| {} | {:.2} | {} | {:.2} | {} | {} | {} |",
            line.name,
            line.median_of(|run| seconds(run.wall)),
            beside(|run| seconds(run.wall)),
            line.median_of(|run| seconds(run.cpu)) / gigabytes,
            beside(|run| seconds(run.cpu)),
            line.runs().iter().map(|run| run.peak_bytes).max().unwrap_or(0) >> 20,
            line.settings
        );
    }
    text
}
