//! Realistic WAL: what pgbench makes a scratch server write.

use std::fs;
use std::path::{Path, PathBuf};

use walship::pg::SegmentName;
use walship_tests::postgres::{self, PgServer};

/// One whole 16 MiB segment.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Its name.
    pub name: SegmentName,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Where it lies.
    pub path: PathBuf,
}

/// The two faces of an OLTP server's WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Right after a checkpoint: nearly every change carries an image of its page.
    FullPages,
    /// Later between two checkpoints: nearly all records are small.
    SmallRecords,
}

impl Kind {
    /// Both kinds.
    pub const ALL: [Self; 2] = [Self::FullPages, Self::SmallRecords];

    /// Returns its name in tables.
    pub fn title(self) -> &'static str {
        match self {
            Self::FullPages => "full pages",
            Self::SmallRecords => "small records",
        }
    }
}

/// How many segments of each kind there are.
pub const SEGMENTS: usize = 4;

/// Returns [`SEGMENTS`] consecutive segments of pgbench's WAL of this kind. They are made once by a
/// scratch server (half a minute) and kept in cargo's target folder.
///
/// # Panics
/// When no PostgreSQL is installed, or when the disk is full.
pub fn pgbench(kind: Kind) -> Vec<Segment> {
    let major = postgres::primary_major();
    let folder = target_dir().join(format!("walship-bench/wal-{major}/{}", kind.title().replace(' ', "-")));
    if segments_in(&folder).len() < SEGMENTS {
        make(major, kind, &folder);
    }
    let mut segments = segments_in(&folder);
    segments.truncate(SEGMENTS);
    segments
        .into_iter()
        .map(|(name, path)| Segment { name, bytes: fs::read(&path).expect("a segment is readable"), path })
        .collect()
}

fn make(major: u32, kind: Kind, folder: &Path) {
    let _ = fs::remove_dir_all(folder);
    let scale = match kind {
        Kind::FullPages => "20",
        Kind::SmallRecords => "1",
    };
    let archive = tempfile::tempdir().expect("a temporary folder can be made");
    let server = PgServer::builder(major)
        .setting("archive_mode", "on")
        .setting("archive_command", format!("cp %p '{}/%f'", archive.path().display()))
        .setting("max_wal_size", "8GB")
        .setting("checkpoint_timeout", "1h")
        .setting("synchronous_commit", "off")
        .setting("autovacuum", "off")
        .start();
    server.pgbench(&["-i", "-q", "-s", scale]);
    server.psql("CHECKPOINT");
    if kind == Kind::SmallRecords {
        // Once around, so that hardly a page is left that was not written since the checkpoint.
        server.pgbench(&["-n", "-c", "4", "-t", "5000"]);
    }
    let mut unwanted = server.switch_wal();
    server.wait_until_archived(&unwanted);
    let wanted = |unwanted: &str| -> Vec<(SegmentName, PathBuf)> {
        let mut found = segments_in(archive.path());
        found.retain(|(name, _)| name.to_string().as_str() > unwanted);
        found
    };
    while wanted(&unwanted).len() < SEGMENTS {
        server.pgbench(&["-n", "-c", "4", "-t", "2000"]);
    }
    fs::create_dir_all(folder).expect("the target folder is writable");
    for (name, path) in wanted(&unwanted).into_iter().take(SEGMENTS) {
        unwanted = name.to_string();
        server.wait_until_archived(&unwanted);
        fs::copy(&path, folder.join(&unwanted)).expect("the target folder is writable");
    }
}

fn segments_in(folder: &Path) -> Vec<(SegmentName, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<(SegmentName, PathBuf)> = entries
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
        .filter(|(_, path): &(SegmentName, PathBuf)| {
            fs::metadata(path).is_ok_and(|metadata| metadata.len() == 16 << 20)
        })
        .collect();
    found.sort();
    found
}

/// Returns cargo's target folder, in which this program was built.
///
/// # Panics
/// When it was moved out of it.
pub fn target_dir() -> PathBuf {
    let program = std::env::current_exe().expect("a running program knows its own path");
    let marked = program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    marked.expect("the benches run in cargo's target folder").to_owned()
}
