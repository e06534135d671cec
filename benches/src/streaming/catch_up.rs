//! How fast a backlog of WAL that a slot holds is stored.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use walship::pg::{Lsn, SegmentName, SegmentSize};
use walship_tests::bins;
use walship_tests::postgres::{PgServer, primary_major};

use super::site::{Site, Store};
use super::walrus;
use crate::measure::{Contender, Measurement, compete, process};
use crate::tables::Effort;

/// How many segments the slot holds.
const SEGMENTS: usize = 128;

/// A server and the slot that keeps its WAL.
struct Backlog {
    server: PgServer,
    names: Vec<SegmentName>,
    /// Where the last segment ends.
    end: Lsn,
}

impl Backlog {
    fn new() -> Self {
        let server = PgServer::builder(primary_major())
            .setting("archive_mode", "off")
            .setting("synchronous_commit", "off")
            .setting("autovacuum", "off")
            .setting("max_wal_size", "64GB")
            // Page images and small records alternate, as on a server that lives.
            .setting("checkpoint_timeout", "30s")
            .start();
        server.pgbench(&["-i", "-q", "-s", "50"]);
        let size = SegmentSize::DEFAULT;
        let full: SegmentName = server.switch_wal().parse().expect("the server names a segment");
        server.psql("CHECKPOINT");
        server.psql("SELECT pg_create_physical_replication_slot('backlog', true)");
        let first = full.number(size) + 1;
        let position = || server.current_lsn().parse::<Lsn>().expect("the server names a position").0;
        while position() / size.bytes() < first + SEGMENTS as u64 {
            server.pgbench(&["-n", "-c", "8", "-j", "2", "-T", "5"]);
        }
        server.psql("CHECKPOINT");
        let last: SegmentName = server.switch_wal().parse().expect("the server names a segment");
        let name = |number| SegmentName::from_number(full.timeline, number, size).expect("it is there");
        let names = (first..=last.number(size)).map(name).collect();
        Self { server, names, end: last.end(size) }
    }

    /// Makes a slot that starts where the backlog does.
    fn slot(&self, name: &str) {
        let slots = format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{name}'"
        );
        self.server.psql(&slots);
        self.server.psql(&format!("SELECT pg_copy_physical_replication_slot('backlog', '{name}')"));
    }

    fn bytes(&self) -> u64 {
        self.names.len() as u64 * SegmentSize::DEFAULT.bytes()
    }

    fn run(&self, argv: &[&str], environment: &[(&str, &str)]) -> Measurement {
        let port = self.server.port().to_string();
        let mut all = vec![
            ("PGHOST", self.server.socket_dir().to_str().expect("scratch paths are UTF-8")),
            ("PGPORT", &port),
            ("PGUSER", "postgres"),
            ("PGDATABASE", "postgres"),
        ];
        all.extend(environment);
        process(argv, &all, self.server.socket_dir())
    }

    fn pg_receivewal(&self, compression: &str) -> Measurement {
        self.slot("bench");
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let tool = self.server.tool("pg_receivewal");
        let program = tool.get_program().to_str().expect("the tools' paths are UTF-8");
        let (end, folder) = (self.end.to_string(), folder.path().to_str().expect("scratch paths are UTF-8"));
        let compress = format!("--compress={compression}");
        let argv = [program, "--slot", "bench", "-D", folder, &compress, "--endpos", &end, "--no-loop"];
        let measured = self.run(&argv, &[]);
        let files = fs::read_dir(folder).expect("the folder is ours").count();
        assert!(files >= self.names.len(), "pg_receivewal has {files} of {} segments", self.names.len());
        measured
    }

    fn walship(&self, store: Store, compression: &str) -> Measurement {
        self.slot("bench");
        let site = Site::new(store, &self.server);
        let (program, config) = (bins::walship(), site.stage().config());
        let program = program.to_str().expect("scratch paths are UTF-8");
        let config = config.to_str().expect("scratch paths are UTF-8");
        let argv = [program, "receive", "--once", "--slot", "bench", "--compression", compression];
        let measured = self.run(&argv, &[("WALSHIP_CONFIG", config)]);
        self.check(&site);
        measured
    }

    fn walrus(&self, program: &std::path::Path, store: Store) -> Measurement {
        self.slot("bench");
        let last = self.names.last().expect("there is a backlog").to_string();
        walrus::receive(program, &self.server, store, &last)
    }

    /// Compares what is stored with the server's own files: speed that is bought with a wrong byte is none.
    fn check(&self, site: &Site) {
        let lineage = site.lineage();
        let folder: PathBuf = self.server.data_dir().join("pg_wal");
        for name in &self.names {
            let stored = site.wait_for(lineage.segment_bytes(*name)).expect("the repository can be read");
            let own = fs::read(folder.join(name.to_string())).expect("the slot keeps the server's files");
            assert!(stored.is_some_and(|stored| stored == own), "{name} is not stored as the server has it");
        }
    }
}

/// Storing what a slot holds, beside `pg_receivewal`.
pub fn catching_up(effort: Effort) -> String {
    let backlog = Backlog::new();
    let peer = walrus::program();
    let mut contenders = vec![
        Contender::new("`pg_receivewal --compress=lz4`, folder", |_| backlog.pg_receivewal("lz4")),
        Contender::new("`pg_receivewal`, folder, nothing compressed", |_| backlog.pg_receivewal("none")),
        Contender::new("`walship receive --once`, lz4, folder", |_| backlog.walship(Store::Folder, "lz4")),
        Contender::new("`walship receive --once`, lz4, S3", |_| backlog.walship(Store::S3(0), "lz4")),
        Contender::new("`walship receive --once`, zstd:1, folder", |_| {
            backlog.walship(Store::Folder, "zstd:1")
        }),
    ];
    if let Some(program) = &peer {
        for store in [Store::Folder, Store::S3(0)] {
            let title = format!("`wal-rus wal-receive`, lz4, {}", store.title());
            let backlog = &backlog;
            contenders.push(Contender::new(title, move |_| backlog.walrus(program, store)));
        }
    }
    let rows = compete(effort.long_rounds, contenders);
    let bytes = backlog.bytes() as f64;
    let mut text = String::new();
    let _ = writeln!(
        text,
        "\n{} segments of 16 MiB in the slot\n\n| | MB/s | MB/s beside the first | CPU s per GB | CPU beside the first | \
         peak MiB |\n|---|---|---|---|---|---|",
        backlog.names.len()
    );
    for row in &rows {
        let peak = row.peak_bytes.map_or(0, |peak| peak >> 20);
        let _ = writeln!(
            text,
            "| {} | {:.0} | {:.2} | {:.2} | {:.2} | {peak} |",
            row.name,
            bytes / row.wall.as_secs_f64() / 1e6,
            1.0 / row.wall_ratio,
            row.cpu.as_secs_f64() / bytes * 1e9,
            row.cpu_ratio
        );
    }
    let _ = match peer {
        Some(program) => writeln!(text, "\n{}", walrus::version(&program)),
        None => writeln!(text, "\nwal-rus is not installed (`benches/peers/install`): absent"),
    };
    text
}
