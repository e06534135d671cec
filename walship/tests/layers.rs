//! The layer rule of docs/ARCHITECTURE.md, read from the sources: a room knows only what lies below it,
//! pure rooms touch neither files, clock, environment, randomness nor the network, and the two thin
//! commands link neither tokio nor the AWS SDK.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The rooms of `walship`, from the bottom up. Rooms on one line do not know each other.
const WALSHIP_FLOORS: &[&[&str]] = &[
    &["pg"],
    &["wal"],
    &["catalog"],
    &["codec", "feed", "watch"],
    &["durable"],
    &["spool", "storage", "replication", "pages"],
    &["repository"],
    &["archive"],
    &["agent"],
    &["backup", "receive", "observe"],
    &["serve"],
    &["cli"],
];

/// The rooms of `pitr`, from the bottom up.
const PITR_FLOORS: &[&[&str]] = &[
    &["target", "inherited", "words"],
    &["plan", "page"],
    &["recovery_settings", "retention", "verify", "log", "drill"],
    &["execute"],
    &["cli"],
];

/// What stands beside all floors: every room may use it, and it uses only these rooms.
const BESIDE: &[(&str, &[&str])] = &[("error", &["pg"]), ("config", &["pg", "codec", "storage"])];

/// Rooms that compute and nothing else.
const PURE: &[(&str, &[&str])] = &[
    ("walship", &["pg", "wal", "catalog", "codec", "feed", "watch"]),
    (
        "pitr",
        &[
            "target",
            "inherited",
            "words",
            "page",
            "plan",
            "recovery_settings",
            "retention",
            "verify",
            "log",
            "drill",
        ],
    ),
];

/// What a pure room must not name: as the beginning of an imported path, or anywhere in its code.
/// (A scoped thread is no I/O: the codec computes on two cores.)
const IMPURE_PATHS: &[&str] = &[
    "tokio",
    "aws_",
    "nix",
    "rand",
    "tempfile",
    "std::fs",
    "std::env",
    "std::net",
    "std::process",
    "std::time::SystemTime",
    "std::time::Instant",
];
const IMPURE_WORDS: &[&str] = &[
    "Utc::now",
    "Local::now",
    "SystemTime::now",
    "Instant::now",
    "std::fs::",
    "std::env::",
    "std::process::",
    "std::net::",
    "tokio::",
];

#[test]
fn no_room_of_walship_knows_a_room_above_it() {
    no_upward_imports("walship", WALSHIP_FLOORS);
}

#[test]
fn no_room_of_pitr_knows_a_room_above_it() {
    no_upward_imports("pitr", PITR_FLOORS);
}

#[test]
fn pure_rooms_touch_neither_files_nor_clock_nor_network() {
    let mut complaints = String::new();
    for (krate, rooms) in PURE {
        for source in sources(krate).iter().filter(|source| rooms.contains(&source.room.as_str())) {
            let code = source.code();
            for path in imported_paths(&code) {
                if IMPURE_PATHS.iter().any(|impure| path == *impure || path.starts_with(&prefix_of(impure))) {
                    let _ = writeln!(complaints, "{} imports {path}", source.shown());
                }
            }
            for word in IMPURE_WORDS.iter().filter(|word| code.contains(**word)) {
                let _ = writeln!(complaints, "{} uses {word}", source.shown());
            }
        }
    }
    assert!(complaints.is_empty(), "pure rooms must stay pure:\n{complaints}");
}

/// What was stored to be kept is removed for retention alone: one file asks a storage for that.
#[test]
fn only_retention_removes_what_was_stored_to_be_kept() {
    let mut complaints = String::new();
    for krate in ["walship", "pitr"] {
        for source in sources(krate).iter().filter(|source| source.room != "storage") {
            let code = source.code();
            let allowed = source.shown().ends_with("repository/removal.rs");
            for word in [".removal()", "StoreRemoval"].iter().filter(|word| !allowed && code.contains(**word))
            {
                let _ = writeln!(complaints, "{} uses {word}", source.shown());
            }
            let begins =
                code.contains("begin_removal(") && !source.shown().ends_with("execute/expire/mod.rs");
            if begins && !allowed {
                let _ = writeln!(complaints, "{} begins a removal", source.shown());
            }
        }
    }
    assert!(complaints.is_empty(), "only repository::removal, for execute::expire, removes:\n{complaints}");
}

#[test]
fn thin_commands_link_neither_tokio_nor_the_aws_sdk() {
    for package in ["archive-cmd", "restore-cmd"] {
        let output = Command::new(env!("CARGO"))
            .args([
                "tree",
                "--locked",
                "--offline",
                "--edges",
                "normal",
                "--prefix",
                "none",
                "--package",
                package,
            ])
            .current_dir(workspace())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let tree = String::from_utf8_lossy(&output.stdout).into_owned();
        let names: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
        assert!(names.contains("walship"), "{package} is built on the library: {names:?}");
        let heavy = |name: &&&str| {
            name.starts_with("aws-")
                || ["tokio", "hyper", "hyper-util", "prometheus", "rustls", "clap", "tracing-subscriber"]
                    .contains(*name)
        };
        assert_eq!(
            names.iter().filter(heavy).collect::<Vec<_>>(),
            Vec::<&&str>::new(),
            "{package} must stay thin"
        );
    }
}

fn no_upward_imports(krate: &str, floors: &[&[&str]]) {
    let floor_of = |room: &str| floors.iter().position(|floor| floor.contains(&room));
    let mut complaints = String::new();
    for source in sources(krate) {
        if ["lib", "main"].contains(&source.room.as_str()) {
            continue;
        }
        let beside = BESIDE.iter().find(|(name, _)| *name == source.room);
        let own_floor = floor_of(&source.room);
        if beside.is_none() && own_floor.is_none() {
            let _ = writeln!(
                complaints,
                "{}: the room `{}` has no floor yet; give it one here and in docs/ARCHITECTURE.md",
                source.shown(),
                source.room
            );
            continue;
        }
        for used in source.rooms_used() {
            let allowed = match beside {
                Some((_, rooms)) => {
                    rooms.contains(&used.as_str()) || BESIDE.iter().any(|(name, _)| *name == used)
                }
                None => {
                    BESIDE.iter().any(|(name, _)| *name == used)
                        || floor_of(&used).zip(own_floor).is_none_or(|(used, own)| used < own)
                }
            };
            if used != source.room && !allowed {
                let _ = writeln!(complaints, "{} (room `{}`) uses `{used}`", source.shown(), source.room);
            }
        }
    }
    assert!(complaints.is_empty(), "these look up from a lower floor:\n{complaints}");
}

struct Source {
    path: PathBuf,
    /// The module directly below the crate root.
    room: String,
    /// How many modules deep the file lies: 1 for `src/pg.rs` and `src/pg/mod.rs`.
    depth: usize,
    text: String,
}

impl Source {
    fn shown(&self) -> String {
        self.path.strip_prefix(workspace()).unwrap_or(&self.path).display().to_string()
    }

    /// The code without comments and without the tests at its end.
    fn code(&self) -> String {
        let lines = self.text.lines().take_while(|line| !line.starts_with("#[cfg(test)]"));
        lines
            .map(|line| if line.trim_start().starts_with("//") { "" } else { line })
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// The rooms of its own crate that it names, in `use` lines or in paths.
    fn rooms_used(&self) -> BTreeSet<String> {
        let code = self.code();
        let mut used = BTreeSet::new();
        for path in imported_paths(&code) {
            let mut parts: Vec<&str> = path.split("::").collect();
            let supers = parts.iter().take_while(|part| **part == "super").count();
            if parts.first() == Some(&"crate") {
                parts.remove(0);
            } else if supers == self.depth {
                parts.drain(..supers);
            } else {
                continue;
            }
            used.extend(parts.first().map(|part| (*part).to_owned()));
        }
        for (at, _) in code.match_indices("crate::") {
            let name: String = code[at + 7..]
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || *c == '_' || c.is_ascii_digit())
                .collect();
            used.insert(name);
        }
        // What the crate root itself re-exports (`crate::Error`), and braces, are no rooms.
        used.retain(|name| name.starts_with(|c: char| c.is_ascii_lowercase()));
        used
    }
}

/// Returns every path that the `use` declarations of `code` import, groups expanded.
fn imported_paths(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for statement in code.split(';') {
        let Some(at) = statement.rfind("use ") else { continue };
        let starts_a_word = at == 0 || !statement.as_bytes()[at - 1].is_ascii_alphanumeric();
        let tree: String = statement[at + 4..].split_whitespace().collect::<Vec<_>>().join(" ");
        if starts_a_word && !tree.contains(['=', '(', '"']) {
            expand("", &tree, &mut paths);
        }
    }
    paths
}

fn expand(prefix: &str, tree: &str, into: &mut Vec<String>) {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let name = tree.split(" as ").next().unwrap_or(tree);
        if !name.is_empty() {
            into.push(format!("{prefix}{name}"));
        }
        return;
    };
    let inner_prefix = format!("{prefix}{}", &tree[..open]);
    let inner = tree[open + 1..].trim_end().trim_end_matches('}');
    let (mut depth, mut from) = (0, 0);
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&inner_prefix, &inner[from..at], into);
                from = at + 1;
            }
            _ => {}
        }
    }
    // A group that ends the list lost its brace above; the scan tolerates that.
    expand(&inner_prefix, &inner[from..], into);
}

fn prefix_of(impure: &str) -> String {
    if impure.ends_with('_') { impure.to_owned() } else { format!("{impure}::") }
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a member of the workspace").to_owned()
}

fn sources(krate: &str) -> Vec<Source> {
    let root = workspace().join(krate).join("src");
    let mut folders = vec![root.clone()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a source folder is readable") {
            let path = entry.expect("a source folder is readable").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let inside = path.strip_prefix(&root).expect("found below it").with_extension("");
                let mut modules: Vec<String> =
                    inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
                if modules.len() > 1 && modules.last().is_some_and(|name| name == "mod") {
                    modules.pop();
                }
                let text = fs::read_to_string(&path).expect("sources are text");
                found.push(Source { room: modules[0].clone(), depth: modules.len(), path, text });
            }
        }
    }
    assert!(found.len() > 1, "the sources of {krate} are found");
    found
}

#[test]
fn the_reader_of_use_lines_understands_groups() {
    let code =
        "pub use a::b;\nuse crate::{pg::{Lsn, segment::Name as N}, storage};\nuse std::fs;\nlet x = 1;";
    let expected = ["a::b", "crate::pg::Lsn", "crate::pg::segment::Name", "crate::storage", "std::fs"];
    assert_eq!(imported_paths(code), expected);
}
