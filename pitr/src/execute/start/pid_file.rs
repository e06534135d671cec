//! `postmaster.pid`: what a running server says about itself before it can be asked.
//!
//! Source: `src/include/utils/pidfile.h`.

use std::path::{Path, PathBuf};

/// What the file of a running server says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct PidFile {
    /// The server's first process.
    pub(super) pid: u32,
    /// Its port.
    pub(super) port: Option<u16>,
    /// The first folder of its Unix sockets, as it is configured; empty without any.
    socket_dir: String,
    /// The first address that it listens on; empty for none.
    listen_address: String,
    /// What it does: `starting`; `ready` (in recovery or not); `standby`, which is one that takes no connections; `stopping`.
    pub(super) status: String,
}

impl PidFile {
    /// Parses the file. The server writes it line by line: what is not there yet is empty.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let line = |number: usize| lines.get(number - 1).copied().unwrap_or_default();
        Some(Self {
            // A single-user session writes its number with a minus.
            pid: line(1).parse().ok().filter(|pid| *pid > 1)?,
            port: line(4).parse().ok(),
            socket_dir: line(5).to_owned(),
            listen_address: line(6).to_owned(),
            status: line(8).to_owned(),
        })
    }

    /// Returns whether it takes connections; read-only ones when it recovers.
    pub(super) fn takes_connections(&self) -> bool {
        self.status == "ready"
    }

    /// Returns whether it recovers and takes no connections before it has: its `hot_standby` is off.
    pub(super) fn stays_closed(&self) -> bool {
        self.status == "standby"
    }

    /// Returns the folder of its Unix socket.
    pub(super) fn socket_dir(&self, data_dir: &Path) -> Option<PathBuf> {
        // An abstract socket has no folder.
        let is_folder = !self.socket_dir.is_empty() && !self.socket_dir.starts_with('@');
        is_folder.then(|| data_dir.join(&self.socket_dir))
    }

    /// Returns the `host` that leads to it: its socket, else an address; `None` when it listens nowhere.
    pub(super) fn host(&self, data_dir: &Path) -> Option<String> {
        if let Some(folder) = self.socket_dir(data_dir) {
            return Some(folder.to_string_lossy().into_owned());
        }
        match self.listen_address.as_str() {
            "" => None,
            "*" | "0.0.0.0" => Some("127.0.0.1".to_owned()),
            "::" => Some("::1".to_owned()),
            address => Some(address.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_while_it_is_written() {
        let whole = "4711\n/srv/data\n1700000000\n5433\n/run/postgresql\nlocalhost\n  1 2\nready   \n";
        let file = PidFile::parse(whole).unwrap();
        assert_eq!((file.pid, file.port, file.status.as_str()), (4711, Some(5433), "ready"));
        assert!(file.takes_connections());
        assert_eq!(file.host(Path::new("/srv/data")).unwrap(), "/run/postgresql");
        let half = PidFile::parse("4711\n/srv/data\n").unwrap();
        assert_eq!((half.port, half.host(Path::new("/x")), half.takes_connections()), (None, None, false));
        assert_eq!(PidFile::parse(""), None);
        assert_eq!(PidFile::parse("-4711\n"), None);
    }

    #[test]
    fn a_server_is_reached_by_its_socket_or_its_address() {
        for (socket, address, host) in [
            (".", "*", Some("/srv/data/.")),
            ("@abstract", "*", Some("127.0.0.1")),
            ("", "::", Some("::1")),
            ("", "10.0.0.7", Some("10.0.0.7")),
            ("", "", None),
        ] {
            let text = format!("4711\n/srv/data\n1\n5432\n{socket}\n{address}\n\nready\n");
            let file = PidFile::parse(&text).unwrap();
            assert_eq!(file.host(Path::new("/srv/data")).as_deref(), host, "{socket} {address}");
        }
    }
}
