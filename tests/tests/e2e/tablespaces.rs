//! Tablespaces whose locations are too long for the links in a tar archive.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use walship_tests::postgres::{PgServer, StopMode, majors};
use walship_tests::stage::Stage;

/// Makes a folder whose path has more than 99 bytes, and one whose path has fewer.
fn locations(root: &Path) -> [PathBuf; 2] {
    let long = root.join("long".repeat(30)).join("and a blank");
    let short = root.join("short");
    assert!(long.as_os_str().len() > 130 && short.as_os_str().len() < 99);
    [long, short].map(|folder| {
        fs::create_dir_all(&folder).unwrap();
        folder
    })
}

fn check(server: &PgServer, locations: &[PathBuf; 2]) {
    server.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(server.psql("SELECT count(*) FROM far"), "4000", "{}", server.log());
    assert_eq!(server.psql("SELECT count(*) FROM near"), "2000");
    let found = server.psql(
        "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname LIKE 's\\_%' ORDER BY spcname",
    );
    let expected: Vec<_> = locations.iter().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(found, expected.join("\n"));
}

#[test]
fn a_long_tablespace_location_is_backed_up_and_restored_there_or_elsewhere() {
    for major in majors() {
        let stage = Stage::folder("main");
        let spaces = TempDir::new().unwrap();
        let old = locations(&spaces.path().join("old"));
        let mut server = stage.archiving(PgServer::builder(major)).start();
        stage.init(&server);
        let [long, short] = old.each_ref().map(|path| path.to_str().unwrap());
        server.psql(&format!(
            "CREATE TABLESPACE s_1 LOCATION '{long}'; CREATE TABLESPACE s_2 LOCATION '{short}';
             CREATE TABLE far TABLESPACE s_1 AS SELECT generate_series(1, 3000);
             CREATE TABLE near TABLESPACE s_2 AS SELECT generate_series(1, 2000)"
        ));
        stage.backup(&server);
        server.psql("INSERT INTO far SELECT generate_series(1, 1000)");
        server.archive_now();

        // Beside the original, which goes on: both tablespaces elsewhere.
        let new = locations(&spaces.path().join("new"));
        let [new_long, new_short] = new.each_ref().map(|path| path.to_str().unwrap());
        let copy = stage.path().join("copy");
        let maps = [format!("{long}={new_long}"), format!("{short}={new_short}")];
        let args = ["restore", "--latest", "-D", copy.to_str().unwrap(), "--tablespace-mapping", &maps[0]];
        stage.ok(stage.pitr(&args).args(["--tablespace-mapping", &maps[1]]));
        check(&stage.recovering(&copy).start(), &new);
        check(&server, &old);

        // In its place: what is written is exactly what the server's manifest lists.
        server.stop(StopMode::Fast);
        fs::rename(spaces.path().join("old"), spaces.path().join("lost")).unwrap();
        let again = stage.path().join("again");
        stage.ok(&mut stage.pitr(&["restore", "--latest", "-D", again.to_str().unwrap()]));
        let mut verify = server.binaries().tool("pg_verifybackup");
        stage.ok(verify.arg("-n").arg(&again));
        check(&stage.recovering(&again).start(), &old);
    }
}
