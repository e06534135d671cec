//! Segments whose compressed body is spooled to disk: one conditional write each, in bounded memory.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::stage::Stage;
use walship_tests::weed::WeedServer;

/// Memory of its own that a process may hold: what it does with a segment of any size.
const PEAK_KIB_MAX: u64 = 64 << 10;

/// Runs a command to its end; returns its output and the most memory of its own that it was seen to hold.
fn peak_of(command: &mut Command) -> (Output, u64) {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let ended = std::thread::spawn(move || child.wait_with_output().unwrap());
    let (mut peak, deadline) = (0, Instant::now() + Duration::from_secs(300));
    while !ended.is_finished() {
        assert!(Instant::now() < deadline, "{command:?} does not end");
        // The program's text, which a debug build has much of, is not counted.
        let text = fs::read_to_string(&status).unwrap_or_default();
        let held = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let held = held.and_then(|kib| kib.trim().strip_suffix(" kB")?.parse().ok());
        peak = peak.max(held.unwrap_or(0));
        std::thread::sleep(Duration::from_millis(1));
    }
    (ended.join().unwrap(), peak)
}

fn succeeded_within(command: &mut Command) -> u64 {
    let (output, peak_kib) = peak_of(command);
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    assert!((1..=PEAK_KIB_MAX).contains(&peak_kib), "{command:?} held {peak_kib} KiB");
    peak_kib
}

fn comes_back(stage: &Stage, server: &PgServer, segment: &Path) {
    stage.init(server);
    let name = segment.file_name().unwrap().to_str().unwrap();
    let target = stage.path().join("fetched");
    let pushed = succeeded_within(
        stage.walship(&["wal", "push", segment.to_str().unwrap()]).current_dir(server.data_dir()),
    );
    let again = stage.ok(&mut stage.walship(&["wal", "push", "--json", segment.to_str().unwrap()]));
    assert!(again.contains("already stored"), "{again}");
    let fetched = succeeded_within(&mut stage.walship(&["wal", "fetch", name, target.to_str().unwrap()]));
    println!("{}: {pushed} KiB to push, {fetched} KiB to fetch", stage.url());
    assert!(fs::read(&target).unwrap() == fs::read(segment).unwrap(), "byte for byte");
    let spool = stage.path().join("state");
    let left = fs::read_dir(&spool).map(|entries| entries.flatten().map(|entry| entry.path()).collect());
    let left: Vec<_> = left.unwrap_or_default();
    assert!(!left.iter().any(|path| path.is_file() && path.metadata().unwrap().len() > 1 << 20), "{left:?}");
}

#[test]
fn a_spooled_segment_comes_back_byte_for_byte_in_bounded_memory() {
    let server = PgServer::builder(primary_major()).wal_segment_size_mb(256).start();
    // What no codec makes smaller, and what fills most of the segment.
    server.psql(
        "WITH noise AS MATERIALIZED (SELECT string_agg(decode(md5(random()::text), 'hex'), '') AS b \
         FROM generate_series(1, 65536)) \
         SELECT count(pg_logical_emit_message(false, 'noise', b)) FROM noise, generate_series(1, 200)",
    );
    let name = server.switch_wal();
    let segment = server.data_dir().join("pg_wal").join(name);
    assert_eq!(segment.metadata().unwrap().len(), 256 << 20);

    comes_back(&Stage::folder("main"), &server, &segment);
    let weed = WeedServer::start();
    let endpoint = weed.endpoint();
    comes_back(&Stage::s3("main", &endpoint), &server, &segment);
}
