//! What a supervisor hears of `walship receive`: systemd's notification protocol (`sd_notify`).
//!
//! Nothing is said where `NOTIFY_SOCKET` does not name a socket. The watchdog is answered on the thread that
//! receives, and only while the receiver shows signs of life: neither a thread that hangs nor a stream that has
//! stopped turning is kept alive by its own pings.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use sd_notify::NotifyState;
use tokio::sync::watch;
use walship::receive::{ReceiveEvent, Report};

/// A stream reports every second. One that is silent for longer than this hangs.
const STREAMING_SILENCE_MAX: Duration = Duration::from_secs(30);

/// Reaching a server, looking into the repositories and each attempt at a store end by bounds of their own, which are
/// shorter than this.
const WAITING_SILENCE_MAX: Duration = Duration::from_secs(15 * 60);

/// How often the status line may change while nothing else does.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// So many messages wait at most while the supervisor does not listen; more are dropped.
const MESSAGES_MAX: usize = 64;

/// How long the last message may take.
const LAST_WORD_MAX: Duration = Duration::from_secs(1);

/// The longest status line.
const STATUS_CHARS_MAX: usize = 300;

/// The supervisor that started this program, if there is one.
pub(super) struct Supervisor {
    /// Sending may block for ever where the supervisor is stuck: a thread of its own does it.
    messages: Mutex<Option<SyncSender<Message>>>,
    sent: Mutex<Receiver<()>>,
    watchdog: Option<Duration>,
    heard: Mutex<Heard>,
}

enum Message {
    Ready,
    Status(String),
    Watchdog,
    Stopping,
}

/// The last sign of life.
struct Heard {
    at: Instant,
    streaming: bool,
    ready: bool,
    stopping: bool,
    said_at: Option<Instant>,
}

impl Supervisor {
    /// Returns the one that the environment names.
    pub(super) fn of_environment() -> Self {
        let (messages, waiting) = sync_channel(MESSAGES_MAX);
        let (done, sent) = sync_channel(1);
        let named = std::env::var_os("NOTIFY_SOCKET").is_some_and(|socket| !socket.is_empty());
        if named {
            std::thread::spawn(move || pass_on(&waiting, &done));
        }
        Self {
            messages: Mutex::new(named.then_some(messages)),
            sent: Mutex::new(sent),
            watchdog: sd_notify::watchdog_enabled().filter(|_| named),
            heard: Mutex::new(Heard {
                at: Instant::now(),
                streaming: false,
                ready: false,
                stopping: false,
                said_at: None,
            }),
        }
    }

    /// Answers the watchdog, and says when it is time to stop; on this thread, beside what is done on it.
    pub(super) fn attend(self: &Arc<Self>, mut stop: watch::Receiver<bool>) {
        let told = Arc::clone(self);
        tokio::spawn(async move {
            if stop.wait_for(|stop| *stop).await.is_ok() {
                told.stopping("stopping: what is on its way is stored");
            }
        });
        let Some(patience) = self.watchdog else { return };
        let asked = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                let (silence, streaming) = {
                    let heard = asked.heard();
                    (heard.at.elapsed(), heard.streaming)
                };
                if may_ping(silence, streaming) {
                    asked.say(Message::Watchdog);
                }
                // Twice in the time that it gives us is what its manual asks for; a third leaves room for a late one.
                tokio::time::sleep(patience / 3).await;
            }
        });
    }

    /// Takes note of what the receiver does, and passes on what a supervisor shows.
    pub(super) fn hear(&self, event: &ReceiveEvent) {
        let text = {
            let mut heard = self.heard();
            let (text, is_news) = match event {
                ReceiveEvent::Streaming { host, timeline, start } => {
                    heard.streaming = true;
                    let text = format!("streaming timeline {timeline} from {host}, from {start} on");
                    (Some(text), true)
                }
                ReceiveEvent::Lost { error, .. } => {
                    heard.streaming = false;
                    (Some(format!("waiting for the server: {error}")), true)
                }
                ReceiveEvent::StoreFails { error, .. } => (Some(format!("a store fails: {error}")), true),
                ReceiveEvent::Report(report) => {
                    heard.streaming = report.streaming;
                    (report.streaming.then(|| streaming_text(report)), false)
                }
                ReceiveEvent::Switched { .. } | ReceiveEvent::WalIsLost { .. } | ReceiveEvent::Warning(_) => {
                    (None, false)
                }
            };
            // Uploads speak for themselves: that one fails is no sign that the stream is alive.
            if !heard.streaming || matches!(event, ReceiveEvent::Streaming { .. } | ReceiveEvent::Report(_)) {
                heard.at = Instant::now();
            }
            let due = is_news || heard.said_at.is_none_or(|said| said.elapsed() >= STATUS_INTERVAL);
            let text = text.filter(|_| due && !heard.stopping);
            if text.is_some() {
                heard.said_at = Some(Instant::now());
            }
            text
        };
        if let Some(text) = text {
            self.say(Message::Status(one_line(&text)));
        }
        if matches!(event, ReceiveEvent::Streaming { .. })
            && !std::mem::replace(&mut self.heard().ready, true)
        {
            self.say(Message::Ready);
        }
    }

    /// Says how it ended; returns when that was passed on, or after a second.
    pub(super) fn leave(&self, why: &str) {
        self.stopping(why);
        drop(self.messages.lock().unwrap_or_else(PoisonError::into_inner).take());
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        match sent.recv_timeout(LAST_WORD_MAX) {
            Ok(()) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    }

    fn stopping(&self, why: &str) {
        let first = !std::mem::replace(&mut self.heard().stopping, true);
        if first {
            self.say(Message::Stopping);
        }
        self.say(Message::Status(one_line(why)));
    }

    fn say(&self, message: Message) {
        let messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(messages) = &*messages
            && messages.try_send(message).is_err()
        {
            tracing::debug!("the supervisor does not listen");
        }
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends what is to be said, until nobody has anything to say any more.
fn pass_on(messages: &Receiver<Message>, done: &SyncSender<()>) {
    for message in messages {
        let state = match &message {
            Message::Ready => NotifyState::Ready,
            Message::Status(text) => NotifyState::Status(text),
            Message::Watchdog => NotifyState::Watchdog,
            Message::Stopping => NotifyState::Stopping,
        };
        if let Err(error) = sd_notify::notify(&[state]) {
            tracing::debug!(%error, "the supervisor was not told");
        }
    }
    let _ = done.try_send(());
}

/// Whether a receiver that was heard of so long ago is taken to be alive.
fn may_ping(silence: Duration, streaming: bool) -> bool {
    silence <= if streaming { STREAMING_SILENCE_MAX } else { WAITING_SILENCE_MAX }
}

fn streaming_text(report: &Report) -> String {
    format!(
        "streaming timeline {} from {}; durable up to {}, {} behind the server",
        report.timeline.map_or_else(|| "?".to_owned(), |timeline| timeline.to_string()),
        report.host.as_deref().unwrap_or("?"),
        report.durable_lsn,
        HumanBytes(report.server_lsn.bytes_since(report.durable_lsn)),
    )
}

/// A message has a line for each thing it says: what a server or a store said must not become one.
fn one_line(text: &str) -> String {
    text.chars().take(STATUS_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_shows_signs_of_life_is_kept_alive() {
        let seconds = Duration::from_secs;
        assert!(may_ping(seconds(0), true) && may_ping(seconds(30), true));
        assert!(!may_ping(seconds(31), true), "a stream that does not turn any more is ended");
        assert!(may_ping(seconds(600), false), "a server may be away for a long time");
        assert!(!may_ping(seconds(901), false));
    }

    #[test]
    fn uploads_that_fail_do_not_speak_for_the_stream() {
        let supervisor = Supervisor::of_environment();
        let long_ago = Instant::now() - Duration::from_secs(60);
        let fails = ReceiveEvent::StoreFails { error: "no".into(), retry_in: Duration::from_secs(1) };
        supervisor.heard().streaming = true;
        supervisor.heard().at = long_ago;
        supervisor.hear(&fails);
        assert_eq!(supervisor.heard().at, long_ago);
        supervisor.heard().streaming = false;
        supervisor.hear(&fails);
        assert!(supervisor.heard().at > long_ago);
    }

    #[test]
    fn nothing_that_a_server_says_becomes_a_message() {
        assert_eq!(one_line("down\nWATCHDOG=trigger\u{1b}[m"), "down WATCHDOG=trigger [m");
        assert_eq!(one_line(&"x".repeat(1000)).len(), STATUS_CHARS_MAX);
    }
}
