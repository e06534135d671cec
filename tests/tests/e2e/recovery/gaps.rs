//! A segment that was given up is no end of the archive, even where nothing later is stored.

use std::process::Command;

use walship_tests::postgres;
use walship_tests::process::{self, RunOptions};
use walship_tests::{bins, wait};

use super::site::{Kind, REPORT, Site, assert_never_promoted, control};
use super::{BROKEN_ROW, ROWS, origin};

#[test]
fn nobody_takes_a_segment_that_was_given_up_for_the_end() {
    for major in postgres::majors() {
        super::side_by_side(&[Kind::Folder, Kind::S3], |kind| {
            let case = format!("{kind:?}, {major}");
            let origin = origin(major);
            let site = Site::new(kind, &origin.repository());
            let mut removed = Vec::new();
            for segment in &origin.segments[BROKEN_ROW - 1..] {
                removed.push(site.remove(segment));
            }
            let mut give_up = Command::new(bins::walship());
            give_up.envs(site.env()).args(["wal", "give-up", origin.broken_segment()]);
            give_up.args(["--reason", "never written", "--yes"]);
            let output = process::run(&mut give_up, RunOptions::default());
            assert!(output.status.success(), "{case}: {}", String::from_utf8_lossy(&output.stderr));

            let one_shot = Site::home(&site).join("one-shot");
            std::fs::rename(origin.restored(&site, "recovery.signal"), &one_shot).unwrap();
            let mut server = site.recovering(&one_shot).prepare();
            server.launch();
            let status = server.wait_for_exit();
            let log = server.log();
            assert!(!status.success(), "{case}: {status}\n{log}");
            assert!(log.contains("never written"), "{case}:\n{log}");
            assert_never_promoted(&server, "recovery.signal");

            let standby = site.recovering(&origin.restored(&site, "standby.signal")).start();
            wait::until("the standby was refused several times", || {
                standby.log().matches(REPORT).count() >= 3
            });
            let rows = standby.psql("SELECT count(*), pg_is_in_recovery() FROM t");
            assert_eq!(rows, format!("{}|t", BROKEN_ROW - 1), "{case}");
            assert_eq!(control(&standby, "Latest checkpoint's TimeLineID"), "1", "{case}");

            // The WAL turns up after all, the gap is closed.
            removed.iter().for_each(|objects| site.put_all(objects));
            standby.wait_for("SELECT count(*) FROM t", &ROWS.to_string());
            server.start();
            server.wait_for("SELECT pg_is_in_recovery()", "f");
            server.wait_for("SELECT count(*) FROM t", &ROWS.to_string());
        });
    }
}
