//! `walship serve`, `walship check --monitor` and the shipped alerts: what they say is what is the case.

mod damage;
mod metrics;
mod monitor;
mod notices;
mod rules;
mod unreachable;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;
use walship_tests::postgres::PgServer;
use walship_tests::stage::Stage;
use walship_tests::{process, wait};

/// A running `walship serve`; dropping it kills it.
struct Serving {
    child: Child,
    folder: TempDir,
    address: SocketAddr,
}

impl Serving {
    /// Starts it on a free port with a look every second, and waits until it listens.
    fn start(stage: &Stage, server: Option<&PgServer>) -> Self {
        Self::start_with(stage, server, &["--interval", "1"])
    }

    fn start_with(stage: &Stage, server: Option<&PgServer>, args: &[&str]) -> Self {
        Self::start_in(stage, server, args, &[])
    }

    /// With these variables in its environment.
    fn start_in(
        stage: &Stage,
        server: Option<&PgServer>,
        args: &[&str],
        variables: &[(&str, &Path)],
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let errors = fs::File::create(folder.path().join("stderr")).unwrap();
        let inner = match server {
            Some(server) => stage.walship_on(server, &[]),
            None => stage.walship(&[]),
        };
        let mut command = process::guarded(inner.get_program());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        // How full this machine's disk is is no matter of most tests.
        for limit in ["WARNING", "CRITICAL"] {
            command.env(format!("WALSHIP_WATCH_DISK_{limit}_PERCENT"), "100");
        }
        command.args(["serve", "--listen", "127.0.0.1:0"]).args(args).envs(variables.iter().copied());
        command.args(if server.is_none() { &["--offline"][..] } else { &[] });
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let mut child = process::spawn(command).unwrap();
        let said = folder.path().join("stderr");
        let address = wait::some("walship serve listens", || {
            let text = fs::read_to_string(&said).unwrap();
            assert!(child.try_wait().unwrap().is_none(), "it ended: {text}");
            let address = text.split("listening on http://").nth(1)?.split("/metrics\n").next()?;
            address.parse().ok()
        });
        Self { child, folder, address }
    }

    fn said(&self) -> String {
        fs::read_to_string(self.folder.path().join("stderr")).unwrap()
    }

    /// The status line and the body of an answer, as any HTTP client gets them.
    fn get(&self, path: &str) -> (String, String) {
        let mut socket = TcpStream::connect(self.address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        write!(socket, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    fn metrics(&self) -> Metrics {
        let (status, body) = self.get("/metrics");
        assert_eq!(status, "HTTP/1.1 200 OK");
        Metrics::parse(&body)
    }

    /// The metrics of a look that began after this call.
    fn fresh(&self) -> Metrics {
        let began = chrono::Utc::now().timestamp_micros() as f64 / 1e6;
        wait::some("walship serve has looked again", || {
            let metrics = self.metrics();
            (metrics.one("walship_observed_timestamp_seconds", &[]) > began).then_some(metrics)
        })
    }

    /// Waits until the metrics are as they should be.
    fn wait(&self, what: &str, condition: impl Fn(&Metrics) -> bool) -> Metrics {
        wait::some(what, || Some(self.metrics()).filter(&condition))
    }

    fn terminate(&mut self) -> ExitStatus {
        process::signal(self.child.id(), Signal::SIGTERM);
        process::wait_within(&mut self.child, wait::PATIENCE)
            .unwrap_or_else(|| panic!("it does not end; it said:\n{}", self.said()))
    }

    fn kill9(&mut self) {
        process::kill_tree(&mut self.child);
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            process::kill_tree(&mut self.child);
        }
        if std::thread::panicking() {
            eprintln!("walship serve said:\n{}", self.said());
        }
    }
}

/// Metrics, read by another reader than the one that wrote them.
#[derive(Debug)]
struct Metrics(Vec<(String, BTreeMap<String, String>, f64)>);

impl Metrics {
    fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            // No test has a comma or a quote in a label.
            let pairs = labels.trim_end_matches('}').split(',').filter(|pair| !pair.is_empty()).map(|pair| {
                let (name, value) = pair.split_once('=').unwrap();
                (name.to_owned(), value.trim_matches('"').to_owned())
            });
            (name.to_owned(), pairs.collect(), value.parse().unwrap())
        };
        Self(text.lines().filter(|text| !text.starts_with('#')).map(line).collect())
    }

    fn all(&self, name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
        let has = |own: &BTreeMap<String, String>| {
            labels.iter().all(|(name, value)| own.get(*name).is_some_and(|own| own == value))
        };
        self.0
            .iter()
            .filter(|(own, labels, _)| own == name && has(labels))
            .map(|(.., value)| *value)
            .collect()
    }

    fn maybe(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let all = self.all(name, labels);
        assert!(all.len() < 2, "{name} {labels:?}: {all:?}");
        all.first().copied()
    }

    fn one(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.maybe(name, labels).unwrap_or_else(|| panic!("no {name} {labels:?} among {self:#?}"))
    }

    /// The kinds of problems that there are, with their severity.
    fn problems(&self) -> Vec<(String, String)> {
        let these = self.0.iter().filter(|(name, _, value)| name == "walship_problem" && *value > 0.0);
        these.map(|(_, labels, _)| (labels["kind"].clone(), labels["severity"].clone())).collect()
    }

    fn has_problem(&self, kind: &str) -> bool {
        self.problems().iter().any(|(own, _)| own == kind)
    }
}
