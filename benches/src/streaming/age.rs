//! How old the newest commit is that a reader finds in the repository.

use std::fmt::Write as _;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures_util::{StreamExt as _, TryStreamExt as _};
use tempfile::NamedTempFile;
use walship::error::Result;
use walship::pg::SegmentName;
use walship::repository::LineageRepository;
use walship::wal::decode::decode;
use walship::wal::reader::Reader;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::process;

use super::receiver::{Receiver, cpu_seconds, guarded, tps};
use super::site::{Site, Store};
use crate::measure::quantile;
use crate::tables::Effort;

/// Transactions a second.
const RATE: &str = "2000";

/// Between two looks at the repository.
const PAUSE: Duration = Duration::from_millis(20);

/// How many parts the reader fetches at once.
const READS: usize = 8;

/// The age of the newest durable commit under a load of 2,000 transactions a second.
pub fn ages(effort: Effort) -> String {
    let mut text = String::from(
        "\n| store | TPS | WAL MB/s | looks | median ms | 99 % ms | worst ms | read back: median ms | 99 % ms | CPU of \
         `walship receive` |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for store in [Store::Folder, Store::S3(0), Store::S3(25)] {
        text.push_str(&row(store, effort));
    }
    text
}

fn row(store: Store, effort: Effort) -> String {
    let seconds = 12 * effort.long_rounds;
    let server = PgServer::builder(primary_major())
        .setting("fsync", "on")
        .setting("archive_mode", "off")
        .setting("max_wal_size", "8GB")
        .setting("max_slot_wal_keep_size", "8GB")
        .start();
    server.pgbench(&["-i", "-q", "-s", "20"]);
    server.psql("CHECKPOINT");
    let site = Site::new(store, &server);
    let receiver = Receiver::walship(&site, &server, &[]);
    let lineage = site.lineage();
    let full: SegmentName = server.switch_wal().parse().expect("the server names a segment");
    let first = full.next(lineage.lineage().segment_size).expect("another one follows");
    let mut tail = Tail::new(lineage, first);
    let before = Standing::of(&server, &receiver);
    let mut load = Load::start(&server, seconds);
    let ages = site.wait_for(async {
        let mut ages = Vec::new();
        while load.runs() {
            ages.extend(tail.look().await.expect("the repository can be read"));
            tokio::time::sleep(PAUSE).await;
        }
        ages
    });
    let after = Standing::of(&server, &receiver);
    let (took, bytes) = ((after.at - before.at).as_secs_f64(), after.lsn - before.lsn);
    // At the start nothing of the load is anywhere yet.
    let ages = &ages[ages.len().min(100)..];
    assert!(ages.len() > 50, "the load went by unseen");
    let of = |pick: fn(&Age) -> f64| {
        let all: Vec<f64> = ages.iter().map(|age| 1e3 * pick(age)).collect();
        (quantile(&all, 0.5), quantile(&all, 0.99), quantile(&all, 1.0))
    };
    let (durable, read) = (of(|age| age.durable), of(|age| age.read));
    let mut text = String::new();
    let _ = writeln!(
        text,
        "| {} | {:.0} | {:.1} | {} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} % |",
        store.title(),
        load.tps(),
        bytes as f64 / took / 1e6,
        ages.len(),
        durable.0,
        durable.1,
        durable.2,
        read.0,
        read.1,
        100.0 * (after.cpu - before.cpu) / took,
    );
    text
}

/// Where everything is at a moment.
struct Standing {
    at: Instant,
    lsn: u64,
    cpu: f64,
}

impl Standing {
    fn of(server: &PgServer, receiver: &Receiver) -> Self {
        let lsn: walship::pg::Lsn = server.current_lsn().parse().expect("the server names a position");
        Self { at: Instant::now(), lsn: lsn.0, cpu: cpu_seconds(receiver.pid()) }
    }
}

/// pgbench at [`RATE`].
struct Load {
    child: Child,
    said: NamedTempFile,
}

impl Load {
    fn start(server: &PgServer, seconds: usize) -> Self {
        let said = NamedTempFile::new().expect("a temporary file can be made");
        let mut pgbench = server.tool("pgbench");
        pgbench.args(["-n", "-c", "8", "-j", "2", "-R", RATE, "-T"]).arg(seconds.to_string());
        let mut pgbench = guarded(&pgbench);
        let output = said.reopen().expect("the file is ours");
        pgbench.stdin(Stdio::null()).stdout(output).stderr(Stdio::null());
        Self { child: process::spawn(pgbench).expect("pgbench can be started"), said }
    }

    fn runs(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    /// Transactions a second, as pgbench has counted them.
    fn tps(&self) -> f64 {
        tps(&std::fs::read_to_string(self.said.path()).expect("pgbench says text"))
    }
}

/// How old the newest durable commit was, in seconds.
struct Age {
    /// When the store had said that it is there.
    durable: f64,
    /// When it was read and decoded.
    read: f64,
}

/// A reader of the open segment who has nothing but the repository.
struct Tail {
    lineage: LineageRepository,
    reader: Reader,
    segment: SegmentName,
    /// So many bytes of the segment were read.
    end: u64,
    newest: Option<DateTime<Utc>>,
}

impl Tail {
    fn new(lineage: LineageRepository, first: SegmentName) -> Self {
        let size = lineage.lineage().segment_size;
        let reader = Reader::new(first.start(size), first.timeline, size);
        Self { lineage, reader, segment: first, end: 0, newest: None }
    }

    /// Reads what is new, as far as it is contiguous: WAL behind a hole is of no use to anybody.
    async fn look(&mut self) -> Result<Option<Age>> {
        let size = self.lineage.lineage().segment_size;
        loop {
            let listed = self.lineage.tail_of(self.segment).await?;
            let mut seen = Utc::now();
            let (mut new, mut reach) = (Vec::new(), self.end);
            for part in listed {
                if part.start <= reach && part.end > reach {
                    reach = part.end;
                    new.push(part);
                }
            }
            let (lineage, segment) = (&self.lineage, self.segment);
            let reads = new.iter().map(|part| lineage.tail_part(segment, part));
            let parts: Vec<_> = futures_util::stream::iter(reads).buffered(READS).try_collect().await?;
            for part in parts {
                self.read(&part.bytes[usize::try_from(self.end - part.offset()).expect("parts are short")..]);
            }
            if new.is_empty() && self.lineage.segment_summary(self.segment).await?.is_some() {
                seen = Utc::now();
                let bytes =
                    self.lineage.segment_bytes(self.segment).await?.expect("it was there a moment ago");
                self.read(&bytes[usize::try_from(self.end).expect("segments are short")..]);
            }
            if self.end == size.bytes() {
                self.segment = self.segment.next(size).expect("another one follows");
                self.end = 0;
                continue;
            }
            let since = |newest: DateTime<Utc>, at: DateTime<Utc>| (at - newest).as_seconds_f64();
            let age = |newest| Age { durable: since(newest, seen), read: since(newest, Utc::now()) };
            return Ok(self.newest.map(age));
        }
    }

    fn read(&mut self, bytes: &[u8]) {
        let newest = &mut self.newest;
        self.reader.push(bytes, |record, layout| {
            let event = decode(record, layout).ok().flatten();
            *newest = event.and_then(|event| event.kind.stop_time()).max(*newest);
        });
        self.end += bytes.len() as u64;
        assert!(self.reader.stop().is_none(), "the WAL that was read back is not valid");
    }
}
