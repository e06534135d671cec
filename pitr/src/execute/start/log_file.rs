//! What a server wrote before it ended: the last lines that tell why.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::time::sleep;
use walship::{Error, Result};

use crate::execute::restore::make_private;

/// The file in which the server says where it logs, when a collector of its own does.
///
/// Source: `src/backend/postmaster/syslogger.c`, update_metainfo_datafile.
const CURRENT_LOGFILES: &str = "current_logfiles";

/// How much of the end of a log is read.
const TAIL_BYTES: u64 = 64 << 10;

/// How many lines are told.
const LINES_MAX: usize = 4;

/// How long is waited for lines that tell why, and how often they are looked for.
const WORDS_PATIENCE: Duration = Duration::from_secs(2);
const WORDS_EVERY: Duration = Duration::from_millis(50);

/// The output of one start.
#[derive(Debug)]
pub(super) struct ServerLog {
    data_dir: PathBuf,
    path: PathBuf,
    /// Where this start's output begins: a backup of a restored server brings an older one's along.
    from: u64,
}

impl ServerLog {
    /// Makes the file's folder where it is not there.
    pub(super) fn open(data_dir: &Path, path: &Path) -> Result<Self> {
        make_log_folder(path)?;
        let from = fs::metadata(path).map_or(0, |meta| meta.len());
        Ok(Self { data_dir: data_dir.to_owned(), path: path.to_owned(), from })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the last lines that tell why the server ended, or where there are none (the words may be in any
    /// language) the last lines.
    pub(super) async fn last_words(&self) -> Result<Vec<String>> {
        // A collector writes what it has got after the server is gone.
        let waits_until = Instant::now() + WORDS_PATIENCE;
        loop {
            let mut text = read_tail(&self.path, self.from)?;
            for path in self.collected() {
                text.push('\n');
                text.push_str(&read_tail(&path, 0)?);
            }
            match telling(&text) {
                Some(lines) => return Ok(lines),
                None if Instant::now() > waits_until => return Ok(last(&text.lines().collect::<Vec<_>>())),
                None => sleep(WORDS_EVERY).await,
            }
        }
    }

    /// Returns the files of the server's own collector.
    fn collected(&self) -> Vec<PathBuf> {
        let list = read_tail(&self.data_dir.join(CURRENT_LOGFILES), 0).unwrap_or_default();
        let paths = list.lines().filter_map(|line| line.split_once(' '));
        paths.map(|(_, path)| self.data_dir.join(path)).collect()
    }
}

/// Makes the folder that the server's output goes to.
fn make_log_folder(log: &Path) -> Result<()> {
    match log.parent() {
        Some(folder) if !folder.is_dir() => make_private(folder),
        _ => Ok(()),
    }
}

/// Returns the last lines that tell of an end and lead to it; `None` when none tells.
fn telling(text: &str) -> Option<Vec<String>> {
    const ENDS: [&str; 2] = ["FATAL:", "PANIC:"];
    const LEADS: [&str; 2] = ["HINT:", "could not bind"];
    let has = |line: &str, words: &[&str]| words.iter().any(|word| line.contains(word));
    text.lines().any(|line| has(line, &ENDS)).then(|| {
        // A report of restore-cmd begins with "error:".
        let tells = |line: &&str| has(line, &ENDS) || has(line, &LEADS) || line.starts_with("error: ");
        last(&text.lines().filter(tells).collect::<Vec<_>>())
    })
}

fn last(lines: &[&str]) -> Vec<String> {
    let lines: Vec<&str> = lines.iter().map(|line| line.trim()).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(LINES_MAX)..].iter().map(|line| (*line).to_owned()).collect()
}

/// Returns the end of a file, from no earlier than `from`; nothing when it is not there.
fn read_tail(path: &Path, from: u64) -> Result<String> {
    let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        other => other.map_err(failed)?,
    };
    let length = file.metadata().map_err(failed)?.len();
    file.seek(SeekFrom::Start(from.max(length.saturating_sub(TAIL_BYTES)))).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_that_tell_why_are_found() {
        let text = "LOG:  starting\nLOG:  could not bind IPv4 address \"127.0.0.1\": in use\nHINT:  Is another one?\n\
                    FATAL:  could not create any TCP/IP sockets\nLOG:  database system is shut down\n";
        assert_eq!(
            telling(text).unwrap(),
            [
                "LOG:  could not bind IPv4 address \"127.0.0.1\": in use",
                "HINT:  Is another one?",
                "FATAL:  could not create any TCP/IP sockets"
            ]
        );
        assert_eq!(telling("LOG:  redirecting\nHINT:  Future log output will appear in \"log\".\n"), None);
        assert_eq!(last(&["a", "", "b"]), ["a", "b"]);
        assert_eq!(last(&["a", "b", "c", "d", "e"]), ["b", "c", "d", "e"]);
    }

    #[tokio::test]
    async fn only_this_start_counts_and_the_collectors_files_too() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("log/pitr-start.log");
        fs::create_dir(home.path().join("log")).unwrap();
        fs::write(&path, "FATAL:  an older start\n").unwrap();
        let log = ServerLog::open(home.path(), &path).unwrap();
        assert!(log.last_words().await.unwrap().is_empty());
        fs::write(home.path().join(CURRENT_LOGFILES), "stderr log/own.log\n").unwrap();
        fs::write(home.path().join("log/own.log"), "FATAL:  this one\n").unwrap();
        assert_eq!(log.last_words().await.unwrap(), ["FATAL:  this one"]);
    }
}
