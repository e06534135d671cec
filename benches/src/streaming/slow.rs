//! What a receiver and a slow store do to a server whose commits do not wait for them.

use std::fmt::Write as _;

use walship_tests::postgres::PgServer;

use super::receiver::{Receiver, tps};
use super::site::{Site, Store, busy_server};
use crate::measure::{median, quantile};
use crate::tables::Effort;

/// Who listens meanwhile.
const LISTENERS: [(&str, Option<Store>); 4] = [
    ("nobody", None),
    ("`walship receive`, folder", Some(Store::Folder)),
    ("`walship receive`, S3", Some(Store::S3(0))),
    ("`walship receive`, S3, 25 ms away", Some(Store::S3(25))),
];

/// Throughput of a server that is busy, with and without a receiver.
pub fn slow_stores(effort: Effort) -> String {
    let (rounds, seconds) = if effort.long_rounds > 1 { (9, 5) } else { (3, 3) };
    let server = busy_server();
    server.pgbench(&["-i", "-q", "-s", "20"]);
    // Once around, so that rounds differ little in how many page images they write.
    server.pgbench(&["-n", "-c", "8", "-j", "2", "-T", "15"]);
    let mut runs = vec![Vec::new(); LISTENERS.len()];
    for round in 0..rounds {
        for turn in 0..LISTENERS.len() {
            let index = (round + turn) % LISTENERS.len();
            runs[index].push(measure(&server, LISTENERS[index].1, seconds));
        }
    }
    let mut text = String::from(
        "\n| who listens | TPS | beside nobody | lowest and highest round | beside the folder | lowest and highest round |\n\
         |---|---|---|---|---|---|\n",
    );
    for ((title, _), own) in LISTENERS.iter().zip(&runs) {
        let _ = write!(text, "| {title} | {:.0} |", median(own.clone()));
        for other in [&runs[0], &runs[1]] {
            let ratios: Vec<f64> = own.iter().zip(other).map(|(own, other)| own / other).collect();
            let (low, high) = (quantile(&ratios, 0.0), quantile(&ratios, 1.0));
            let _ = write!(text, " {:.2} | {low:.2} to {high:.2} |", median(ratios));
        }
        text.push('\n');
    }
    text
}

fn measure(server: &PgServer, store: Option<Store>, seconds: usize) -> f64 {
    let listening = store.map(|store| {
        let site = Site::new(store, server);
        (Receiver::walship(&site, server, &["--slot", "bench"]), site)
    });
    let said = server.pgbench(&["-n", "-c", "8", "-j", "2", "-T", &seconds.to_string()]);
    if let Some((receiver, site)) = listening {
        drop(receiver);
        drop(site);
        server.wait_for("SELECT active FROM pg_replication_slots", "f");
        server.psql("SELECT pg_drop_replication_slot('bench')");
    }
    tps(&said)
}
