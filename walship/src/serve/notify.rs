//! Tells of problems: by webhook, by command. What could not be delivered is tried again, in order; what was told is kept,
//! so that a restart tells nothing twice and nothing that waits is forgotten.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::webhook::Webhook;
use crate::config::{NotifyLeast, NotifySettings, WebhookForm};
use crate::error::{Error, Result};
use crate::watch::metrics::Notices;
use crate::watch::steady::{Event, Notice, Rules, Steady};
use crate::watch::{Facts, Problem, Severity, absence};

/// The version of messages and of the state file.
const FORMAT: u32 = 1;

/// So many notices wait for one receiver; the oldest is dropped for one more.
const WAITING_MAX: usize = 100;

/// So often a notice is tried before it is given up: for about a day.
const ATTEMPTS_MAX: u32 = 300;

/// From one try to the next: doubled each time, up to the second.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// How long a command may run.
const COMMAND_PATIENCE: Duration = Duration::from_secs(30);

/// How long the end waits for what can still be delivered.
const END_PATIENCE: Duration = Duration::from_secs(3);

/// The longest state file that is read.
const STATE_BYTES_MAX: u64 = 4 << 20;

/// Who is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Receiver {
    Webhook,
    Command,
}

/// A notice that is to be delivered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Waiting {
    to: Receiver,
    notice: Notice,
    attempts: u32,
}

/// What is kept over a restart.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct State {
    format: u32,
    steady: Steady,
    waiting: VecDeque<Waiting>,
}

/// Decides what is told, and has it delivered.
#[derive(Debug)]
pub(super) struct Notifier {
    rules: Rules,
    receivers: Vec<Receiver>,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    cluster: String,
    host: String,
    webhook: Option<Webhook>,
    command: Option<String>,
    state: Mutex<State>,
    failed_total: Mutex<u64>,
    more: [Notify; 2],
    path: Option<PathBuf>,
    /// One write after the other.
    writing: tokio::sync::Mutex<()>,
}

impl Notifier {
    /// Returns one for the settings; `None` where nobody is to be told. `path` is the state file.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a webhook that is none; [`Error::LocalIo`] or [`Error::Denied`] when the state cannot be read.
    pub(super) async fn new(
        settings: &NotifySettings,
        cluster: &str,
        path: Option<PathBuf>,
    ) -> Result<Option<Self>> {
        if !settings.is_on() {
            return Ok(None);
        }
        let webhook =
            settings.webhook.as_ref().map(|url| Webhook::new(url, settings.webhook_form)).transpose()?;
        let mut receivers = Vec::new();
        receivers.extend(webhook.is_some().then_some(Receiver::Webhook));
        receivers.extend(settings.command.is_some().then_some(Receiver::Command));
        let mut state = match path.clone() {
            Some(path) => crate::storage::blocking(move || read_state(&path)).await?,
            None => State::default(),
        };
        state.waiting.retain(|waiting| receivers.contains(&waiting.to));
        let shared = Arc::new(Shared {
            cluster: cluster.to_owned(),
            host: crate::repository::RecordedBy::now().host,
            webhook,
            command: settings.command.clone(),
            state: Mutex::new(state),
            failed_total: Mutex::new(0),
            more: [Notify::new(), Notify::new()],
            path,
            writing: tokio::sync::Mutex::new(()),
        });
        let deliver = |receiver: &Receiver| tokio::spawn(Arc::clone(&shared).deliver_all(*receiver));
        let workers = receivers.iter().map(deliver).collect();
        let least = match settings.least {
            NotifyLeast::Warning => Severity::Warning,
            NotifyLeast::Critical => Severity::Critical,
        };
        let rules = Rules { least, hold: settings.hold.0.unwrap_or_default(), repeat: settings.repeat.0 };
        Ok(Some(Self { rules, receivers, shared, workers }))
    }

    /// Takes what is wrong now; what is to be told of it is delivered by and by.
    pub(super) async fn step(&mut self, problems: &[Problem], facts: &Facts) {
        let changed = {
            let mut state = self.shared.state();
            let before = state.clone();
            let notices = state.steady.step(
                problems,
                &|kind, subject| absence(facts, kind, subject),
                facts.at,
                &self.rules,
            );
            for notice in notices {
                for to in &self.receivers {
                    state.waiting.push_back(Waiting { to: *to, notice: notice.clone(), attempts: 0 });
                }
            }
            while state.waiting.len() > WAITING_MAX * self.receivers.len() {
                state.waiting.pop_front();
                tracing::error!("a notice was dropped: too many wait to be delivered");
            }
            *state != before
        };
        if changed {
            self.shared.save().await;
            self.shared.more.iter().for_each(Notify::notify_one);
        }
    }

    /// Returns how notices are doing.
    pub(super) fn notices(&self) -> Notices {
        Notices {
            waiting: self.shared.state().waiting.len() as u64,
            failed_total: *self.shared.failed_total.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Delivers for a moment what still waits, and ends.
    pub(super) async fn end(self) {
        let delivered = async {
            while self.shared.state().waiting.iter().any(|waiting| waiting.attempts == 0) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let _ = timeout(END_PATIENCE, delivered).await;
        self.workers.iter().for_each(JoinHandle::abort);
        self.shared.save().await;
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers what waits for one receiver, in order, until it is ended.
    async fn deliver_all(self: Arc<Self>, to: Receiver) {
        loop {
            let first = self.state().waiting.iter().find(|waiting| waiting.to == to).cloned();
            let Some(first) = first else {
                self.more[to as usize].notified().await;
                continue;
            };
            let failure = self.deliver(to, &first.notice).await.err();
            let attempts = first.attempts + 1;
            let is_over = failure.is_none() || attempts >= ATTEMPTS_MAX;
            {
                let mut state = self.state();
                let at = state.waiting.iter().position(|waiting| waiting.to == to);
                // The queue may have dropped it meanwhile.
                if let Some(at) = at.filter(|at| state.waiting[*at] == first) {
                    match is_over {
                        true => drop(state.waiting.remove(at)),
                        false => state.waiting[at].attempts = attempts,
                    }
                }
            }
            self.save().await;
            if let Some(error) = failure {
                *self.failed_total.lock().unwrap_or_else(PoisonError::into_inner) += 1;
                let fate = if is_over { "it is given up" } else { "it will be tried again" };
                tracing::warn!("{error}; {fate}");
                tokio::time::sleep(pause(attempts)).await;
            }
        }
    }

    async fn deliver(&self, to: Receiver, notice: &Notice) -> Result<()> {
        let (json, text) = (self.json(notice)?, self.text(notice)?);
        match (to, &self.webhook, &self.command) {
            (Receiver::Webhook, Some(webhook), _) => {
                webhook.post(if webhook.form == WebhookForm::Text { text } else { json }).await
            }
            (Receiver::Command, _, Some(command)) => run(command, json).await,
            _ => Ok(()),
        }
    }

    fn json(&self, notice: &Notice) -> Result<String> {
        let Problem { kind, subject, severity, text, next } = &notice.problem;
        encode(&serde_json::json!({
            "format": FORMAT,
            "event": notice.event,
            "cluster": self.cluster,
            "host": self.host,
            "kind": kind,
            "subject": subject,
            "severity": severity,
            "text": text,
            "next": next,
            "since": notice.since,
            "at": notice.at,
        }))
    }

    /// The form that chats understand.
    fn text(&self, notice: &Notice) -> Result<String> {
        let Problem { severity, text, next, .. } = &notice.problem;
        let word = match severity {
            Severity::Warning => "WARNING",
            Severity::Critical => "CRITICAL",
        };
        let since = notice.since.format("%Y-%m-%d %H:%M:%SZ");
        let cluster = &self.cluster;
        let line = match notice.event {
            Event::Problem => format!("walship {word}: {cluster}: {text} (since {since}). {next}"),
            Event::Reminder => format!("walship still {word}: {cluster}: {text} (since {since}). {next}"),
            Event::Recovery => format!("walship OK: {cluster}: it is over (since {since}): {text}"),
            Event::Unwatched => {
                format!("walship watches this no more: {cluster}: {text} (since {since}). {next}")
            }
        };
        encode(&serde_json::json!({ "text": line }))
    }

    /// Keeps the state, where it is to be kept. A failure is said, and no reason to stop watching.
    async fn save(&self) {
        let Some(path) = self.path.clone() else { return };
        let _one_at_a_time = self.writing.lock().await;
        let state = State { format: FORMAT, ..self.state().clone() };
        let written = crate::storage::blocking(move || {
            let bytes = serde_json::to_vec(&state)
                .map_err(|error| Error::invalid(format!("the state cannot be written as JSON: {error}")))?;
            crate::durable::write(&path, &bytes)
        });
        if let Err(error) = written.await {
            tracing::warn!("what was told is not kept, a restart may tell it again: {error}");
        }
    }
}

fn encode(value: &serde_json::Value) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|error| Error::invalid(format!("a notice cannot be written as JSON: {error}")))
}

fn pause(attempts: u32) -> Duration {
    (PAUSE * 2_u32.saturating_pow(attempts.saturating_sub(1).min(16))).min(PAUSE_MAX)
}

fn read_state(path: &Path) -> Result<State> {
    let failed = |error| Error::from_io(format!("reading {}", path.display()), error);
    if let Some(folder) = path.parent() {
        use std::os::unix::fs::DirBuilderExt as _;
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|error| Error::from_io(format!("making {}", folder.display()), error))?;
    }
    let mut text = String::new();
    match std::fs::File::open(path) {
        Ok(file) => {
            use io::Read as _;
            file.take(STATE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::default()),
        Err(error) => return Err(failed(error)),
    }
    match serde_json::from_str::<State>(&text) {
        Ok(state) if state.format == FORMAT => Ok(state),
        // To tell again is better than not to begin.
        _ => {
            tracing::warn!("{} is not understood: what was told may be told again", path.display());
            Ok(State::default())
        }
    }
}

/// Runs a command of the shell with `json` on its standard input. Its output is not looked at.
async fn run(command: &str, json: String) -> Result<()> {
    let failed = |why: String| Error::unavailable(format!("the command of [notify] {why}"));
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(format!("could not be started: {error}")))?;
    let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
    let stdin = child.stdin.take();
    let work = async {
        if let Some(mut stdin) = stdin {
            // It may not want to read it.
            let _ = stdin.write_all(json.as_bytes()).await;
        }
        child.wait().await
    };
    match timeout(COMMAND_PATIENCE, work).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(failed(format!("ended with {status}"))),
        Ok(Err(error)) => Err(failed(format!("could not be waited for: {error}"))),
        Err(_) => {
            if let Some(group) = group {
                let _ = killpg(group, Signal::SIGKILL);
            }
            Err(failed(format!("did not end within {} s", COMMAND_PATIENCE.as_secs())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_bound() {
        let seconds: Vec<_> = [1, 2, 3, 9, 10, 300].map(|attempts| pause(attempts).as_secs()).into();
        assert_eq!(seconds, [1, 2, 4, 256, 300, 300]);
    }

    #[test]
    fn a_state_that_is_not_understood_is_begun_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/state.json");
        assert_eq!(read_state(&path).unwrap(), State::default());
        for text in ["", "{", "{\"format\":2,\"steady\":{},\"waiting\":[]}"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read_state(&path).unwrap(), State::default(), "{text}");
        }
    }

    #[tokio::test]
    async fn commands_get_the_json_and_failures_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("out");
        run(&format!("cat > '{}'", file.display()), "{}".into()).await.unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "{}");
        let error = run("exit 3 # hush", "{}".repeat(1 << 20)).await.unwrap_err().to_string();
        assert!(error.contains('3') && !error.contains("hush"), "{error}");
    }
}
