//! Connection strings as libpq reads them: URIs and keyword/value strings, as plain settings.
//!
//! Pure: no environment, no files. What the words mean is for [`super::options`].

use std::collections::BTreeMap;

use crate::pg::ParseError;

/// The settings of one connection string, by libpq's keyword.
pub type Settings = BTreeMap<String, String>;

/// The longest connection string that is read.
pub const MAX_BYTES: usize = 64 << 10;

/// Returns the settings in `text`: a `postgresql://` URI, a keyword/value string, or (without any
/// `=`) the bare name of a database.
///
/// # Errors
/// [`ParseError`] for text that libpq would refuse. No error text repeats a value: it might be a password.
/// Source: `src/interfaces/libpq/fe-connect.c`, conninfo_parse and conninfo_uri_parse.
pub fn parse(text: &str) -> Result<Settings, ParseError> {
    if text.len() > MAX_BYTES {
        return Err(ParseError::new(format!("the connection string has {} bytes", text.len())));
    }
    if text.contains('\0') {
        return Err(ParseError::new("the connection string holds a zero byte"));
    }
    let text = text.trim();
    for scheme in ["postgresql://", "postgres://"] {
        if let Some(rest) = text.strip_prefix(scheme) {
            return parse_uri(rest);
        }
    }
    if text.contains('=') {
        return parse_keywords(text);
    }
    let mut settings = Settings::new();
    if text.chars().any(char::is_whitespace) {
        return Err(ParseError::new("the connection string is neither a URI nor keyword=value pairs"));
    }
    if !text.is_empty() {
        settings.insert("dbname".into(), text.into());
    }
    Ok(settings)
}

fn parse_keywords(text: &str) -> Result<Settings, ParseError> {
    let mut settings = Settings::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        let mut keyword = String::new();
        while let Some(c) = chars.next_if(|c| *c != '=' && !c.is_ascii_whitespace()) {
            keyword.push(c);
        }
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        if keyword.is_empty() && chars.peek().is_none() {
            return Ok(settings);
        }
        if keyword.is_empty() || chars.next() != Some('=') {
            return Err(ParseError::new("the connection string lacks \"=\" after a keyword"));
        }
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        let quoted = chars.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        loop {
            match chars.next() {
                None if quoted => {
                    return Err(ParseError::new("the connection string has an unterminated quote"));
                }
                None => break,
                Some('\'') if quoted => break,
                Some(c) if !quoted && c.is_ascii_whitespace() => break,
                Some('\\') => value.extend(chars.next()),
                Some(c) => value.push(c),
            }
        }
        settings.insert(keyword, value);
    }
}

/// Parses what follows the scheme: `[user[:password]@][host[:port],...][/dbname][?keyword=value&...]`.
fn parse_uri(rest: &str) -> Result<Settings, ParseError> {
    let mut settings = Settings::new();
    let (before_query, query) = match rest.split_once('?') {
        Some((before, query)) => (before, Some(query)),
        None => (rest, None),
    };
    let (authority, dbname) = match before_query.split_once('/') {
        Some((authority, dbname)) => (authority, Some(dbname)),
        None => (before_query, None),
    };
    let hosts = match authority.split_once('@') {
        Some((user, hosts)) => {
            let (user, password) = user.split_once(':').map_or((user, None), |(u, p)| (u, Some(p)));
            if !user.is_empty() {
                settings.insert("user".into(), percent_decode(user)?);
            }
            if let Some(password) = password {
                settings.insert("password".into(), percent_decode(password)?);
            }
            hosts
        }
        None => authority,
    };
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for part in hosts.split(',') {
        let (host, port) = match part.strip_prefix('[') {
            Some(rest) => {
                let (host, after) = rest
                    .split_once(']')
                    .ok_or_else(|| ParseError::new("the URI lacks \"]\" after an IPv6 address"))?;
                let port = match after.strip_prefix(':') {
                    Some(port) => port,
                    None if after.is_empty() => "",
                    None => return Err(ParseError::new("the URI has text between \"]\" and the port")),
                };
                (host, port)
            }
            None => part.split_once(':').unwrap_or((part, "")),
        };
        names.push(percent_decode(host)?);
        ports.push(percent_decode(port)?);
    }
    if names.iter().any(|name| !name.is_empty()) {
        settings.insert("host".into(), names.join(","));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        settings.insert("port".into(), ports.join(","));
    }
    if let Some(dbname) = dbname.filter(|name| !name.is_empty()) {
        settings.insert("dbname".into(), percent_decode(dbname)?);
    }
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (keyword, value) = pair
            .split_once('=')
            .ok_or_else(|| ParseError::new("the URI has a parameter without \"=\" after its name"))?;
        let (keyword, value) = (percent_decode(keyword)?, percent_decode(value)?);
        if value.contains('=') && pair.matches('=').count() > 1 {
            return Err(ParseError::new(format!("the URI has an extra \"=\" in parameter {keyword:?}")));
        }
        // JDBC's spelling, which libpq understands too.
        if keyword == "ssl" && value == "true" {
            settings.insert("sslmode".into(), "require".into());
        } else {
            settings.insert(keyword, value);
        }
    }
    Ok(settings)
}

fn percent_decode(text: &str) -> Result<String, ParseError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first != b'%' {
            bytes.push(*first);
            rest = tail;
            continue;
        }
        let decoded = tail.get(..2).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            digits
                .bytes()
                .all(|b| b.is_ascii_hexdigit())
                .then(|| u8::from_str_radix(digits, 16).ok())
                .flatten()
        });
        match decoded {
            Some(0) => return Err(ParseError::new("the URI holds the forbidden %00")),
            Some(byte) => bytes.push(byte),
            None => return Err(ParseError::new("the URI holds \"%\" without two hex digits after it")),
        }
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| ParseError::new("the URI is not UTF-8 once decoded"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
    }

    #[test]
    fn uris_are_read_as_libpq_does() {
        for (text, expected) in [
            ("postgresql://", vec![]),
            ("postgres://localhost", vec![("host", "localhost")]),
            (
                "postgresql://localhost:5433/mydb",
                vec![("host", "localhost"), ("port", "5433"), ("dbname", "mydb")],
            ),
            ("postgresql://user:secret@h", vec![("user", "user"), ("password", "secret"), ("host", "h")]),
            (
                "postgresql://other@localhost/otherdb?connect_timeout=10&application_name=myapp",
                vec![
                    ("user", "other"),
                    ("host", "localhost"),
                    ("dbname", "otherdb"),
                    ("connect_timeout", "10"),
                    ("application_name", "myapp"),
                ],
            ),
            (
                "postgresql://host1:123,host2:456/somedb?target_session_attrs=primary",
                vec![
                    ("host", "host1,host2"),
                    ("port", "123,456"),
                    ("dbname", "somedb"),
                    ("target_session_attrs", "primary"),
                ],
            ),
            (
                "postgresql:///db?host=/run/pg&port=5434",
                vec![("dbname", "db"), ("host", "/run/pg"), ("port", "5434")],
            ),
            (
                "postgresql://[2001:db8::1234]:5/db",
                vec![("host", "2001:db8::1234"), ("port", "5"), ("dbname", "db")],
            ),
            (
                "postgresql://%2Fvar%2Flib%2Fpostgresql/dbname",
                vec![("host", "/var/lib/postgresql"), ("dbname", "dbname")],
            ),
            ("postgresql://h/d?ssl=true", vec![("host", "h"), ("dbname", "d"), ("sslmode", "require")]),
            ("postgresql://u%40x@h", vec![("user", "u@x"), ("host", "h")]),
        ] {
            assert_eq!(parse(text).unwrap(), settings(&expected), "{text}");
        }
    }

    #[test]
    fn keyword_strings_are_read_as_libpq_does() {
        for (text, expected) in [
            ("host=localhost port=5432", vec![("host", "localhost"), ("port", "5432")]),
            ("  user = 'a b'  dbname='it\\'s' ", vec![("user", "a b"), ("dbname", "it's")]),
            ("password=a\\ b host=", vec![("password", "a b"), ("host", "")]),
            ("mydb", vec![("dbname", "mydb")]),
            ("", vec![]),
        ] {
            assert_eq!(parse(text).unwrap(), settings(&expected), "{text}");
        }
    }

    #[test]
    fn broken_strings_are_refused_without_repeating_values() {
        for text in [
            "host",
            "host=a b",
            "user='x",
            "= x",
            "postgresql://[::1",
            "postgresql://[::1]x",
            "postgresql://h%zz",
            "postgresql://h%0",
            "postgresql://h/%00",
            "postgresql://h?x",
            "postgresql://h?a=b=c",
            "two words",
        ] {
            match parse(text) {
                Ok(found) => assert_eq!(found, settings(&[("dbname", text)]), "{text:?}"),
                Err(error) => assert!(!error.to_string().contains("zz"), "{error}"),
            }
        }
        assert!(parse("user='secret").is_err());
        assert!(parse("host=a b").is_err());
        assert!(parse("postgresql://h?a=b=c").is_err());
    }

    proptest! {
        #[test]
        fn parsing_is_total(text in "\\PC*") {
            let _ = parse(&text);
            let _ = parse(&format!("postgresql://{text}"));
        }

        #[test]
        fn quoting_round_trips(value in "\\PC*") {
            let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
            let found = parse(&format!("user='{quoted}'")).unwrap();
            prop_assert_eq!(&found["user"], &value);
        }
    }
}
