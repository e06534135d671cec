//! Damage that an earlier verification found, as it is remembered, and as it is told again.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use walship::catalog::{KnownDamage, KnownFlaw, ReadPlace, StandingDamage};

use super::{Finding, FindingKind, ProvenState, Takes};

/// Returns damage that was found in one place as it is remembered.
pub fn known_damage(place: ReadPlace, at: DateTime<Utc>, findings: &[Finding]) -> KnownDamage {
    let flaws = findings.iter().filter(|finding| finding.is_damage()).map(|finding| KnownFlaw {
        kind: serde_json::to_value(finding.kind)
            .ok()
            .and_then(|kind| kind.as_str().map(str::to_owned))
            .unwrap_or_default(),
        object: finding.object.clone(),
        what: finding.what.clone(),
        takes: match &finding.takes {
            Takes::Segments { first, .. } => Some(first.to_string()),
            Takes::Backup { part, .. } => Some(part.clone()),
            Takes::Nothing | Takes::Tail(_) | Takes::History(_) => None,
        },
    });
    KnownDamage { place, at, flaws: flaws.take(KnownDamage::FLAWS_MAX).collect() }
}

/// Returns remembered damage as findings: what was not read again is damaged as it was.
pub fn told_again(repository: &str, damage: &KnownDamage) -> Vec<Finding> {
    let at = damage.at.format("%Y-%m-%d %H:%M:%SZ");
    let finding = |flaw: &KnownFlaw| {
        let takes = match (&flaw.takes, &damage.place) {
            (None, _) => Takes::Nothing,
            (Some(_), ReadPlace::Segment(name)) => Takes::Segments { first: *name, last: *name },
            (Some(part), ReadPlace::Documents { backup } | ReadPlace::Object { backup, .. }) => {
                Takes::Backup { id: backup.clone(), part: part.clone() }
            }
        };
        let kind = serde_json::from_value(flaw.kind.clone().into()).unwrap_or(FindingKind::Damaged);
        let what = format!("{} (found {at}, and not read again since)", flaw.what);
        Finding::damage(kind, repository, flaw.object.clone(), what, takes)
    };
    damage.flaws.iter().map(finding).collect()
}

/// Returns what is wrong with a repository: the places that are known to be damaged, and how many of the `damages` that were
/// found are not remembered with one of them.
pub fn standing(state: &ProvenState, findings: &[Finding], damages: u64) -> StandingDamage {
    let mut flaws: HashMap<&str, Vec<&str>> = HashMap::new();
    for flaw in state.damage().values().flat_map(|damage| &damage.flaws) {
        flaws.entry(&flaw.object).or_default().push(&flaw.what);
    }
    let is_remembered = |finding: &&Finding| {
        let known = flaws.get(&*finding.object).into_iter().flatten();
        finding.is_damage() && known.into_iter().any(|what| finding.what.starts_with(what))
    };
    let remembered = findings.iter().filter(is_remembered).count() as u64;
    StandingDamage {
        places: state.damage().len() as u64,
        since: state.damage().values().map(|damage| damage.at).min(),
        others: damages.saturating_sub(remembered),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_told_as_it_was() {
        let at = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
        let name = "000000010000000000000003".parse().unwrap();
        let id = "20261121T010203Z-0123456789abcdef".to_owned();
        let part = Takes::Backup { id: id.clone(), part: "data/000001.tar".into() };
        for (place, takes) in [
            (ReadPlace::Segment(name), Takes::Segments { first: name, last: name }),
            (ReadPlace::Segment(name), Takes::Nothing),
            (ReadPlace::Object { backup: id.clone(), place: 0 }, part),
            (ReadPlace::Documents { backup: id }, Takes::Nothing),
        ] {
            let found = Finding::damage(FindingKind::Broken, "here", "an object", "flipped", takes);
            let note = Finding::note(FindingKind::Damaged, "here", "another", "to be known");
            let again = told_again("here", &known_damage(place, at, &[note, found.clone()]));
            assert_eq!(again.len(), 1);
            assert!(again[0].what.starts_with("flipped (found 2023-11-14"));
            assert_eq!(again[0], Finding { what: again[0].what.clone(), ..found });
        }
    }

    #[test]
    fn what_no_place_remembers_is_counted() {
        let time = |second: i64| DateTime::from_timestamp(1_700_000_000 + second, 0).unwrap();
        let damage = |object: &str, what: &str| {
            Finding::damage(FindingKind::Damaged, "here", object.to_owned(), what, Takes::Nothing)
        };
        let mut state = ProvenState::of(walship::pg::SegmentSize::DEFAULT, "here", time(9), []);
        for (segment, second) in [("000000010000000000000003", 2), ("000000010000000000000004", 1)] {
            let place = ReadPlace::Segment(segment.parse().unwrap());
            state.doubt(known_damage(place, time(second), &[damage(segment, "flipped")]));
        }
        let missing = damage("000000010000000000000004", "it does not go on where 3 ends");
        let again = state.damage().values().flat_map(|damage| told_again("here", damage));
        let found: Vec<_> = again.chain([missing, damage("a backup", "it is missing")]).collect();
        assert_eq!(found.len(), 4);
        let standing = standing(&state, &found, 4);
        assert_eq!(standing, StandingDamage { places: 2, since: Some(time(1)), others: 2 });
    }
}
