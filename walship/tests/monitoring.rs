//! docs/monitoring.md, the alerts and the dashboard speak of metrics and problems that there are, and of all of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use walship::watch::Kind;
use walship::watch::metrics::METRICS;

fn read(path: &str) -> String {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every word that looks like a metric.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let words =
        text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '-' && c != '.' && c != '/');
    words
        .filter(|word| word.starts_with("walship_") && !word.contains(['.', '/']))
        .map(str::to_owned)
        .collect()
}

fn known() -> BTreeSet<String> {
    METRICS.iter().map(|metric| metric.name.to_owned()).collect()
}

#[test]
fn the_page_lists_every_metric_with_its_labels_and_every_problem() {
    let page = read("docs/monitoring.md");
    for metric in METRICS {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{}` |", metric.name)));
        let row = row.unwrap_or_else(|| panic!("docs/monitoring.md has no row for {}", metric.name));
        let labels: Vec<&str> = row.split(" | ").nth(1).unwrap().split('`').skip(1).step_by(2).collect();
        assert_eq!(labels, metric.labels, "the labels of {}", metric.name);
        let kind = if metric.is_counter { "counter" } else { "gauge" };
        assert_eq!(row.split(" | ").nth(2), Some(kind), "{}", metric.name);
    }
    let unknown: Vec<_> = metrics_in(&page).difference(&known()).cloned().collect();
    assert!(unknown.is_empty(), "docs/monitoring.md names what is not there: {unknown:?}");
    for kind in Kind::ALL {
        assert!(page.lines().any(|line| line.starts_with(&format!("| `{kind}` |"))), "no row for {kind}");
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.word());
    }
    assert_eq!(Kind::ALL.iter().collect::<BTreeSet<_>>().len(), Kind::ALL.len());
    for alert in alerts() {
        assert!(page.contains(&format!("`{alert}`")), "docs/monitoring.md does not tell of {alert}");
    }
}

fn alerts() -> Vec<String> {
    let rules = read("share/monitoring/walship-alerts.yml");
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    names.map(str::to_owned).collect()
}

#[test]
fn alerts_and_their_tests_speak_of_what_is_measured() {
    let rules = read("share/monitoring/walship-alerts.yml");
    let tests = read("share/monitoring/walship-alerts-test.yml");
    for text in [&rules, &tests] {
        let unknown: Vec<_> = metrics_in(text).difference(&known()).cloned().collect();
        assert!(unknown.is_empty(), "not measured: {unknown:?}");
    }
    for alert in alerts() {
        assert!(tests.contains(&alert) || alert.contains("Disk"), "{alert} is not tested");
    }
    // The kinds that expressions ask for are kinds.
    for part in rules.split("kind=").skip(1) {
        let value = part.trim_start_matches('~').trim_start_matches('"').split('"').next().unwrap();
        for word in value.split('|').filter(|word| !matches!(*word, "full" | "incremental")) {
            assert!(Kind::ALL.iter().any(|kind| kind.word() == word), "{word}");
        }
    }
}

#[test]
fn the_dashboard_is_valid_and_asks_for_what_is_measured() {
    let dashboard: serde_json::Value =
        serde_json::from_str(&read("share/monitoring/walship-dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let (mut ids, mut places) = (BTreeSet::new(), Vec::new());
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        let at = |name: &str| panel["gridPos"][name].as_u64().unwrap();
        let place = (at("x"), at("y"), at("x") + at("w"), at("y") + at("h"));
        assert!(place.2 <= 24, "{panel}");
        let overlaps = |other: &(u64, u64, u64, u64)| {
            place.0 < other.2 && other.0 < place.2 && place.1 < other.3 && other.1 < place.3
        };
        assert!(!places.iter().any(overlaps), "{panel} lies over another");
        places.push(place);
        if panel["type"] == "row" {
            continue;
        }
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{panel}");
        for target in targets {
            let asked = metrics_in(target["expr"].as_str().unwrap());
            assert!(!asked.is_empty() && asked.is_subset(&known()), "{target}");
        }
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        if let Some(query) = variable["definition"].as_str() {
            let asked = metrics_in(query);
            assert!(!asked.is_empty() && asked.is_subset(&known()), "{variable}");
        }
    }
}
