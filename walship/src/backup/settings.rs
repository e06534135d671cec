//! The settings files that a base backup lacks: those outside the data directory, as in Debian's layout.
//!
//! Read over an ordinary session, for which the backup's own rights may not do. Without them the backup is
//! as good as any; what is missing is said.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::BackupEvent;
use crate::error::{Error, Result};
use crate::replication::{ConnectOptions, Connection, SessionKind, SystemIdentity};
use crate::repository::LineageRepository;

/// The longest file that is saved.
const FILE_BYTES_MAX: usize = 256 << 10;

/// More files than anyone includes.
const FILES_MAX: usize = 200;

/// The files that the running server names, and those that its configuration includes.
const PATHS: &str = "
    SELECT path FROM (
        SELECT current_setting(name) AS path FROM unnest(ARRAY['config_file', 'hba_file', 'ident_file']) AS name
        UNION SELECT sourcefile FROM pg_file_settings
    ) AS files, (SELECT current_setting('data_directory') || '/' AS folder) AS data
    WHERE path <> '' AND left(path, length(folder)) <> folder ORDER BY path";

/// Returns path and content of the settings files that lie outside the data directory; what cannot be
/// had is a warning.
pub(super) async fn outside_files(
    server: &ConnectOptions,
    identity: &SystemIdentity,
    progress: &(dyn Fn(BackupEvent) + Send + Sync),
) -> Vec<(String, Vec<u8>)> {
    let warn = |text: String| progress(BackupEvent::Warning(text));
    let mut session = match connect(server, identity).await {
        Ok(session) => session,
        Err(error) => {
            warn(format!("whether settings files lie outside the data directory is not known: {error}"));
            return Vec::new();
        }
    };
    let rows = match session.query(PATHS).await {
        Ok(rows) => rows.rows,
        Err(error) => {
            warn(format!(
                "whether settings files lie outside the data directory is not known ({error}); where they do, \
                 keep copies of them, or grant pg_read_all_settings and pg_read_server_files to save them \
                 beside the backup"
            ));
            return Vec::new();
        }
    };
    let paths = rows.into_iter().filter_map(|mut row| row.pop().flatten());
    let (mut files, mut total) = (Vec::new(), 0);
    for path in paths {
        match read(&mut session, &path).await {
            Ok(content) if content.len() > FILE_BYTES_MAX => {
                warn(format!("{path:?} is too long to be saved beside the backup: keep a copy"));
            }
            Ok(content)
                if files.len() >= FILES_MAX
                    || total + path.len() + content.len() > LineageRepository::SETTINGS_BYTES_MAX =>
            {
                warn(format!("{path:?} is not saved beside the backup, there are too many: keep a copy"));
            }
            Ok(content) => {
                total += path.len() + content.len();
                files.push((path, content));
            }
            Err(error) => warn(format!(
                "{path:?} lies outside the data directory and cannot be read to save it beside the backup \
                 ({error}): keep a copy, or grant pg_read_server_files"
            )),
        }
    }
    session.close().await;
    files
}

async fn connect(server: &ConnectOptions, identity: &SystemIdentity) -> Result<Connection> {
    let mut session = Connection::connect(server, SessionKind::Ordinary).await?;
    let rows = session.query("SELECT system_identifier FROM pg_control_system()").await?;
    if rows.get(0, 0) == Some(identity.system_identifier.to_string().as_str()) {
        return Ok(session);
    }
    Err(Error::mismatch("the server that answered is another cluster's"))
}

/// Reads a file, at most one byte more than is saved.
async fn read(session: &mut Connection, path: &str) -> Result<Vec<u8>> {
    let literal = path.replace('\'', "''");
    let length = FILE_BYTES_MAX + 1;
    let rows = session
        .query(&format!(
            "SET standard_conforming_strings = on; \
             SELECT encode(pg_read_binary_file('{literal}', 0, {length}), 'base64')"
        ))
        .await?;
    let text: String = rows.get(0, 0).unwrap_or_default().split_ascii_whitespace().collect();
    BASE64_STANDARD.decode(text).map_err(|_| Error::mismatch(format!("{path:?} did not come as base64")))
}
