//! Names and texts in SQL, whatever they hold.

/// Returns a name as SQL has it, whatever it is.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Returns a text as SQL has it, whatever it is and whatever the server's `standard_conforming_strings`.
pub fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// Returns a value as a connection string has it.
pub fn conninfo_value(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_texts_are_quoted_whatever_they_hold() {
        assert_eq!(quoted("we\"ird Name"), "\"we\"\"ird Name\"");
        assert_eq!(literal("it's \\ a"), "E'it''s \\\\ a'");
        assert_eq!(conninfo_value("a=b 'c' \\"), "'a=b \\'c\\' \\\\'");
    }
}
