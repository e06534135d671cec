//! Leaving the server that started this process: own session, no inherited descriptor, `/` as working folder.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use crate::error::{Error, Result};

/// A log of this length is begun anew.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// Whether an agent that `data_directory`'s server starts would become a child of its postmaster as soon as
/// its starter is gone: that one would take the death of an unknown child by a signal for the crash of a
/// backend, and restart the database (`src/backend/postmaster/postmaster.c`). So it is where the
/// postmaster is the first process, in a container.
pub fn postmaster_would_adopt(data_directory: &Path) -> bool {
    postmaster(data_directory) == Some(1)
}

fn postmaster(data_directory: &Path) -> Option<i32> {
    fs::read_to_string(data_directory.join("postmaster.pid")).ok()?.lines().next()?.trim().parse().ok()
}

/// Waits until `starter`, this process's parent, is gone, and returns whether somebody else than the postmaster
/// has adopted this process; after ten seconds whatever is known then.
pub async fn is_adopted_safely(starter: i32, data_directory: &Path) -> bool {
    for _ in 0..1000 {
        let parent = nix::unistd::getppid().as_raw();
        if parent != starter {
            return postmaster(data_directory) != Some(parent);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    true
}

/// Detaches this process; to be called before it opens anything. Its messages go to `log` from now on.
///
/// # Errors
/// [`Error::LocalIo`] for what the system refuses.
pub fn detach(log: &Path) -> Result<()> {
    close_inherited();
    // Fails where this process leads a group already: then it is on its own as well.
    let _ = nix::unistd::setsid();
    let failed = |error| Error::from_io(format!("writing {}", log.display()), error);
    let log = open_log(log).map_err(failed)?;
    nix::unistd::dup2_stderr(&log).map_err(|errno| failed(errno.into()))?;
    std::env::set_current_dir("/").map_err(|error| Error::from_io("leaving the working folder", error))?;
    raise_oom_score();
    Ok(())
}

fn open_log(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
    let log = options.open(path)?;
    if log.metadata()?.len() > LOG_BYTES_MAX {
        log.set_len(0)?;
    }
    Ok(log)
}

/// Closes what a postmaster, a shell or a supervisor left open: whoever reads the other end of a pipe would
/// wait for this process.
fn close_inherited() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return };
    let open: Vec<RawFd> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|descriptor| *descriptor > 2)
        .collect();
    for descriptor in open {
        // The one of the folder just read is closed already.
        let _ = nix::unistd::close(descriptor);
    }
}

/// A postmaster may be protected from the kernel's out-of-memory killer; its helper must not be.
fn raise_oom_score() {
    let path = "/proc/self/oom_score_adj";
    let score = fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<i32>().ok());
    if score.is_some_and(|score| score < 0) {
        let _ = fs::write(path, "0");
    }
}
