//! A moment by chance out of those that can be reached.

use chrono::{DateTime, Duration, Utc};

/// A span of time in which every moment can be reached: from the first up to the second.
pub type Span = (DateTime<Utc>, DateTime<Utc>);

/// Returns the moment that `chance` leads to: all moments of the spans are as likely as each other. `None` where
/// no span lasts.
pub fn moment(spans: &[Span], chance: u64) -> Option<DateTime<Utc>> {
    let length = |(from, until): &Span| (*until - *from).num_microseconds().unwrap_or(i64::MAX).max(0) as u64;
    let total = spans.iter().fold(0u64, |sum, span| sum.saturating_add(length(span)));
    let mut at = chance.checked_rem(total)?;
    for span in spans {
        match at.checked_sub(length(span)) {
            Some(rest) => at = rest,
            None => return span.0.checked_add_signed(Duration::microseconds(i64::try_from(at).ok()?)),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(micros: i64) -> DateTime<Utc> {
        DateTime::from_timestamp_micros(micros).unwrap()
    }

    #[test]
    fn moments_lie_in_the_spans_and_nowhere_else() {
        assert_eq!(moment(&[], 7), None);
        assert_eq!(moment(&[(at(5), at(5)), (at(9), at(3))], 7), None);
        let spans = [(at(100), at(103)), (at(200), at(200)), (at(300), at(302))];
        let found: Vec<_> = (0..6).map(|chance| moment(&spans, chance).unwrap().timestamp_micros()).collect();
        assert_eq!(found, [100, 101, 102, 300, 301, 100]);
    }

    proptest! {
        #[test]
        fn a_moment_is_always_in_a_span(
            spans in proptest::collection::vec((0i64..1 << 50, 0i64..1 << 40), 1..6), chance: u64
        ) {
            let spans: Vec<Span> = spans.iter().map(|(from, long)| (at(*from), at(from + long))).collect();
            let lasts = spans.iter().any(|(from, until)| from < until);
            let found = moment(&spans, chance);
            prop_assert_eq!(found.is_some(), lasts);
            if let Some(found) = found {
                prop_assert!(spans.iter().any(|(from, until)| *from <= found && found < *until));
            }
        }
    }
}
