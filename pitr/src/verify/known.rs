//! Damage that an earlier verification found, as it is remembered, and as it is told again.

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

/// Returns what is wrong with a repository: the places that are known to be damaged, and so many others.
pub fn standing(state: &ProvenState, others: u64) -> StandingDamage {
    let since = state.damage().values().map(|damage| damage.at).min();
    StandingDamage { places: state.damage().len() as u64, since, others }
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
}
