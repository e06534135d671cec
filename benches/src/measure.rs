//! Measuring contenders that take turns, so that whatever else the machine does hits them alike.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};

/// What one run of one contender cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measurement {
    /// Time by the wall clock.
    pub wall: Duration,
    /// User and system time.
    pub cpu: Duration,
    /// The most memory that the process held (resident), for whole processes.
    pub peak_bytes: Option<u64>,
}

/// Something that is measured again and again; its argument is the number of the round.
pub struct Contender<'a> {
    name: String,
    run: Box<dyn FnMut(usize) -> Measurement + 'a>,
}

impl<'a> Contender<'a> {
    /// Returns a contender; `run` prepares what it needs, then measures only what counts.
    pub fn new(name: impl Into<String>, run: impl FnMut(usize) -> Measurement + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }
}

/// The result of one contender: medians over the rounds.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Median time by the wall clock.
    pub wall: Duration,
    /// Median user and system time.
    pub cpu: Duration,
    /// The largest peak of memory in any round.
    pub peak_bytes: Option<u64>,
    /// Median over the rounds of this contender's wall time by the first one's in the same round.
    pub wall_ratio: f64,
    /// The same for user and system time.
    pub cpu_ratio: f64,
}

/// Lets all contenders run once unmeasured and then `rounds` times in turn, each round beginning with
/// another one; ratios are to the first contender.
///
/// # Panics
/// Without contenders or rounds.
pub fn compete(rounds: usize, mut contenders: Vec<Contender<'_>>) -> Vec<Row> {
    assert!(rounds > 0 && !contenders.is_empty(), "somebody must run");
    let count = contenders.len();
    let mut samples: Vec<Vec<Measurement>> = vec![Vec::new(); count];
    for round in 0..=rounds {
        for turn in 0..count {
            let index = (round + turn) % count;
            let sample = (contenders[index].run)(round);
            if round > 0 {
                samples[index].push(sample);
            }
        }
    }
    let ratio = |own: &[Measurement], of: fn(&Measurement) -> Duration| {
        let ratios = own.iter().zip(&samples[0]);
        median(ratios.map(|(own, first)| of(own).as_secs_f64() / of(first).as_secs_f64().max(1e-9)).collect())
    };
    let rows = contenders.iter().zip(&samples).map(|(contender, own)| Row {
        name: contender.name.clone(),
        wall: Duration::from_secs_f64(median(own.iter().map(|sample| sample.wall.as_secs_f64()).collect())),
        cpu: Duration::from_secs_f64(median(own.iter().map(|sample| sample.cpu.as_secs_f64()).collect())),
        peak_bytes: own.iter().filter_map(|sample| sample.peak_bytes).max(),
        wall_ratio: ratio(own, |sample| sample.wall),
        cpu_ratio: ratio(own, |sample| sample.cpu),
    });
    rows.collect()
}

/// Returns a runner that calls `work`; CPU time is that of all threads, so nothing else may run in this
/// process meanwhile.
pub fn in_process<'a>(mut work: impl FnMut() + 'a) -> impl FnMut(usize) -> Measurement + 'a {
    move |_| {
        let cpu_before = own_cpu();
        let started = Instant::now();
        work();
        let wall = started.elapsed();
        Measurement { wall, cpu: own_cpu().saturating_sub(cpu_before), peak_bytes: None }
    }
}

/// Runs `argv` as a process of its own and returns what it and everything that it waited for cost.
///
/// A small process of this program stands between, because the kernel reports the use of *all* ended
/// children together: so the child to be measured is the only one of its parent. Its peak of memory
/// cannot be less than what that small process holds (some 3 MiB).
///
/// # Panics
/// When the command cannot be run or fails; its standard error is in the message.
pub fn process(argv: &[&str], environment: &[(&str, &str)], dir: &Path) -> Measurement {
    let this = std::env::current_exe().expect("a running program knows its own path");
    let mut command = Command::new(this);
    command.arg(CHILD).args(argv).envs(environment.iter().copied()).current_dir(dir);
    let output = command.output().unwrap_or_else(|e| panic!("{command:?} could not be started: {e}"));
    assert!(
        output.status.success(),
        "{argv:?} failed: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("the small process prints a measurement")
}

/// The first argument that makes a bench program the small process of [`process`].
const CHILD: &str = "--measure-child";

/// Does the work of the small process and ends, when the arguments say that this is one; to be called
/// first in the `main` of a program that uses [`process`].
pub fn be_the_small_process_if_asked() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_none_or(|first| first != CHILD) {
        return;
    }
    let program = arguments.next().expect("a program follows");
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    let started = Instant::now();
    let status = command.status().expect("the measured program can be started");
    let wall = started.elapsed();
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("a process may ask for its children's use");
    if !status.success() {
        eprintln!("{status}");
        std::process::exit(1);
    }
    let measurement = Measurement {
        wall,
        cpu: cpu_of(&usage),
        // Linux counts in kibibytes.
        peak_bytes: u64::try_from(usage.max_rss()).ok().map(|kib| kib << 10),
    };
    println!("{}", serde_json::to_string(&measurement).expect("a measurement is plain data"));
    std::process::exit(0);
}

/// Returns the rows as a Markdown table; with `bytes`, also as a rate by CPU time.
pub fn table(rows: &[Row], bytes: Option<u64>) -> String {
    let peaks = rows.iter().any(|row| row.peak_bytes.is_some());
    let mut text = String::from("| | wall ms | CPU ms | wall ratio | CPU ratio |");
    let mut rule = String::from("|---|---|---|---|---|");
    for (wanted, title) in [(bytes.is_some(), " GB/s of CPU time |"), (peaks, " peak MiB |")] {
        if wanted {
            text.push_str(title);
            rule.push_str("---|");
        }
    }
    let _ = write!(text, "\n{rule}\n");
    for row in rows {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let _ = write!(
            text,
            "| {} | {:.2} | {:.2} | {:.2} | {:.2} |",
            row.name,
            ms(row.wall),
            ms(row.cpu),
            row.wall_ratio,
            row.cpu_ratio
        );
        if let Some(bytes) = bytes {
            let _ = write!(text, " {:.2} |", bytes as f64 / row.cpu.as_secs_f64().max(1e-9) / 1e9);
        }
        if peaks {
            let peak = row.peak_bytes.map_or_else(String::new, |peak| format!("{}", peak >> 20));
            let _ = write!(text, " {peak} |");
        }
        text.push('\n');
    }
    text
}

fn own_cpu() -> Duration {
    cpu_of(&getrusage(UsageWho::RUSAGE_SELF).expect("a process may ask for its own use"))
}

/// Returns user and system time together.
pub(crate) fn cpu_of(usage: &Usage) -> Duration {
    let duration = |time: TimeVal| {
        Duration::from_secs(u64::try_from(time.tv_sec()).unwrap_or(0))
            + Duration::from_micros(u64::try_from(time.tv_usec()).unwrap_or(0))
    };
    duration(usage.user_time()) + duration(usage.system_time())
}

/// Returns the smallest of `values` that is at least as large as this share of them (0 to 1).
///
/// # Panics
/// Without values.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// Returns the middle of `values`; of an even number the mean of the two in the middle.
///
/// # Panics
/// Without values.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios_are_taken_round_by_round() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|share| quantile(&hundred, share)), [1.0, 50.0, 99.0, 100.0]);
        let run = |factor: u64| {
            move |round: usize| Measurement {
                wall: Duration::from_millis(factor * (round as u64 + 1)),
                cpu: Duration::from_millis(factor),
                peak_bytes: Some(factor << 20),
            }
        };
        let rows = compete(4, vec![Contender::new("one", run(1)), Contender::new("three", run(3))]);
        assert!((rows[1].wall_ratio - 3.0).abs() < 1e-9 && (rows[1].cpu_ratio - 3.0).abs() < 1e-9);
        assert!(table(&rows, None).ends_with("| three | 10.50 | 3.00 | 3.00 | 3.00 | 3 |\n"));
    }
}
