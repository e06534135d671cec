//! Settings files outside the data directory, as Debian has them: saved beside the backup, given back.

use std::fs;

use tempfile::TempDir;
use walship_tests::postgres::{PgServer, majors};
use walship_tests::stage::Stage;

#[test]
fn settings_files_outside_the_data_directory_are_saved_and_given_back() {
    for major in majors() {
        let stage = Stage::folder("main");
        let etc = TempDir::new().unwrap();
        let (hba, ident) = (etc.path().join("pg_hba.conf"), etc.path().join("it's ident.conf"));
        let hba_text = "# Ärger\nlocal all all trust\nlocal replication all trust\nhost all all 127.0.0.1/32 trust\n\
                        host replication all 127.0.0.1/32 trust\n";
        fs::write(&hba, hba_text).unwrap();
        fs::write(&ident, b"# \xFF is not UTF-8\n").unwrap();
        let included = etc.path().join("more.conf");
        fs::write(&included, "work_mem = 5MB\n").unwrap();
        let server = stage
            .archiving(PgServer::builder(major))
            .setting("hba_file", hba.display())
            .setting("ident_file", ident.display())
            .start();
        fs::write(
            server.data_dir().join("postgresql.auto.conf"),
            format!("include '{}'\n", included.display()),
        )
        .unwrap();
        stage.init(&server);

        // A role that may not look: said, and the backup is none the worse.
        server.psql("CREATE ROLE copier LOGIN REPLICATION");
        let mut limited = stage.walship_on(&server, &["backup"]);
        let output = stage.run(limited.env("PGUSER", "copier"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("pg_read_server_files"), "{said}");
        let data = stage.path().join("unknown");
        let folder = stage.path().join("settings");
        let [data, folder_text] = [&data, &folder].map(|path| path.to_str().unwrap());
        let args = ["restore", "--latest", "-D", data, "--settings-dir", folder_text];
        let refused = stage.fails(&mut stage.pitr(&args), 2);
        assert!(refused.contains("no settings files"), "{refused}");

        let said = String::from_utf8_lossy(&stage.run(&mut stage.walship_on(&server, &["backup"])).stderr)
            .into_owned();
        assert!(!said.contains("warning"), "{said}");
        let plain = stage.path().join("plain");
        let said = stage.ok(&mut stage.pitr(&["restore", "--latest", "-D", plain.to_str().unwrap()]));
        assert!(said.contains("pg_hba.conf") && said.contains("--settings-dir DIR"), "{said}");
        stage.ok(&mut stage.pitr(&args));
        for path in [&hba, &ident, &included] {
            let given_back = folder.join(path.strip_prefix("/").unwrap());
            assert_eq!(fs::read(given_back).unwrap(), fs::read(path).unwrap(), "{}", path.display());
        }
        let refused = stage.fails(stage.pitr(&args[..4]).args(["--settings-dir", folder_text]), 2);
        assert!(refused.contains("is not empty"), "{refused}");
    }
}
