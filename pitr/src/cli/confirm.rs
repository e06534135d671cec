//! Questions before what cannot be undone.

use std::io::{BufRead as _, IsTerminal as _, Read as _, Write as _};

use walship::{Error, Result};

/// No answer is longer.
const ANSWER_BYTES_MAX: u64 = 4096;

/// Shows what is going to happen and has `word` typed, on a terminal only. Signals are heard meanwhile.
///
/// # Errors
/// [`Error::Invalid`] for any other answer, and where nobody can be asked.
pub(super) async fn confirm(what: String, word: String) -> Result<()> {
    let asking = move || ask(&what, &word, "changing a data directory that is there", "--dry-run only looks");
    let answered = tokio::task::spawn_blocking(asking).await;
    answered.unwrap_or_else(|error| Err(Error::local_io(format!("asking was broken off: {error}"))))
}

/// The same for the removal of what is stored.
///
/// # Errors
/// As [`confirm`].
pub(super) fn confirm_removal(what: &str, word: &str) -> Result<()> {
    ask(what, word, "removing backups and WAL", "without --confirm it only looks")
}

fn ask(what: &str, word: &str, doing: &str, looking: &str) -> Result<()> {
    let refused = |why: &str| {
        Err(Error::invalid(why)
            .with_safe("nothing was written")
            .with_next(format!("Run it on a terminal and type {word}, or add --yes; {looking}.")))
    };
    if !std::io::stdin().is_terminal() {
        return refused(&format!("{doing} has to be confirmed"));
    }
    let mut stderr = std::io::stderr();
    let _ = write!(stderr, "{what}\nType {word} to go on: ").and_then(|()| stderr.flush());
    let mut answer = Vec::new();
    let mut input = std::io::stdin().lock().take(ANSWER_BYTES_MAX);
    input.read_until(b'\n', &mut answer).map_err(|error| Error::from_io("reading the answer", error))?;
    match String::from_utf8_lossy(&answer).trim() == word {
        true => Ok(()),
        false => refused("the answer was another one"),
    }
}
