//! What commits wait for when a receiver is their synchronous standby.

use std::fmt::Write as _;
use std::fs;

use walship_tests::postgres::PgServer;

use super::receiver::Receiver;
use super::site::{Site, Store, busy_server};
use crate::measure::{median, quantile};
use crate::tables::Effort;

/// How many sessions commit at once.
const CLIENTS: [usize; 3] = [1, 8, 32];

/// Who has to have a commit before it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standby {
    Nobody,
    PgReceivewal,
    Walship(Store),
    /// `walship receive --flush local`: the spool; the store follows.
    Spool(Store),
}

const STANDBYS: [Standby; 7] = [
    Standby::PgReceivewal,
    Standby::Nobody,
    Standby::Walship(Store::Folder),
    Standby::Walship(Store::S3(0)),
    Standby::Walship(Store::S3(5)),
    Standby::Walship(Store::S3(25)),
    Standby::Spool(Store::S3(25)),
];

impl Standby {
    fn title(self) -> String {
        match self {
            Self::Nobody => "nobody: the server's own disk".to_owned(),
            Self::PgReceivewal => "`pg_receivewal --synchronous`, folder".to_owned(),
            Self::Walship(store) => format!("`walship receive --flush repository`, {}", store.title()),
            Self::Spool(store) => format!("`walship receive --flush local`, {}", store.title()),
        }
    }
}

/// One run of pgbench.
#[derive(Debug, Clone, Copy)]
struct Run {
    tps: f64,
    median_ms: f64,
    worst_ms: f64,
}

/// Throughput and latency of commits that wait for a receiver.
pub fn commits(effort: Effort) -> String {
    let (rounds, seconds) = if effort.long_rounds > 1 { (3, 4) } else { (1, 2) };
    let server = busy_server();
    server.psql("CREATE TABLE committed (client int, at timestamptz DEFAULT clock_timestamp())");
    // By standby, then clients: the rounds.
    let mut runs = vec![vec![Vec::new(); CLIENTS.len()]; STANDBYS.len()];
    for round in 0..rounds {
        for turn in 0..STANDBYS.len() {
            let index = (round + turn) % STANDBYS.len();
            for (own, run) in runs[index].iter_mut().zip(measure(&server, STANDBYS[index], seconds)) {
                own.push(run);
            }
        }
    }
    let mut text = String::from(
        "\n| who has it before a commit returns | clients | TPS | beside the first | median ms | 99 % ms |\n\
         |---|---|---|---|---|---|\n",
    );
    for (standby, by_clients) in STANDBYS.iter().zip(&runs) {
        for ((clients, own), first) in CLIENTS.iter().zip(by_clients).zip(&runs[0]) {
            let of = |pick: fn(&Run) -> f64| median(own.iter().map(pick).collect());
            let ratio = median(own.iter().zip(first).map(|(own, first)| own.tps / first.tps).collect());
            let _ = writeln!(
                text,
                "| {} | {clients} | {:.0} | {ratio:.2} | {:.2} | {:.2} |",
                standby.title(),
                of(|run| run.tps),
                of(|run| run.median_ms),
                of(|run| run.worst_ms)
            );
        }
    }
    text
}

/// One run for each number of clients.
fn measure(server: &PgServer, standby: Standby, seconds: usize) -> Vec<Run> {
    let wait_for = |name: &str| {
        server.psql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'"));
        server.psql("SELECT pg_reload_conf()");
        if !name.is_empty() {
            server.wait_for("SELECT sync_state FROM pg_stat_replication", "sync");
        }
    };
    let all = || CLIENTS.iter().map(|clients| pgbench(server, *clients, seconds)).collect();
    let runs = match standby {
        Standby::Nobody => all(),
        Standby::PgReceivewal => {
            let created = server.run_tool("pg_receivewal", &["--slot", "bench", "--create-slot"]);
            assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
            let _receiver = Receiver::pg_receivewal(server, "bench", &["--synchronous"]);
            wait_for("pg_receivewal");
            let runs = all();
            wait_for("");
            runs
        }
        Standby::Walship(store) | Standby::Spool(store) => {
            let site = Site::new(store, server);
            let spool = tempfile::tempdir().expect("a temporary folder can be made");
            let mut args = vec!["--slot", "bench", "--flush"];
            match standby {
                Standby::Spool(_) => {
                    let folder = spool.path().to_str().expect("scratch paths are UTF-8");
                    args.extend(["local", "--spool", folder]);
                }
                _ => args.push("repository"),
            }
            let _receiver = Receiver::walship(&site, server, &args);
            wait_for("walship");
            let runs = all();
            wait_for("");
            runs
        }
    };
    if standby != Standby::Nobody {
        server.wait_for("SELECT active FROM pg_replication_slots", "f");
        server.psql("SELECT pg_drop_replication_slot('bench')");
    }
    runs
}

/// Commits one row each, as fast as it goes.
fn pgbench(server: &PgServer, clients: usize, seconds: usize) -> Run {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let script = folder.path().join("script");
    fs::write(&script, "INSERT INTO committed VALUES (:client_id);\n").expect("the scratch folder has room");
    let mut pgbench = server.tool("pgbench");
    pgbench.args(["-n", "-M", "prepared", "-l", "--log-prefix"]).arg(folder.path().join("log"));
    pgbench.arg("-c").arg(clients.to_string()).arg("-T").arg(seconds.to_string()).arg("-f").arg(&script);
    walship_tests::process::run_ok(&mut pgbench);
    let mut micros = Vec::new();
    for entry in fs::read_dir(folder.path()).expect("the folder is ours").flatten() {
        if entry.path() != script {
            let log = fs::read_to_string(entry.path()).expect("pgbench's log is text");
            let times = log.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<f64>().ok());
            micros.extend(times);
        }
    }
    Run {
        tps: micros.len() as f64 / seconds as f64,
        median_ms: quantile(&micros, 0.5) / 1e3,
        worst_ms: quantile(&micros, 0.99) / 1e3,
    }
}
