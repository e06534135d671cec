//! A small HTTP server that answers as a test says: AWS's metadata service, its token service.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Asked {
    /// `GET`, `PUT`...
    pub method: String,
    /// The path with what stands after a question mark.
    pub path: String,
    /// The header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
}

impl Asked {
    /// Returns a header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }
}

/// A running server; its thread ends with the process.
pub struct FakeHttp {
    address: SocketAddr,
    log: Arc<Mutex<Vec<Asked>>>,
}

impl FakeHttp {
    /// Starts a server that answers each request with the status, content type and body that `answer` returns.
    ///
    /// # Panics
    /// When no port of the loopback can be had.
    pub fn start(answer: impl Fn(&Asked) -> (u16, &'static str, String) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let log = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&log);
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let Some(asked) = read(&socket) else { continue };
                let (status, kind, body) = answer(&asked);
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(asked);
                let head = format!(
                    "HTTP/1.1 {status} Answer\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\
                     x-aws-ec2-metadata-token-ttl-seconds: 21600\r\nconnection: close\r\n\r\n",
                    body.len()
                );
                let mut socket = socket;
                let _ = socket.write_all((head + &body).as_bytes());
            }
        });
        Self { address, log }
    }

    /// Returns the address that it listens at.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the server's URL.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the requests seen so far.
    pub fn log(&self) -> Vec<Asked> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn read(socket: &TcpStream) -> Option<Asked> {
    socket.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    let mut reader = BufReader::new(socket);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut asked = Asked { method, path, headers, body: String::new() };
    let length = asked.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    reader.take(length).read_to_string(&mut asked.body).ok()?;
    Some(asked)
}
