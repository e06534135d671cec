//! Whom commits wait for: `synchronous_standby_names`.

/// Which part a standby has among `synchronous_standby_names`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StandbyRole {
    /// No commit waits for it.
    None,
    /// Every commit waits for it and for so many others.
    Required {
        /// So many.
        others: usize,
    },
    /// A commit may return without it, when others answer.
    Replaceable,
}

impl StandbyRole {
    /// Returns the part of the standby with this `application_name`.
    ///
    /// Source: `src/backend/replication/syncrep_gram.y`, `syncrep_scanner.l`.
    pub fn of(names: &str, standby: &str) -> Self {
        let words = words(names);
        let (count, listed) = match words.iter().position(|word| word == "(") {
            Some(open) => {
                let count = words[..open].last().and_then(|word| word.parse::<usize>().ok()).unwrap_or(1);
                (count, &words[open + 1..])
            }
            None => (1, &words[..]),
        };
        let listed: Vec<&String> =
            listed.iter().filter(|word| !["(", ")"].contains(&word.as_str())).collect();
        let is_it = |word: &&&String| **word == "*" || word.eq_ignore_ascii_case(standby);
        if listed.iter().filter(is_it).count() == 0 {
            return Self::None;
        }
        // A star stands for any number of standbys.
        let any = listed.iter().any(|word| *word == "*");
        match !any && count >= listed.len() {
            true => Self::Required { others: listed.len() - 1 },
            false => Self::Replaceable,
        }
    }
}

/// Cuts into names, numbers and parentheses; what stands in quotes is one name.
fn words(names: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (number, text) in names.split('"').enumerate() {
        if number % 2 == 1 {
            words.push(text.to_owned());
            continue;
        }
        let spaced = text.replace('(', " ( ").replace(')', " ) ").replace(',', " ");
        words.extend(spaced.split_whitespace().map(str::to_owned));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_waited_for_is_read_from_the_names() {
        for (names, role) in [
            ("", StandbyRole::None),
            ("s1, s2", StandbyRole::None),
            ("walship", StandbyRole::Required { others: 0 }),
            ("WalShip", StandbyRole::Required { others: 0 }),
            ("\"walship\"", StandbyRole::Required { others: 0 }),
            ("FIRST 1 (walship)", StandbyRole::Required { others: 0 }),
            ("1 (walship)", StandbyRole::Required { others: 0 }),
            ("FIRST 2 (walship, s1)", StandbyRole::Required { others: 1 }),
            ("any 3 (s1,walship,\"s 2\")", StandbyRole::Required { others: 2 }),
            // When it is away, the next one is waited for instead.
            ("walship, s1", StandbyRole::Replaceable),
            ("FIRST 1 (walship, s1)", StandbyRole::Replaceable),
            ("ANY 1 (walship, s1)", StandbyRole::Replaceable),
            ("*", StandbyRole::Replaceable),
            ("FIRST 2 (walship, *)", StandbyRole::Replaceable),
            ("\"walship x\"", StandbyRole::None),
            ("a, Walship", StandbyRole::Replaceable),
            ("ANY 2 (a, \"walship\")", StandbyRole::Required { others: 1 }),
            ("walship_b", StandbyRole::None),
            ("\"a walship b\"", StandbyRole::None),
        ] {
            assert_eq!(StandbyRole::of(names, "walship"), role, "{names}");
        }
    }
}
