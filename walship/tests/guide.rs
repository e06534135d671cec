//! Each `next:` line of an error leads to its paragraph in docs/operators-guide.md: read from the sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A beginning that is shorter says nothing.
const CHARS_MIN: usize = 8;

/// Sentences that are printed by themselves, in files whose errors say what stands elsewhere in them.
const NOT_ADVICE: [&str; 2] =
    ["Nothing was written. A file that can be read", "It is given up, and archive-cmd lets it go"];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("the sources can be read") {
        let path = entry.expect("the sources can be read").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|is| is == "rs") && !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
}

/// What of a program matters here.
#[derive(Debug, PartialEq, Eq)]
enum Token {
    /// A text, as the compiler reads it.
    Text(String),
    /// An opening bracket, and the path before it: of a function, a method or a macro.
    Open(String),
    Close,
}

/// Reads a program; comments, characters and all that is no text is left out.
fn tokens(code: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut path = String::new();
    let mut rest = code;
    while let Some(c) = rest.chars().next() {
        let after = &rest[c.len_utf8()..];
        if rest.starts_with("//") {
            rest = rest.split_once('\n').map_or("", |(_, after)| after);
            continue;
        }
        rest = after;
        match c {
            '"' => {
                let (text, after) = literal(rest);
                tokens.push(Token::Text(text));
                rest = after;
            }
            // A character, not a lifetime.
            '\'' if after.starts_with('\\') || after.chars().nth(1) == Some('\'') => {
                let escaped = after.strip_prefix('\\').unwrap_or(after);
                let first = escaped.chars().next().map_or(0, char::len_utf8);
                rest = escaped[first..].split_once('\'').map_or("", |(_, after)| after);
            }
            '(' | '[' | '{' => tokens.push(Token::Open(std::mem::take(&mut path))),
            ')' | ']' | '}' => tokens.push(Token::Close),
            _ => {}
        }
        match c.is_alphanumeric() || "_:!.".contains(c) {
            true => path.push(c),
            false => path.clear(),
        }
    }
    tokens
}

/// Reads the literal that begins behind an opening quote, as the compiler does; returns it and what follows.
fn literal(code: &str) -> (String, &str) {
    let mut text = String::new();
    let mut rest = code;
    loop {
        let c = rest.chars().next().expect("a literal ends");
        rest = &rest[c.len_utf8()..];
        match c {
            '"' => return (text, rest),
            '\\' => {
                let escaped = rest.chars().next().expect("something is escaped");
                rest = &rest[escaped.len_utf8()..];
                match escaped {
                    '\n' => rest = rest.trim_start(),
                    'n' => text.push('\n'),
                    other => text.push(other),
                }
            }
            other => text.push(other),
        }
    }
}

/// A text as it may be printed: "..." stands for what is filled in. `None` for one that has no beginning of its own.
fn shown(text: &str) -> Option<String> {
    let mut shown = String::new();
    let mut rest = text.split('\n').next().unwrap_or_default();
    while let Some((before, after)) = rest.split_once('{') {
        shown.push_str(before);
        match after.strip_prefix('{') {
            Some(after) => {
                shown.push('{');
                rest = after;
            }
            None => {
                shown.push_str("...");
                rest = after.split_once('}').map_or("", |(_, after)| after);
            }
        }
    }
    shown.push_str(&rest.replace("}}", "}"));
    let shown = shown.trim().to_owned();
    (shown.len() >= CHARS_MIN && !shown.starts_with("...")).then_some(shown)
}

/// The texts of a call's argument that may be printed: not those that are filled into others, or given to functions. The
/// tokens begin behind the opening bracket.
fn texts(tokens: &[Token]) -> Vec<&str> {
    let mut found = Vec::new();
    // Of each bracket that is open: how many texts in it count.
    let mut open = vec![usize::MAX];
    for token in tokens {
        match token {
            Token::Open(path) => {
                let wraps = path.is_empty() || path == "Some" || path.ends_with("from");
                let outer = open.last().copied().unwrap_or(0);
                open.push(match path.ends_with("format!") || path.ends_with("concat!") {
                    true => outer.min(1),
                    false if wraps => outer,
                    false => 0,
                });
            }
            Token::Close => {
                open.pop();
            }
            Token::Text(text) => {
                if let Some(left) = open.last_mut().filter(|left| **left > 0) {
                    *left -= 1;
                    found.push(text.as_str());
                }
            }
        }
        if open.is_empty() {
            break;
        }
    }
    found
}

/// A text that advises, by the way the project writes: one whole sentence.
fn is_sentence(text: &str) -> bool {
    text.starts_with(|c: char| c.is_uppercase() || c == '`')
        && text.contains(' ')
        && text.ends_with('.')
        && !text.contains('\n')
}

/// What the errors of a file say to do. Where a file gives its errors a text that comes out of a variable, a constant or a
/// function, each sentence in it is taken for one.
fn next_lines(code: &str, found: &mut BTreeSet<String>) {
    let tokens = tokens(code);
    let mut passes_on = false;
    for (at, token) in tokens.iter().enumerate() {
        let Token::Open(path) = token else { continue };
        let argument = &tokens[at + 1..];
        if path.ends_with(".with_next") {
            let texts = texts(argument);
            // Of another error, or of a report: said where that is made.
            let of_another = matches!(argument.first(), Some(Token::Open(path)) if path.ends_with(".next"));
            passes_on |= texts.is_empty() && !of_another;
            found.extend(texts.into_iter().filter_map(shown));
        }
        passes_on |= path.ends_with("TargetError::new");
    }
    if passes_on {
        let sentences = tokens.iter().filter_map(|token| match token {
            Token::Text(text) if is_sentence(text) && !NOT_ADVICE.iter().any(|not| text.starts_with(not)) => {
                shown(text)
            }
            _ => None,
        });
        found.extend(sentences);
    }
}

fn all_next_lines() -> BTreeSet<String> {
    let mut files = Vec::new();
    for krate in ["walship", "pitr", "archive-cmd", "restore-cmd"] {
        sources(&workspace().join(krate).join("src"), &mut files);
    }
    let mut found = BTreeSet::new();
    for file in files {
        let code = fs::read_to_string(&file).expect("the sources can be read");
        let code = code.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        next_lines(code, &mut found);
    }
    // What an error says that says nothing of its own.
    for error in [
        walship::Error::unavailable(""),
        walship::Error::denied(""),
        walship::Error::missing(""),
        walship::Error::conflict(""),
        walship::Error::corrupt(""),
        walship::Error::mismatch(""),
        walship::Error::invalid(""),
        walship::Error::local_io(""),
    ] {
        found.insert(error.next().to_owned());
    }
    found
}

/// The rows of the guide's table: how a line begins, and the paragraph.
fn rows(guide: &str) -> Vec<(String, String)> {
    let table = guide.split("\n## By `next:` line\n").nth(1).expect("the guide has the table");
    let rows = table.lines().filter(|line| line.starts_with("| `") && !line.starts_with("| `next:`"));
    rows.map(|line| {
        let (beginning, paragraph) = line.trim_matches(['|', ' ']).rsplit_once(" | ").expect(line);
        let anchor = paragraph.split("](#").nth(1).and_then(|rest| rest.strip_suffix(')')).expect(line);
        (beginning.trim_matches(['`', ' ']).to_owned(), anchor.to_owned())
    })
    .collect()
}

/// A heading's anchor, as it is made where the page is shown.
fn anchor(heading: &str) -> String {
    let kept = heading
        .to_lowercase()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || " -".contains(*c))
        .collect::<String>();
    kept.replace(' ', "-")
}

#[test]
fn every_next_line_leads_to_its_paragraph() {
    let guide = fs::read_to_string(workspace().join("docs/operators-guide.md")).unwrap();
    let anchors: BTreeSet<String> =
        guide.lines().filter_map(|line| line.strip_prefix("## ")).map(anchor).collect();
    let rows = rows(&guide);
    let lines = all_next_lines();
    assert!(lines.len() > 300, "the sources are read: {}", lines.len());
    let leads = |line: &str, beginning: &str| line.trim_matches(['`', ' ']).starts_with(beginning);
    let mut complaints = Vec::new();
    for line in &lines {
        if !rows.iter().any(|(beginning, _)| leads(line, beginning)) {
            complaints.push(format!("no row for: {line}"));
        }
    }
    for (beginning, paragraph) in &rows {
        if beginning.len() < CHARS_MIN || !anchors.contains(paragraph) {
            complaints.push(format!("leads nowhere: {beginning} -> {paragraph}"));
        }
        // The page also has a line that a report prints by itself.
        let printed = beginning.starts_with("Look into the server's disk and memory");
        if !printed && !lines.iter().any(|line| leads(line, beginning)) {
            complaints.push(format!("no error says this: {beginning}"));
        }
    }
    assert!(
        complaints.is_empty(),
        "docs/operators-guide.md, \"By `next:` line\":\n{}",
        complaints.join("\n")
    );
}

#[test]
fn what_passes_through_helpers_and_variables_is_seen() {
    let lines = |code: &str| {
        let mut found = BTreeSet::new();
        next_lines(code, &mut found);
        found.into_iter().collect::<Vec<_>>()
    };
    let direct = r#"// It's "no.text" (here.
        e.with_next("Look at it.").with_next(format!("Run `x {id:?}` in {}: {{it}}.", join(", "), "Not this."))
            .with_next(match c { '"' | '\'' => "Either this is so.", _ if f("Not that.") => "Or that is so." });"#;
    assert_eq!(
        lines(direct),
        ["Either this is so.", "Look at it.", "Or that is so.", "Run `x ...` in ...: {it}."]
    );
    let apart = ["Give it a name.", "Read ... aloud."];
    for code in [
        r#"const NEXT: &str = "Give it a name."; fn f<'a>() { e("a fact", "Read {} aloud.").with_next(NEXT) }"#,
        r#"let refused = |what: &str, next: &str| e(what).with_next(next); refused("a fact", "Give it a name.");
           refused("no Fact either.", "Read {x} aloud.")"#,
        r#"let (error, next) = (e("a fact"), Some("Give it a name.")); error.with_next(other("Read {} aloud."))"#,
        r#"TargetError::new("a fact", "Give it a name.").or(TargetError::new(text, "Read {why} aloud."))"#,
    ] {
        assert_eq!(lines(code), apart, "{code}");
    }
    // Where every text is given at once, other sentences are none; nor where one is another error's.
    assert_eq!(lines(r#"e.with_next(other.next().to_owned()); say("Nothing is on record.")"#), [""; 0]);
}

#[test]
fn links_between_the_pages_lead_somewhere() {
    for page in ["operators-guide.md", "changing-over.md"] {
        let text = fs::read_to_string(workspace().join("docs").join(page)).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            let (file, wanted) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page } else { file };
            let there = fs::read_to_string(workspace().join("docs").join(target));
            let there = there.unwrap_or_else(|error| panic!("{page}: {link}: {error}"));
            let headings: Vec<String> = there
                .lines()
                .filter(|line| line.starts_with('#'))
                .map(|line| anchor(line.trim_start_matches(['#', ' '])))
                .collect();
            assert!(wanted.is_empty() || headings.contains(&wanted.to_owned()), "{page}: {link}");
        }
    }
}
