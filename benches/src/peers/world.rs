//! A server with a backlog: a base backup, and the segments behind it that wait to be archived.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use walship::pg::{SegmentName, SegmentSize};
use walship_tests::postgres::{PgServer, StopMode, primary_major};
use walship_tests::process;

use crate::wal::target_dir;

/// So many segments wait, at least.
pub(super) const SEGMENTS: usize = 256;

/// pgbench's scale, for 300 MB.
const SCALE: &str = "20";

/// The folders of the backlog. They are made once (some minutes) and kept in cargo's target folder.
pub(super) struct World {
    folder: PathBuf,
    /// All segments from the start of the base backup on, in order.
    pub(super) names: Vec<SegmentName>,
}

impl World {
    /// Returns the backlog, made if need be.
    pub(super) fn new() -> Self {
        let folder = target_dir().join(format!("walship-bench/peers-{}", primary_major()));
        if !folder.join("segments").is_file() {
            make(&folder);
        }
        let names = fs::read_to_string(folder.join("segments")).expect("the list was just written");
        let names = names.lines().map(|name| name.parse().expect("the list holds names")).collect();
        Self { folder, names }
    }

    /// The server's data directory.
    pub(super) fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// The base backup.
    pub(super) fn base(&self) -> PathBuf {
        self.folder.join("base")
    }

    /// Where a segment lies.
    pub(super) fn segment(&self, name: SegmentName) -> PathBuf {
        self.data().join("pg_wal").join(name.to_string())
    }

    /// Starts the server. It archives nothing until it is told to.
    pub(super) fn server(&self) -> PgServer {
        // What an earlier run left, when it was broken off.
        mark(&self.data(), &self.names, 0);
        fs::write(self.data().join("postgresql.auto.conf"), "").expect("the folder is ours");
        PgServer::from_data_dir(&self.data())
            .setting("fsync", "on")
            .setting("archive_mode", "on")
            .setting("checkpoint_timeout", "1h")
            .setting("max_wal_size", "64GB")
            .setting("wal_keep_size", "64GB")
            .start()
    }

    /// Marks the first `count` segments as waiting, all others as archived.
    pub(super) fn mark(&self, count: usize) {
        mark(&self.data(), &self.names, count);
    }

    /// Returns how many segments wait.
    pub(super) fn waiting(&self) -> usize {
        waiting_in(&self.data())
    }
}

/// Returns how many files of a server wait to be archived.
pub(super) fn waiting_in(data: &Path) -> usize {
    let entries = fs::read_dir(data.join("pg_wal/archive_status")).expect("it is the server's");
    entries.flatten().filter(|entry| entry.file_name().to_string_lossy().ends_with(".ready")).count()
}

fn mark(data: &Path, names: &[SegmentName], count: usize) {
    let status = data.join("pg_wal/archive_status");
    for entry in fs::read_dir(&status).expect("it is the server's").flatten() {
        let _ = fs::remove_file(entry.path());
    }
    for (index, name) in names.iter().enumerate() {
        let how = if index < count { "ready" } else { "done" };
        fs::write(status.join(format!("{name}.{how}")), "").expect("the folder is ours");
    }
}

fn make(folder: &Path) {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).expect("the target folder is writable");
    let mut server = PgServer::builder(primary_major())
        .setting("archive_mode", "on")
        .setting("archive_command", "")
        .setting("synchronous_commit", "off")
        .setting("autovacuum", "off")
        .setting("shared_buffers", "1GB")
        .setting("max_wal_size", "64GB")
        .setting("wal_keep_size", "64GB")
        .start();
    server.pgbench(&["-i", "-q", "-s", SCALE]);
    server.switch_wal();
    let base = folder.join("base");
    let target = base.to_str().expect("scratch paths are UTF-8");
    let backup = server.run_tool("pg_basebackup", &["-c", "fast", "-X", "stream", "--no-sync", "-D", target]);
    assert!(backup.status.success(), "{}", String::from_utf8_lossy(&backup.stderr));
    let wal = fs::read_dir(base.join("pg_wal")).expect("it is the backup's").flatten();
    let first: SegmentName =
        wal.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).min().expect("a backup has WAL");
    let size = SegmentSize::DEFAULT;
    let number = || -> u64 {
        let name = server.psql("SELECT pg_walfile_name(pg_current_wal_lsn())");
        name.parse::<SegmentName>().expect("the server names a segment").number(size)
    };
    while number() < first.number(size) + SEGMENTS as u64 {
        // Page images and small records alternate, as on a server that lives.
        server.pgbench(&["-n", "-c", "8", "-j", "2", "-T", "4"]);
        server.psql("CHECKPOINT");
    }
    let last: SegmentName = server.switch_wal().parse().expect("the server names a segment");
    server.stop(StopMode::Fast);
    process::run_ok(Command::new("mv").arg(server.data_dir()).arg(folder.join("data")));
    let numbers = first.number(size)..=last.number(size);
    let names: Vec<String> = numbers
        .filter_map(|number| SegmentName::from_number(first.timeline, number, size))
        .map(|name| name.to_string())
        .collect();
    fs::write(folder.join("segments"), names.join("\n")).expect("the target folder is writable");
}
