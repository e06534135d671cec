//! Unpacks one data object of a backup: zstd frames of tar, every name and every byte checked.
//!
//! The object is hostile until checked: names must be the manifest's, nothing is written through a
//! link, no file is written twice, and a file's size and checksum must be what the server said.

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use tokio::sync::mpsc;
use walship::catalog::BackupObject;
use walship::pg::BackupLabel;
use walship::pg::Oid;
use walship::pg::backup_label::{tablespace_map_line, without_incremental_lines};
use walship::pg::backup_manifest::{BackupManifest, ManifestFile, check_path};
use walship::{Error, Result};

use super::restore::{Progress, another_backup};

/// The file without which PostgreSQL does not start; kept in memory and written last.
pub(super) const CONTROL_FILE: &str = "global/pg_control";

/// Where recovery starts.
const BACKUP_LABEL: &str = "backup_label";

/// The longest `pg_control` that is kept in memory; PostgreSQL's has 8192 bytes.
const CONTROL_FILE_BYTES_MAX: u64 = 1 << 16;

/// Where tablespaces lie, in backups of clusters whose links do not fit into a tar archive. PostgreSQL makes
/// its links by it when it starts, whatever links there are.
const TABLESPACE_MAP: &str = "tablespace_map";

/// The longest `tablespace_map` that is kept in memory; its lines have some 1000 bytes at most.
const TABLESPACE_MAP_BYTES_MAX: u64 = 4 << 20;

/// Folders that come empty: WAL is fetched from the archive, and slots are not restored.
const NEVER_FILLED: &[&str] = &["pg_wal", "pg_replslot"];

/// How much is read from the tar stream at once.
const BUFFER_BYTES: usize = 256 << 10;

/// Room is set aside for files from this length on. On ext4 long files are written in two thirds of the time then, and
/// thousands of short ones in twice the time.
const RESERVED_FROM: u64 = 1 << 20;

/// Where things go and what they must be; shared by the threads that unpack.
#[derive(Debug)]
pub(super) struct Destination {
    data_dir: PathBuf,
    tablespaces: HashMap<Oid, PathBuf>,
    expected: HashMap<PathBuf, ManifestFile>,
    /// Whether it comes from several backups: then the label that is stored is not the one that is restored.
    is_incremental: bool,
    state: Mutex<State>,
    pub(super) progress: Arc<Progress>,
}

#[derive(Debug, Default)]
struct State {
    /// In which object each file is to be found, where more than the manifest's files are in the objects.
    from: Option<HashMap<PathBuf, (u32, u32)>>,
    written: HashSet<PathBuf>,
    /// The files of each object: their names in the manifest, and where they are.
    claimed: HashMap<String, Vec<(PathBuf, PathBuf)>>,
    control_file: Option<Vec<u8>>,
    /// Whether the group may read the cluster's files.
    group_reads: bool,
}

impl Destination {
    pub(super) fn new(
        data_dir: PathBuf,
        tablespaces: HashMap<Oid, PathBuf>,
        manifest: BackupManifest,
        is_incremental: bool,
        progress: Arc<Progress>,
    ) -> Self {
        let expected = manifest.files.into_iter().map(|file| (file.path.clone(), file)).collect();
        Self { data_dir, tablespaces, expected, is_incremental, state: Mutex::default(), progress }
    }

    /// Says in which object each file counts; elsewhere, and unless the manifest lists it, it is passed over.
    pub(super) fn expect_from(&self, objects: HashMap<PathBuf, (u32, u32)>) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).from = Some(objects);
    }

    /// Returns whether a file of an object counts.
    pub(super) fn counts(&self, listed: &Path, object: u32) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(from) = &state.from else { return true };
        from.get(listed).is_some_and(|(last, _)| *last == object) && self.is_expected(listed)
    }

    /// Returns the bytes of `pg_control`, once every file of the manifest was written.
    pub(super) fn finish(&self) -> Result<Vec<u8>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(missing) = self.expected.keys().find(|path| !state.written.contains(*path)) {
            return Err(damaged(format!("the backup does not hold {missing:?}, which its manifest lists")));
        }
        state.control_file.take().ok_or_else(|| damaged("the backup does not hold global/pg_control"))
    }

    /// Removes every file that was written from an object, and lets its names be taken again.
    pub(super) fn give_back(&self, object: &str) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (listed, local) in state.claimed.remove(object).unwrap_or_default() {
            if listed == Path::new(CONTROL_FILE) {
                state.control_file = None;
            }
            state.written.remove(&listed);
            match fs::remove_file(&local) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::from_io(format!("removing {}", local.display()), error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Returns whether the manifest lists a file of this name.
    pub(super) fn is_expected(&self, listed: &Path) -> bool {
        self.expected.contains_key(listed)
    }

    /// Returns what the manifest says of a file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the manifest does not list a file of this length there, or a backup never has one.
    pub(super) fn check_listed(&self, Place { listed, .. }: &Place, bytes: u64) -> Result<&ManifestFile> {
        if NEVER_FILLED.iter().any(|folder| listed.starts_with(folder)) {
            return Err(damaged(format!("a backup holds no such file as {listed:?}")));
        }
        match self.expected.get(listed) {
            Some(file) if file.bytes == bytes => Ok(file),
            Some(file) if self.is_stored_label(listed) => Ok(file),
            Some(file) => {
                Err(damaged(format!("{listed:?} has {bytes} bytes, the manifest says {}", file.bytes)))
            }
            None => Err(damaged(format!("the backup holds {listed:?}, which its manifest does not list"))),
        }
    }

    /// Returns whether the manifest lists a file below this folder.
    pub(super) fn lists_below(&self, folder: &Path) -> bool {
        self.expected.keys().any(|path| path.starts_with(folder))
    }

    /// Returns whether this is the data directory, or a tablespace's folder.
    pub(super) fn is_root(&self, path: &Path) -> bool {
        path == self.data_dir || self.tablespaces.values().any(|root| root == path)
    }

    /// Returns whether a file is kept in memory until it is known what becomes of it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for one that is too long for that.
    pub(super) fn is_held(&self, listed: &Path, bytes: u64) -> Result<bool> {
        let bytes_max = match listed {
            path if self.is_stored_label(path) => BackupLabel::MAX_BYTES as u64,
            path if path == Path::new(CONTROL_FILE) => CONTROL_FILE_BYTES_MAX,
            path if path == Path::new(TABLESPACE_MAP) => TABLESPACE_MAP_BYTES_MAX,
            _ => return Ok(false),
        };
        match bytes > bytes_max {
            true => Err(damaged(format!("{} has {bytes} bytes", listed.display()))),
            false => Ok(true),
        }
    }

    /// Takes a file that is kept in memory: `pg_control` is for the end, the map of tablespaces is written with the
    /// places that they were restored to.
    pub(super) fn take_held(&self, place: &Place, content: Vec<u8>, mode: u32) -> Result<()> {
        if place.listed == Path::new(CONTROL_FILE) {
            self.state.lock().unwrap_or_else(PoisonError::into_inner).control_file = Some(content);
            return Ok(());
        }
        let written = match self.is_stored_label(&place.listed) {
            true => self.label_of_all(place, &content)?,
            false => mapped_anew(&content, &self.tablespaces)?,
        };
        create(&place.local, mode)?
            .write_all(&written)
            .map_err(|error| Error::from_io(format!("writing {}", place.local.display()), error))
    }

    /// Returns whether this is the label of an incremental backup, as stored.
    fn is_stored_label(&self, listed: &Path) -> bool {
        self.is_incremental && listed == Path::new(BACKUP_LABEL)
    }

    /// Returns the label of what is put together from several backups, by that of the incremental one.
    fn label_of_all(&self, place: &Place, stored: &[u8]) -> Result<Vec<u8>> {
        let label = without_incremental_lines(stored);
        let file = self.check_listed(place, label.len() as u64)?;
        if file.bytes != label.len() as u64 || file.matches_crc32c(crc32c::crc32c(&label)) != Some(true) {
            return Err(damaged(format!("{BACKUP_LABEL} is not what the manifest says")));
        }
        Ok(label)
    }

    /// Takes note of whether the group may read a file.
    pub(super) fn note_group(&self, reads: bool) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).group_reads |= reads;
    }

    /// Returns whether the group may read the cluster's files: `initdb --allow-group-access`.
    pub(super) fn group_reads(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).group_reads
    }

    /// Takes a name once, for an object, for a file of that length.
    ///
    /// # Errors
    /// As [`Destination::check_listed`]; [`Error::Corrupt`] for a name that was taken.
    pub(super) fn claim(&self, object: &str, place: &Place, bytes: u64) -> Result<&ManifestFile> {
        let file = self.check_listed(place, bytes)?;
        let name = &place.listed;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.written.insert(name.to_owned()) {
            return Err(damaged(format!("the backup holds {name:?} twice")));
        }
        let claimed = state.claimed.entry(object.to_owned()).or_default();
        claimed.push((name.to_owned(), place.local.clone()));
        Ok(file)
    }
}

/// The stored bytes of an object as they arrive, as something to read from.
pub(super) struct Arriving {
    pub(super) chunks: mpsc::Receiver<Result<Bytes>>,
    pub(super) current: Bytes,
    pub(super) hasher: blake3::Hasher,
    /// The error that ended the arrival, for the caller: `io::Error` would lose its answers.
    pub(super) failed: Arc<Mutex<Option<Error>>>,
}

impl Read for Arriving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                None => return Ok(0),
                Some(Ok(chunk)) => {
                    self.hasher.update(&chunk);
                    self.current = chunk;
                }
                Some(Err(error)) => {
                    let text = error.to_string();
                    *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return Err(io::Error::other(text));
                }
            }
        }
        let length = buffer.len().min(self.current.len());
        buffer[..length].copy_from_slice(&self.current.split_to(length));
        Ok(length)
    }
}

/// Writes what an object holds. Blocking; for a thread of its own.
pub(super) fn unpack(destination: &Destination, object: &BackupObject, arriving: Arriving) -> Result<()> {
    unpack_stream(destination, object, arriving)
        .map_err(|error| error.context(format!("backup object {}", object.name)))
}

/// Returns where a member belongs, relative to the data directory or the tablespace; `None`: it is that folder itself.
///
/// # Errors
/// What is wrong with it, in words: it leads elsewhere.
pub(super) fn member_path(entry: &tar::Entry<'_, impl Read>) -> std::result::Result<Option<PathBuf>, String> {
    let name = entry.path().map_err(|error| format!("it cannot be unpacked: {error}"))?;
    let name = Path::new(&*name).components().as_path();
    let name = name.strip_prefix(".").unwrap_or(name);
    if name.as_os_str().is_empty() && entry.header().entry_type().is_dir() {
        return Ok(None);
    }
    check_path(name).map_err(|error| error.to_string())?;
    Ok(Some(name.to_owned()))
}

fn unpack_stream(destination: &Destination, object: &BackupObject, arriving: Arriving) -> Result<()> {
    let unreadable = |error: io::Error| damaged(format!("it cannot be unpacked: {error}"));
    let decoder = zstd::stream::read::Decoder::new(arriving).map_err(unreadable)?;
    // No stream is longer than its record says: a small object cannot fill the disk.
    let mut archive = tar::Archive::new(decoder.take(object.tar_bytes));
    // Raw: extensions that carry long names or sizes are never written, and would be kept in memory.
    for entry in archive.entries().map_err(unreadable)?.raw(true) {
        let mut entry = entry.map_err(unreadable)?;
        let Some(name) = member_path(&entry).map_err(damaged)? else { continue };
        let kind = entry.header().entry_type();
        let mode = entry.header().mode().unwrap_or(0o600);
        let place = place_of(destination, object.tablespace, &name)?;
        match kind {
            tar::EntryType::Directory => make_dir(&place.local, mode)?,
            tar::EntryType::Regular => write_file(destination, &object.name, &place, mode, &mut entry)?,
            // The links of tablespaces are made from the plan, never from the archive.
            tar::EntryType::Symlink if is_tablespace_link(destination, object.tablespace, &name) => {}
            other => {
                return Err(damaged(format!("{name:?} is neither a file nor a folder ({other:?})")));
            }
        }
    }
    // Read to the very end: the digest covers every stored byte.
    let mut padded = archive.into_inner();
    io::copy(&mut padded, &mut io::sink()).map_err(unreadable)?;
    let mut decoder = padded.into_inner();
    let rest = decoder.read(&mut [0]).map_err(unreadable)?;
    if rest > 0 {
        return Err(damaged("it is longer than the backup's record says"));
    }
    let mut arriving = decoder.finish().into_inner();
    let behind = io::copy(&mut arriving, &mut io::sink()).map_err(unreadable)?;
    if behind > 0 {
        return Err(damaged("it is longer than the backup's record says"));
    }
    let digest = arriving.hasher.finalize().to_hex().to_string();
    if digest != object.digest {
        return Err(damaged(format!(
            "it has the digest {digest}, the backup's record says {}",
            object.digest
        )));
    }
    Ok(())
}

/// Where an entry goes, and its name in the manifest.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) local: PathBuf,
    pub(super) listed: PathBuf,
}

/// Returns where an entry goes whose name was checked.
///
/// # Errors
/// [`Error::Corrupt`] for one that is not where a backup has any.
pub(super) fn place_of(destination: &Destination, tablespace: Option<Oid>, name: &Path) -> Result<Place> {
    let Some(oid) = tablespace else {
        let under_link = name.starts_with("pg_tblspc")
            && destination.tablespaces.keys().any(|oid| {
                name.starts_with(Path::new("pg_tblspc").join(oid.to_string()))
                    && name.components().count() > 2
            });
        if under_link {
            return Err(damaged(format!("{name:?} would be written through a tablespace's link")));
        }
        return Ok(Place { local: destination.data_dir.join(name), listed: name.to_owned() });
    };
    let root = destination
        .tablespaces
        .get(&oid)
        .ok_or_else(|| damaged(format!("it belongs to tablespace {oid}, which the backup does not list")))?;
    if !name.iter().next().and_then(|first| first.to_str()).is_some_and(is_version_folder) {
        return Err(damaged(format!("{name:?} is not in a folder that PostgreSQL makes in a tablespace")));
    }
    let listed = Path::new("pg_tblspc").join(oid.to_string()).join(name);
    Ok(Place { local: root.join(name), listed })
}

/// Returns whether this is a name like `PG_15_202209061`.
///
/// Source: `src/include/common/relpath.h`, TABLESPACE_VERSION_DIRECTORY.
fn is_version_folder(name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let versions = name.strip_prefix("PG_").and_then(|rest| rest.split_once('_'));
    versions.is_some_and(|(major, catalog)| number(major) && number(catalog))
}

pub(super) fn is_tablespace_link(destination: &Destination, tablespace: Option<Oid>, name: &Path) -> bool {
    tablespace.is_none()
        && name.parent() == Some(Path::new("pg_tblspc"))
        && name
            .file_name()
            .and_then(|oid| oid.to_str()?.parse::<Oid>().ok())
            .is_some_and(|oid| destination.tablespaces.contains_key(&oid))
}

pub(super) fn make_dir(path: &Path, mode: u32) -> Result<()> {
    // The link of a tablespace stands where some servers send a folder.
    if fs::symlink_metadata(path).is_ok() {
        return Ok(());
    }
    let mode = 0o700 | (mode & 0o050);
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|error| Error::from_io(format!("creating {}", path.display()), error))
}

fn write_file(
    destination: &Destination,
    object: &str,
    place: &Place,
    mode: u32,
    entry: &mut tar::Entry<'_, impl Read>,
) -> Result<()> {
    let file = destination.claim(object, place, entry.size())?;
    if let Some(parent) = place.local.parent()
        && !parent.exists()
    {
        make_dir(parent, 0o700)?;
    }
    destination.note_group(mode & 0o040 != 0);
    let is_held = destination.is_held(&place.listed, file.bytes)?;
    let mut kept = Vec::new();
    let mut output = match is_held {
        true => None,
        false => {
            let output = create(&place.local, 0o600 | (mode & 0o040))?;
            reserve(&output, &place.local, file.bytes)?;
            Some(output)
        }
    };
    let mut crc = 0;
    let mut written = 0;
    let mut buffer = vec![0; BUFFER_BYTES.min(usize::try_from(file.bytes).unwrap_or(BUFFER_BYTES).max(1))];
    loop {
        let length = entry
            .read(&mut buffer)
            .map_err(|error| damaged(format!("{:?} cannot be unpacked: {error}", place.listed)))?;
        if length == 0 {
            break;
        }
        crc = crc32c::crc32c_append(crc, &buffer[..length]);
        written += length as u64;
        match &mut output {
            Some(output) => output
                .write_all(&buffer[..length])
                .map_err(|error| Error::from_io(format!("writing {}", place.local.display()), error))?,
            None => kept.extend_from_slice(&buffer[..length]),
        }
        destination.progress.written_bytes.fetch_add(length as u64, Ordering::Relaxed);
    }
    if written != file.bytes {
        return Err(damaged(format!("{:?} ends after {written} of {} bytes", place.listed, file.bytes)));
    }
    if file.matches_crc32c(crc) == Some(false) {
        return Err(damaged(format!("{:?} does not match the checksum in the manifest", place.listed)));
    }
    destination.progress.files.fetch_add(1, Ordering::Relaxed);
    if is_held {
        destination.take_held(place, kept, 0o600 | (mode & 0o040))?;
    }
    Ok(())
}

/// Returns a `tablespace_map` with the places that the tablespaces were restored to. Without any change it
/// is the same file, so that it still is what the manifest says.
///
/// Source: `xlogrecovery.c`, read_tablespace_map: lines of oid and path, newlines and backslashes in a path
/// behind a backslash.
fn mapped_anew(map: &[u8], tablespaces: &HashMap<Oid, PathBuf>) -> Result<Vec<u8>> {
    let mut anew = Vec::with_capacity(map.len());
    let mut escaped = false;
    let lines = map.split_inclusive(|byte| {
        let ends = *byte == b'\n' && !escaped;
        escaped = *byte == b'\\' && !escaped;
        ends
    });
    for line in lines {
        let oid = line.split(|byte| *byte == b' ').next().unwrap_or_default();
        let oid = std::str::from_utf8(oid).ok().and_then(|oid| oid.parse::<Oid>().ok());
        let (oid, path) = oid.and_then(|oid| Some((oid, tablespaces.get(&oid)?))).ok_or_else(|| {
            damaged(format!("its {TABLESPACE_MAP} names a tablespace that it does not list"))
        })?;
        anew.extend(tablespace_map_line(oid, path));
    }
    Ok(anew)
}

/// Creates a file that must not exist, not even as a link.
pub(super) fn create(path: &Path, mode: u32) -> Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(|error| Error::from_io(format!("creating {}", path.display()), error))
}

/// Has the file system set room aside for a long file, so that a disk without it is met before the first byte; the
/// file's length stays. A file system that cannot do that is met by writing.
///
/// # Errors
/// [`Error::LocalIo`] where there is no room.
pub(super) fn reserve(file: &File, path: &Path, bytes: u64) -> Result<()> {
    let Some(length) = i64::try_from(bytes).ok().filter(|_| bytes >= RESERVED_FROM) else { return Ok(()) };
    match fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, length) {
        Err(errno @ (Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG)) => {
            let what = format!("making room for the {bytes} bytes of {}", path.display());
            Err(Error::from_io(what, errno.into()))
        }
        _ => Ok(()),
    }
}

pub(super) fn damaged(what: impl Into<String>) -> Error {
    another_backup(Error::corrupt(what).with_safe(
        "the repository is unchanged; the restored folder is incomplete and PostgreSQL refuses it",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_set_aside_for_long_files_and_no_length() {
        use std::os::unix::fs::MetadataExt as _;
        let home = tempfile::tempdir().unwrap();
        let length_and_room = |bytes| {
            let path = home.path().join(format!("{bytes}"));
            let file = create(&path, 0o600).unwrap();
            reserve(&file, &path, bytes).unwrap();
            let meta = file.metadata().unwrap();
            (meta.len(), meta.blocks() * 512)
        };
        assert_eq!(length_and_room(RESERVED_FROM - 1), (0, 0));
        // Nothing is set aside where the file system cannot.
        let (length, room) = length_and_room(3 * RESERVED_FROM);
        assert!(length == 0 && (room == 0 || room >= 3 * RESERVED_FROM), "{length} {room}");
        let path = home.path().join("absurd");
        let error =
            reserve(&create(&path, 0o600).unwrap(), &path, 1 << 60).map_err(|error| error.to_string());
        assert!(room == 0 || error.unwrap_err().contains("making room for the 1152921504606846976 bytes"));
    }

    #[test]
    fn a_tablespace_map_is_the_same_or_leads_to_the_new_places() {
        let old = b"16500 /srv/a b\n16501 /srv/odd\\\nname\\\\x\n";
        let places = |first: &str| {
            HashMap::from([(16500, PathBuf::from(first)), (16501, PathBuf::from("/srv/odd\nname\\x"))])
        };
        assert_eq!(mapped_anew(old, &places("/srv/a b")).unwrap(), old);
        assert_eq!(mapped_anew(old, &places("/new")).unwrap(), b"16500 /new\n16501 /srv/odd\\\nname\\\\x\n");
        assert_eq!(mapped_anew(b"", &places("/new")).unwrap(), b"");
        for hostile in [&b"16502 /x\n"[..], b"/etc\n", b"\n", b"\xFF \xFF\n", b"16500\n99 x"] {
            assert!(mapped_anew(hostile, &places("/new")).is_err(), "{hostile:?}");
        }
    }
}
