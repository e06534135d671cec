//! `pitr info --html`: the page of a real archive says what its JSON says, and is written whole or not at all.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use serde_json::Value;
use walship_tests::postgres::{PgServer, majors};
use walship_tests::stage::Stage;

/// A time as the page shows it.
fn shown(time: &Value) -> String {
    format!("{}Z", time.as_str().unwrap()[..19].replace('T', " "))
}

fn heading(page: &str) -> &str {
    page.split("<h1>").nth(1).unwrap().split("</h1>").next().unwrap()
}

#[test]
fn a_page_says_what_the_archive_holds() {
    for major in majors() {
        let stage = Stage::folder("main");
        let server = stage.archiving(PgServer::builder(major).wal_segment_size_mb(1)).start();
        stage.init(&server);
        let path = stage.path().join("page.html");
        let page = |path: &Path| {
            let mut info = stage.pitr(&["info", "--html"]);
            assert_eq!(stage.ok(info.arg(path)), "");
            fs::read_to_string(path).unwrap()
        };
        let empty = page(&path);
        assert!(heading(&empty).contains("something is wrong"), "{}", heading(&empty));
        assert!(empty.contains("there is no complete backup") && empty.contains("nothing to draw"));

        server.psql("create table t (n int); insert into t values (1)");
        stage.backup(&server);
        server.psql("insert into t values (2); select pg_create_restore_point('here <b>')");
        server.archive_now();
        let mut drill = stage.pitr_as_user(&["drill", "--latest", "--reason", "is it <real>?", "--scratch"]);
        drill.arg(stage.path().join("scratch")).arg("--pg-bin").arg(server.binaries().server_bin());
        stage.ok(&mut drill);
        stage.ok(&mut stage.pitr(&["verify"]));
        // A page that is there is replaced, and keeps its mode.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let good = page(&path);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(heading(&good).contains("in order"), "{good}");
        let printed: Value = serde_json::from_str(&stage.ok(&mut stage.pitr(&["info", "--json"]))).unwrap();
        let window = &printed["timelines"][0]["windows"][0];
        let backup = &printed["backups"][0];
        for said in [
            shown(&window["from_time"]),
            shown(&window["latest_transaction"]["time"]),
            format!("(xid {})", window["latest_transaction"]["xid"]),
            format!("{} to {}", window["from_lsn"].as_str().unwrap(), window["until_lsn"].as_str().unwrap()),
            backup["id"].as_str().unwrap().to_owned(),
            shown(&backup["finished"]),
            "here &lt;b&gt;".to_owned(),
            "reason: is it &lt;real&gt;?".to_owned(),
            "<path class=\"proven\"".to_owned(),
            "<dt>Last verification</dt><dd class=\"value good\">sound</dd>".to_owned(),
            "<rect class=\"window\"".to_owned(),
        ] {
            assert!(good.contains(&said), "{said}\n{good}");
        }
        assert!(!good.contains("<rect class=\"gap\"") && !good.contains("<b>\"") && !good.contains("<real>"));

        // WAL that is given up is a gap, at the archive's end.
        let last = printed["timelines"][0]["last_segment"].as_str().unwrap();
        let next = format!("{:024X}", u128::from_str_radix(last, 16).unwrap() + 1);
        stage.ok(&mut stage.walship(&["wal", "give-up", &next, "--reason", "lost & gone", "--yes"]));
        let cut = stage.ok(&mut stage.pitr(&["info", "--html", "-"]));
        assert!(heading(&cut).contains("something is wrong"), "{}", heading(&cut));
        for said in
            ["<rect class=\"gap\"", "lost &amp; gone", &next, "the end of the archive cannot be reached"]
        {
            assert!(cut.contains(said), "{said}\n{cut}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), good);
    }
}

#[test]
fn a_page_that_cannot_be_written_leaves_the_old_one() {
    let stage = Stage::folder("main");
    let server = stage.archiving(PgServer::builder(majors()[0]).wal_segment_size_mb(1)).start();
    stage.init(&server);
    for (target, status, said) in [
        (stage.path().join("none/page.html"), 1, "No such file"),
        (stage.path().to_owned(), 2, "is a folder"),
        ("/dev/full".into(), 1, "No space left on device"),
    ] {
        let mut info = stage.pitr(&["info", "--html"]);
        let output = stage.run(info.arg(&target));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{error}");
        assert!(
            error.contains(said) && error.contains("\nsafe:  a page that was there before is unchanged"),
            "{error}"
        );
        assert_eq!(error.lines().count(), 3, "{error}");
        assert!(output.stdout.is_empty());
    }
    let both = stage.run(&mut stage.pitr(&["info", "--html", "-", "--json"]));
    assert_eq!(both.status.code(), Some(2));
}
