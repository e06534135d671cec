//! The agent: answers the thin commands of one data directory over a Unix socket, and works ahead of them.
//!
//! It holds nothing that is not on disk or in the repositories as well, so it may be killed at any moment;
//! whoever asked then does the work in the foreground. It ends by itself when nobody asks, when its socket or
//! its data directory is gone, or when it is told to.

pub mod detach;
mod fetch;
mod push;
mod warm;

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::archive::DataDirectory;
use crate::archive::push::PushOptions;
use crate::error::{Error, Result};
use crate::repository::ClusterName;
use crate::storage::StorageConfig;

use super::client::SIGN_OF_LIFE;
use super::meeting::{Meeting, NEW};
use super::protocol::{Answer, GREETING, Question, body_length};
use fetch::Fetches;
use push::Pushes;
pub use push::SideBySide;
use warm::Warm;

/// So many are talked to at once.
const ASKERS_MAX: usize = 16;

/// How long somebody who was answered may take to be done.
const TAKING_MAX: Duration = Duration::from_secs(60);

/// How long somebody who connected may take to ask.
const ASKING_MAX: Duration = Duration::from_secs(5);

/// What an agent works with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where it is asked, and for which data directory.
    pub meeting: Meeting,
    /// The repositories.
    pub repositories: Vec<StorageConfig>,
    /// The cluster in them.
    pub cluster: ClusterName,
    /// How WAL is pushed.
    pub push: PushOptions,
    /// How long a fetch for a one-shot recovery tries again.
    pub restore_retry: Duration,
    /// How much is pushed side by side.
    pub pushed: SideBySide,
    /// So many files are fetched side by side.
    pub fetched: usize,
    /// After so long without a question it ends.
    pub idle_max: Duration,
}

/// What PostgreSQL is told.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Said {
    status: u8,
    text: String,
}

/// How a question is answered.
#[derive(Debug)]
enum Reply {
    Said(Said),
    File(PathBuf),
    Foreground(String),
}

/// Why an agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Another one is at work there already.
    Taken,
    /// Nobody asked.
    Idle,
    /// Its socket or its data directory is gone or another's.
    Replaced,
    /// It was told to.
    Told,
}

/// Answers at the socket until there is no more to do, or `stop` is ready.
///
/// # Errors
/// [`Error::LocalIo`] or [`Error::Denied`] when the socket cannot be made.
pub async fn serve(settings: Settings, stop: impl Future<Output = ()>) -> Result<Ended> {
    let socket = settings.meeting.socket.clone();
    let Some(_lock) = lock(&socket)? else { return Ok(Ended::Taken) };
    let listener = listen(&socket)?;
    let agent = Arc::new(Agent::new(&settings));
    let (own_socket, own_directory) = (identity(&socket), identity(&agent.data_directory));
    tokio::pin!(stop);
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    let ended = loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => agent.meet(stream),
                Err(error) => {
                    tracing::warn!(%error, "nobody can be heard at the moment");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            _ = ticks.tick() => {
                agent.fetches.tidy();
                if identity(&socket) != own_socket || identity(&agent.data_directory) != own_directory {
                    break Ended::Replaced;
                }
                if agent.idle_for().await >= settings.idle_max {
                    break Ended::Idle;
                }
            }
            () = &mut stop => break Ended::Told,
        }
    };
    if identity(&socket) == own_socket {
        let _ = fs::remove_file(&socket);
    }
    if identity(&agent.data_directory) == own_directory {
        agent.fetches.remove_spool();
    }
    Ok(ended)
}

/// Returns the lock of a socket that nobody else serves. The file stays: who removes it may remove another's.
fn lock(socket: &Path) -> Result<Option<Flock<fs::File>>> {
    let path = socket.with_extension("lock");
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| Error::from_io(format!("opening {}", path.display()), error))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(Error::from_io(format!("locking {}", path.display()), errno.into())),
    }
}

/// Listens at `socket`; one that nobody serves any more is replaced.
fn listen(socket: &Path) -> Result<UnixListener> {
    let mut new = socket.as_os_str().to_owned();
    new.push(NEW);
    let failed = |error| Error::from_io(format!("making the socket {}", socket.display()), error);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&new).map_err(failed)?;
    fs::rename(&new, socket).map_err(failed)?;
    Ok(listener)
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

struct Agent {
    data_directory: PathBuf,
    pushes: Arc<Pushes>,
    fetches: Fetches,
    askers: AtomicUsize,
    last_asked: Mutex<Instant>,
}

impl Agent {
    fn new(settings: &Settings) -> Self {
        let warm = Arc::new(Warm::new(settings.repositories.clone(), settings.cluster.clone()));
        let data_directory = settings.meeting.data_directory.clone();
        Self {
            pushes: Arc::new(Pushes::new(Arc::clone(&warm), settings.push.clone(), settings.pushed)),
            fetches: Fetches::new(
                warm,
                data_directory.clone(),
                settings.push.lineage,
                settings.restore_retry,
                settings.fetched,
            ),
            data_directory,
            askers: AtomicUsize::new(0),
            last_asked: Mutex::new(Instant::now()),
        }
    }

    async fn idle_for(&self) -> Duration {
        if self.askers.load(Ordering::SeqCst) > 0 || self.pushes.is_busy() {
            return Duration::ZERO;
        }
        self.last_asked.lock().await.elapsed()
    }

    /// Talks to one asker, beside everything else.
    fn meet(self: &Arc<Self>, stream: UnixStream) {
        let ours = stream.peer_cred().is_ok_and(|peer| peer.uid() == nix::unistd::geteuid().as_raw());
        if !ours || self.askers.fetch_add(1, Ordering::SeqCst) >= ASKERS_MAX {
            if ours {
                self.askers.fetch_sub(1, Ordering::SeqCst);
            }
            return;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = this.talk(stream).await {
                tracing::debug!(%error, "an asker went away");
            }
            *this.last_asked.lock().await = Instant::now();
            this.askers.fetch_sub(1, Ordering::SeqCst);
        });
    }

    async fn talk(&self, stream: UnixStream) -> io::Result<()> {
        let (mut reader, mut writer) = stream.into_split();
        writer.write_all(GREETING).await?;
        let Ok(question) = timeout(ASKING_MAX, read_question(&mut reader)).await else { return Ok(()) };
        let Some(question) = question? else {
            return say(&mut writer, &Answer::Foreground { reason: "that is no question".to_owned() }).await;
        };
        let writer = Mutex::new(writer);
        let work = self.work(question, &writer);
        tokio::pin!(work);
        let mut gone = [0];
        loop {
            tokio::select! {
                // Whoever asked has gone: PostgreSQL may have stopped it. What it asked for goes on only where that
                // needs nobody.
                _ = reader.read(&mut gone) => return Ok(()),
                () = &mut work => return Ok(()),
                () = tokio::time::sleep(SIGN_OF_LIFE) => {
                    if let Ok(mut writer) = writer.try_lock() {
                        say(&mut writer, &Answer::Working).await?;
                    }
                }
            }
        }
    }
}

impl Agent {
    async fn work(&self, question: Question, writer: &Mutex<OwnedWriteHalf>) {
        let (Question::Push { path } | Question::Fetch { target: path, .. }) = &question;
        if !self.is_ours(path) {
            let reason = format!("this agent works for {}", self.data_directory.display());
            return send(writer, Reply::Foreground(reason)).await;
        }
        match question {
            Question::Push { path } => {
                let pushes = Arc::clone(&self.pushes);
                let said = tokio::spawn(async move { pushes.asked(path).await }).await;
                let lost = |_| Reply::Foreground("the push was lost".to_owned());
                send(writer, said.map_or_else(lost, Reply::Said)).await;
            }
            Question::Fetch { name, target } => {
                let (reply, held) = self.fetches.asked(&name, &target).await;
                send(writer, reply).await;
                // Whoever has taken the file hangs up.
                tokio::time::sleep(TAKING_MAX).await;
                drop(held);
            }
        }
    }

    fn is_ours(&self, path: &Path) -> bool {
        let directory = DataDirectory::of_wal_file(path);
        let real = directory.and_then(|directory| fs::canonicalize(directory.path()).ok());
        real.as_ref() == Some(&self.data_directory)
    }
}

async fn send(writer: &Mutex<OwnedWriteHalf>, reply: Reply) {
    let answer = match reply {
        Reply::Said(Said { status, text }) => Answer::Status { status, text },
        Reply::File(path) => Answer::File { path },
        Reply::Foreground(reason) => {
            tracing::info!("left to the foreground: {reason}");
            Answer::Foreground { reason }
        }
    };
    if let Err(error) = say(&mut *writer.lock().await, &answer).await {
        tracing::debug!(%error, "an answer was not taken");
    }
}

async fn say(writer: &mut OwnedWriteHalf, answer: &Answer) -> io::Result<()> {
    match timeout(ASKING_MAX, writer.write_all(&answer.to_message())).await {
        Ok(written) => written,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Reads one question; `None` when what comes is none.
async fn read_question(reader: &mut OwnedReadHalf) -> io::Result<Option<Question>> {
    let mut length = [0; 4];
    reader.read_exact(&mut length).await?;
    let Some(length) = body_length(length) else { return Ok(None) };
    let mut body = vec![0; length];
    reader.read_exact(&mut body).await?;
    Ok(Question::parse(&body))
}
