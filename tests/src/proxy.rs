//! A TCP proxy on the loopback that misbehaves on demand, for any protocol behind it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::requests::{RequestReader, Requests};

/// What the proxy does to connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nothing.
    Pass,
    /// Everything that the server sends comes this much later, however much is on the way.
    Latency(Duration),
    /// Connections are reset after this many bytes from the server (counted per connection).
    ResetAfter(u64),
    /// Connections are closed in order after this many bytes from the server.
    CloseAfter(u64),
    /// Connections are reset after this many bytes to the server.
    ResetUploadAfter(u64),
    /// Both directions together carry at most this many bytes a second.
    Throttle(u64),
    /// What the server sends comes at this many bytes a second at most, all connections together.
    Rate(u64),
    /// Everything is swallowed, nothing comes back, connections stay open.
    BlackHole,
    /// New connections are closed at once and open ones reset.
    Refuse,
}

/// A running proxy; dropping it closes everything.
pub struct Proxy {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
    target: Arc<Mutex<SocketAddr>>,
    requests: Arc<Mutex<Requests>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Proxy {
    /// Starts a proxy in front of `target`, on a free port and in threads of its own.
    ///
    /// # Panics
    /// When no port of the loopback can be had.
    pub fn start(target: SocketAddr) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a listener can be made non-blocking");
        let address = listener.local_addr().expect("a listener has an address");
        let (mode, seen) = watch::channel(Mode::Pass);
        let (stop, stopped) = oneshot::channel::<()>();
        let target = Arc::new(Mutex::new(target));
        let ahead = Arc::clone(&target);
        let requests = Arc::<Mutex<Requests>>::default();
        let counted = Arc::clone(&requests);
        let link = Arc::<Link>::default();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime for the proxy");
            runtime.block_on(async move {
                let listener = TcpListener::from_std(listener).expect("the listener can be used");
                tokio::select! {
                    () = accept(listener, ahead, seen, counted, link) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, mode, target, requests, stop: Some(stop), thread: Some(thread) }
    }

    /// Returns the address to connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the URL of an HTTP server behind it.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns how many requests of S3 clients went through it since it started.
    pub fn requests(&self) -> Requests {
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Misbehaves like this from now on, open connections included.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Connects to another server from the next connection on.
    pub fn set_target(&self, target: SocketAddr) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(
    listener: TcpListener,
    target: Arc<Mutex<SocketAddr>>,
    mode: watch::Receiver<Mode>,
    requests: Arc<Mutex<Requests>>,
    link: Arc<Link>,
) {
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        let target = *target.lock().unwrap_or_else(PoisonError::into_inner);
        tokio::spawn(connection(client, target, mode.clone(), requests.clone(), link.clone()));
    }
}

/// The one link that all connections share under [`Mode::Rate`]: when it has carried all that it was given.
#[derive(Debug, Default)]
struct Link(Mutex<Option<Instant>>);

/// An idle link carries so much of a burst at once. Timers wake milliseconds late: without it each of them would
/// be time lost.
const BURST: Duration = Duration::from_millis(10);

impl Link {
    /// Gives it `bytes` now, and returns when it has carried them.
    fn passed(&self, now: Instant, bytes: usize, bytes_a_second: u64) -> Instant {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = now.checked_sub(BURST).unwrap_or(now);
        let begins = free.map_or(since, |free| free.max(since));
        let passed = begins + Duration::from_secs_f64(bytes as f64 / bytes_a_second.max(1) as f64);
        *free = Some(passed);
        passed
    }
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Up,
    Down,
}

async fn connection(
    client: TcpStream,
    target: SocketAddr,
    mode: watch::Receiver<Mode>,
    requests: Arc<Mutex<Requests>>,
    link: Arc<Link>,
) {
    if *mode.borrow() == Mode::Refuse {
        return reset(&client);
    }
    let Ok(server) = TcpStream::connect(target).await else { return reset(&client) };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mut reader = RequestReader::default();
    let count = |bytes: &[u8]| {
        reader.pass(bytes, &mut requests.lock().unwrap_or_else(PoisonError::into_inner));
    };
    let ended = tokio::select! {
        ended = pump(&mut from_client, &mut to_server, Way::Up, mode.clone(), &link, count) => ended,
        ended = pump(&mut from_server, &mut to_client, Way::Down, mode.clone(), &link, |_| ()) => ended,
        () = refused(mode.clone()) => Ended::Reset,
    };
    if ended == Ended::Reset
        && let Ok(client) = from_client.reunite(to_client)
    {
        reset(&client);
    }
}

/// Closes with a RST instead of a FIN as soon as the socket is dropped.
fn reset(socket: &TcpStream) {
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    let _ = setsockopt(socket, sockopt::Linger, &linger);
}

async fn refused(mut mode: watch::Receiver<Mode>) {
    if mode.wait_for(|mode| *mode == Mode::Refuse).await.is_err() {
        std::future::pending().await
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Closed,
    Reset,
}

/// A piece on its way, and whether its connection ends behind it.
struct Piece {
    bytes: Vec<u8>,
    due: Instant,
    end: Option<Ended>,
}

/// The bytes of a piece at most.
const PIECE_BYTES: usize = 32 << 10;

/// As many pieces are on the way at most: more than any store here sends in 30 ms.
const PIECES: usize = 512;

async fn pump(
    from: &mut (impl tokio::io::AsyncRead + Unpin),
    to: &mut (impl tokio::io::AsyncWrite + Unpin),
    way: Way,
    mode: watch::Receiver<Mode>,
    link: &Link,
    mut passing: impl FnMut(&[u8]),
) -> Ended {
    let (line_in, mut line) = mpsc::channel::<Piece>(PIECES);
    let arriving = async {
        while let Some(Piece { bytes, due, end }) = line.recv().await {
            tokio::time::sleep_until(due).await;
            passing(&bytes);
            if to.write_all(&bytes).await.is_err() {
                return Ended::Closed;
            }
            if let Some(end) = end {
                return end;
            }
        }
        Ended::Closed
    };
    tokio::pin!(arriving);
    tokio::select! {
        ended = &mut arriving => ended,
        () = departing(from, way, mode, link, line_in) => arriving.await,
    }
}

/// Puts on the line what is read, as long as there is something.
async fn departing(
    from: &mut (impl tokio::io::AsyncRead + Unpin),
    way: Way,
    mut mode: watch::Receiver<Mode>,
    link: &Link,
    line: mpsc::Sender<Piece>,
) {
    let mut buffer = vec![0; PIECE_BYTES];
    let mut carried = 0_u64;
    loop {
        let bytes = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(bytes) => bytes,
        };
        let current = *mode.borrow();
        let mut passed = bytes;
        let mut due = Instant::now();
        let mut end = None;
        match (current, way) {
            (Mode::Latency(time), Way::Down) => due += time,
            (Mode::Rate(a_second), Way::Down) => {
                tokio::time::sleep_until(link.passed(due, bytes, a_second)).await;
            }
            (Mode::Throttle(a_second), _) => {
                tokio::time::sleep(Duration::from_secs_f64(bytes as f64 / a_second.max(1) as f64)).await;
            }
            (Mode::ResetAfter(most), Way::Down) | (Mode::ResetUploadAfter(most), Way::Up)
                if carried + bytes as u64 > most =>
            {
                passed = usize::try_from(most.saturating_sub(carried)).unwrap_or(0);
                end = Some(Ended::Reset);
            }
            (Mode::CloseAfter(most), Way::Down) if carried + bytes as u64 > most => {
                passed = usize::try_from(most.saturating_sub(carried)).unwrap_or(0);
                end = Some(Ended::Closed);
            }
            (Mode::BlackHole, _) => {
                // What was swallowed stays lost: the connection cannot be used any more.
                let _ = mode.wait_for(|mode| *mode != Mode::BlackHole).await;
                passed = 0;
                end = Some(Ended::Reset);
            }
            _ => {}
        }
        carried += passed as u64;
        let piece = Piece { bytes: buffer[..passed].to_vec(), due, end };
        let last = piece.end.is_some();
        if line.send(piece).await.is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_carries_its_rate_and_no_more() {
        let (link, begin) = (Link::default(), Instant::now());
        let after = |millis| begin + Duration::from_millis(millis);
        let close = |passed: Instant, millis: u64| {
            let expected = after(millis);
            assert!(passed.max(expected) - passed.min(expected) < Duration::from_micros(10), "{millis}");
        };
        // Half a second of bytes, twice at once, of which a burst of 10 ms is free.
        close(link.passed(begin, 500_000, 1_000_000), 490);
        close(link.passed(begin, 500_000, 1_000_000), 990);
        // Who wakes late loses nothing.
        close(link.passed(after(995), 5_000, 1_000_000), 995);
        // An idle second is not saved up.
        close(link.passed(after(2000), 500_000, 1_000_000), 2490);
    }
}
