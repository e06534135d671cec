//! No server crosses a fork: the parent's segment is stored, with WAL behind the switch that the
//! followed timeline never had.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use walship_tests::postgres::{self, PgServer, StopMode};
use walship_tests::process::copy_tree;
use walship_tests::s3_inprocess::Fault as S3Fault;
use walship_tests::{bins, wait};

use super::site::{self, Kind, REPORT, Site, base_backup, create_repository, kept_until_the_end};

/// An archive with a fork inside a segment. Timeline 1 has a row of an old primary that went on behind
/// the switch; timeline 2 has a row of the promoted standby.
pub(super) struct Forked {
    home: PathBuf,
    /// The segment with the fork, on timeline 1 and on timeline 2.
    pub(super) fork: [String; 2],
    after: [String; 2],
    /// What archiving of the promoted standby failed.
    pub(super) failures: String,
}

impl Forked {
    fn make(major: u32) -> Self {
        let home = tempfile::Builder::new().prefix("walship-forked").tempdir().unwrap();
        let repository = home.path().join("repo");
        let archiving = |builder: postgres::PgServerBuilder| {
            builder
                .setting("archive_mode", "on")
                .setting("archive_command", format!("'{}' %p", bins::archive_cmd().display()))
                .env("WALSHIP_REPO", &repository)
                .env("WALSHIP_CLUSTER", site::CLUSTER)
        };
        let primary = archiving(PgServer::builder(major))
            .wal_segment_size_mb(1)
            .setting("autovacuum", "off")
            .setting("checkpoint_timeout", "1h")
            .setting("wal_keep_size", "64MB")
            .start();
        create_repository(&repository, &primary);
        primary.psql("CREATE TABLE t (who text)");
        base_backup(&primary, &home.path().join("base"));
        primary.psql("INSERT INTO t VALUES ('before')");
        primary.archive_now();

        let data = home.path().join("standby");
        copy_tree(&home.path().join("base"), &data);
        fs::write(data.join("standby.signal"), "").unwrap();
        let standby = archiving(PgServer::from_data_dir(&data))
            .setting("primary_conninfo", primary.socket_conninfo())
            .setting("restore_command", format!("'{}' %f %p", bins::restore_cmd().display()))
            .start();
        primary.psql("INSERT INTO t VALUES ('shared')");
        standby.wait_for("SELECT count(*) FROM t", "2");
        let fork = primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())");
        standby.promote();
        standby.psql("INSERT INTO t VALUES ('new')");
        let fork_2 = standby.archive_now();
        standby.psql("INSERT INTO t VALUES ('new 2')");
        let after_2 = standby.archive_now();
        assert_eq!(fork[8..], fork_2[8..], "the fork lies inside the segment that both went on with");
        assert_eq!(&fork_2[..8], "00000002");
        let failures = standby.psql("SELECT failed_count, last_failed_wal FROM pg_stat_archiver");

        // The old primary has not noticed anything.
        primary.psql("INSERT INTO t VALUES ('old')");
        assert_eq!(primary.archive_now(), fork);
        primary.psql("INSERT INTO t VALUES ('old 2')");
        let after = primary.archive_now();

        // What a clean stop archives is not part of the scene.
        copy_tree(&repository, &home.path().join("scene"));
        for (mut server, kept) in [(primary, "old"), (standby, "new")] {
            assert!(server.stop(StopMode::Fast).success(), "{}", server.log());
            copy_tree(server.data_dir(), &home.path().join(kept));
        }
        Self { home: kept_until_the_end(home), fork: [fork, fork_2], after: [after, after_2], failures }
    }

    pub(super) fn repository(&self) -> PathBuf {
        self.home.join("scene")
    }

    /// The data directory of the old (`"old"`) or the new primary (`"new"`), cleanly stopped, and the
    /// repository with everything that they archived before they were gone.
    pub(super) fn stopped(&self, which: &str) -> (PathBuf, PathBuf) {
        (self.home.join(which), self.home.join("repo"))
    }

    /// The segments behind the one with the fork, on timeline 1 and on timeline 2.
    pub(super) fn after(&self) -> &[String; 2] {
        &self.after
    }

    pub(super) fn restored(&self, site: &Site, signal: &str) -> PathBuf {
        let data = site.home().join("data");
        copy_tree(&self.home.join("base"), &data);
        fs::write(data.join(signal), "").unwrap();
        data
    }
}

pub(super) fn forked(major: u32) -> &'static Forked {
    static MADE: LazyLock<Mutex<Vec<(u32, &'static Forked)>>> = LazyLock::new(Mutex::default);
    let mut all = MADE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((_, made)) = all.iter().find(|(made, _)| *made == major) {
        return made;
    }
    let made: &'static Forked = Box::leak(Box::new(Forked::make(major)));
    all.push((major, made));
    made
}

const SHARED: &str = "before,shared";
const NEW: &str = "before,shared,new,new 2";
const OLD: &str = "before,shared,old,old 2";
const ROWS: &str = "SELECT string_agg(who, ',' ORDER BY ctid) FROM t";

/// Waits until the standby has asked in vain some more, and checks that it has only what both
/// timelines share.
fn waits_at_the_fork(standby: &PgServer, case: &str) {
    waits_with(standby, SHARED, "\" from archive", case);
}

/// Waits until `sign` has turned up in the standby's log some more times, and checks that it has these
/// rows all the while.
fn waits_with(standby: &PgServer, rows: &str, sign: &str, case: &str) {
    standby.wait_for(ROWS, rows);
    let rounds = || standby.log().matches(sign).count();
    let before = rounds();
    wait::until("the standby has asked again and again", || rounds() >= before + 4);
    assert_eq!(standby.psql(ROWS), rows, "{case}");
    assert_eq!(standby.psql("SELECT pg_is_in_recovery()"), "t", "{case}");
}

#[test]
fn a_standby_follows_the_fork_when_all_is_there() {
    for major in postgres::majors() {
        let forked = forked(major);
        let site = Site::new(Kind::Folder, &forked.repository());
        let standby = site.recovering(&forked.restored(&site, "standby.signal")).start();
        standby.wait_for(ROWS, NEW);
        assert!(!standby.log().contains(REPORT), "{}", standby.log());
    }
}

#[test]
fn a_standby_stops_at_the_fork_while_the_new_timelines_segment_is_a_hole() {
    for major in postgres::majors() {
        let forked = forked(major);
        let site = Site::new(Kind::Folder, &forked.repository());
        let hole = site.remove(&forked.fork[1]);
        let standby = site.recovering(&forked.restored(&site, "standby.signal")).start();
        waits_with(&standby, "before", REPORT, "hole");
        assert!(standby.log().contains("a hole"), "{}", standby.log());
        site.put_all(&hole);
        standby.wait_for(ROWS, NEW);
    }
}

#[test]
fn a_standby_gets_the_parents_bytes_up_to_the_fork_only() {
    for major in postgres::majors() {
        let forked = forked(major);
        let site = Site::new(Kind::Folder, &forked.repository());
        // The promoted standby has not archived any segment yet.
        let mut later = site.remove(&forked.fork[1]);
        later.append(&mut site.remove(&forked.after[1]));
        let mut standby = site.recovering(&forked.restored(&site, "standby.signal")).start();
        waits_at_the_fork(&standby, "absent");
        // A restart begins in the middle of it.
        standby.psql("CHECKPOINT");
        standby.restart();
        waits_at_the_fork(&standby, "absent, after a restart");
        site.put_all(&later);
        standby.wait_for(ROWS, NEW);
        assert!(standby.stop(StopMode::Fast).success());
    }
}

#[test]
fn a_standby_stops_at_the_fork_while_the_new_timelines_segment_is_unknown() {
    for major in postgres::majors() {
        let forked = forked(major);
        let site = Site::new(Kind::S3, &forked.repository());
        let s3 = site.s3.as_ref().unwrap();
        let unknown = format!("{}.wal", forked.fork[1]);
        s3.set_faults(move |seen| seen.path.ends_with(&unknown).then_some(S3Fault::S3(403, "AccessDenied")));
        let standby = site.recovering(&forked.restored(&site, "standby.signal")).start();
        waits_with(&standby, "before", REPORT, "unknown");
        s3.heal();
        standby.wait_for(ROWS, NEW);
    }
}

#[test]
fn a_standby_does_not_move_while_a_newer_history_is_unknown() {
    for major in postgres::majors() {
        let forked = forked(major);
        let site = Site::new(Kind::S3, &forked.repository());
        let s3 = site.s3.as_ref().unwrap();
        s3.set_faults(|seen| {
            seen.path.ends_with("00000002.history").then_some(S3Fault::S3(500, "InternalError"))
        });
        let mut standby = site.recovering(&forked.restored(&site, "standby.signal")).prepare();
        standby.launch();
        wait::until("the standby has asked again and again", || {
            standby.log().matches("00000002.history, asked for before").count() >= 3
        });
        assert!(!standby.log().contains("restored log file"), "{}", standby.log());
        s3.heal();
        standby.wait_until_ready().unwrap();
        standby.wait_for(ROWS, NEW);
    }
}

#[test]
fn a_standby_hears_of_a_fork_that_turns_up_while_it_waits() {
    for major in postgres::majors() {
        let forked = forked(major);
        let site = Site::new(Kind::S3, &forked.repository());
        let mut fork = site.remove("00000002");
        fork.append(&mut site.remove(&forked.fork[0]));
        fork.append(&mut site.remove(&forked.after[0]));
        let standby = site.recovering(&forked.restored(&site, "standby.signal")).start();
        standby.wait_for(ROWS, "before");
        // Everything turns up between the standby's question for the history file and its next one for
        // the segment: the worst moment.
        let s3 = site.s3.as_ref().unwrap();
        let storage_prefix = site.home().file_name().unwrap().to_str().unwrap().to_owned();
        let (inner, segment) = (Arc::downgrade(s3), format!("{}.wal", forked.fork[0]));
        let (history_asked, done) = (AtomicBool::new(false), Arc::new(AtomicBool::new(false)));
        let done_there = done.clone();
        s3.set_faults(move |seen| {
            if seen.path.ends_with("00000002.history") {
                history_asked.store(true, Ordering::SeqCst);
            } else if history_asked.load(Ordering::SeqCst)
                && seen.path.ends_with(&segment)
                && !done_there.swap(true, Ordering::SeqCst)
            {
                let server = inner.upgrade().unwrap();
                for (key, bytes) in &fork {
                    server.put(&format!("{storage_prefix}/{key}"), bytes.clone());
                }
            }
            None
        });
        standby.wait_for(ROWS, NEW);
        assert!(done.load(Ordering::SeqCst));
        assert!(standby.log().contains("has turned up"), "{}", standby.log());
    }
}

#[test]
fn one_shot_recovery_at_a_fork_stops_or_ends_there_and_never_crosses() {
    for major in postgres::majors() {
        let forked = forked(major);
        // A hole on the followed timeline: an error.
        let site = Site::new(Kind::Folder, &forked.repository());
        site.remove(&forked.fork[1]);
        let mut server = site.recovering(&forked.restored(&site, "recovery.signal")).prepare();
        server.launch();
        assert!(!server.wait_for_exit().success());
        let fatal = format!("FATAL:  could not restore file \"{}\" from archive", forked.fork[1]);
        assert!(server.log().contains(&fatal), "{}", server.log());
        site::assert_never_promoted(&server, "recovery.signal");

        // Nothing on the followed timeline yet: the archive ends at the fork.
        let site = Site::new(Kind::Folder, &forked.repository());
        site.remove(&forked.fork[1]);
        site.remove(&forked.after[1]);
        let server = site.recovering(&forked.restored(&site, "recovery.signal")).start();
        server.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(server.psql(ROWS), SHARED);
        assert_eq!(server.psql("SELECT timeline_id FROM pg_control_checkpoint()"), "3");
        drop(server);

        // All there: the newest timeline, to its end.
        let site = Site::new(Kind::Folder, &forked.repository());
        let server = site.recovering(&forked.restored(&site, "recovery.signal")).start();
        server.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(server.psql(ROWS), NEW);
    }
}

#[test]
fn a_server_pinned_to_the_old_timeline_gets_all_of_it() {
    for major in postgres::majors() {
        let forked = forked(major);
        let site = Site::new(Kind::Folder, &forked.repository());
        let data = forked.restored(&site, "recovery.signal");
        // An earlier attempt with another target has left this behind.
        site_history_into(&site, &data);
        let server = site.recovering(&data).setting("recovery_target_timeline", "1").start();
        server.wait_for("SELECT pg_is_in_recovery()", "f");
        assert_eq!(server.psql(ROWS), OLD);
        assert_eq!(server.psql("SELECT timeline_id FROM pg_control_checkpoint()"), "3");
    }
}

fn site_history_into(site: &Site, data: &std::path::Path) {
    let target = data.join("pg_wal/00000002.history");
    let mut fetch = std::process::Command::new(bins::restore_cmd());
    fetch.args(["00000002.history"]).arg(&target).envs(site.env());
    walship_tests::process::run_ok(&mut fetch);
    assert!(target.exists());
}
