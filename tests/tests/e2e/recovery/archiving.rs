//! Archiving around promotions, and by standbys; `pg_rewind`.

use std::fs;
use std::io::Write as _;

use walship_tests::postgres::{self, PgServer};
use walship_tests::process::{self, RunOptions, copy_tree};
use walship_tests::{bins, wait};

use super::forks::forked;
use super::origin;
use super::site::{Kind, Site};

#[test]
fn a_promotion_is_archived_without_a_hitch() {
    for major in postgres::majors() {
        let forked = forked(major);
        assert_eq!(forked.failures, "0|", "the promoted standby archived everything at the first attempt");
        let site = Site::new(Kind::Folder, &forked.repository());
        assert_eq!(names(&site, "00000002.history"), ["00000002.history"]);
        let [old, new] = &forked.fork;
        let of_old = names(&site, old);
        assert!(of_old.contains(&format!("{old}.wal")), "the old primary's whole segment: {of_old:?}");
        let partials = of_old.iter().filter(|key| key.starts_with(&format!("{old}.partial."))).count();
        assert_eq!(partials, 1, "the promoted standby's part of it: {of_old:?}");
        // It begins with its parent's pages and is whole all the same.
        assert_eq!(names(&site, new), [format!("{new}.wal")]);
    }
}

fn names(site: &Site, file: &str) -> Vec<String> {
    site.keys_of(file).iter().map(|key| key.rsplit('/').next().unwrap().to_owned()).collect()
}

#[test]
fn a_standby_that_archives_always_stores_the_same_bytes_again() {
    for major in postgres::majors() {
        let origin = origin(major);
        let site = Site::new(Kind::Folder, &origin.repository());
        let before = site.keys();
        let standby = site
            .recovering(&origin.restored(&site, "standby.signal"))
            .setting("archive_mode", "always")
            .setting("archive_command", format!("'{}' %p", bins::archive_cmd().display()))
            .start();
        archived(&standby, origin.segments.last().unwrap());
        assert_eq!(site.keys(), before, "nothing is stored twice");
    }
}

/// Waits until the standby has archived `file`, and checks that archiving never failed.
fn archived(standby: &PgServer, file: &str) {
    let question = "SELECT last_archived_wal, failed_count FROM pg_stat_archiver";
    let answer = format!("{file}|0");
    wait::until(&format!("the standby has archived {file}"), || {
        standby.try_psql(question).as_deref() == Ok(&answer)
            || standby.data_dir().join(format!("pg_wal/archive_status/{file}.done")).exists()
    });
    assert_eq!(standby.psql("SELECT failed_count FROM pg_stat_archiver"), "0", "{}", standby.log());
}

#[test]
fn a_cut_segment_that_is_archived_again_is_kept_apart() {
    for major in postgres::majors() {
        let forked = forked(major);
        let site = Site::new(Kind::Folder, &forked.repository());
        let mut later = site.remove(&forked.fork[1]);
        later.append(&mut site.remove(&forked.after()[1]));
        let [old, new] = &forked.fork;
        let before = names(&site, old);
        let standby = site
            .recovering(&forked.restored(&site, "standby.signal"))
            .setting("archive_mode", "always")
            .setting("archive_command", format!("'{}' %p", bins::archive_cmd().display()))
            .start();
        archived(&standby, old);
        let added: Vec<_> = names(&site, old).into_iter().filter(|name| !before.contains(name)).collect();
        let apart = |name: &String| name.starts_with(&format!("{old}.incomplete."));
        assert!(added.len() == 1 && added.iter().all(apart), "{added:?}");

        // The real ones come, are replayed, and archived again as what they are.
        site.put_all(&later);
        archived(&standby, new);
        assert_eq!(names(&site, new), [format!("{new}.wal")]);
        assert_eq!(names(&site, old).len(), before.len() + 1);
    }
}

#[test]
fn pg_rewind_fetches_from_the_archive_and_never_takes_an_outage_for_an_absence() {
    // pg_rewind insists on its own major, and there is none to be had for 14.
    let own_tools = |major: &u32| postgres::PgBinaries::find(*major).tools_major() == *major;
    for major in postgres::majors().into_iter().filter(own_tools) {
        let forked = forked(major);
        let (old, repository) = forked.stopped("old");
        let (new, _) = forked.stopped("new");
        let site = Site::new(Kind::Folder, &repository);
        let (target, source) = (site.home().join("data"), site.home().join("source"));
        copy_tree(&old, &target);
        copy_tree(&new, &source);
        fs::remove_file(target.join("pg_wal").join(&forked.fork[0])).unwrap();
        let mut conf = fs::OpenOptions::new().append(true).open(target.join("postgresql.auto.conf")).unwrap();
        writeln!(conf, "restore_command = '{} %f %p'", bins::restore_cmd().display()).unwrap();

        let rewind = |repository: Option<&str>| {
            let binaries = postgres::PgBinaries::find(major);
            let mut rewind = binaries.unprivileged("pg_rewind");
            rewind.arg("-c").arg("-D").arg(&target).arg("--source-pgdata").arg(&source).envs(site.env());
            if let Some(repository) = repository {
                rewind.env("WALSHIP_REPO", repository);
            }
            process::run(&mut rewind, RunOptions::default())
        };
        let control = fs::read(target.join("global/pg_control")).unwrap();
        let output = rewind(Some("file:///nowhere/at/all"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{said}");
        // 126 is a failure of the command, not an absent file; the words differ from major to major.
        assert!(said.contains("restore_command") && said.contains("failed"), "{said}");
        assert!(!said.contains("could not restore file"), "{said}");
        assert_eq!(fs::read(target.join("global/pg_control")).unwrap(), control, "nothing was rewound");

        let output = rewind(None);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::write(target.join("standby.signal"), "").unwrap();
        let server = site.recovering(&target).start();
        server.wait_for("SELECT string_agg(who, ',' ORDER BY ctid) FROM t", "before,shared,new,new 2");
    }
}
