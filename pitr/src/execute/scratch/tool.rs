//! Runs one of PostgreSQL's programs to its end, within a time and with a bounded memory of what it says.

use std::env;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::time::timeout;
use walship::{Error, Result};

/// How much of the end of what it says is kept, of each of its outputs.
const SAID_BYTES: usize = 64 << 10;

/// How many lines that tell of an error are said.
const TELLING_MAX: usize = 4;

/// How long output that somebody else holds open is waited for, after the program has ended.
const PIPES_PATIENCE: Duration = Duration::from_secs(2);

/// Which of libpq's variables a program sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Environment {
    /// None: where to connect to is told in its arguments, and nothing else may lead it elsewhere.
    Private,
    /// All of this program's.
    Ours,
}

/// What a program came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Its exit status; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Whether it was ended because its time was up.
    pub timed_out: bool,
    /// The last of what it printed.
    pub printed: String,
    /// The last of what it said on its standard error.
    pub said: String,
}

impl Ran {
    /// Returns whether it did what it was to do.
    pub fn succeeded(&self) -> bool {
        self.code == Some(0)
    }

    /// Returns the last lines of both outputs, errors last.
    pub fn last_lines(&self, max: usize) -> String {
        let lines: Vec<&str> = self
            .printed
            .lines()
            .chain(self.said.lines())
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        lines[lines.len().saturating_sub(max)..].join("; ")
    }

    /// Returns how it ended, for people.
    pub fn ended(&self) -> String {
        let how = match (self.timed_out, self.code) {
            (true, _) => "did not end in time".to_owned(),
            (false, Some(code)) => format!("ended with status {code}"),
            (false, None) => "was killed".to_owned(),
        };
        let tells = |line: &&str| ["error:", "ERROR:", "FATAL:"].iter().any(|word| line.contains(word));
        let telling: Vec<&str> = self.said.lines().map(str::trim).filter(tells).take(TELLING_MAX).collect();
        let said = if telling.is_empty() { self.last_lines(4) } else { telling.join("; ") };
        if said.is_empty() { how } else { format!("{how}: {said}") }
    }
}

/// Runs a program and waits for its end, at most `patience` long; it is killed then.
///
/// # Errors
/// When it cannot be started.
/// # Cancel safety
/// Dropping the future kills it.
pub async fn run<I, S>(
    program: &Path,
    arguments: I,
    environment: Environment,
    patience: Duration,
) -> Result<Ran>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.kill_on_drop(true);
    if environment == Environment::Private {
        for (name, _) in env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("PG")) {
                command.env_remove(name);
            }
        }
    }
    let failed = |error| Error::from_io(format!("running {}", program.display()), error);
    let mut child = command.spawn().map_err(failed)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let printed = tokio::spawn(tail(stdout));
    let said = tokio::spawn(tail(stderr));
    let (code, timed_out) = match timeout(patience, child.wait()).await {
        Ok(status) => (status.map_err(failed)?.code(), false),
        Err(_) => {
            child.kill().await.map_err(failed)?;
            (None, true)
        }
    };
    let text = async |task: tokio::task::JoinHandle<Vec<u8>>| match timeout(PIPES_PATIENCE, task).await {
        Ok(Ok(bytes)) => String::from_utf8_lossy(&bytes).into_owned(),
        _ => String::new(),
    };
    Ok(Ran { code, timed_out, printed: text(printed).await, said: text(said).await })
}

/// Reads to the end and returns the last of it.
async fn tail(from: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut from) = from else { return kept };
    let mut buffer = [0u8; 8192];
    // A failure to read is as good as an end: what came before is what there is.
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..count]);
        if kept.len() > 2 * SAID_BYTES {
            kept.drain(..kept.len() - SAID_BYTES);
        }
    }
    let start = kept.len().saturating_sub(SAID_BYTES);
    kept.split_off(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shell(script: &str, patience: Duration) -> Ran {
        run(Path::new("/bin/sh"), ["-c", script], Environment::Private, patience).await.unwrap()
    }

    #[tokio::test]
    async fn what_a_program_says_is_kept_up_to_a_bound() {
        let long = Duration::from_secs(60);
        let ran = shell("echo out; echo err >&2; exit 3", long).await;
        assert_eq!((ran.code, ran.succeeded(), ran.timed_out), (Some(3), false, false));
        assert_eq!(ran.ended(), "ended with status 3: out; err");
        let ran =
            shell("echo 'x: error: no: ERROR:  such type' >&2; echo 'Command was: CREATE' >&2; exit 1", long)
                .await;
        assert_eq!(ran.ended(), "ended with status 1: x: error: no: ERROR:  such type");
        let ran = shell("seq 100000", long).await;
        assert!(ran.succeeded() && ran.printed.len() <= SAID_BYTES);
        assert_eq!(ran.last_lines(2), "99999; 100000");
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_ended() {
        let ran = shell("echo begun; exec sleep 1000", Duration::from_millis(300)).await;
        assert!(ran.timed_out && ran.code.is_none());
        assert_eq!(ran.ended(), "did not end in time: begun");
    }
}
