//! Where a thin command and its agent meet: one socket for each configuration, environment, program and
//! data directory, in a folder that is this user's alone.
//!
//! Whatever could make the work come out differently is part of the socket's name, so that a changed setting
//! or a new version never reaches an agent that does not know of it.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::archive::{DataDirectory, own_folder};
use crate::config::DEFAULT_PATH;

use super::protocol::GREETING;

/// Names a socket outright, for an agent that a supervisor runs.
pub const SOCKET_VARIABLE: &str = "WALSHIP_AGENT_SOCKET";

/// Tells `walship wal push` and `wal fetch` at which socket to start an agent for the calls to come: set by
/// the thin commands that found none.
pub const WANTED_VARIABLE: &str = "WALSHIP_AGENT_WANTED";

/// What the agent is told by its environment must be what the call would be told.
const VARIABLES: &[&str] = &["WALSHIP_", "AWS_", "SSL_CERT_", "HOME=", "TMPDIR="];

/// `sun_path` has 108 bytes, the last one zero; the socket is bound under a longer name first.
const SOCKET_PATH_BYTES_MAX: usize = 107 - NEW.len();

/// What the name of a socket ends with until it is listened on.
pub(super) const NEW: &str = ".new";

/// A socket, and whose data directory it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    /// The socket's absolute path.
    pub socket: PathBuf,
    /// The data directory's, without links.
    pub data_directory: PathBuf,
}

impl Meeting {
    /// Returns where the agent for `file`, a path in a data directory's `pg_wal`, is found; `options` are the
    /// call's own. `None` where there can be none: the path lies elsewhere, or the folder for the socket
    /// is not this user's own, or too deep.
    pub fn of(options: &[OsString], file: &Path) -> Option<Self> {
        let data_directory = fs::canonicalize(DataDirectory::of_wal_file(file)?.path()).ok()?;
        let socket = match env::var_os(SOCKET_VARIABLE).filter(|value| !value.is_empty()) {
            Some(named) => Some(PathBuf::from(named)).filter(|socket| is_own_place(socket))?,
            None => {
                let folder = own_folder(None).ok()?;
                folder.join(format!("agent-{}.sock", name(options, &data_directory).ok()?))
            }
        };
        let fits = socket.is_absolute() && socket.as_os_str().len() <= SOCKET_PATH_BYTES_MAX;
        fits.then_some(Self { socket, data_directory })
    }
}

/// Whether nobody else can put a socket there.
fn is_own_place(socket: &Path) -> bool {
    let folder = socket.parent().and_then(|folder| fs::symlink_metadata(folder).ok());
    folder.is_some_and(|folder| {
        folder.is_dir() && folder.uid() == nix::unistd::geteuid().as_raw() && folder.mode() & 0o022 == 0
    })
}

/// Returns the part of the socket's name that is different where anything is.
fn name(options: &[OsString], data_directory: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(GREETING);
    add(env!("CARGO_PKG_VERSION").as_bytes());
    let program = super::client::walship();
    add(program.as_os_str().as_bytes());
    if let Ok(metadata) = fs::metadata(&program) {
        add(&identity(&metadata));
    }
    add(data_directory.as_os_str().as_bytes());
    let metadata = fs::metadata(data_directory)?;
    add(&metadata.dev().to_le_bytes());
    add(&metadata.ino().to_le_bytes());
    for option in options {
        add(option.as_bytes());
    }
    let configuration = configuration(options);
    add(configuration.as_os_str().as_bytes());
    match fs::read(&configuration) {
        Ok(bytes) => add(&bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut variables: Vec<_> = env::vars_os().filter(|(name, _)| is_relevant(name)).collect();
    variables.sort();
    for (name, value) in &variables {
        add(name.as_bytes());
        add(value.as_bytes());
    }
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

/// Returns what changes when a file is replaced or written to.
fn identity(metadata: &Metadata) -> Vec<u8> {
    [metadata.dev(), metadata.ino(), metadata.size()]
        .into_iter()
        .chain([metadata.mtime(), metadata.mtime_nsec()].map(i64::cast_unsigned))
        .flat_map(u64::to_le_bytes)
        .collect()
}

fn is_relevant(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    if [SOCKET_VARIABLE, WANTED_VARIABLE, super::client::ABSENT_STATUS_VARIABLE].contains(&name) {
        return false;
    }
    VARIABLES.iter().any(|known| match known.strip_suffix('=') {
        Some(whole) => name == whole,
        None => name.starts_with(known),
    })
}

/// Returns the path of the configuration file that a call with these options reads.
fn configuration(options: &[OsString]) -> PathBuf {
    let mut options = options.iter();
    let mut named = None;
    while let Some(option) = options.next() {
        if option == "--config" {
            named = options.next().map(PathBuf::from);
        } else if let Some(path) = option.as_bytes().strip_prefix(b"--config=") {
            named = Some(PathBuf::from(OsStr::from_bytes(path)));
        }
    }
    named
        .or_else(|| env::var_os("WALSHIP_CONFIG").filter(|value| !value.is_empty()).map(PathBuf::from))
        .unwrap_or_else(|| DEFAULT_PATH.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn whatever_matters_changes_the_name() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&two).unwrap();
        let file = folder.path().join("walship.toml");
        fs::write(&file, "cluster = 'a'").unwrap();
        let options = words(&["--config", file.to_str().unwrap()]);
        let first = name(&options, &one).unwrap();
        assert_eq!(name(&options, &one).unwrap(), first);
        assert_ne!(name(&options, &two).unwrap(), first, "another data directory");
        assert_ne!(name(&words(&["--repo", "/a"]), &one).unwrap(), first, "other options");
        fs::write(&file, "cluster = 'b'").unwrap();
        assert_ne!(name(&options, &one).unwrap(), first, "another configuration");
    }

    #[test]
    fn the_configuration_file_is_found_among_the_options() {
        assert_eq!(configuration(&words(&["--lineage", "2", "--config", "/a"])), Path::new("/a"));
        assert_eq!(configuration(&words(&["--config=/b", "--cluster", "x"])), Path::new("/b"));
    }

    #[test]
    fn variables_of_no_consequence_do_not_count() {
        for relevant in ["WALSHIP_REPO", "AWS_PROFILE", "HOME", "SSL_CERT_FILE", "TMPDIR"] {
            assert!(is_relevant(OsStr::new(relevant)), "{relevant}");
        }
        for other in ["PATH", "PGDATA", "HOMEBREW", SOCKET_VARIABLE, WANTED_VARIABLE, "WALSHIP_ABSENT_STATUS"]
        {
            assert!(!is_relevant(OsStr::new(other)), "{other}");
        }
    }

    #[test]
    fn there_is_no_agent_for_a_path_outside_of_a_data_directory() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Meeting::of(&[], &folder.path().join("x")), None);
        assert_eq!(Meeting::of(&[], Path::new("/nowhere/pg_wal/x")), None);
    }
}
