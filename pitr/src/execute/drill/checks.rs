//! The user's checks: a folder of `.sql` files, each run in a read-only transaction, its answer compared.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use walship::replication::{Connection, Rows};
use walship::{Error, Result};

use super::{ProofOptions, millis};
use crate::drill::{Check, Checked};
use crate::execute::scratch::Up;

/// The longest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// More checks than anybody writes.
const CHECKS_MAX: usize = 1000;

/// How much of an answer is shown.
const SHOWN_CHARS: usize = 2000;

/// How much longer than the server is waited for an answer: it ends a query itself, when it can.
const GRACE: Duration = Duration::from_secs(5);

/// A check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckFile {
    /// Its path below the folder of checks.
    pub name: String,
    /// The database that it is for, where its folder says so.
    pub database: Option<String>,
    /// The query.
    sql: String,
    /// The answer that is expected; `None`: one true.
    expected: Option<String>,
}

/// Reads a folder of checks: `NAME.sql`, `NAME.expected` beside it where the answer is not one true, and the same in
/// folders that are called like the database.
///
/// # Errors
/// [`Error::Invalid`] for a folder without any, for an answer without its query, and for files that are too long or not
/// UTF-8; what reading fails with.
pub fn read_checks(folder: &Path) -> Result<Vec<CheckFile>> {
    let mut checks = Vec::new();
    let (files, folders) = entries(folder)?;
    read_folder(&files, None, &mut checks)?;
    for (name, path) in folders {
        let (files, _) = entries(&path)?;
        read_folder(&files, Some(&name), &mut checks)?;
    }
    if checks.is_empty() || checks.len() > CHECKS_MAX {
        return Err(Error::invalid(format!("{} has {} files NAME.sql", folder.display(), checks.len()))
            .with_safe("nothing was started")
            .with_next(format!("Name a folder with 1 to {CHECKS_MAX} of them with --checks.")));
    }
    Ok(checks)
}

type Named = Vec<(String, PathBuf)>;

/// Returns the files and the folders in a folder, by name.
fn entries(folder: &Path) -> Result<(Named, Named)> {
    let failed = |error| Error::from_io(format!("reading the checks in {}", folder.display()), error);
    let (mut files, mut folders) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
        let Some(name) = name.filter(|name| !name.starts_with('.')) else { continue };
        if path.is_dir() { folders.push((name, path)) } else { files.push((name, path)) }
    }
    files.sort();
    folders.sort();
    Ok((files, folders))
}

fn read_folder(files: &Named, database: Option<&str>, checks: &mut Vec<CheckFile>) -> Result<()> {
    for (name, path) in files {
        if let Some(of) = name.strip_suffix(".expected")
            && !files.iter().any(|(other, _)| other.strip_suffix(".sql") == Some(of))
        {
            return Err(Error::invalid(format!("there is no {of}.sql beside {}", path.display()))
                .with_safe("nothing was started")
                .with_next("Name the query and its answer alike: NAME.sql, NAME.expected."));
        }
        let Some(of) = name.strip_suffix(".sql") else { continue };
        let expected = path.with_file_name(format!("{of}.expected"));
        checks.push(CheckFile {
            name: database.map_or_else(|| name.clone(), |database| format!("{database}/{name}")),
            database: database.map(str::to_owned),
            sql: read(path)?,
            expected: if expected.exists() { Some(read(&expected)?) } else { None },
        });
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
    let mut bytes = Vec::new();
    fs::File::open(path).map_err(failed)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    let bad =
        |what: &str| Error::invalid(format!("{} {what}", path.display())).with_safe("nothing was started");
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(bad("is longer than 1 MiB"));
    }
    let text = String::from_utf8(bytes).map_err(|_| bad("is not UTF-8"))?;
    if text.contains('\0') {
        return Err(bad("holds a zero byte"));
    }
    Ok(text)
}

/// Runs a check. Whatever comes of it is the check's result, and no error of the drill.
pub(super) async fn run(up: &Up, check: &CheckFile, options: &ProofOptions) -> Check {
    let database = check.database.clone().unwrap_or_else(|| options.checks_database.clone());
    let begun = Instant::now();
    let answered = answer(up, &check.sql, &database, options.check_patience).await;
    let took = begun.elapsed();
    let (result, detail) = match answered {
        Ok(rows) => match judge(&rows, check.expected.as_deref()) {
            None => (Checked::Passed, None),
            Some(differs) => (Checked::Failed, Some(differs)),
        },
        // However it says so.
        Err(error) if took >= options.check_patience => (
            Checked::TimedOut,
            Some(format!("no answer within {} s: {error}", options.check_patience.as_secs_f64())),
        ),
        Err(error) => (Checked::Failed, Some(shortened(&error.to_string()))),
    };
    Check { name: check.name.clone(), database, result, millis: millis(took), detail }
}

async fn answer(up: &Up, sql: &str, database: &str, patience: Duration) -> Result<Rows> {
    let mut connection = up.connect(database, patience + GRACE).await?;
    connection.query(&format!("SET statement_timeout = {}", millis(patience).max(1))).await?;
    connection.query("BEGIN READ ONLY").await?;
    let before = transaction(&mut connection).await?;
    let rows = connection.query(sql).await?;
    if transaction(&mut connection).await? != before {
        return Err(Error::invalid(
            "it ended its transaction, and what it did behind that may not be read-only",
        ));
    }
    connection.query("ROLLBACK").await?;
    connection.close().await;
    Ok(rows)
}

/// Returns what tells a session's transaction from another one.
async fn transaction(connection: &mut Connection) -> Result<Option<String>> {
    let rows = connection
        .query(
            "SELECT pg_catalog.transaction_timestamp()::pg_catalog.text || ' ' || \
             pg_catalog.current_setting('transaction_read_only')",
        )
        .await?;
    Ok(rows.get(0, 0).map(str::to_owned))
}

/// Returns how an answer differs from what is expected; `None` where it does not.
fn judge(rows: &Rows, expected: Option<&str>) -> Option<String> {
    let lines: Vec<String> = rows
        .rows
        .iter()
        .map(|row| row.iter().map(|value| value.as_deref().unwrap_or("")).collect::<Vec<_>>().join("|"))
        .collect();
    let Some(expected) = expected else {
        let is_true = matches!(&*rows.rows, [row] if matches!(&**row, [Some(value)] if value == "t"));
        return (!is_true).then(|| {
            format!("expected: one true\ngot {} rows:\n{}", lines.len(), shortened(&lines.join("\n")))
        });
    };
    let wanted: Vec<&str> = expected.trim_end_matches(['\n', '\r']).lines().collect();
    let same = lines.join("\n").lines().eq(wanted.iter().copied());
    (!same).then(|| {
        format!("expected:\n{}\ngot:\n{}", shortened(&wanted.join("\n")), shortened(&lines.join("\n")))
    })
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[&[Option<&str>]]) -> Rows {
        let text = |value: &Option<&str>| value.map(str::to_owned);
        Rows { columns: Vec::new(), rows: rows.iter().map(|row| row.iter().map(text).collect()).collect() }
    }

    #[test]
    fn an_answer_is_one_true_or_what_the_file_says() {
        assert_eq!(judge(&rows(&[&[Some("t")]]), None), None);
        for other in
            [&rows(&[]), &rows(&[&[Some("f")]]), &rows(&[&[None]]), &rows(&[&[Some("t")], &[Some("t")]])]
        {
            assert!(judge(other, None).unwrap().starts_with("expected: one true\n"), "{other:?}");
        }
        let table = rows(&[&[Some("1"), None], &[Some("2"), Some("b")]]);
        for (expected, same) in [
            ("1|\n2|b\n", true),
            ("1|\r\n2|b", true),
            ("1|\n2|b\n\n", true),
            ("1|\n", false),
            ("2|b\n1|\n", false),
        ] {
            assert_eq!(judge(&table, Some(expected)).is_none(), same, "{expected:?}");
        }
        assert_eq!(judge(&rows(&[]), Some("")), None);
        assert_eq!(judge(&rows(&[&[Some("a\nb")]]), Some("a\nb")), None);
    }

    #[test]
    fn a_folder_of_checks_is_read_by_name_and_database() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        assert!(read_checks(&at("nowhere")).is_err());
        assert!(read_checks(home.path()).unwrap_err().to_string().contains("0 files"));
        fs::create_dir(at("shop")).unwrap();
        for (name, text) in
            [("b.sql", "select 2"), ("a.sql", "select true"), ("b.expected", "2\n"), ("notes", "x")]
        {
            fs::write(at(name), text).unwrap();
        }
        fs::write(at("shop/c.sql"), "select 3").unwrap();
        let checks = read_checks(home.path()).unwrap();
        let names: Vec<_> = checks.iter().map(|check| check.name.as_str()).collect();
        assert_eq!(names, ["a.sql", "b.sql", "shop/c.sql"]);
        assert_eq!(checks[1].expected.as_deref(), Some("2\n"));
        assert_eq!(checks[2].database.as_deref(), Some("shop"));
        fs::write(at("d.expected"), "x").unwrap();
        assert!(read_checks(home.path()).unwrap_err().to_string().contains("no d.sql"));
        fs::write(at("d.sql"), [0xff, 0xfe]).unwrap();
        assert!(read_checks(home.path()).unwrap_err().to_string().contains("not UTF-8"));
    }
}
