//! Prints the tables of `docs/benchmarks.md`; `benches/run` builds and calls it.

use walship_benches::tables::{self, Effort};
use walship_benches::{measure, peers, scale, streaming};

/// A table's title and what makes it.
type Table = (&'static str, fn(Effort) -> String);

const TABLES: [Table; 19] = [
    ("Record decoding", tables::decoding),
    ("Codecs", tables::codecs),
    ("Segment objects", tables::encoding),
    ("One segment, whole processes", tables::processes),
    ("Base backup and restore", tables::backups),
    ("Ten million segments", |_| scale::table()),
    ("A hundred thousand objects on S3", |_| scale::stored_table()),
    ("Streaming: age of the newest durable commit", streaming::ages),
    ("Streaming: synchronous commits", streaming::commits),
    ("Streaming: a slow store", streaming::slow_stores),
    ("Streaming: catching up", streaming::catching_up),
    ("Peers: a call of the thin commands", peers::calls),
    ("Peers: segments that wait", peers::waiting),
    ("Peers: a server at work", peers::load),
    ("Peers: replay", peers::replays),
    ("Peers: one segment from cold", peers::first),
    ("Peers: base backup", peers::base_backups),
    ("Peers: incremental", peers::incrementals),
    ("Peers: restore", peers::restores),
];

fn main() {
    measure::be_the_small_process_if_asked();
    scale::be_the_measured_process_if_asked();
    let mut effort = Effort { rounds: 15, long_rounds: 5 };
    let mut wanted = Vec::new();
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--quick" => effort = Effort { rounds: 3, long_rounds: 1 },
            "-h" | "--help" => {
                println!("usage: walship-bench [--quick] [TABLE...]\n\ntables, each by its first words:");
                TABLES.iter().for_each(|(title, _)| println!("  {title}"));
                return;
            }
            table if TABLES.iter().any(|(title, _)| title.starts_with(table)) => wanted.push(argument),
            other => {
                eprintln!("walship-bench: there is no table {other:?}; see --help");
                std::process::exit(2);
            }
        }
    }
    for (title, make) in TABLES {
        if wanted.is_empty() || wanted.iter().any(|wanted| title.starts_with(wanted.as_str())) {
            println!("### {title}\n{}", make(effort));
        }
    }
}
