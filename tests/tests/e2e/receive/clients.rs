//! Clients that remember outside of the server what it has acknowledged.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use walship_tests::postgres::PgServer;
use walship_tests::process;

/// How many clients commit at the same time.
const CLIENTS: usize = 4;

/// More than any of them commits in a round.
const COMMITS_MAX: usize = 30_000;

/// Sessions that commit one row after the other.
pub(crate) struct Clients(Vec<Client>);

/// What a session knows to be committed: rows 0 to `last` of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Acknowledged {
    round: usize,
    client: usize,
    pub(crate) last: u64,
}

struct Client {
    child: Child,
    round: usize,
    number: usize,
    acknowledged: std::path::PathBuf,
}

impl Clients {
    /// Makes the table that they write to.
    pub(crate) fn table(server: &PgServer) {
        server.psql("CREATE TABLE committed (round int, client int, n int, filler text)");
    }

    /// Starts them; what they are told goes to files in `folder`.
    pub(crate) fn start(server: &PgServer, folder: &Path, round: usize) -> Self {
        Self((0..CLIENTS).map(|number| Client::start(server, folder, round, number)).collect())
    }

    /// Returns what is acknowledged by now; they go on.
    pub(crate) fn so_far(&self) -> Vec<Acknowledged> {
        self.0.iter().filter_map(Client::last).collect()
    }

    /// Returns what was acknowledged, once all of them are gone: the server is dead.
    pub(crate) fn end(mut self) -> Vec<Acknowledged> {
        for client in &mut self.0 {
            client.end();
        }
        self.so_far()
    }
}

impl Client {
    fn start(server: &PgServer, folder: &Path, round: usize, number: usize) -> Self {
        let acknowledged = folder.join(format!("acknowledged-{round}-{number}"));
        let script = folder.join(format!("script-{round}-{number}"));
        let mut text = std::io::BufWriter::new(fs::File::create(&script).unwrap());
        for n in 0..COMMITS_MAX {
            // Some rows are longer than others: records cross pages and segments in many ways.
            let filler = if n % 17 == 0 { 1500 } else { 20 };
            writeln!(
                text,
                "INSERT INTO committed VALUES ({round}, {number}, {n}, repeat('x', {filler})) RETURNING n;"
            )
            .unwrap();
        }
        text.into_inner().unwrap();
        let psql = server.tool("psql");
        let mut command = process::guarded(psql.get_program());
        for (name, value) in psql.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]);
        command.stdin(fs::File::open(&script).unwrap());
        command.stdout(fs::File::create(&acknowledged).unwrap()).stderr(Stdio::null());
        Self { child: process::spawn(command).unwrap(), round, number, acknowledged }
    }

    fn end(&mut self) {
        if process::wait_within(&mut self.child, Duration::from_secs(10)).is_none() {
            process::kill_tree(&mut self.child);
        }
    }

    fn last(&self) -> Option<Acknowledged> {
        let text = fs::read_to_string(&self.acknowledged).unwrap();
        // Each is a line; what is no whole line was not read as an answer.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let last = whole.lines().last()?.parse().unwrap();
        Some(Acknowledged { round: self.round, client: self.number, last })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            process::kill_tree(&mut self.child);
        }
    }
}

/// Returns how many commits these are.
pub(crate) fn commits(acknowledged: &[Acknowledged]) -> u64 {
    acknowledged.iter().map(|session| session.last + 1).sum()
}

/// Returns what of it the server does not have; empty when nothing is lost.
pub(crate) fn lost(server: &PgServer, acknowledged: &[Acknowledged]) -> String {
    if acknowledged.is_empty() {
        return String::new();
    }
    let values: Vec<String> = acknowledged
        .iter()
        .map(|Acknowledged { round, client, last }| format!("({round}, {client}, {last})"))
        .collect();
    server.psql(&format!(
        "WITH found AS (SELECT round, client, n FROM committed)
         SELECT string_agg(format('round %s client %s: %s of %s', round, client, present, last + 1), '; ')
         FROM (SELECT v.round, v.client, v.last, count(f.n) AS present
               FROM (VALUES {}) v (round, client, last)
               LEFT JOIN found f ON f.round = v.round AND f.client = v.client AND f.n <= v.last
               GROUP BY v.round, v.client, v.last) s
         WHERE present <> last + 1",
        values.join(", ")
    ))
}
