//! Each `next:` line of an error leads to its paragraph in docs/operators-guide.md: read from the sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A beginning that is shorter says nothing.
const CHARS_MIN: usize = 8;

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

/// The first literal in each call of `with_next`: where the line begins. Calls that pass on a text of elsewhere have
/// none.
fn next_lines(code: &str, found: &mut BTreeSet<String>) {
    for call in code.split(".with_next(").skip(1) {
        let mut depth = 1;
        let mut rest = call;
        while depth > 0 {
            let Some(c) = rest.chars().next() else { break };
            if let Some(after) =
                rest.strip_prefix("'\"'").or(rest.strip_prefix("'('")).or(rest.strip_prefix("')'"))
            {
                rest = after;
                continue;
            }
            rest = &rest[c.len_utf8()..];
            match c {
                '(' => depth += 1,
                ')' => depth -= 1,
                '"' => {
                    let (text, _) = literal(rest);
                    // Up to what is filled in.
                    let text = text.split(['{', '\n']).next().unwrap_or_default().trim().to_owned();
                    if text.len() >= CHARS_MIN {
                        found.insert(text);
                    }
                    break;
                }
                _ => {}
            }
        }
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
    assert!(lines.len() > 200, "the sources are read: {}", lines.len());
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
