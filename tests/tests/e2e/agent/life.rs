//! What becomes of an agent: who is its parent, what it holds, what ends it, and what it is not taken for.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use walship_tests::postgres::{PgServer, StopMode, newer_major, primary_major};
use walship_tests::stage::Stage;
use walship_tests::tmpfs::Tmpfs;
use walship_tests::{bins, process, wait};

use super::{agents, all_archived, assert_stored, open_gate, server_with_waiting, stage, the_agent};

/// The words of `/proc/PID/stat` behind the program's name.
fn stat(pid: u32) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let behind = text.rsplit_once(") ").unwrap().1;
    behind.split_whitespace().map(str::to_owned).collect()
}

/// Parent, group and session of a process.
fn family(pid: u32) -> [u32; 3] {
    let stat = stat(pid);
    [1, 2, 3].map(|field| stat[field].parse().unwrap())
}

/// What a process has open: the targets of its descriptors.
fn open_files(pid: u32) -> BTreeSet<String> {
    let folder = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = folder.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    links.map(|link| link.display().to_string()).collect()
}

fn postmaster(server: &PgServer) -> u32 {
    fs::read_to_string(server.data_dir().join("postmaster.pid"))
        .unwrap()
        .lines()
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

/// Calls `archive-cmd` for a file as the server would.
fn push(stage: &Stage, server: &PgServer, path: &Path) -> Command {
    // With the server's environment, which is this process's, and as the user that it sees itself as: all else leads
    // to another agent.
    let mut command = Command::new("unshare");
    command.args(["-U", "--map-user=1000", "--map-group=1000", "--"]).arg(bins::archive_cmd());
    command.arg(path).current_dir(server.data_dir()).env("WALSHIP_CONFIG", stage.config());
    command
}

#[test]
fn it_holds_nothing_of_the_server_and_outlives_its_sudden_end() {
    let stage = stage();
    let (mut server, waiting) = server_with_waiting(&stage, primary_major(), 12);
    open_gate(&stage);
    all_archived(&server, &waiting);
    let (agent, postmaster) = (the_agent(server.data_dir()), postmaster(&server));
    let [parent, group, session] = family(agent);
    assert!(session == agent && group == agent, "a session of its own: {group} {session}");
    assert_ne!(parent, postmaster, "its death would restart the database");
    assert_ne!(family(postmaster)[2], agent);
    assert_eq!(fs::read_link(format!("/proc/{agent}/cwd")).unwrap(), Path::new("/"));
    let score = fs::read_to_string(format!("/proc/{agent}/oom_score_adj")).unwrap();
    assert!(score.trim().parse::<i32>().unwrap() >= 0, "{score}");
    // Its own log, its socket and its lock; no file or pipe of the server's.
    for file in open_files(agent) {
        let own = ["socket:", "anon_inode:", "/dev/null", "/proc/"]
            .iter()
            .any(|start| file.starts_with(start))
            || [".log", ".lock", ".sock"].iter().any(|end| file.ends_with(end)) && file.contains("agent-");
        assert!(
            own || file.starts_with("pipe:") && !open_files(postmaster).contains(&file),
            "it holds {file}"
        );
    }

    // The group of the postmaster is told to end, as a terminal or a supervisor does: nobody else.
    server.stop(StopMode::Immediate);
    assert_eq!(agents(server.data_dir()), [agent]);
    // What it knows is still right: asked again, it answers at once.
    stage.ok(&mut push(&stage, &server, &waiting[3]));
    assert_eq!(agents(server.data_dir()), [agent], "the same one answered");
    assert_stored(&stage, &waiting);
    // And it may end at any time.
    kill(Pid::from_raw(i32::try_from(agent).unwrap()), Signal::SIGKILL).unwrap();
    stage.ok(&mut push(&stage, &server, &waiting[4]));
}

/// Whoever waits for the end of `pg_ctl start` by its output does not wait for the agent.
#[test]
fn a_pipe_behind_pg_ctl_is_let_go() {
    let stage = stage();
    let (mut server, waiting) = server_with_waiting(&stage, primary_major(), 2);
    open_gate(&stage);
    all_archived(&server, &waiting);
    let first = the_agent(server.data_dir());
    server.stop(StopMode::Fast);
    kill(Pid::from_raw(i32::try_from(first).unwrap()), Signal::SIGKILL).unwrap();
    let socket = tempfile::tempdir().unwrap();
    // Without -l the postmaster writes into the pipe, and so did whatever it starts.
    let script =
        "pg_ctl=$1; shift; unshare -U --map-user=1000 --map-group=1000 \"$pg_ctl\" -w start \"$@\" | cat";
    let mut start = Command::new("sh");
    start.args(["-c", script, "sh"]).arg(server.binaries().tool("pg_ctl").get_program());
    start.arg("-D").arg(server.data_dir());
    let options = format!(
        "-c port={} -c listen_addresses=127.0.0.1 -c unix_socket_directories={}",
        server.port(),
        socket.path().display()
    );
    start.arg("-o").arg(options).env("WALSHIP_CONFIG", stage.config()).stdin(Stdio::null());
    start.stdout(Stdio::null()).stderr(Stdio::null());
    let mut started = process::spawn(start).unwrap();
    let psql = |sql: &str| {
        let mut psql = server.binaries().tool("psql");
        psql.args(["-h", socket.path().to_str().unwrap(), "-p", &server.port().to_string()]);
        psql.args(["-U", "postgres", "-d", "postgres", "-qXAtc", sql]);
        process::run(&mut psql, process::RunOptions::default())
    };
    wait::until("it is up", || psql("SELECT 1").status.success());
    psql("CREATE TABLE more (a int); SELECT pg_switch_wal()");
    let agent = the_agent(server.data_dir());
    let mut stop = server.binaries().unprivileged("pg_ctl");
    process::run_ok(stop.arg("-D").arg(server.data_dir()).args(["-w", "-m", "fast", "stop"]));
    // `cat` ends with the last writer: the server is gone, the agent is not, and does not count.
    let status = process::wait_within(&mut started, wait::PATIENCE);
    assert!(status.is_some(), "the pipe is held open");
    assert_eq!(agents(server.data_dir()), [agent]);
}

/// PostgreSQL as the first process of a container: an orphan of it would be its child.
#[test]
fn a_server_that_is_the_first_process_has_no_agent() {
    let stage = stage();
    let (mut server, _) = server_with_waiting(&stage, newer_major(), 1);
    let data = server.data_dir().to_owned();
    server.stop(StopMode::Fast);
    open_gate(&stage);
    let socket = tempfile::tempdir().unwrap();
    let port = server.port().to_string();
    let postgres = server.binaries().unprivileged("postgres");
    let mut first = Command::new("unshare");
    first.args(["-p", "-f", "--kill-child", "--mount-proc", "--"]);
    first.arg(postgres.get_program()).args(postgres.get_args()).arg("-D").arg(&data);
    first.args(["-p", &port, "-c", "listen_addresses=127.0.0.1", "-c"]);
    first.arg(format!("unix_socket_directories={}", socket.path().display()));
    let log = fs::File::create(socket.path().join("log")).unwrap();
    first.env("WALSHIP_CONFIG", stage.config()).stdin(Stdio::null()).stderr(log).stdout(Stdio::null());
    let mut first = process::spawn(first).unwrap();
    let psql = |sql: &str| {
        let mut psql = server.binaries().tool("psql");
        psql.args([
            "-h",
            socket.path().to_str().unwrap(),
            "-p",
            &port,
            "-U",
            "postgres",
            "-d",
            "postgres",
            "-qXAtc",
            sql,
        ]);
        let output = process::run(&mut psql, process::RunOptions::default());
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
    };
    wait::until("it is up", || psql("SELECT 1").is_some());
    assert_eq!(fs::read_to_string(data.join("postmaster.pid")).unwrap().lines().next(), Some("1"));
    let session = psql("SELECT pg_postmaster_start_time()").unwrap();
    psql("SELECT pg_stat_reset_shared('archiver')").unwrap();
    for round in 0..4 {
        psql(&format!("CREATE TABLE t{round} (a int)")).unwrap();
        let last = psql("SELECT pg_walfile_name(pg_switch_wal())").unwrap();
        wait::until("it is archived", || {
            psql(&format!("SELECT last_archived_wal >= '{last}' FROM pg_stat_archiver")).as_deref()
                == Some("t")
        });
        assert!(agents(&data).is_empty(), "an agent was started");
    }
    assert_eq!(psql("SELECT failed_count FROM pg_stat_archiver").as_deref(), Some("0"));
    assert_eq!(psql("SELECT pg_postmaster_start_time()").unwrap(), session, "no backend was restarted");
    let said = fs::read_to_string(socket.path().join("log")).unwrap();
    assert!(!said.contains("terminating any other active server processes"), "{said}");
    process::kill_tree(&mut first);
}

#[test]
fn two_servers_with_one_configuration_have_an_agent_each() {
    let stage = stage();
    let (one, of_one) = server_with_waiting(&stage, primary_major(), 5);
    // The second one has a lineage of its own under the same name.
    let gate = stage.path().join("gate");
    let command = format!("test -e '{}' && '{}' %p", gate.display(), bins::archive_cmd().display());
    let two = PgServer::builder(primary_major())
        .wal_segment_size_mb(1)
        .setting("archive_mode", "on")
        .setting("archive_command", command)
        .env("WALSHIP_CONFIG", stage.config())
        .start();
    stage.ok(&mut stage.walship_on(&two, &["init", "--new-lineage"]));
    let of_two: Vec<PathBuf> = (0..5)
        .map(|number| {
            two.psql(&format!("CREATE TABLE t{number} (a int)"));
            two.data_dir().join("pg_wal").join(two.switch_wal())
        })
        .collect();
    open_gate(&stage);
    all_archived(&one, &of_one);
    all_archived(&two, &of_two);
    let (first, second) = (the_agent(one.data_dir()), the_agent(two.data_dir()));
    assert_ne!(first, second);
    for (number, files) in [("1", &of_one), ("2", &of_two)] {
        let target = stage.path().join("fetched");
        for path in files {
            let name = path.file_name().unwrap().to_str().unwrap();
            let args = ["wal", "fetch", "--lineage", number, name, target.to_str().unwrap()];
            stage.ok(&mut stage.walship(&args));
            assert!(fs::read(&target).unwrap() == fs::read(path).unwrap(), "{name} of lineage {number}");
        }
    }
}

/// A folder that took another one's path, and a program that took another one's place, are not answered from memory.
#[test]
fn what_was_replaced_gets_an_agent_of_its_own() {
    let stage = stage();
    let (mut server, waiting) = server_with_waiting(&stage, primary_major(), 3);
    open_gate(&stage);
    all_archived(&server, &waiting);
    let first = the_agent(server.data_dir());

    // The program is upgraded: copies, so that another file of the same name can take its place.
    let programs = stage.path().join("programs");
    fs::create_dir(&programs).unwrap();
    for program in [bins::walship(), bins::archive_cmd()] {
        fs::copy(&program, programs.join(program.file_name().unwrap())).unwrap();
    }
    let upgraded = |path: &Path| {
        let mut command = stage.command(&programs.join("archive-cmd"));
        command.arg(path).current_dir(server.data_dir());
        command
    };
    stage.ok(&mut upgraded(&waiting[0]));
    wait::until("the copy has its own", || agents(server.data_dir()).len() == 2);
    fs::remove_file(programs.join("walship")).unwrap();
    fs::copy(bins::walship(), programs.join("walship")).unwrap();
    stage.ok(&mut upgraded(&waiting[1]));
    wait::until("the new version has its own", || agents(server.data_dir()).len() == 3);
    assert!(agents(server.data_dir()).contains(&first), "the old ones are left to end when nobody asks");

    // Another data directory at the same path.
    let saved = stage.path().join("saved");
    fs::copy(&waiting[2], &saved).unwrap();
    server.stop(StopMode::Fast);
    let (data, aside) = (server.data_dir().to_owned(), stage.path().join("aside"));
    fs::rename(&data, &aside).unwrap();
    fs::create_dir_all(data.join("pg_wal")).unwrap();
    wait::until("they end", || agents(&data).is_empty());
    fs::remove_dir_all(&data).unwrap();
    fs::rename(&aside, &data).unwrap();
    fs::copy(&saved, &waiting[2]).unwrap();
    stage.ok(&mut push(&stage, &server, &waiting[2]));
}

/// A folder of another user's, a socket of another user's, and no place for a socket lead to the foreground.
#[test]
fn nobody_else_is_asked() {
    let stage = stage();
    let (server, waiting) = server_with_waiting(&stage, primary_major(), 5);
    let nobody = 65534;
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();

    // The folder for sockets is somebody else's, or open to all.
    let theirs = place.path().join("theirs");
    fs::create_dir_all(theirs.join("walship-1000")).unwrap();
    chown(theirs.join("walship-1000"), Some(nobody), Some(nobody)).unwrap();
    stage.ok(push(&stage, &server, &waiting[0]).env("TMPDIR", &theirs));
    let open = place.path().join("open");
    fs::create_dir_all(open.join("walship-1000")).unwrap();
    fs::set_permissions(open.join("walship-1000"), fs::Permissions::from_mode(0o777)).unwrap();
    stage.ok(push(&stage, &server, &waiting[1]).env("TMPDIR", &open));

    // Somebody else answers at the socket, and says that all is well.
    let socket = place.path().join("liar/agent.sock");
    fs::create_dir(socket.parent().unwrap()).unwrap();
    chown(socket.parent().unwrap(), Some(nobody), Some(nobody)).unwrap();
    let liar = "use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 5) or die; \
                while (my $c = $s->accept) { syswrite $c, 'x' x 4096; open my $f, '>', \"$ARGV[0].asked\"; }";
    let mut perl = Command::new("setpriv");
    perl.args(["--reuid=65534", "--regid=65534", "--clear-groups", "perl", "-e", liar]).arg(&socket);
    let mut perl = process::spawn(perl).unwrap();
    wait::until("somebody else listens", || socket.exists());
    stage.ok(push(&stage, &server, &waiting[2]).env("WALSHIP_AGENT_SOCKET", &socket));
    process::kill_tree(&mut perl);

    // Nothing can be made there.
    let disk = Tmpfs::mount(&place.path().join("read-only"), "size=1m");
    disk.remount("ro");
    stage.ok(push(&stage, &server, &waiting[3]).env("TMPDIR", disk.path()));
    stage.ok(push(&stage, &server, &waiting[4]).env("TMPDIR", place.path().join("missing")));
    assert_stored(&stage, &waiting);
    assert!(agents(server.data_dir()).is_empty(), "an agent was started");
}

/// The disk that a recovery writes to has no room for what is fetched ahead.
#[test]
fn a_full_spool_ends_no_recovery() {
    let stage = stage();
    let (mut server, _) = server_with_waiting(&stage, primary_major(), 0);
    open_gate(&stage);
    stage.backup(&server);
    let mut last = String::new();
    for number in 0..40 {
        server.psql(&format!("INSERT INTO t SELECT {number}, md5(i::text) FROM generate_series(1, 100) i"));
        last = server.switch_wal();
        if number % 4 == 0 {
            // Where the recovery may let go of what it has replayed.
            server.psql("CHECKPOINT");
        }
    }
    server.wait_until_archived(&last);
    let rows = server.psql("SELECT count(*), sum(a) FROM t");
    server.stop(StopMode::Fast);

    let disk = Tmpfs::mount(&stage.path().join("small"), "size=2g");
    let data = disk.path().join("restored");
    stage.ok(&mut stage.pitr(&["restore", "--latest", "-D", data.to_str().unwrap()]));
    // Room for the recovery and a few segments, not for sixteen ahead.
    let used = process::run_ok(Command::new("du").args(["-s", "--block-size=1M"]).arg(disk.path()));
    let used: u64 = used.split_whitespace().next().unwrap().parse().unwrap();
    disk.remount(&format!("size={}m", used + 14));
    let restored =
        stage.recovering(&data).setting("min_wal_size", "2MB").setting("max_wal_size", "2MB").start();
    restored.wait_for("SELECT pg_is_in_recovery()", "f");
    assert_eq!(restored.psql("SELECT count(*), sum(a) FROM t"), rows, "{}", restored.log());
    wait::until("the spool is gone", || !data.join("pgsql_tmp_walship_spool").exists());
    let owner = fs::metadata(&data).unwrap().uid();
    assert_eq!(owner, nix::unistd::geteuid().as_raw());
    drop(restored);
    wait::until("no agent is left", || {
        agents(&data).into_iter().for_each(|agent| process::signal(agent, Signal::SIGKILL));
        agents(&data).is_empty()
    });
}
