//! What a backup's own configuration would make the restored server do to files outside its folder. Pure.
//!
//! `postgresql.auto.conf` is read last and overrules nearly everything; it is the only file that a restore
//! changes. `data_directory` is the exception: PostgreSQL must know it before it can find that file, takes it
//! from `postgresql.conf`, and prefers it to `-D`. Only the server's command line outranks it.
//! Source: `src/backend/utils/misc/guc.c`, SelectConfigFiles; `guc-file.l`, ProcessConfigFileInternal.

use std::collections::BTreeMap;
use std::path::{Component, Path};

/// A line of a configuration file that says something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// A setting, its name in lower case.
    Setting {
        /// Its name.
        name: String,
        /// Its value, unquoted.
        value: String,
    },
    /// `include` or `include_if_exists`.
    Include(String),
    /// `include_dir`.
    IncludeDir(String),
}

/// What the backup's configuration files say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inherited {
    /// The backup's `postgresql.auto.conf`.
    pub auto_conf: Vec<u8>,
    /// The settings of `postgresql.conf` and what it includes. Of several values of one name the last, but
    /// one that leads outside the data directory before others: files are not read in PostgreSQL's order.
    pub settings: BTreeMap<String, String>,
    /// What it includes from outside the data directory, or what could not be followed.
    pub outside: Vec<String>,
}

impl Inherited {
    /// Takes the lines of a file in; returns what it includes.
    pub fn add(&mut self, text: &[u8]) -> Vec<Line> {
        let (settings, includes) = lines(text).partition(|line| matches!(line, Line::Setting { .. }));
        let settings: Vec<Line> = settings;
        for line in settings {
            if let Line::Setting { name, value } = line {
                let kept = self.settings.get(&name).is_some_and(|old| leads_outside(old));
                if !kept || leads_outside(&value) {
                    self.settings.insert(name, value);
                }
            }
        }
        includes
    }

    /// Returns the value that holds once `postgresql.auto.conf` is read as well.
    fn value(&self, name: &str) -> Option<String> {
        let overruled = lines(&self.auto_conf).filter_map(|line| match line {
            Line::Setting { name: set, value } if set == name => Some(value),
            _ => None,
        });
        overruled.last().or_else(|| self.settings.get(name).cloned()).filter(|value| !value.is_empty())
    }

    /// Returns the settings that keep a copy from writing where the original server writes.
    pub fn overruled(&self, server_version: u32) -> Vec<(&'static str, String)> {
        let mut settings = Vec::new();
        let unknown = !self.outside.is_empty();
        // Relative paths are taken below the data directory.
        if unknown || self.value("external_pid_file").is_some_and(|path| leads_outside(&path)) {
            settings.push(("external_pid_file", "postmaster.external.pid".to_owned()));
        }
        if unknown || self.value("log_directory").is_some_and(|path| leads_outside(&path)) {
            settings.push(("log_directory", "log".to_owned()));
        }
        let statistics = self.value("stats_temp_directory").is_some_and(|path| leads_outside(&path));
        if server_version < 150_000 && (unknown || statistics) {
            settings.push(("stats_temp_directory", "pg_stat_tmp".to_owned()));
        }
        settings
    }

    /// Returns whether the server has to be told its data directory on its command line.
    pub fn moves_data_directory(&self, data_dir: &Path) -> bool {
        let moved = self.settings.get("data_directory").filter(|path| !path.is_empty());
        !self.outside.is_empty() || moved.is_some_and(|path| Path::new(path) != data_dir)
    }

    /// Returns what to know before the restored server is started with these settings overruled.
    pub fn notes(&self, overruled: &[(&'static str, String)], data_dir: &Path) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(path) = self.settings.get("data_directory").filter(|path| Path::new(path) != data_dir) {
            notes.push(format!(
                "its postgresql.conf says data_directory = {path:?}, which wins over -D: without the option in the \
                 start command below PostgreSQL would start on that folder and not on this one; take the line out"
            ));
        }
        if !self.outside.is_empty() {
            notes.push(format!(
                "its postgresql.conf includes what is not in the backup ({}): read that before the start, it may \
                 name the original server's files",
                self.outside.join(", ")
            ));
        }
        for name in ["hba_file", "ident_file"] {
            if let Some(path) = self.value(name).filter(|path| leads_outside(path)) {
                notes.push(format!(
                    "{name} is {path:?}: the restored server reads the original server's file there, and does not \
                     start where it is missing"
                ));
            }
        }
        for (name, value) in overruled {
            let inherited = match self.value(name) {
                Some(path) => format!("was {path:?}"),
                None => "may be set in what is included".to_owned(),
            };
            notes.push(format!("{name} {inherited}; this copy uses {value:?} in its own folder instead"));
        }
        notes
    }
}

fn leads_outside(path: &str) -> bool {
    Path::new(path).components().any(|part| matches!(part, Component::RootDir | Component::ParentDir))
}

/// Returns what each line says that says something. Lines that PostgreSQL would not accept say nothing.
pub fn lines(text: &[u8]) -> impl Iterator<Item = Line> {
    text.split(|byte| *byte == b'\n').filter_map(line)
}

fn line(line: &[u8]) -> Option<Line> {
    let line = String::from_utf8_lossy(line);
    let line = line.trim_start();
    let length =
        line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.')).unwrap_or(line.len());
    let (name, rest) = line.split_at(length);
    if name.is_empty() {
        return None;
    }
    let rest = rest.trim_start();
    let value = value(rest.strip_prefix('=').unwrap_or(rest).trim_start());
    Some(match name.to_ascii_lowercase().as_str() {
        "include" | "include_if_exists" => Line::Include(value),
        "include_dir" => Line::IncludeDir(value),
        name => Line::Setting { name: name.to_owned(), value },
    })
}

/// Returns a value without its quotes: `'it''s'` and `'it\'s'` are the same.
fn value(text: &str) -> String {
    let Some(quoted) = text.strip_prefix('\'') else {
        let end = text.find(|c: char| c.is_whitespace() || c == '#').unwrap_or(text.len());
        return text[..end].to_owned();
    };
    let mut value = String::new();
    let mut rest = quoted.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\'' if rest.peek() == Some(&'\'') => value.extend(rest.next()),
            '\'' => break,
            '\\' => value.extend(rest.next()),
            c => value.push(c),
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Inherited {
        let mut inherited = Inherited::default();
        inherited.add(text.as_bytes());
        inherited
    }

    #[test]
    fn lines_are_read_as_postgresql_reads_them() {
        for (text, name, value) in [
            ("log_directory = '/var/log/pg' # x", "log_directory", "/var/log/pg"),
            ("  Log_Directory'/a b''c'", "log_directory", "/a b'c"),
            ("data_directory=/srv/pg#c", "data_directory", "/srv/pg"),
            (r"hba_file = '/it\'s'", "hba_file", "/it's"),
            ("port", "port", ""),
        ] {
            let expected = Line::Setting { name: name.into(), value: value.into() };
            assert_eq!(lines(text.as_bytes()).collect::<Vec<_>>(), [expected], "{text}");
        }
        assert_eq!(lines(b"include_dir 'conf.d'\n# a = 1\n\n=\n\xff = 1").count(), 1);
    }

    #[test]
    fn a_copy_writes_nothing_where_the_original_writes() {
        let text = "external_pid_file = '/run/pg.pid'\nlog_directory = '../log'\nhba_file = '/etc/pg/hba.conf'\n\
                    stats_temp_directory = '/run/stats'\ndata_directory = '/srv/prod'";
        let inherited = of(text);
        let names = |version| {
            let overruled = inherited.overruled(version);
            overruled.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names(140_001), ["external_pid_file", "log_directory", "stats_temp_directory"]);
        assert_eq!(names(150_001), ["external_pid_file", "log_directory"]);
        assert!(inherited.moves_data_directory(Path::new("/srv/copy")));
        assert!(!inherited.moves_data_directory(Path::new("/srv/prod")));
        let copy = Path::new("/srv/copy");
        assert_eq!(inherited.notes(&inherited.overruled(150_001), copy).len(), 4);
        assert_eq!(inherited.notes(&[], copy).len(), 2);
        let plain = of("log_directory = 'log'\nport = 1");
        assert_eq!(plain.overruled(140_001), []);
        assert!(plain.notes(&[], copy).is_empty());
    }

    #[test]
    fn what_is_included_from_elsewhere_may_say_anything() {
        let mut inherited = of("log_directory = 'log'");
        inherited.outside.push("/etc/postgresql/common.conf".into());
        assert!(inherited.moves_data_directory(Path::new("/x")));
        assert_eq!(inherited.overruled(150_001).len(), 2);
        let notes = inherited.notes(&inherited.overruled(150_001), Path::new("/x"));
        assert!(notes[0].contains("common.conf"), "{notes:?}");
    }

    #[test]
    fn automatic_settings_overrule_the_file_except_for_the_data_directory() {
        let mut inherited = of("log_directory = '/var/log'");
        inherited.auto_conf = b"log_directory = 'log'\ndata_directory = '/elsewhere'\n".to_vec();
        assert!(inherited.overruled(150_001).is_empty());
        assert!(!inherited.moves_data_directory(Path::new("/x")));
    }
}
