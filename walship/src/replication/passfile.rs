//! The two small files libpq reads for a connection: the password file and the service file.
//!
//! Pure parsers; [`super::options`] finds and reads the files.

use super::conninfo::Settings;
use crate::pg::ParseError;

/// The longest password or service file that is read.
pub const MAX_BYTES: u64 = 1 << 20;

/// Returns the password of the first line that matches, as libpq looks one up; `None` without one.
///
/// `host` is `localhost` for a Unix socket in the default folder. A field `*` matches anything;
/// `\` takes the next character literally.
/// Source: `src/interfaces/libpq/fe-connect.c`, passwordFromFile.
pub fn password(text: &str, host: &str, port: u16, database: &str, user: &str) -> Option<String> {
    let port = port.to_string();
    text.lines().find_map(|line| {
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.starts_with('#') {
            return None;
        }
        let mut rest = line;
        for wanted in [host, port.as_str(), database, user] {
            rest = match_field(rest, wanted)?;
        }
        let mut password = String::new();
        let mut chars = rest.chars();
        while let Some(c) = chars.next() {
            match c {
                // A colon ends the password field: what follows is not part of it.
                ':' => break,
                '\\' => password.extend(chars.next()),
                c => password.push(c),
            }
        }
        (!password.is_empty()).then_some(password)
    })
}

/// Returns what follows the first field and its colon when the field matches.
fn match_field<'a>(line: &'a str, wanted: &str) -> Option<&'a str> {
    if let Some(rest) = line.strip_prefix("*:") {
        return Some(rest);
    }
    let mut wanted = wanted.chars();
    let mut chars = line.char_indices();
    while let Some((at, c)) = chars.next() {
        let literal = match c {
            ':' => return (wanted.next().is_none()).then(|| &line[at + 1..]),
            '\\' => chars.next()?.1,
            c => c,
        };
        if wanted.next() != Some(literal) {
            return None;
        }
    }
    None
}

/// Returns the settings of `[service]`, or `None` when the file has no such section.
///
/// # Errors
/// [`ParseError`] with the line's number for a line that is no `keyword=value`.
/// Source: `src/interfaces/libpq/fe-connect.c`, parseServiceFile.
pub fn service(text: &str, service: &str) -> Result<Option<Settings>, ParseError> {
    let mut found: Option<Settings> = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(section) = line.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            if found.is_some() {
                break;
            }
            if section.0 == service {
                found = Some(Settings::new());
            }
            continue;
        }
        let Some(settings) = &mut found else { continue };
        let bad = || ParseError::new(format!("line {} of the service file is no keyword=value", number + 1));
        let (keyword, value) = line.split_once('=').ok_or_else(bad)?;
        if keyword == "service" {
            return Err(ParseError::new(format!(
                "line {} of the service file names a service inside a service",
                number + 1
            )));
        }
        // The first of two settings of the same keyword wins.
        settings.entry(keyword.into()).or_insert_with(|| value.into());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_matching_line_gives_the_password() {
        let file = "# comment\n\
            db1:5432:app:alice:one\n\
            db1:*:replication:*:two\n\
            *:*:*:we\\:ird:a\\:b\\\\c\n\
            db3:5432:*:bob:p:ignored\n\
            db4:5432:*:bob:\n\
            *:5439:*:*:fünf\r\n";
        for (host, port, database, user, expected) in [
            ("db1", 5432, "app", "alice", Some("one")),
            ("db1", 1, "replication", "anyone", Some("two")),
            ("db2", 1, "x", "we:ird", Some("a:b\\c")),
            ("db3", 5432, "x", "bob", Some("p")),
            ("db4", 5432, "x", "bob", None),
            ("db9", 5439, "x", "bob", Some("fünf")),
            ("db1", 5432, "app", "bob", None),
            ("db", 5432, "app", "alice", None),
            ("db11", 5432, "app", "alice", None),
        ] {
            assert_eq!(password(file, host, port, database, user).as_deref(), expected, "{host} {user}");
        }
    }

    #[test]
    fn a_service_is_found_by_its_section() {
        let file =
            "# my services\n[one]\nhost=a\nport=1\nhost=ignored\n\n[two]\ndbname=b=c\n[bad]\nnonsense\n";
        let one = service(file, "one").unwrap().unwrap();
        assert_eq!((one["host"].as_str(), one["port"].as_str(), one.len()), ("a", "1", 2));
        assert_eq!(service(file, "two").unwrap().unwrap()["dbname"], "b=c");
        assert_eq!(service(file, "three").unwrap(), None);
        assert!(service(file, "bad").unwrap_err().to_string().contains("line 10"));
    }

    proptest! {
        #[test]
        fn both_parsers_are_total(text in "(?s).{0,200}") {
            let _ = password(&text, "h", 1, "d", "u");
            let _ = service(&text, "s");
        }

        #[test]
        fn escaping_round_trips(user in "[a-z:\\\\]{1,10}", secret in "\\PC{1,20}") {
            let escape = |text: &str| text.replace('\\', "\\\\").replace(':', "\\:");
            let file = format!("h:1:d:{}:{}", escape(&user), escape(&secret));
            prop_assert_eq!(password(&file, "h", 1, "d", &user), Some(secret));
        }
    }
}
