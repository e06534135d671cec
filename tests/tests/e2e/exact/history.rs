//! A random history on a real server, archived and backed up, and what `pg_waldump` says of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;

use walship::pg::{Lsn, SegmentName, SegmentSize};
use walship_tests::postgres::PgServer;
use walship_tests::process;
use walship_tests::random::Random;
use walship_tests::stage::Stage;
use walship_tests::{bins, wait};

use crate::receive::{Front, Receiving};
use crate::waldump_oracle::Theirs;

/// Concurrent sessions, and how many transactions each has in one phase.
const SESSIONS: usize = 3;
const TRANSACTIONS: usize = 7;
/// Phases on the first timeline before the fork, after it, and on the second timeline.
const PHASES: (usize, usize, usize) = (6, 2, 3);
/// How many commits the fork is drawn from.
const RECENT: usize = 5;
/// Restore points' names: a few, so that some come twice.
pub(crate) const NAMES: [&str; 4] = ["before release", "nightly", "it's", "a \"b\""];

/// One record as `pg_waldump` shows it.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) timeline: u32,
    pub(crate) lsn: Lsn,
    pub(crate) xid: u32,
    rmgr: String,
    desc: String,
}

/// How a transaction ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    /// The transaction; of a prepared one its own id.
    pub(crate) xid: u32,
    /// In microseconds since 1970.
    pub(crate) time: i64,
    pub(crate) committed: bool,
}

impl Record {
    fn parse(timeline: u32, line: &str) -> Option<Self> {
        let Theirs { rmgr, xid, lsn, desc, .. } = Theirs::parse(line)?;
        Some(Self { timeline, lsn, xid, rmgr, desc })
    }

    /// Returns the transaction that this record ends.
    pub(crate) fn ended(&self) -> Option<Ended> {
        if self.rmgr != "Transaction" {
            return None;
        }
        let (what, rest) = self.desc.split_once(' ')?;
        let (committed, prepared) = match what {
            "COMMIT" => (true, false),
            "ABORT" => (false, false),
            "COMMIT_PREPARED" => (true, true),
            "ABORT_PREPARED" => (false, true),
            _ => return None,
        };
        let (xid, rest) = match prepared {
            true => rest.split_once(": ").map(|(xid, rest)| (xid.parse().expect("an xid"), rest))?,
            false => (self.xid, rest),
        };
        let time = rest.split(" UTC").next()?;
        let time = chrono::NaiveDateTime::parse_from_str(time, "%Y-%m-%d %H:%M:%S%.f")
            .unwrap_or_else(|error| panic!("{error}: {}", self.desc));
        Some(Ended { xid, time: time.and_utc().timestamp_micros(), committed })
    }
}

/// A row of the table `t`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Row {
    pub(crate) id: i64,
    pub(crate) xid: u32,
}

/// How the archive ends on each timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With a whole segment.
    Archived,
    /// With the parts of an open one, which a receiver shipped.
    Shipped,
}

/// What was made, and the truth about it.
pub(crate) struct History {
    pub(crate) stage: Stage,
    /// Where timeline 2 leaves timeline 1.
    pub(crate) fork: Lsn,
    /// Every record from the first backup on, of both timelines, in order; of timeline 1 also what
    /// lies behind the fork.
    pub(crate) records: BTreeMap<u32, Vec<Record>>,
    /// Where the archive of each timeline ends.
    pub(crate) ends: BTreeMap<u32, Lsn>,
    /// The rows committed on each timeline; those before the fork are the first's.
    pub(crate) rows: BTreeMap<u32, BTreeSet<Row>>,
    /// The backups' ids, and where replay begins.
    pub(crate) backups: Vec<(String, Lsn)>,
    /// The commits in all WAL of timeline 1 that its server kept: position, and microseconds since 1970.
    pub(crate) commits: Vec<(Lsn, i64)>,
    /// Targets are drawn from the records behind these positions.
    pub(crate) drawn_from: BTreeMap<u32, Lsn>,
    /// Data directories that were made to be used again, by what they were restored with.
    pub(crate) templates: std::sync::Mutex<BTreeMap<Vec<String>, PathBuf>>,
}

impl History {
    /// Makes a history on PostgreSQL `major`.
    pub(crate) fn make(major: u32, ending: Ending, random: &mut Random) -> Self {
        let stage = Stage::folder("main");
        let clock = stage.path().join("clock");
        fs::write(&clock, "+0").unwrap();
        let first = stage.archiving(PgServer::builder(major).wal_segment_size_mb(1));
        let first = with_clock(first, &clock)
            // Its children must live in the world's time, or their requests' signatures do not hold.
            .setting("archive_command", format!("env -u LD_PRELOAD '{}' %p", bins::archive_cmd().display()))
            .setting("track_commit_timestamp", "on")
            .setting("max_prepared_transactions", 50)
            .setting("autovacuum", "off")
            .setting("wal_keep_size", "100GB")
            .setting("max_wal_size", "100GB")
            .setting("checkpoint_timeout", "1h")
            .setting("wal_recycle", "off")
            .start();
        stage.init(&first);
        first.psql("CREATE TABLE t (id bigint PRIMARY KEY, xid bigint)");
        let mut maker = Maker { stage, clock, random: random.clone(), next_id: 1, backups: Vec::new() };
        maker.backup(&first);
        let mut first = first;
        for phase in 0..PHASES.0 {
            maker.phase(&first);
            match phase {
                1 => maker.crash(&mut first),
                2 | 4 => maker.backup(&first),
                _ => {}
            }
        }
        // The fork comes into a segment in which nothing was prepared: recovery along timeline 2 looks for
        // the state of what was prepared before the fork in timeline 1's file of that segment, which it
        // did not fetch, and fails ("requested WAL segment ... has already been removed").
        first.archive_now();
        for _ in 0..RECENT {
            let insert = maker.insert();
            first.psql(&insert);
        }
        first.archive_now();
        let start = maker.backups[0].1;
        let (fork, second) = maker.promote(&records_of(&first, 1, start));
        for _ in 0..PHASES.1 {
            maker.phase(&first);
        }
        for phase in 0..PHASES.2 {
            maker.phase(&second);
            if phase == 0 {
                maker.backup(&second);
            }
        }
        let mut drawn_from = BTreeMap::from([(1, Lsn(0)), (2, Lsn(0))]);
        if ending == Ending::Shipped {
            for (timeline, server) in [(1, &first), (2, &second)] {
                drawn_from.insert(timeline, maker.shipped(server));
            }
        }
        let Maker { stage, random: used, backups, .. } = maker;
        *random = used;
        let commits = records_of(&first, 1, oldest_wal(&first));
        let commits = commits.iter().filter_map(|record| Some((record.lsn, record.ended()?)));
        let commits = commits.filter(|(_, end)| end.committed).map(|(lsn, end)| (lsn, end.time)).collect();
        let (first, second) = (Whole::of(&first, 1, start, ending), Whole::of(&second, 2, fork, ending));
        let later = second.rows.difference(&first.rows).cloned().collect();
        Self {
            stage,
            fork,
            records: [(1, first.records), (2, second.records)].into(),
            ends: [(1, first.end), (2, second.end)].into(),
            rows: [(1, first.rows), (2, later)].into(),
            backups,
            commits,
            drawn_from,
            templates: std::sync::Mutex::default(),
        }
    }

    /// Returns the records on the way to `timeline`.
    pub(crate) fn path(&self, timeline: u32) -> Vec<&Record> {
        let before = |record: &&Record| timeline == 1 || record.lsn < self.fork;
        let own = (timeline == 2).then(|| &self.records[&2]).into_iter().flatten();
        self.records[&1].iter().filter(before).chain(own).collect()
    }

    /// Returns when each transaction was committed whose record lies before a backup's redo position.
    pub(crate) fn committed_before(&self, start: Lsn) -> impl Iterator<Item = i64> {
        let first = self.commits.iter().filter(move |(lsn, _)| *lsn < start.min(self.fork));
        let second = self.records[&2].iter().filter(move |record| record.lsn < start);
        let second = second.filter_map(|record| record.ended().filter(|end| end.committed));
        first.map(|(_, time)| *time).chain(second.map(|end| end.time))
    }

    /// Returns the ids of the rows that are there when all records on the way to `timeline` that start
    /// before `cut` are replayed.
    pub(crate) fn rows_at(&self, timeline: u32, cut: Lsn) -> BTreeSet<i64> {
        let mut rows = BTreeSet::new();
        for record in self.path(timeline).into_iter().filter(|record| record.lsn < cut) {
            let Some(ended) = record.ended().filter(|ended| ended.committed) else { continue };
            let of_it = self.rows[&record.timeline].iter().filter(|row| row.xid == ended.xid);
            rows.extend(of_it.map(|row| row.id));
        }
        rows
    }
}

/// The clock of a server under test: a file says how far it is off, or where it stands still.
pub(crate) fn with_clock(
    server: walship_tests::postgres::PgServerBuilder,
    clock: &Path,
) -> walship_tests::postgres::PgServerBuilder {
    server
        .env("LD_PRELOAD", faketime())
        .env("FAKETIME_TIMESTAMP_FILE", clock)
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .env("DONT_FAKE_MONOTONIC", "1")
        .env("NO_FAKE_STAT", "1")
}

/// Returns libfaketime.
pub(crate) fn faketime() -> PathBuf {
    let lib = Path::new("/usr/lib");
    let folders = fs::read_dir(lib).unwrap().map(|entry| entry.unwrap().path());
    folders
        .map(|folder| folder.join("faketime/libfaketime.so.1"))
        .find(|path| path.is_file())
        .expect("libfaketime is missing; run scripts/install-test-deps --tools (./test does)")
}

/// What a server holds at its end.
struct Whole {
    records: Vec<Record>,
    rows: BTreeSet<Row>,
    end: Lsn,
}

impl Whole {
    fn of(server: &PgServer, timeline: u32, start: Lsn, ending: Ending) -> Self {
        let rows = server.psql("SELECT id, xid FROM t");
        let rows = rows.lines().map(|line| {
            let (id, xid) = line.split_once('|').unwrap();
            Row { id: id.parse().unwrap(), xid: xid.parse().unwrap() }
        });
        let rows = rows.collect();
        let size = SegmentSize::new(1 << 20).unwrap();
        let end = match ending {
            Ending::Archived => server.archive_now().parse::<SegmentName>().unwrap().end(size),
            Ending::Shipped => server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap(),
        };
        let mut records = records_of(server, timeline, start);
        records.retain(|record| record.lsn < end);
        Self { records, rows, end }
    }
}

/// Returns the records of a timeline from `start` on.
fn records_of(server: &PgServer, timeline: u32, start: Lsn) -> Vec<Record> {
    let mut waldump = server.tool("pg_waldump");
    waldump.env("TZ", "UTC").arg("-p").arg(server.data_dir().join("pg_wal"));
    waldump.args(["-t", &timeline.to_string(), "-s", &start.to_string()]);
    // It ends with an error where WAL ends.
    let output = process::run(&mut waldump, process::RunOptions::default());
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter(|line| line.starts_with("rmgr:"));
    let records: Vec<_> = lines.map(|line| Record::parse(timeline, line).expect(line)).collect();
    assert!(!records.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    records
}

/// Returns where the oldest WAL that a server kept begins.
fn oldest_wal(server: &PgServer) -> Lsn {
    let names = fs::read_dir(server.data_dir().join("pg_wal")).unwrap();
    let names = names.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<SegmentName>().ok());
    names.min().unwrap().start(SegmentSize::new(1 << 20).unwrap())
}

struct Maker {
    stage: Stage,
    clock: PathBuf,
    random: Random,
    next_id: i64,
    backups: Vec<(String, Lsn)>,
}

impl Maker {
    /// A stretch of concurrent transactions under one clock, then some of what an operator does.
    fn phase(&mut self, server: &PgServer) {
        let clock = match self.random.below(6) {
            0 => "-3600".to_owned(),
            1 => "-0.35".to_owned(),
            2 => "+90".to_owned(),
            // It stands still: equal times.
            3 => (chrono::Utc::now() + chrono::TimeDelta::seconds(5)).format("%Y-%m-%d %H:%M:%S").to_string(),
            _ => "+0".to_owned(),
        };
        fs::write(&self.clock, clock).unwrap();
        let scripts: Vec<String> = (0..SESSIONS).map(|_| self.session()).collect();
        self.stretch(server, &scripts);
        // The second leaves a segment in which nothing was committed.
        for _ in 0..self.random.below(3) {
            server.switch_wal();
        }
        fs::write(&self.clock, "+0").unwrap();
    }

    /// Transactions in the open segment, shipped by a receiver that dies; returns where they begin.
    fn shipped(&mut self, server: &PgServer) -> Lsn {
        let front = Front::of(server);
        // Timeline 1 goes on beside the one that left it.
        let args = ["--flush", "repository", "--accept-overtaken"];
        let mut receiving = Receiving::start(&self.stage, &front.conninfo(), &args);
        // Several stretches may end in the same segment; the last one's end is in the open one.
        server.archive_now();
        let begin = server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap();
        for _ in 0..2 {
            let scripts: Vec<String> = (0..SESSIONS).map(|_| self.session()).collect();
            self.stretch(server, &scripts);
        }
        server.psql(&self.insert());
        receiving.wait_durable(server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap());
        receiving.kill9();
        begin
    }

    /// Concurrent sessions, then some of what an operator does.
    fn stretch(&mut self, server: &PgServer, scripts: &[String]) {
        thread::scope(|scope| {
            for script in scripts {
                scope.spawn(move || server.psql(script));
            }
        });
        for _ in 0..self.random.below(3) {
            let name = self.random.pick(&NAMES).replace('\'', "''");
            server.psql(&format!("SELECT pg_create_restore_point('{name}')"));
            server.psql(&self.insert());
        }
        if self.random.chance(0.7) {
            self.end_prepared(server);
        }
        if self.random.chance(0.3) {
            server.psql("CHECKPOINT");
        }
    }

    fn id(&mut self) -> i64 {
        self.next_id += 1;
        self.next_id - 1
    }

    fn insert(&mut self) -> String {
        format!("INSERT INTO t SELECT {}, pg_current_xact_id()::text::bigint;\n", self.id())
    }

    /// The script of one session.
    fn session(&mut self) -> String {
        let mut script = String::new();
        for _ in 0..TRANSACTIONS {
            script += &self.transaction();
        }
        script
    }

    fn transaction(&mut self) -> String {
        let (a, b, c) = (self.insert(), self.insert(), self.insert());
        let name = self.id();
        match self.random.below(12) {
            0 => format!("BEGIN;\n{a}ROLLBACK;\n"),
            1 => format!("BEGIN;\n{a}SAVEPOINT s;\n{b}RELEASE s;\nCOMMIT;\n"),
            2 => format!("BEGIN;\n{a}SAVEPOINT s;\n{b}ROLLBACK TO s;\n{c}COMMIT;\n"),
            3 => format!("BEGIN;\n{a}SAVEPOINT s;\n{b}ROLLBACK TO s;\nROLLBACK;\n"),
            4 => format!("BEGIN;\n{a}PREPARE TRANSACTION 'p{name}';\n{b}COMMIT PREPARED 'p{name}';\n"),
            5 => format!(
                "BEGIN;\n{a}SAVEPOINT s;\n{b}PREPARE TRANSACTION 'p{name}';\nROLLBACK PREPARED 'p{name}';\n"
            ),
            // Stays open, at least for now.
            6 => format!("BEGIN;\n{a}PREPARE TRANSACTION 'p{name}';\n"),
            7 => format!("CREATE TABLE v{name} AS SELECT 1 AS x;\n{a}DROP TABLE v{name};\n"),
            8 => "SELECT pg_current_xact_id();\n".to_owned(),
            _ => a,
        }
    }

    /// Ends one of the prepared transactions.
    fn end_prepared(&mut self, server: &PgServer) {
        let open = server.psql("SELECT gid FROM pg_prepared_xacts ORDER BY gid");
        let open: Vec<&str> = open.lines().collect();
        if !open.is_empty() {
            let how = if self.random.chance(0.5) { "COMMIT" } else { "ROLLBACK" };
            server.psql(&format!("{how} PREPARED '{}'", self.random.pick(&open)));
        }
    }

    fn backup(&mut self, server: &PgServer) {
        let said = self.stage.ok(&mut self.stage.walship_on(server, &["backup", "--json"]));
        let said: serde_json::Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
        let id = said["id"].as_str().unwrap_or_else(|| panic!("{said:#}")).to_owned();
        let start = said["start_lsn"].as_str().unwrap_or_else(|| panic!("{said:#}")).parse().unwrap();
        self.backups.push((id, start));
    }

    /// Kills the server while a transaction is open, which then never ends.
    fn crash(&mut self, server: &mut PgServer) {
        let mut session = server.tool("psql");
        session
            .args(["-X", "-q", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut session = session.spawn().unwrap();
        let mut input = session.stdin.take().unwrap();
        writeln!(input, "BEGIN;\n{}", self.insert()).unwrap();
        server.wait_for("SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'", "1");
        server.psql("SELECT pg_switch_wal()");
        server.kill9();
        drop(input);
        let _ = session.wait();
        server.start();
        wait::until("the server takes writes", || {
            server.try_psql("SELECT pg_is_in_recovery()").is_ok_and(|r| r == "f")
        });
        let insert = self.insert();
        server.psql(&insert);
    }

    /// Restores to a recent commit and promotes: timeline 2.
    fn promote(&mut self, records: &[Record]) -> (Lsn, PgServer) {
        let commits: Vec<_> =
            records.iter().filter(|record| record.ended().is_some_and(|ended| ended.committed)).collect();
        let recent = &commits[commits.len() - RECENT..];
        let at = self.random.pick(recent).lsn.to_string();
        let dir = self.stage.path().join("second");
        let mut args = vec!["restore", "--as", "production", "--target-action", "promote"];
        args.extend(["--to-lsn", &at, "-D", dir.to_str().unwrap()]);
        self.stage.ok(&mut self.stage.pitr(&args));
        let second = with_clock(self.stage.recovering(&dir), &self.clock).start();
        second.wait_for("SELECT pg_is_in_recovery()", "f");
        for gid in second.psql("SELECT gid FROM pg_prepared_xacts").lines() {
            second.psql(&format!("ROLLBACK PREPARED '{gid}'"));
        }
        (fork_of(&dir, 2).1, second)
    }
}

/// Returns which timeline `timeline` leaves, and where, as its server's history file says.
pub(crate) fn fork_of(data_dir: &Path, timeline: u32) -> (u32, Lsn) {
    let path = data_dir.join(format!("pg_wal/{timeline:08X}.history"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap();
    let mut fields = line.split('\t');
    let parent = fields.next().unwrap().trim().parse().unwrap();
    (parent, fields.next().unwrap().trim().parse().unwrap())
}
