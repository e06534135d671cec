//! A server whose clock is not ours: said in one line, while everything goes on.

use walship_tests::postgres::{PgServerBuilder, primary_major};
use walship_tests::stage::Stage;
use walship_tests::wait;

use super::{Front, Receiving, server};
use crate::exact::history::faketime;

/// The server with its clock shifted by this much, as libfaketime writes it.
fn shifted(server: PgServerBuilder, by: &str) -> PgServerBuilder {
    server
        .env("LD_PRELOAD", faketime())
        .env("FAKETIME", by)
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .env("DONT_FAKE_MONOTONIC", "1")
        .env("NO_FAKE_STAT", "1")
}

#[test]
fn a_clock_that_is_off_is_said_once() {
    for (by, words) in
        [("+600", "is 10 min 0 s ahead of this machine's"), ("-7260", "is 2 h 1 min behind this machine's")]
    {
        let stage = Stage::folder("main");
        let server = shifted(server(primary_major(), 1), by).start();
        stage.init(&server);
        let checked = stage.run(&mut stage.walship_on(&server, &["check"]));
        let checked = String::from_utf8_lossy(&checked.stdout).into_owned();
        assert!(checked.contains("the clock of the server is "), "{checked}");

        let front = Front::of(&server);
        let mut receiving = Receiving::start(&stage, &front.conninfo(), &[]);
        server.psql("CREATE TABLE t (n int)");
        let mut writes = 0;
        let mut write = || {
            server.psql("INSERT INTO t VALUES (1)");
            writes += 1;
        };
        wait::until("the clock is spoken of", || {
            write();
            receiving.said().contains("warning: the clock of ")
        });
        let said = receiving.said();
        let line = said.lines().find(|line| line.contains("the clock of ")).unwrap();
        // A second may have begun since.
        let near = words.replace("10 min 0 s", "9 min 59 s");
        assert!(line.contains(words) || line.contains(&near), "{line}");
        server.psql("SELECT pg_switch_wal()");
        receiving.wait_durable(server.psql("SELECT pg_current_wal_flush_lsn()").parse().unwrap());
        assert_eq!(receiving.said().matches("the clock of ").count(), 1, "{writes}: {}", receiving.said());
        assert!(receiving.terminate().success(), "{}", receiving.said());
    }
}
