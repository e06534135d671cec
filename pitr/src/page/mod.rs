//! What every page of HTML has: its frame, its style, escaping, tables, a scale of time. Pure.
//!
//! A page is one file that loads nothing and runs nothing: it can be mailed, kept beside a repository, or served by
//! anything. What it says is said by whoever calls: the report of a drill, the status page of `pitr info`.

mod axis;

use std::fmt::Write as _;

pub use axis::{Scale, Tick, clock_ticks, elapsed_ticks, percent};

use crate::words::escaped;

/// Whatever a name on the page may look like, a browser is told to load and run nothing.
const HEAD: &str = r#"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
"#;

const STYLE: &str = include_str!("style.css");

/// How good something is, for its colour. Words say it as well: colour alone never does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tone {
    /// Neither good nor bad.
    Plain,
    /// As it should be.
    Good,
    /// Not known, or not done.
    Soft,
    /// Somebody should look at it.
    Warn,
    /// Wrong.
    Bad,
}

impl Tone {
    /// Returns the class of elements that are coloured so.
    pub fn class(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Good => "good",
            Self::Soft => "soft",
            Self::Warn => "warn",
            Self::Bad => "bad",
        }
    }
}

/// Returns a page up to where its content begins.
pub fn begin(title: &str) -> String {
    format!("{HEAD}<title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n", escaped(title))
}

/// Ends a page.
pub fn end(page: &mut String) {
    page.push_str("</main>\n</body>\n</html>\n");
}

/// Returns the word that says how something came out, as the page's reader sees it first.
pub fn pill(tone: Tone, word: &str) -> String {
    format!("<span class=\"pill {}\">{}</span>", tone.class(), escaped(word))
}

/// Returns text of at most so many characters, with an ellipsis where there was more.
pub fn shortened(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        Some((at, _)) => format!("{}\u{2026}", &text[..at]),
        None => text.to_owned(),
    }
}

/// Returns text, escaped, in which what stands between backticks is a command.
pub fn with_commands(text: &str) -> String {
    let escaped = escaped(text);
    let parts: Vec<&str> = escaped.split('`').collect();
    // One that is not closed is a character.
    if parts.len().is_multiple_of(2) {
        return escaped;
    }
    let parts = parts.iter().enumerate();
    parts
        .map(|(at, part)| if at % 2 == 1 { format!("<code>{part}</code>") } else { (*part).to_owned() })
        .collect()
}

/// One cell of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    /// What it says; escaped when it is written.
    pub text: String,
    /// How good that is.
    pub tone: Tone,
    /// Whether its lines and spaces count.
    pub pre: bool,
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::toned(Tone::Plain, text)
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl Cell {
    /// Returns a cell with a tone.
    pub fn toned(tone: Tone, text: impl Into<String>) -> Self {
        Self { text: text.into(), tone, pre: false }
    }
}

/// How a column is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    /// Words, which may wrap.
    Words,
    /// Figures: in line with those above.
    Number,
    /// An id, an LSN, a name of a file.
    Code,
}

/// So many rows of a table are shown at once.
const ROWS_SHOWN: usize = 12;

/// So many more can be unfolded.
const ROWS_FOLDED: usize = 200;

/// The most characters of one cell.
const CELL_CHARS_MAX: usize = 600;

/// A longer word is broken where there is no room for it.
const WORD_CHARS_MAX: usize = 40;

/// The same as [`CELL_CHARS_MAX`] where lines count.
const PRE_CHARS_MAX: usize = 4000;

/// Writes a table, the first rows at once and more to unfold; of very long ones the rest is only counted. `where_else` says
/// where all of it is to be had. Where there is little room each row stands by itself, and each cell beside the name of its
/// column.
pub fn table(
    page: &mut String,
    title: &str,
    columns: &[(&str, Column)],
    rows: &[Vec<Cell>],
    where_else: &str,
) {
    let (shown, more) = rows.split_at(rows.len().min(ROWS_SHOWN));
    rows_of(page, title, columns, shown);
    let (folded, left) = more.split_at(more.len().min(ROWS_FOLDED));
    if !folded.is_empty() {
        let _ = writeln!(page, "<details><summary>{} more</summary>", folded.len());
        rows_of(page, &format!("{title}, continued"), columns, folded);
        page.push_str("</details>\n");
    }
    if !left.is_empty() {
        let _ = writeln!(page, "<p class=\"soft\">And {} more: {}.</p>", left.len(), escaped(where_else));
    }
}

fn rows_of(page: &mut String, title: &str, columns: &[(&str, Column)], rows: &[Vec<Cell>]) {
    let class = |column: Column, is_long: bool| match (column, is_long) {
        (Column::Words, false) => "",
        (Column::Words, true) => " class=\"long\"",
        (Column::Number, _) => " class=\"number\"",
        (Column::Code, false) => " class=\"code\"",
        (Column::Code, true) => " class=\"code long\"",
    };
    // Only such words are broken: a column that may break any gives its room to the others.
    let is_long =
        |cell: &Cell| cell.text.split_whitespace().any(|word| word.chars().count() > WORD_CHARS_MAX);
    let _ = write!(page, "<table>\n<caption class=\"unseen\">{}</caption>\n<thead><tr>", escaped(title));
    for (name, column) in columns {
        let _ = write!(page, "<th scope=\"col\"{}>{}</th>", class(*column, false), escaped(name));
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in rows {
        page.push_str("<tr>");
        for ((name, column), cell) in columns.iter().zip(row) {
            let max = if cell.pre { PRE_CHARS_MAX } else { CELL_CHARS_MAX };
            let text = escaped(&shortened(&cell.text, max));
            let text = match cell.tone {
                _ if cell.pre && !text.is_empty() => format!("<pre>{text}</pre>"),
                Tone::Plain => text,
                tone => format!("<span class=\"{}\">{text}</span>", tone.class()),
            };
            let class = class(*column, is_long(cell));
            let _ = write!(page, "<td{class} data-name=\"{}\">{text}</td>", escaped(name));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table>\n");
}

/// Writes names and values.
pub fn facts<'a>(page: &mut String, facts: impl IntoIterator<Item = (&'a str, Cell)>) {
    page.push_str("<dl class=\"facts\">\n");
    for (name, value) in facts {
        let _ = writeln!(
            page,
            "<dt>{}</dt><dd class=\"{}\">{}</dd>",
            escaped(name),
            value.tone.class(),
            escaped(&shortened(&value.text, CELL_CHARS_MAX))
        );
    }
    page.push_str("</dl>\n");
}

/// Writes what stands along a scale at the height `y`, with lines up to `top`. Fewer marks where there is less room: the style shows
/// one of three sets.
pub fn axis(page: &mut String, ticks: impl Fn(usize) -> Vec<Tick>, top: u32, y: u32) {
    for (class, max) in [("narrow", 3), ("middle", 6), ("wide", 12)] {
        let _ = write!(page, "<g class=\"axis {class}\">");
        for tick in ticks(max) {
            let at = percent(tick.at);
            let _ = write!(page, "<line x1=\"{at}\" x2=\"{at}\" y1=\"{top}\" y2=\"{}\"/>", y + 4);
            // At the edges text goes inwards.
            let anchor = match tick.at {
                ..4.0 => " text-anchor=\"start\"",
                96.0.. => " text-anchor=\"end\"",
                _ => "",
            };
            let _ = write!(page, "<text x=\"{at}\" y=\"{}\"{anchor}>{}</text>", y + 17, escaped(&tick.label));
            if let Some(below) = &tick.below {
                let _ = write!(
                    page,
                    "<text class=\"below\" x=\"{at}\" y=\"{}\"{anchor}>{}</text>",
                    y + 31,
                    escaped(below)
                );
            }
        }
        page.push_str("</g>\n");
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns an attribute of an element, which is in percent.
    pub(crate) fn percent_of(element: &str, name: &str) -> f64 {
        let behind = element.split(&format!(" {name}=\"")).nth(1).unwrap();
        behind.split("%\"").next().unwrap().parse().unwrap()
    }

    /// Panics where a page is not what every page is: whole, one that loads nothing and runs nothing, and whose elements are
    /// closed in the order in which they were opened.
    pub(crate) fn assert_sound(page: &str) {
        assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
        assert!(page.chars().all(|c| c == '\n' || !c.is_control()));
        let mut open: Vec<String> = Vec::new();
        let mut rest = page;
        while let Some((_, after)) = rest.split_once('<') {
            let (tag, behind) = after.split_once('>').unwrap();
            rest = behind;
            if tag.starts_with('!') {
                continue;
            }
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name), "before {:.80}", behind);
                continue;
            }
            let name = tag.split([' ', '\n', '/']).next().unwrap().to_owned();
            // Attributes are quoted, and none loads or runs anything.
            let parts: Vec<&str> = tag.split('"').collect();
            assert_eq!(parts.len() % 2, 1, "{tag}");
            let names = parts.iter().step_by(2).flat_map(|names| names.split([' ', '=']));
            assert!(
                !names.into_iter().any(|name| ["href", "src"].contains(&name) || name.starts_with("on")),
                "{tag}"
            );
            assert!(
                !["script", "link", "iframe", "img", "object", "form", "base"].contains(&&*name),
                "{tag}"
            );
            if name == "style" {
                let (style, behind) = rest.split_once("</style>").unwrap();
                assert!(!["url(", "@import", "<"].iter().any(|outside| style.contains(outside)));
                rest = behind;
            } else if name != "meta" && !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert_eq!(open, Vec::<String>::new());
        let mut ids: Vec<&str> =
            page.split(" id=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        let all = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), all, "ids are unique");
    }

    #[test]
    fn a_long_table_is_folded_and_a_very_long_one_is_counted() {
        for (rows, tables, said) in [
            (0, 1, None),
            (12, 1, None),
            (13, 2, Some("<summary>1 more</summary>")),
            (212, 2, Some("<summary>200 more</summary>")),
            (1000, 2, Some("And 788 more: look &lt;there&gt;.")),
        ] {
            let mut page = begin("<t>");
            let rows: Vec<Vec<Cell>> = (0..rows)
                .map(|number| {
                    vec![Cell::from(format!("<{number}>")), Cell::toned(Tone::Bad, "x".repeat(9000))]
                })
                .collect();
            table(&mut page, "A & B", &[("<n>", Column::Number), ("x", Column::Code)], &rows, "look <there>");
            end(&mut page);
            assert_sound(&page);
            assert_eq!(page.matches("<table>").count(), tables);
            assert!(said.is_none_or(|said| page.contains(said)), "{said:?}");
            assert!(page.len() < 200_000, "{}", page.len());
        }
    }

    #[test]
    fn commands_are_told_from_words() {
        for (text, expected) in [
            ("do `a <b>` now", "do <code>a &lt;b&gt;</code> now"),
            ("one ` alone", "one ` alone"),
            ("`a``b`", "<code>a</code><code>b</code>"),
            ("", ""),
        ] {
            assert_eq!(with_commands(text), expected);
        }
    }

    #[test]
    fn text_is_shortened_between_characters() {
        assert_eq!(shortened("äöü", 3), "äöü");
        assert_eq!(shortened("äöü", 2), "äö\u{2026}");
        assert_eq!(shortened("", 0), "");
    }
}
