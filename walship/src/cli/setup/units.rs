//! The text of systemd's units: services for `walship receive`, `walship serve`, backups, `pitr expire` and drills, and their
//! timers.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use walship::error::{Error, Result};

/// What the units are made of.
#[derive(Debug)]
pub(super) struct Units {
    /// What their names begin with.
    pub(super) name: String,
    /// The user that they run as.
    pub(super) user: String,
    /// The folder of the programs.
    pub(super) programs: PathBuf,
    /// The configuration, where it is not the default one.
    pub(super) config: Option<PathBuf>,
    /// The folders that they write to; `None`: not known.
    pub(super) folders: Option<Folders>,
    /// Whether the configuration names a status file.
    pub(super) own_status_file: bool,
    /// Options of `walship serve`, `walship backup`, `pitr verify` and `pitr drill`.
    pub(super) serve_options: Vec<String>,
    pub(super) backup_options: Vec<String>,
    pub(super) verify_options: Vec<String>,
    pub(super) drill_options: Vec<String>,
    /// When the timers elapse.
    pub(super) backup_at: String,
    pub(super) verify_at: String,
    pub(super) expire_at: String,
    pub(super) drill_at: String,
}

/// What the configuration says of this machine's folders.
#[derive(Debug, Default)]
pub(super) struct Folders {
    /// Folders that are repositories.
    pub(super) repositories: Vec<PathBuf>,
    /// Others that are written to.
    pub(super) others: Vec<PathBuf>,
    /// Whether one of them is where state is kept.
    pub(super) has_state_dir: bool,
}

/// What a service does besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Runs {
    /// Programs of ours only.
    Ours,
    /// A PostgreSQL server as well.
    Server,
    /// Programs of ours that only read repositories, and have to begin without them.
    Watching,
}

impl Units {
    /// Returns the units: each one's file name and text.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what cannot stand in a unit.
    pub(super) fn texts(&self) -> Result<Vec<(String, String)>> {
        let name = &self.name;
        let units = [
            ("receive.service", self.receive()?),
            ("serve.service", self.serve()?),
            ("backup.service", self.backup()?),
            ("backup.timer", self.timer("base backups", &self.backup_at, "1h")?),
            ("expire.service", self.expire()?),
            ("expire.timer", self.timer("what retention keeps", &self.expire_at, "15min")?),
            ("verify.service", self.verify()?),
            ("verify.timer", self.timer("verification of what is stored", &self.verify_at, "1h")?),
            ("drill.service", self.drill()?),
            ("drill.timer", self.timer("restore drills", &self.drill_at, "1h")?),
        ];
        Ok(units.into_iter().map(|(kind, text)| (format!("{name}-{kind}"), text)).collect())
    }

    fn receive(&self) -> Result<String> {
        let mut command = vec!["receive".to_owned()];
        if !self.own_status_file {
            command.extend(["--status-file".to_owned(), format!("/run/{}/receive.json", self.name)]);
        }
        let exec = self.exec("walship", &command)?;
        let (name, mounts) = (&self.name, self.mounts()?);
        Ok(format!(
            "\
[Unit]
Description=Streams PostgreSQL's WAL into the repository ({name})
Documentation=man:walship-receive(1)
Wants=network-online.target
After=network-online.target postgresql.service
{mounts}# A server that is away, or a repository, is waited for. It is never given up.
StartLimitIntervalSec=0

[Service]
# It says READY=1 when it streams, STATUS= where it is, WATCHDOG=1 as long as it makes progress, and STOPPING=1.
Type=notify
{exec}
Restart=always
RestartSec=10
# A server that is not there yet: the start fails after this time, and is tried again.
TimeoutStartSec=5min
# What is on its way is stored before it ends, within a minute.
TimeoutStopSec=90
# Connecting and storing have bounds of their own; a stream that stands still for half a minute stops answering.
WatchdogSec=3min
# The status file, and the place for a spool (--spool /var/lib/{name}/spool).
RuntimeDirectory={name}
RuntimeDirectoryMode=0755
StateDirectory={name}
StateDirectoryMode=0700
{}
[Install]
WantedBy=multi-user.target
",
            self.surroundings(Runs::Ours)?
        ))
    }

    fn serve(&self) -> Result<String> {
        let mut command = vec!["serve".to_owned()];
        command.extend(self.serve_options.iter().cloned());
        let exec = self.exec("walship", &command)?;
        let name = &self.name;
        Ok(format!(
            "\
[Unit]
Description=Watches the archive: metrics for Prometheus, notices of problems ({name})
Documentation=man:walship-serve(1)
# No mount is waited for: that one is missing is what it tells.
Wants=network-online.target
After=network-online.target postgresql.service
StartLimitIntervalSec=0

[Service]
Type=exec
{exec}
Restart=always
RestartSec=10
# Notices that can still be delivered are, for some seconds.
TimeoutStopSec=30
StateDirectory={name}
StateDirectoryMode=0700
{}
[Install]
WantedBy=multi-user.target
",
            self.surroundings(Runs::Watching)?
        ))
    }

    fn backup(&self) -> Result<String> {
        let mut command = vec!["backup".to_owned()];
        command.extend(self.backup_options.iter().cloned());
        let exec = self.exec("walship", &command)?;
        self.oneshot(
            ("Base backup of PostgreSQL", "walship-backup"),
            "# Status 4: the backup is complete, and damaged pages were found. The journal names them.\n",
            &exec,
            Runs::Ours,
        )
    }

    fn expire(&self) -> Result<String> {
        let exec = self.exec("pitr", &["expire", "--confirm", "--yes"].map(str::to_owned))?;
        self.oneshot(
            ("Removes from the repository what retention does not keep", "pitr-expire"),
            "# [retention] in the configuration says what stays; without it nothing is removed, and this fails.\n",
            &exec,
            Runs::Ours,
        )
    }

    fn verify(&self) -> Result<String> {
        let mut command = vec!["verify".to_owned()];
        command.extend(self.verify_options.iter().cloned());
        let exec = self.exec("pitr", &command)?;
        self.oneshot(
            ("Reads what is stored in the repository, and proves it", "pitr-verify"),
            "# Status 4: something is damaged. The journal says which moments it takes away.\n",
            &exec,
            Runs::Ours,
        )
    }

    fn drill(&self) -> Result<String> {
        let mut command = vec!["drill".to_owned()];
        if self.scratch().is_none() {
            command.extend(["--scratch".to_owned(), format!("/var/lib/{}/drill", self.name)]);
        }
        command.extend(self.drill_options.iter().cloned());
        let exec = self.exec("pitr", &command)?;
        self.oneshot(
            ("Restore drill: a restore that really runs, proven and measured", "pitr-drill"),
            "# Status 4: a proof failed; 1: it could not be carried out, or an objective was missed.\n\
             # The scratch folder needs room for the whole cluster.\n",
            &exec,
            Runs::Server,
        )
    }

    /// Returns where drills restore to, where the options say that.
    fn scratch(&self) -> Option<&str> {
        let options = &self.drill_options;
        let joined = options.iter().find_map(|option| option.strip_prefix("--scratch="));
        joined.or_else(|| options.windows(2).find(|two| two[0] == "--scratch").map(|two| &*two[1]))
    }

    fn oneshot(&self, (what, page): (&str, &str), statuses: &str, exec: &str, runs: Runs) -> Result<String> {
        let (name, mounts) = (&self.name, self.mounts()?);
        Ok(format!(
            "\
[Unit]
Description={what} ({name})
Documentation=man:{page}(1)
Wants=network-online.target
After=network-online.target postgresql.service
{mounts}
[Service]
Type=oneshot
{statuses}{exec}
# It takes as long as it takes: a oneshot service has no time limit of its own, and a limit would end a good one.
TimeoutStartSec=infinity
# The server goes first.
Nice=10
IOSchedulingClass=best-effort
IOSchedulingPriority=7
StateDirectory={name}
StateDirectoryMode=0700
{}",
            self.surroundings(runs)?
        ))
    }

    fn timer(&self, what: &str, at: &str, spread: &str) -> Result<String> {
        let name = &self.name;
        check_line(at)?;
        Ok(format!(
            "\
[Unit]
Description=Timer: {what} ({name})

[Timer]
OnCalendar={at}
# Many servers that back up to one store do not begin in the same second.
RandomizedDelaySec={spread}
# Made up for when the machine was off at that time.
Persistent=true

[Install]
WantedBy=timers.target
"
        ))
    }

    fn exec(&self, program: &str, words: &[String]) -> Result<String> {
        let path = self.programs.join(program);
        let mut line = format!("ExecStart={}", exec_word(&path_text(&path)?)?);
        for word in words {
            line.push(' ');
            line.push_str(&exec_word(word)?);
        }
        Ok(line)
    }

    /// Who it runs as, what it knows, and what it cannot do.
    fn surroundings(&self, runs: Runs) -> Result<String> {
        let mut text = format!("User={}\n", self.user);
        if let Some(config) = &self.config {
            let _ =
                writeln!(text, "Environment={}", word(&format!("WALSHIP_CONFIG={}", path_text(config)?))?);
        }
        if self.folders.as_ref().is_some_and(|folders| !folders.has_state_dir) {
            let _ = writeln!(
                text,
                "# What verifications have seen is remembered here too: an older copy of a repository does not know it.\n\
                 Environment=WALSHIP_STATE_DIR=/var/lib/{}",
                self.name
            );
        }
        let _ = writeln!(
            text,
            "# Secrets (AWS_SECRET_ACCESS_KEY, PGPASSWORD ...), readable for root alone; read before it becomes {}.",
            self.user
        );
        let _ = writeln!(text, "EnvironmentFile=-/etc/walship/{}.env", self.name);
        text.push_str("\n# What it cannot do. `systemd-analyze security` explains each line.\n");
        match &self.folders {
            Some(folders) => {
                text.push_str("ProtectSystem=strict\n");
                for folder in folders.repositories.iter().filter(|_| runs != Runs::Watching) {
                    let _ = writeln!(text, "ReadWritePaths={}", word(&path_text(folder)?)?);
                }
                // A service must start without them: that of a status file below /run is there while the receiver runs.
                let scratch = self.scratch().map(Path::new).filter(|_| runs == Runs::Server);
                for folder in folders.others.iter().map(PathBuf::as_path).chain(scratch) {
                    let _ = writeln!(text, "ReadWritePaths={}", word(&format!("-{}", path_text(folder)?))?);
                }
            }
            None => text.push_str(
                "# `walship setup systemd` makes it strict, with the folders that the configuration names.\n\
                 ProtectSystem=full\n",
            ),
        }
        text.push_str(HARDENING);
        text.push_str(match runs {
            Runs::Ours | Runs::Watching => HARDENING_OURS,
            Runs::Server => HARDENING_SERVER,
        });
        Ok(text)
    }

    /// Returns the line about mounts: an empty mount point must not be looked at before the repository is there.
    fn mounts(&self) -> Result<String> {
        let Some(folders) = self.folders.as_ref().filter(|folders| !folders.repositories.is_empty()) else {
            return Ok(String::new());
        };
        let words = folders.repositories.iter().map(|folder| word(&path_text(folder)?));
        Ok(format!("RequiresMountsFor={}\n", words.collect::<Result<Vec<_>>>()?.join(" ")))
    }
}

/// For every service.
const HARDENING: &str = "\
# Read only, not hidden: a user's home may hold .pgpass, .aws and the data directory.
ProtectHome=read-only
# A server whose socket is in /tmp is not found then: name host=/var/run/postgresql, or set this to no.
PrivateTmp=yes
PrivateDevices=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictRealtime=yes
# Sockets of the server and of the agent; the server or the store over the network; netlink to sort addresses.
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
LockPersonality=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
ProtectProc=invisible
# With yes the end of a service would take the shared memory of a server of the same user away.
RemoveIPC=no
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0077
# A core would hold what was in memory: secrets, and rows.
LimitCORE=0
";

const HARDENING_OURS: &str = "\
ProcSubset=pid
MemoryDenyWriteExecute=yes
SystemCallFilter=~@privileged @resources
SystemCallFilter=setpriority ioprio_set
";

const HARDENING_SERVER: &str = "\
# PostgreSQL reads /proc/meminfo, and its JIT writes code: neither ProcSubset= nor MemoryDenyWriteExecute=.
";

/// A word of a line that knows specifiers (`%h`) and quotes.
fn word(text: &str) -> Result<String> {
    check_line(text)?;
    let mut quoted = String::new();
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '%' => quoted.push_str("%%"),
            c => quoted.push(c),
        }
    }
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "_-./:=,@+".contains(c));
    Ok(if plain && !text.is_empty() { quoted } else { format!("\"{quoted}\"") })
}

/// A word of a command, where variables (`$HOME`) are known too.
fn exec_word(text: &str) -> Result<String> {
    Ok(word(text)?.replace('$', "$$"))
}

/// # Errors
/// [`Error::Invalid`] for what would begin another line.
fn check_line(text: &str) -> Result<()> {
    if text.chars().any(char::is_control) {
        return Err(Error::invalid(format!("{text:?} cannot stand in a unit: it has control characters"))
            .with_safe("nothing was written"));
    }
    Ok(())
}

fn path_text(path: &Path) -> Result<String> {
    match path.to_str() {
        Some(text) if path.is_absolute() => Ok(text.to_owned()),
        _ => Err(Error::invalid(format!(
            "{path:?} cannot stand in a unit: it has to be an absolute path in UTF-8"
        ))
        .with_safe("nothing was written")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units() -> Units {
        Units {
            name: "walship".into(),
            user: "postgres".into(),
            programs: "/usr/bin".into(),
            config: None,
            folders: None,
            own_status_file: false,
            serve_options: Vec::new(),
            backup_options: vec!["--label".into(), "it costs 5 % of $HOME".into()],
            verify_options: Vec::new(),
            drill_options: Vec::new(),
            backup_at: "*-*-* 01:30".into(),
            verify_at: "*-*-* 04:00".into(),
            expire_at: "*-*-* 05:30".into(),
            drill_at: "Sun *-*-1..7 06:00".into(),
        }
    }

    fn text(units: &Units, name: &str) -> String {
        let texts = units.texts().unwrap();
        texts.into_iter().find(|(known, _)| known == name).map(|(_, text)| text).unwrap()
    }

    #[test]
    fn nothing_in_a_word_means_anything_to_systemd() {
        let backup = text(&units(), "walship-backup.service");
        assert!(
            backup.contains("\nExecStart=/usr/bin/walship backup --label \"it costs 5 %% of $$HOME\"\n"),
            "{backup}"
        );
        assert_eq!(word("a\"b\\c").unwrap(), r#""a\"b\\c""#);
        assert_eq!(word("").unwrap(), "\"\"");
        assert!(word("a\nExecStartPre=/bin/rm").is_err());
        assert!(path_text(Path::new("srv/walship")).is_err());
    }

    #[test]
    fn folders_that_are_known_are_all_that_is_written_to() {
        let unknown = text(&units(), "walship-receive.service");
        assert!(
            unknown.contains("ProtectSystem=full\n") && !unknown.contains("RequiresMountsFor"),
            "{unknown}"
        );
        let folders = Folders {
            repositories: vec!["/srv/wal ship".into()],
            others: vec!["/var/spool/w".into()],
            has_state_dir: true,
        };
        let known = Units { folders: Some(folders), own_status_file: true, ..units() };
        let receive = text(&known, "walship-receive.service");
        for line in [
            "RequiresMountsFor=\"/srv/wal ship\"",
            "ProtectSystem=strict",
            "ReadWritePaths=\"/srv/wal ship\"",
            "ReadWritePaths=-/var/spool/w",
            "ExecStart=/usr/bin/walship receive",
        ] {
            assert!(receive.lines().any(|known| known == line), "{line} in {receive}");
        }
        // Watching has to begin while a mount is missing, and writes to none.
        let serve = text(&known, "walship-serve.service");
        assert!(serve.contains("\nProtectSystem=strict\nReadWritePaths=-/var/spool/w\n"), "{serve}");
        assert!(!serve.contains("/srv/wal ship") && !serve.contains("WALSHIP_STATE_DIR"), "{serve}");
        for (name, text) in known.texts().unwrap().iter().filter(|(name, _)| name.ends_with(".service")) {
            assert!(text.contains("\nLimitCORE=0\n"), "{name}: {text}");
        }
        let options = |words: &[&str]| Units {
            folders: Some(Folders::default()),
            drill_options: words.iter().map(|word| (*word).to_owned()).collect(),
            ..units()
        };
        for words in [&["--scratch", "/srv/big"][..], &["--latest", "--scratch=/srv/big"]] {
            let units = options(words);
            let drill = text(&units, "walship-drill.service");
            assert!(drill.contains("\nReadWritePaths=-/srv/big\n"), "{drill}");
            assert!(!drill.contains("/var/lib/walship/drill"), "{drill}");
            assert!(!text(&units, "walship-backup.service").contains("/srv/big"));
            let verify = text(&units, "walship-verify.service");
            assert!(verify.contains("\nEnvironment=WALSHIP_STATE_DIR=/var/lib/walship\n"), "{verify}");
        }
    }
}
