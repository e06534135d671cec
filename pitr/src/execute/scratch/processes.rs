//! The processes of one scratch server, known by a name that nobody else has on a command line.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::sleep;
use walship::{Error, Result};

/// How long a server may take to end when it is told to end at once, before its processes are killed, and
/// how long these may take then.
const QUIT_PATIENCE: Duration = Duration::from_secs(20);
const KILL_PATIENCE: Duration = Duration::from_secs(60);

const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What a process is to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Its first process.
    Postmaster,
    /// One of its other processes: they end with the first.
    Child,
    /// A program that was about to start it.
    Starter,
}

/// Ends the server that has `name` as its `cluster_name`, and what is about to start it; returns how many processes
/// there were. That it is this server is sure: nobody else has that name, which is made of 64 random bits.
///
/// # Errors
/// [`Error::LocalIo`] when they do not end, or processes cannot be listed.
pub(super) async fn end(name: &str) -> Result<usize> {
    let begun = Instant::now();
    let mut found_at_first = None;
    loop {
        let found = find(name)?;
        let count = found.len();
        found_at_first.get_or_insert(count);
        if count == 0 {
            return Ok(found_at_first.unwrap_or(0));
        }
        let late = begun.elapsed() > QUIT_PATIENCE;
        if begun.elapsed() > KILL_PATIENCE {
            let pids: Vec<String> = found.iter().map(|(pid, _)| pid.to_string()).collect();
            return Err(Error::local_io(format!(
                "the scratch server does not end: processes {}",
                pids.join(", ")
            ))
            .with_next("End them by hand, then run this again: it removes what is left."));
        }
        for (pid, part) in found {
            let signal = match (part, late) {
                // At once, and without a checkpoint: it gives its shared memory back.
                (Part::Postmaster, false) => Signal::SIGQUIT,
                (Part::Child, false) => continue,
                (Part::Starter, _) | (_, true) => Signal::SIGKILL,
            };
            // One that has ended meanwhile is what was wanted.
            let _ = kill(Pid::from_raw(pid), signal);
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Returns the processes of a server.
fn find(name: &str) -> Result<Vec<(i32, Part)>> {
    let entries = fs::read_dir("/proc").map_err(|error| Error::from_io("listing the processes", error))?;
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let parts = pids.filter(|pid| *pid != own).filter_map(|pid| {
        // A process that has ended, or is nobody's any more, has none.
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((pid, part(&command, name)?))
    });
    Ok(parts.collect())
}

/// Returns what the process with this command line is to the server; `None` for nothing.
fn part(command: &[u8], name: &str) -> Option<Part> {
    let command = String::from_utf8_lossy(command);
    let words: Vec<&str> = command.split('\0').collect();
    let program = Path::new(words.first()?).file_name()?.to_str()?;
    // The title of a process of the server: `postgres: NAME: checkpointer`.
    if words[0].strip_prefix("postgres: ").is_some_and(|title| title.starts_with(&format!("{name}:"))) {
        return Some(Part::Child);
    }
    let setting = format!("cluster_name={name}");
    match program {
        "postgres" | "postmaster" => words.contains(&setting.as_str()).then_some(Part::Postmaster),
        "pg_ctl" | "sh" | "bash" | "dash" => {
            words.iter().any(|word| word.contains(&setting)).then_some(Part::Starter)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_servers_own_processes_are_its_parts() {
        let name = "walship-scratch-00000000000000ff";
        for (command, expected) in [
            (
                "/usr/lib/postgresql/15/bin/postgres\0-D\0/s/data\0-c\0cluster_name=NAME\0",
                Some(Part::Postmaster),
            ),
            ("/usr/lib/postgresql/15/bin/postgres\0-D\0/s/data\0-c\0cluster_name=NAMEx\0", None),
            ("postgres: NAME: checkpointer \0\0", Some(Part::Child)),
            ("postgres: NAMEx: checkpointer \0\0", None),
            ("/bin/pg_ctl\0start\0-o\0-c 'cluster_name=NAME' -c port=5432\0", Some(Part::Starter)),
            ("/bin/sh\0-c\0exec postgres -c cluster_name=NAME\0", Some(Part::Starter)),
            ("vim\0cluster_name=NAME\0", None),
            ("grep\0NAME\0", None),
            ("", None),
        ] {
            let command = command.replace("NAME", name);
            assert_eq!(part(command.as_bytes(), name), expected, "{command}");
        }
    }

    #[tokio::test]
    async fn a_starter_is_ended_and_nobody_else() {
        let name = format!("walship-scratch-{:016x}", rand::random::<u64>());
        let script = format!("read line; : cluster_name={name}");
        let mut starter = std::process::Command::new("sh");
        let mut starter = starter.args(["-c", &script]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        let _held_open = starter.stdin.take();
        let mut other = std::process::Command::new("sleep").arg("300").spawn().unwrap();
        // The child may not be what it is going to be yet.
        while find(&name).unwrap().is_empty() {
            sleep(LOOK_EVERY).await;
        }
        let reaped = std::thread::spawn(move || starter.wait().unwrap());
        assert_eq!(end(&name).await.unwrap(), 1);
        assert!(!reaped.join().unwrap().success());
        assert_eq!(end(&name).await.unwrap(), 0);
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
