//! What a tool costs that is called again and again, and that may leave helpers at work: all of its processes
//! together.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use walship_tests::{process, wait};

use super::Run;

/// How often memory is looked at. What is shorter than that is not seen.
const LOOK: Duration = Duration::from_millis(50);

/// Counts from its start what the children of one process, and helpers that detached themselves from it, use.
///
/// Helpers become children of this program, which the kernel is asked for; those that end stay to be read.
pub(super) struct Meter {
    caller: Option<u32>,
    daemon: Option<u32>,
    before: Duration,
    old_children: BTreeSet<u32>,
    peak_bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    looking: Option<JoinHandle<()>>,
}

/// One line of `/proc/PID/stat`.
struct Stat {
    pid: u32,
    parent: u32,
    /// PostgreSQL's own, or a copy of one of its processes that has not become a shell yet.
    server: bool,
    /// Its own time and that of the children that it has waited for.
    cpu: Duration,
    own_cpu: Duration,
    resident_bytes: u64,
}

impl Meter {
    /// Starts to count what `caller`, which calls the tool, waits for, and the helpers; the memory of `daemon`,
    /// which was there before, as well.
    pub(super) fn start(caller: u32, daemon: Option<u32>) -> Self {
        Self::start_with(Some(caller), cpu_of(caller), daemon, children_now())
    }

    /// The same where `caller` may have called already: `before` is its processor time when it had not, and
    /// `old_children` are those that are no helpers.
    pub(super) fn start_late(
        caller: u32,
        before: Duration,
        daemon: Option<u32>,
        old_children: BTreeSet<u32>,
    ) -> Self {
        Self::start_with(Some(caller), before, daemon, old_children)
    }

    fn start_with(
        caller: Option<u32>,
        before: Duration,
        daemon: Option<u32>,
        old_children: BTreeSet<u32>,
    ) -> Self {
        let (peak_bytes, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let looking = {
            let (old, peak_bytes, stop) = (old_children.clone(), Arc::clone(&peak_bytes), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    peak_bytes.fetch_max(memory(caller, daemon, &old), Ordering::Relaxed);
                    std::thread::sleep(LOOK);
                }
            })
        };
        Self { caller, daemon, before, old_children, peak_bytes, stop, looking: Some(looking) }
    }

    /// Returns the processor time of the helpers so far.
    pub(super) fn helpers_cpu(&self) -> Duration {
        children().filter(|stat| !self.old_children.contains(&stat.pid)).map(|stat| stat.cpu).sum()
    }

    /// Returns the processor time and the most memory of all processes at once, and ends the helpers.
    pub(super) fn finish(mut self) -> (Duration, u64) {
        let mut cpu = self.caller.map_or(Duration::ZERO, cpu_of).saturating_sub(self.before);
        self.peak_bytes.fetch_max(memory(self.caller, self.daemon, &self.old_children), Ordering::Relaxed);
        self.stop_looking();
        let helpers: Vec<Stat> = children().filter(|stat| !self.old_children.contains(&stat.pid)).collect();
        for helper in helpers {
            let below = process::descendants(helper.pid);
            cpu += helper.cpu + below.iter().map(|pid| cpu_of(*pid)).sum::<Duration>();
            for pid in below.iter().chain([&helper.pid]) {
                process::signal(*pid, Signal::SIGKILL);
            }
        }
        // Also those that became ours by the death of these.
        wait::until("the helpers are gone", || {
            let left: Vec<u32> =
                children().map(|stat| stat.pid).filter(|pid| !self.old_children.contains(pid)).collect();
            for pid in &left {
                process::signal(*pid, Signal::SIGKILL);
                let _ = waitpid(Pid::from_raw(pid.cast_signed()), Some(WaitPidFlag::WNOHANG));
            }
            left.is_empty()
        });
        (cpu, self.peak_bytes.load(Ordering::Relaxed))
    }

    fn stop_looking(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(looking) = self.looking.take() {
            let _ = looking.join();
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.stop_looking();
    }
}

/// Runs a command to its end and returns what it and everything that it started cost, and whether it succeeded.
pub(super) fn run(command: Command) -> (Run, bool) {
    let old_children = children_now();
    let started = Instant::now();
    let mut child = process::spawn(command).expect("the tool can be started");
    let meter = Meter::start_with(None, Duration::ZERO, None, old_children);
    let pid = Pid::from_raw(child.id().cast_signed());
    // It stays to be read, and is waited for when its time is known.
    let status = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).expect("it is our child");
    let wall = started.elapsed();
    let (cpu, peak_bytes) = meter.finish();
    let _ = child.wait();
    (Run { wall, cpu, peak_bytes }, matches!(status, WaitStatus::Exited(_, 0)))
}

/// Returns the processor time so far of a process and of everything below it, whether it still runs or not.
pub(super) fn cpu_of_tree(pid: u32) -> Duration {
    cpu_of(pid) + process::descendants(pid).into_iter().map(cpu_of).sum::<Duration>()
}

/// Returns the memory of everything that `caller` has started, and of this program's new children.
fn memory(caller: Option<u32>, daemon: Option<u32>, old_children: &BTreeSet<u32>) -> u64 {
    let all: Vec<Stat> = all().collect();
    let own = std::process::id();
    let new = |stat: &&Stat| stat.parent == own && !old_children.contains(&stat.pid);
    let mut tool: BTreeSet<u32> = all.iter().filter(new).map(|stat| stat.pid).chain(daemon).collect();
    loop {
        let below = |stat: &&Stat| caller == Some(stat.parent) || tool.contains(&stat.parent);
        let found: Vec<u32> =
            all.iter().filter(below).map(|stat| stat.pid).filter(|pid| !tool.contains(pid)).collect();
        if found.is_empty() {
            let tool = all.iter().filter(|stat| !stat.server && tool.contains(&stat.pid));
            return tool.map(|stat| stat.resident_bytes).sum();
        }
        tool.extend(found);
    }
}

/// Returns the processor time of a process and of the children that it has waited for.
pub(super) fn cpu_of(pid: u32) -> Duration {
    stat_of(pid).map_or(Duration::ZERO, |stat| stat.cpu)
}

/// Returns the processor time of a process alone.
pub(super) fn own_cpu_of(pid: u32) -> Duration {
    stat_of(pid).map_or(Duration::ZERO, |stat| stat.own_cpu)
}

/// Returns the children of this program, to which helpers come that detach themselves from now on.
pub(super) fn children_now() -> BTreeSet<u32> {
    nix::sys::prctl::set_child_subreaper(true).expect("Linux knows subreapers");
    children().map(|stat| stat.pid).collect()
}

fn children() -> impl Iterator<Item = Stat> {
    let own = std::process::id();
    all().filter(move |stat| stat.parent == own)
}

fn all() -> impl Iterator<Item = Stat> {
    let entries = fs::read_dir("/proc").expect("/proc is readable").flatten();
    entries.filter_map(|entry| stat_of(entry.file_name().to_str()?.parse().ok()?))
}

fn stat_of(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses and may hold anything.
    let (name, fields) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let number = |field: usize| fields.get(field).and_then(|text| text.parse::<u64>().ok());
    // Linux shows times in hundredths of a second, and memory in pages of 4 KiB on most machines.
    let time =
        |fields: std::ops::Range<usize>| Duration::from_millis(fields.filter_map(number).sum::<u64>() * 10);
    let zombie = fields.first() == Some(&"Z");
    Some(Stat {
        pid,
        parent: u32::try_from(number(1)?).ok()?,
        server: name.ends_with("(postgres"),
        cpu: time(11..15),
        own_cpu: time(11..13),
        resident_bytes: if zombie { 0 } else { number(21)? * 4096 },
    })
}
