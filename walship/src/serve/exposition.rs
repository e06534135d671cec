//! The metrics as Prometheus reads them, over HTTP and from node_exporter's folder of text files alike.

use std::collections::BTreeMap;
use std::path::Path;

use prometheus::{CounterVec, Encoder as _, GaugeVec, Opts, Registry, TextEncoder};

use crate::durable::TempFile;
use crate::error::{Error, Result};
use crate::watch::metrics::{Metric, Sample};

/// The content type of the text.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// What node_exporter reads of a folder.
const FILE_END: &str = ".prom";

/// Returns the text form of values.
///
/// # Errors
/// [`Error::Invalid`] for a name or a number of labels that the format does not have: a mistake in the tables here.
pub fn text(samples: &[Sample]) -> Result<String> {
    let wrong = |error: prometheus::Error| Error::invalid(format!("the metrics cannot be written: {error}"));
    let mut by_metric: BTreeMap<&'static str, (&'static Metric, Vec<&Sample>)> = BTreeMap::new();
    for sample in samples {
        let entry = by_metric.entry(sample.metric.name).or_insert((sample.metric, Vec::new()));
        entry.1.push(sample);
    }
    // It puts them in order: the same facts are the same text.
    let registry = Registry::new();
    for (metric, samples) in by_metric.into_values() {
        let options = Opts::new(metric.name, metric.help);
        if metric.is_counter {
            let family = CounterVec::new(options, metric.labels).map_err(wrong)?;
            for sample in samples {
                let counter = family.get_metric_with_label_values(&sample.labels).map_err(wrong)?;
                counter.inc_by(sample.value.max(0.0));
            }
            registry.register(Box::new(family)).map_err(wrong)?;
        } else {
            let family = GaugeVec::new(options, metric.labels).map_err(wrong)?;
            for sample in samples {
                family.get_metric_with_label_values(&sample.labels).map_err(wrong)?.set(sample.value);
            }
            registry.register(Box::new(family)).map_err(wrong)?;
        }
    }
    let mut bytes = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut bytes).map_err(wrong)?;
    String::from_utf8(bytes).map_err(|_| Error::invalid("the metrics are not UTF-8"))
}

/// Writes the text to a file that appears whole, readable by everybody.
///
/// # Errors
/// [`Error::Invalid`] for a name that node_exporter passes over; what the file system says.
pub fn write_file(path: &Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;

    if path.file_name().and_then(|name| name.to_str()).is_none_or(|name| !name.ends_with(FILE_END)) {
        return Err(Error::invalid(format!("{} does not end in {FILE_END}", path.display()))
            .with_safe("nothing was written")
            .with_next(
                "Name it so: node_exporter reads only such files of its --collector.textfile.directory.",
            ));
    }
    let failed = |error| {
        Error::from_io(format!("the metrics cannot be written to {}", path.display()), error)
            .with_safe("the file that was there before is unchanged")
            .with_next("Give the user that runs this the right to write into that folder, and the disk room.")
    };
    let file = TempFile::beside(path).map_err(|error| {
        error
            .context(format_args!("the metrics cannot be written to {}", path.display()))
            .with_safe("the file that was there before is unchanged")
            .with_next("Give the user that runs this the right to write into that folder, and the disk room.")
    })?;
    file.file().write_all(text.as_bytes()).map_err(failed)?;
    file.file().set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(failed)?;
    file.publish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::metrics::METRICS;

    #[test]
    fn label_values_are_escaped_and_every_metric_can_be_written() {
        let sample = |metric: &'static &'static Metric| Sample {
            metric,
            labels: metric.labels.iter().map(|_| "a\"b\\c\nd".to_owned()).collect(),
            value: 1.5,
        };
        let samples: Vec<_> = METRICS.iter().map(sample).collect();
        let text = text(&samples).unwrap();
        for metric in METRICS {
            assert!(
                text.contains(&format!("\n{}{{", metric.name)) || text.starts_with(metric.name),
                "{}",
                metric.name
            );
            let kind = if metric.is_counter { "counter" } else { "gauge" };
            assert!(text.contains(&format!("# TYPE {} {kind}\n", metric.name)), "{}", metric.name);
            assert_eq!(metric.is_counter, metric.name.ends_with("_total"), "{}", metric.name);
        }
        assert!(text.contains(r#"{version="a\"b\\c\nd"} 1.5"#), "{text}");
    }

    #[test]
    fn files_are_named_as_node_exporter_wants_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("walship.prom");
        write_file(&path, "a 1\n").unwrap();
        write_file(&path, "a 2\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a 2\n");
        assert!(matches!(write_file(&folder.path().join("x.txt"), ""), Err(Error::Invalid(_))));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
