//! How a real server takes what `archive-cmd` and `restore-cmd` answer: an outage or a hole never ends
//! a recovery early, a standby waits and catches up, nobody crosses a fork.

mod archiving;
mod forks;
mod gaps;
mod site;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use walship_tests::postgres::{self, PgServer, StopMode};
use walship_tests::process::copy_tree;
use walship_tests::s3_inprocess::Fault as S3Fault;
use walship_tests::{bins, process, wait};

use site::{
    Fault, Kind, REPORT, Site, assert_never_promoted, base_backup, control, create_repository,
    kept_until_the_end,
};

/// How many rows the origin wrote, one into each of its segments.
const ROWS: usize = 6;
/// The row whose segment the faults begin at.
const BROKEN_ROW: usize = 3;

/// An archive of one timeline and the base backup that it begins with.
struct Origin {
    home: PathBuf,
    /// The segment that holds the n-th row's commit; the first is of row 1.
    segments: Vec<String>,
    /// A position that only the last segment reaches.
    target: String,
}

impl Origin {
    fn make(major: u32) -> Self {
        let home = tempfile::Builder::new().prefix("walship-origin").tempdir().unwrap();
        let repository = home.path().join("repo");
        let server = PgServer::builder(major)
            .wal_segment_size_mb(1)
            .setting("archive_mode", "on")
            .setting("archive_command", format!("'{}' %p", bins::archive_cmd().display()))
            .setting("autovacuum", "off")
            .env("WALSHIP_REPO", &repository)
            .env("WALSHIP_CLUSTER", site::CLUSTER)
            .start();
        create_repository(&repository, &server);
        server.psql("CREATE TABLE t (n int)");
        base_backup(&server, &home.path().join("base"));
        let mut segments = Vec::new();
        let mut target = String::new();
        for row in 1..=ROWS {
            server.psql(&format!("INSERT INTO t VALUES ({row})"));
            target = server.psql("SELECT pg_current_wal_lsn()");
            segments.push(server.switch_wal());
        }
        server.wait_until_archived(segments.last().unwrap());
        Self { home: kept_until_the_end(home), segments, target }
    }

    fn repository(&self) -> PathBuf {
        self.home.join("repo")
    }

    /// A data directory to recover, with this signal file.
    fn restored(&self, site: &Site, signal: &str) -> PathBuf {
        let data = site.home().join("data");
        copy_tree(&self.home.join("base"), &data);
        fs::write(data.join(signal), "").unwrap();
        data
    }

    fn broken_segment(&self) -> &str {
        &self.segments[BROKEN_ROW - 1]
    }
}

/// The origin of a major, made once.
fn origin(major: u32) -> &'static Origin {
    static ORIGINS: LazyLock<Mutex<Vec<(u32, &'static Origin)>>> = LazyLock::new(Mutex::default);
    let mut origins = ORIGINS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((_, made)) = origins.iter().find(|(made, _)| *made == major) {
        return made;
    }
    let made: &'static Origin = Box::leak(Box::new(Origin::make(major)));
    origins.push((major, made));
    made
}

/// What ends a one-shot recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    TheEnd,
    ATarget,
}

/// Every fault on the primary major, those that differ most on the newer one; SeaweedFS, which is slow to
/// fill, on the primary only.
fn faults_of(kind: Kind) -> Vec<(u32, Fault)> {
    let all = match kind {
        Kind::Folder => [Fault::Dead, Fault::Unmounted, Fault::Forbidden, Fault::Hole],
        Kind::S3 | Kind::Weed => [Fault::Dead, Fault::Forbidden, Fault::NoBucket, Fault::Hole],
    };
    let mut cases: Vec<_> = all.into_iter().map(|fault| (postgres::primary_major(), fault)).collect();
    if kind != Kind::Weed {
        for major in postgres::majors().into_iter().skip(1) {
            cases.extend([Fault::Dead, Fault::Hole].map(|fault| (major, fault)));
        }
    }
    cases
}

/// Runs cases side by side, a few at a time: they mostly wait.
fn side_by_side<T: Copy + Send + Sync>(cases: &[T], run: impl Fn(T) + Sync) {
    for some in cases.chunks(4) {
        thread::scope(|scope| {
            let running: Vec<_> = some.iter().map(|case| scope.spawn(|| run(*case))).collect();
            for case in running {
                if let Err(panic) = case.join() {
                    std::panic::resume_unwind(panic);
                }
            }
        });
    }
}

#[test]
fn one_shot_recovery_stops_at_a_fault_of_a_folder() {
    one_shot_recovery_stops(Kind::Folder);
}

#[test]
fn one_shot_recovery_stops_at_a_fault_of_s3() {
    one_shot_recovery_stops(Kind::S3);
}

#[test]
fn one_shot_recovery_stops_at_a_fault_of_seaweedfs() {
    one_shot_recovery_stops(Kind::Weed);
}

fn one_shot_recovery_stops(kind: Kind) {
    let _weed = (kind == Kind::Weed).then(site::weed);
    let mut cases = Vec::new();
    for (major, fault) in faults_of(kind) {
        cases.push((major, fault, Until::TheEnd));
        if kind != Kind::Weed && [Fault::Dead, Fault::Hole].contains(&fault) {
            cases.push((major, fault, Until::ATarget));
        }
    }
    side_by_side(&cases, |(major, fault, until)| one_shot_recovery_stops_at(kind, major, fault, until));
}

fn one_shot_recovery_stops_at(kind: Kind, major: u32, fault: Fault, until: Until) {
    let case = format!("{kind:?}, {major}, {fault:?}, {until:?}");
    let origin = origin(major);
    let site = Site::new(kind, &origin.repository());
    let data = origin.restored(&site, "recovery.signal");
    let command = site.breaking_at(origin.broken_segment(), fault);
    let mut recovery = site.recovering_by(&data, &command);
    if until == Until::ATarget {
        recovery = recovery.setting("recovery_target_lsn", &origin.target);
    }
    let mut server = recovery.prepare();
    server.launch();
    let status = server.wait_for_exit();
    let log = server.log();
    assert!(site.is_broken(), "{case}: the fault was met\n{log}");
    assert!(!status.success(), "{case}: {status}\n{log}");
    let refused = log.lines().find_map(|line| line.split("FATAL:  could not restore file \"").nth(1));
    let refused = refused.and_then(|rest| rest.split('"').next()).unwrap_or_default();
    // An agent may have got what comes behind before the fault.
    let ahead = walship_tests::agent_use() != "off" && refused > origin.broken_segment();
    assert!(refused == origin.broken_segment() || ahead, "{case}: {refused:?} was not restored\n{log}");
    assert!(log.contains(REPORT) && log.contains("\nnext:  "), "{case}: no report in the log:\n{log}");
    assert!(!log.contains("PANIC"), "{case}:\n{log}");
    assert_never_promoted(&server, "recovery.signal");
    assert_eq!(control(&server, "Latest checkpoint's TimeLineID"), "1", "{case}");
    assert!(!data.join("pg_wal/00000002.history").exists(), "{case}");

    // Once the fault is gone, the same recovery goes on where it stopped.
    site.mend(origin.broken_segment(), fault, &origin.repository());
    server.start();
    server.wait_for("SELECT pg_is_in_recovery()", if until == Until::ATarget { "t" } else { "f" });
    // A server that pauses at its target answers queries before it has replayed the last record.
    server.wait_for("SELECT count(*) FROM t", &ROWS.to_string());
}

#[test]
fn recovery_with_the_whole_archive_reaches_its_end_and_promotes() {
    for major in postgres::majors() {
        side_by_side(&[Kind::Folder, Kind::S3, Kind::Weed], |kind| {
            let origin = origin(major);
            let site = Site::new(kind, &origin.repository());
            let data = origin.restored(&site, "recovery.signal");
            let server = site.recovering(&data).start();
            server.wait_for("SELECT pg_is_in_recovery()", "f");
            assert_eq!(server.psql("SELECT string_agg(n::text, ',' ORDER BY n) FROM t"), "1,2,3,4,5,6");
            assert_eq!(server.psql("SELECT timeline_id FROM pg_control_checkpoint()"), "2");
            assert!(!server.log().contains(REPORT), "a recovery without a fault is quiet:\n{}", server.log());
        });
    }
}

#[test]
fn a_standby_keeps_asking_a_folder_and_catches_up() {
    a_standby_catches_up(Kind::Folder);
}

#[test]
fn a_standby_keeps_asking_s3_and_catches_up() {
    a_standby_catches_up(Kind::S3);
}

#[test]
fn a_standby_keeps_asking_seaweedfs_and_catches_up() {
    a_standby_catches_up(Kind::Weed);
}

fn a_standby_catches_up(kind: Kind) {
    let _weed = (kind == Kind::Weed).then(site::weed);
    side_by_side(&faults_of(kind), |(major, fault)| a_standby_catches_up_after(kind, major, fault));
}

fn a_standby_catches_up_after(kind: Kind, major: u32, fault: Fault) {
    let case = format!("{kind:?}, {major}, {fault:?}");
    let origin = origin(major);
    let site = Site::new(kind, &origin.repository());
    let data = origin.restored(&site, "standby.signal");
    // Both files: standby.signal wins, for PostgreSQL and for restore-cmd.
    fs::write(data.join("recovery.signal"), "").unwrap();
    let command = site.breaking_at(origin.broken_segment(), fault);
    let mut server = site.recovering_by(&data, &command).start();
    let reports = |server: &PgServer| server.log().matches(REPORT).count();
    wait::until("the standby has met the fault several times", || reports(&server) >= 3);
    assert!(site.is_broken(), "{case}");
    let before = (BROKEN_ROW - 1).to_string();
    assert_eq!(server.psql("SELECT count(*), pg_is_in_recovery() FROM t"), format!("{before}|t"), "{case}");
    assert!(server.is_running(), "{case}:\n{}", server.log());

    site.mend(origin.broken_segment(), fault, &origin.repository());
    server.wait_for("SELECT count(*) FROM t", &ROWS.to_string());
    assert_eq!(server.psql("SELECT pg_is_in_recovery()"), "t", "{case}");
    assert!(server.stop(StopMode::Fast).success(), "{case}");
    let log = server.log();
    assert!(!log.contains("FATAL:  could not") && !log.contains("PANIC"), "{case}:\n{log}");
    assert_never_promoted(&server, "standby.signal");
    assert_eq!(control(&server, "Latest checkpoint's TimeLineID"), "1", "{case}");
}

/// Stops a server whose `restore-cmd` hangs in the broken segment; `slow` waits until it does.
fn stops_clean_and_catches_up(
    mut server: PgServer,
    case: &str,
    slow: impl Fn(),
    mend: impl FnOnce(),
    promoted: bool,
) {
    server.launch();
    slow();
    let running = || !restore_cmds_of(server.pid()).is_empty();
    wait::until("restore-cmd runs", running);
    let fetching = restore_cmds_of(server.pid());
    let asked = Instant::now();
    let status = server.stop(StopMode::Fast);
    let took = asked.elapsed();
    let log = server.log();
    assert!(status.success(), "{case}: {status}\n{log}");
    assert!(took < Duration::from_secs(15), "{case}: the stop took {took:?}");
    assert!(log.contains("database system is shut down"), "{case}:\n{log}");
    for bad in ["PANIC", "FATAL:  could not restore", "was terminated by signal"] {
        assert!(!log.contains(bad), "{case}: {bad:?} in\n{log}");
    }
    wait::until("restore-cmd is gone", || fetching.iter().all(|pid| !process::is_alive(*pid)));

    mend();
    server.start();
    server.wait_for("SELECT count(*) FROM t", &ROWS.to_string());
    server.wait_for("SELECT pg_is_in_recovery()", if promoted { "f" } else { "t" });
    let left: Vec<_> = fs::read_dir(server.data_dir().join("pg_wal"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("RECOVERY") || name.contains("tmp"))
        .collect();
    assert!(left.is_empty(), "{case}: {left:?} stays behind in pg_wal");
}

fn restore_cmds_of(postmaster: u32) -> Vec<u32> {
    let program = bins::restore_cmd();
    let program = program.file_name().unwrap().to_str().unwrap().to_owned();
    let is_one = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        // It may go on as `walship wal fetch`.
        [program.as_str(), "walship"].contains(&name.trim())
    };
    process::descendants(postmaster).into_iter().filter(is_one).collect()
}

#[test]
fn a_stop_during_a_slow_fetch_from_s3_is_clean() {
    let mut cases = Vec::new();
    for major in postgres::majors() {
        cases.extend([(major, "recovery.signal"), (major, "standby.signal")]);
    }
    side_by_side(&cases, |(major, signal)| {
        let origin = origin(major);
        let site = Site::new(Kind::S3, &origin.repository());
        let data = origin.restored(&site, signal);
        // The store's deadline must not be what ends the fetch.
        let server = site
            .recovering(&data)
            .env("WALSHIP_DEADLINE_MS", "120000")
            .env("WALSHIP_REQUEST_MS", "110000")
            .prepare();
        let s3 = site.s3.as_ref().unwrap();
        let (met, meets) =
            (std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)), origin.broken_segment());
        let met_there = met.clone();
        s3.set_faults(move |seen| {
            let hit = seen.method == "GET" && seen.path.ends_with(&format!("{meets}.wal"));
            met_there.fetch_or(hit, std::sync::atomic::Ordering::SeqCst);
            hit.then_some(S3Fault::Late(Duration::from_secs(100)))
        });
        let slow =
            || wait::until("the slow segment is asked for", || met.load(std::sync::atomic::Ordering::SeqCst));
        stops_clean_and_catches_up(
            server,
            &format!("S3, {major}, {signal}"),
            slow,
            || s3.heal(),
            signal == "recovery.signal",
        );
    });
}

#[test]
fn a_stop_during_a_slow_fetch_from_a_folder_is_clean() {
    let mut cases = Vec::new();
    for major in postgres::majors() {
        cases.extend([(major, "recovery.signal"), (major, "standby.signal")]);
    }
    side_by_side(&cases, |(major, signal)| {
        let origin = origin(major);
        let site = Site::new(Kind::Folder, &origin.repository());
        let data = origin.restored(&site, signal);
        // A configuration that nobody writes: restore-cmd waits for it, as it would for a hanging mount.
        let gate = site.home().join("slow.toml");
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let command = format!(
            "if [ %f = {} ] && [ -p '{1}' ]; then export WALSHIP_CONFIG='{1}'; fi; exec '{2}' %f %p",
            origin.broken_segment(),
            gate.display(),
            bins::restore_cmd().display()
        );
        let server = site.recovering_by(&data, &command).prepare();
        let title = format!("waiting for {}", origin.broken_segment());
        let data_dir = data.clone();
        let slow =
            || wait::until("the slow segment is fetched", || startup_title(&data_dir).contains(&title));
        let mend = || fs::remove_file(&gate).unwrap();
        stops_clean_and_catches_up(
            server,
            &format!("folder, {major}, {signal}"),
            slow,
            mend,
            signal == "recovery.signal",
        );
    });
}

/// The title of the startup process of the server on `data_dir`; empty while there is none.
fn startup_title(data_dir: &Path) -> String {
    let pid_file = fs::read_to_string(data_dir.join("postmaster.pid")).unwrap_or_default();
    let Some(postmaster) = pid_file.lines().next().and_then(|line| line.parse().ok()) else {
        return String::new();
    };
    let titles = process::descendants(postmaster).into_iter().filter_map(|pid| {
        let title = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some(String::from_utf8_lossy(&title).replace('\0', " "))
    });
    titles.filter(|title| title.contains("startup")).collect()
}
