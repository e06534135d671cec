//! Finds the `pg_ctl` that belongs to a backup, and its fellows: PostgreSQL of another major version refuses its files.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;
use walship::{Error, Result};

/// How long a program may take to say its version.
const VERSION_PATIENCE: Duration = Duration::from_secs(20);

/// Returns the path of the `pg_ctl` of this major version: in the folder that is given, else the first on the
/// `PATH` that is of it, else where the packages of Debian and of Red Hat's family put it.
///
/// # Errors
/// [`Error::Missing`] when there is none; what was found instead is named.
pub async fn find(given: Option<&Path>, major: u32) -> Result<PathBuf> {
    let folders = match given {
        Some(folder) => vec![folder.to_owned()],
        None => usual_folders(major),
    };
    let others = match look("pg_ctl", folders, major).await {
        Ok(program) => return Ok(program),
        Err(others) => others,
    };
    let place = match given {
        Some(folder) => format!("in {}", folder.display()),
        None => usual_places(major),
    };
    Err(Error::missing(format!("no pg_ctl of PostgreSQL {major}, which made the backup, is {place}{others}"))
        .with_safe("nothing was written")
        .with_next(format!(
            "Install PostgreSQL {major}, or name the folder of its programs with --pg-bin; or leave --start out."
        )))
}

/// Returns the path of another of PostgreSQL's programs, of this major version: in the folder that is given, else as
/// [`find`] looks for it. The error says where it was looked for.
pub async fn find_tool(name: &str, given: Option<&Path>, major: u32) -> Result<PathBuf, String> {
    let folders = given.map(Path::to_owned).into_iter().chain(usual_folders(major)).collect();
    look(name, folders, major).await.map_err(|others| {
        let given = given.map_or_else(String::new, |folder| format!("in {}, ", folder.display()));
        format!("no {name} of PostgreSQL {major} is {given}{}{others}", usual_places(major))
    })
}

fn usual_folders(major: u32) -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let packages = [format!("/usr/lib/postgresql/{major}/bin"), format!("/usr/pgsql-{major}/bin")];
    env::split_paths(&path).chain(packages.map(PathBuf::from)).collect()
}

fn usual_places(major: u32) -> String {
    format!("on the PATH, in /usr/lib/postgresql/{major}/bin or in /usr/pgsql-{major}/bin")
}

/// Returns the first program of this name and major version, or which others there are.
async fn look(name: &str, folders: Vec<PathBuf>, major: u32) -> Result<PathBuf, String> {
    let mut others = Vec::new();
    for folder in folders {
        let Ok(program) = std::path::absolute(folder.join(name)) else { continue };
        if !program.is_file() {
            continue;
        }
        match version(&program).await {
            Some(found) if found == major => return Ok(program),
            Some(found) => others.push(format!("{} is of {found}", program.display())),
            None => others.push(format!("{} does not say its version", program.display())),
        }
    }
    Err(if others.is_empty() { String::new() } else { format!(": {}", others.join(", ")) })
}

/// Returns the major version of one of PostgreSQL's programs.
async fn version(program: &Path) -> Option<u32> {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = timeout(VERSION_PATIENCE, command.output()).await.ok()?.ok()?;
    output.status.success().then(|| major_of(&String::from_utf8_lossy(&output.stdout)))?
}

/// Returns the major version in `pg_ctl (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
fn major_of(text: &str) -> Option<u32> {
    let version = text.split_once("(PostgreSQL) ")?.1;
    let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    version[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn versions_are_read_as_they_are_printed() {
        for (text, major) in [
            ("pg_ctl (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", Some(15)),
            ("pg_ctl (PostgreSQL) 18beta2", Some(18)),
            ("pg_ctl (PostgreSQL) 14", Some(14)),
            ("pg_ctl", None),
            ("", None),
        ] {
            assert_eq!(major_of(text), major, "{text}");
        }
    }

    #[tokio::test]
    async fn a_pg_ctl_of_another_major_is_named_and_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("pg_ctl");
        fs::write(&program, "#!/bin/sh\necho 'pg_ctl (PostgreSQL) 17.2'\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find(Some(folder.path()), 17).await.unwrap(), program);
        let error = find(Some(folder.path()), 16).await.unwrap_err();
        assert!(
            error.to_string().ends_with("pg_ctl is of 17") && error.next().contains("--pg-bin"),
            "{error}"
        );
    }
}
