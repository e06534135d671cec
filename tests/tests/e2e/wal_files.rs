//! One WAL file through the real programs: every way in which it can be the wrong file, meet a store
//! that is not well, or come back as something else. What counts is the exit status: PostgreSQL reads
//! nothing else.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use walship_tests::bins;
use walship_tests::postgres::{self, PgServer, StopMode};
use walship_tests::stage::Stage;

/// A data directory that is not running, with whole segments of 1 MiB.
struct Source {
    _folder: TempDir,
    data_dir: PathBuf,
    segments: Vec<String>,
}

/// The WAL of one real server, made once.
fn source() -> &'static Source {
    static SOURCE: OnceLock<Source> = OnceLock::new();
    SOURCE.get_or_init(|| {
        let mut server = PgServer::builder(postgres::primary_major())
            .wal_segment_size_mb(1)
            .setting("wal_keep_size", "256MB")
            .start();
        server.psql("CREATE TABLE t AS SELECT generate_series(1, 20000) AS a");
        for round in 0..5 {
            server.psql(&format!("INSERT INTO t SELECT {round} FROM generate_series(1, 1000)"));
            server.switch_wal();
        }
        let last = server.psql("SELECT pg_walfile_name(pg_current_wal_lsn())");
        server.stop(StopMode::Fast);
        let folder = tempfile::tempdir().unwrap();
        let data_dir = folder.path().join("data");
        fs::create_dir_all(data_dir.join("global")).unwrap();
        fs::create_dir_all(data_dir.join("pg_wal")).unwrap();
        for name in ["global/pg_control", "PG_VERSION"] {
            fs::copy(server.data_dir().join(name), data_dir.join(name)).unwrap();
        }
        let mut segments = Vec::new();
        for entry in fs::read_dir(server.data_dir().join("pg_wal")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            // Not those kept for later use under coming names.
            if name.len() == 24 && name < last {
                fs::copy(server.data_dir().join("pg_wal").join(&name), data_dir.join("pg_wal").join(&name))
                    .unwrap();
                segments.push(name);
            }
        }
        segments.sort();
        assert!(segments.len() >= 4, "{segments:?}");
        Source { _folder: folder, data_dir, segments }
    })
}

/// A repository, and a data directory of the server's that nothing runs in.
struct Scene {
    stage: Stage,
    data_dir: PathBuf,
}

impl Scene {
    fn new() -> Self {
        Self::with("")
    }

    /// With further lines of configuration.
    fn with(lines: &str) -> Self {
        let lines = format!(
            "restore_retry_ms = 0\n{lines}\n[limits]\nconnect_ms = 500\nrequest_ms = 1000\ndeadline_ms = 2000\n"
        );
        let stage = Stage::folder("main").configured(&lines);
        let scene = Self::around(stage);
        scene.stage.ok(&mut scene.stage.walship(&["init", "--data-dir", scene.data_dir.to_str().unwrap()]));
        scene
    }

    fn around(stage: Stage) -> Self {
        let data_dir = stage.path().join("data");
        let copied = Command::new("cp").arg("-r").arg(&source().data_dir).arg(&data_dir).status().unwrap();
        assert!(copied.success());
        Self { stage, data_dir }
    }

    fn wal(&self, name: &str) -> PathBuf {
        self.data_dir.join("pg_wal").join(name)
    }

    /// `archive-cmd pg_wal/NAME`, run where PostgreSQL would run it.
    fn archive(&self, name: &str) -> Output {
        let mut command = self.stage.command(&bins::archive_cmd());
        command.arg(format!("pg_wal/{name}")).current_dir(&self.data_dir);
        self.stage.run(&mut command)
    }

    fn archived(&self, name: &str) -> String {
        let output = self.archive(name);
        assert_eq!(output.status.code(), Some(0), "{name}: {}", text(&output));
        text(&output)
    }

    /// For what is changed in the repository behind an agent that may have fetched it.
    fn without_agent(self) -> Self {
        Self { stage: self.stage.with_agent("off"), ..self }
    }

    /// Archiving must fail, in the way that makes PostgreSQL ask again.
    fn refused(&self, name: &str) -> String {
        let output = self.archive(name);
        let status = output.status.code().expect("no signal");
        assert!((1..=125).contains(&status), "{name}: {status}: {}", text(&output));
        text(&output)
    }

    /// `restore-cmd NAME pg_wal/RECOVERYXLOG`: the status, the output, and the file if it is there.
    fn restore(&self, name: &str) -> (i32, String, Option<Vec<u8>>) {
        let target = self.wal("RECOVERYXLOG");
        let _ = fs::remove_file(&target);
        let mut command = self.stage.command(&bins::restore_cmd());
        command.args([name, "pg_wal/RECOVERYXLOG"]).current_dir(&self.data_dir);
        let output = self.stage.run(&mut command);
        let left: Vec<_> = fs::read_dir(self.data_dir.join("pg_wal"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains("walship"))
            .collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        (output.status.code().expect("no signal"), text(&output), fs::read(target).ok())
    }

    /// The restore must give no answer: 126, and 75 for a standby, with no file.
    fn unanswered(&self, name: &str) -> String {
        for (signal, expected) in [(None, 126), (Some("recovery.signal"), 126), (Some("standby.signal"), 75)]
        {
            for other in ["recovery.signal", "standby.signal"] {
                let _ = fs::remove_file(self.data_dir.join(other));
            }
            if let Some(signal) = signal {
                // standby.signal wins over recovery.signal.
                fs::write(self.data_dir.join("recovery.signal"), "").unwrap();
                fs::write(self.data_dir.join(signal), "").unwrap();
            }
            let (status, said, file) = self.restore(name);
            assert_eq!((status, file), (expected, None), "{name} {signal:?}: {said}");
        }
        let (status, said, file) = self.restore(name);
        assert_eq!((status, file), (75, None));
        let _ = fs::remove_file(self.data_dir.join("standby.signal"));
        said
    }

    fn absent(&self, name: &str) {
        let (status, said, file) = self.restore(name);
        assert_eq!((status, file), (1, None), "{name}: {said}");
    }

    fn delivered(&self, name: &str) -> Vec<u8> {
        let (status, said, file) = self.restore(name);
        assert_eq!(status, 0, "{name}: {said}");
        file.unwrap()
    }

    fn stored(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.stage.repository_dir().join("main")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() { folders.push(path) } else { found.push(path) }
            }
        }
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut names: Vec<_> = found.iter().map(name).filter(|name| !name.ends_with(".json")).collect();
        names.sort();
        names
    }

    fn object(&self, name: &str) -> PathBuf {
        let folder = format!("main/0001/wal/{}/{}", &name[..8], &name[8..16]);
        self.stage.repository_dir().join(folder).join(format!("{name}.wal"))
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.wal(name)).unwrap();
        change(&mut bytes);
        fs::write(self.wal(name), bytes).unwrap();
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn replace(path: &Path, bytes: &[u8]) {
    let mut permissions = fs::metadata(path).unwrap().permissions();
    permissions.set_mode(0o600);
    fs::set_permissions(path, permissions).unwrap();
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_segment_comes_back_byte_for_byte_and_stock_tools_read_it() {
    for (compression, tool) in [("lz4", "lz4"), ("zstd:3", "zstd")] {
        let scene = Scene::with(&format!("compression = {compression:?}"));
        for name in &source().segments {
            let original = fs::read(scene.wal(name)).unwrap();
            assert_eq!(scene.archived(name), "", "nothing to say");
            assert_eq!(scene.archived(name), "", "the same bytes again are success");
            assert_eq!(scene.delivered(name), original);
            let object = fs::File::open(scene.object(name)).unwrap();
            let tool = Command::new(tool).args(["-d", "-c"]).stdin(Stdio::from(object)).output().unwrap();
            assert!(tool.status.success(), "{}", text(&tool));
            assert!(tool.stdout == original, "{compression}: the tool's output differs");
        }
        scene.absent("00000001000000FF00000001");
    }
}

#[test]
fn files_that_are_not_what_their_names_say_are_refused() {
    let scene = Scene::new();
    let [first, second, third, ..] = &*source().segments else { unreachable!() };
    scene.change(first, |bytes| bytes.truncate(512 << 10));
    assert!(scene.refused(first).contains("524288 bytes"));
    scene.change(second, |bytes| bytes[1] ^= 0xFF);
    assert!(scene.refused(second).contains("magic"));
    fs::copy(source().data_dir.join("pg_wal").join(first), scene.wal(third)).unwrap();
    assert!(scene.refused(third).contains("not the WAL that its name says"));
    let fourth = &source().segments[3];
    scene.change(fourth, |bytes| bytes[24] ^= 1);
    let said = scene.refused(fourth);
    assert!(
        said.contains("has no lineage for system identifier") && said.contains("--new-lineage"),
        "{said}"
    );
    fs::write(scene.wal("evil"), "x").unwrap();
    assert!(scene.refused("evil").contains("not the name of a file"));
    assert!(scene.refused("0000000100000000000000F0").contains("opening it"));
    std::os::unix::fs::symlink(scene.wal(first), scene.wal("0000000100000000000000F1")).unwrap();
    scene.refused("0000000100000000000000F1");
    fs::create_dir(scene.wal("0000000100000000000000F2")).unwrap();
    assert!(scene.refused("0000000100000000000000F2").contains("not a regular file"));
    fs::write(scene.wal("00000002.history"), "nonsense\n").unwrap();
    scene.refused("00000002.history");
    assert_eq!(scene.stored(), Vec::<String>::new());
}

#[test]
fn other_bytes_under_a_taken_name_are_a_conflict_with_both_digests() {
    let scene = Scene::new();
    let name = source().segments.last().unwrap();
    let original = fs::read(scene.wal(name)).unwrap();
    scene.archived(name);
    // Padding behind the switch record: valid WAL, other bytes.
    scene.change(name, |bytes| *bytes.last_mut().unwrap() ^= 1);
    let said = scene.refused(name);
    assert!(
        said.contains("already stored") && said.contains("stored digest") && said.contains("local"),
        "{said}"
    );
    assert!(said.contains("nothing was overwritten") && said.contains("--new-lineage"), "{said}");
    assert_eq!(scene.delivered(name), original);
    assert_eq!(scene.stored().len(), 1);
}

#[test]
fn a_zero_padded_segment_is_kept_apart_and_never_served() {
    let scene = Scene::new();
    let [first, second, third, ..] = &*source().segments else { unreachable!() };
    scene.archived(first);
    scene.change(second, |bytes| bytes[512 << 10..].fill(0));
    let said = scene.archived(second);
    assert!(said.contains("warning") && said.contains("not a whole segment"), "{said}");
    assert!(scene.stored().iter().any(|name| name.starts_with(&format!("{second}.incomplete."))));
    scene.absent(second);
    scene.archived(third);
    let said = scene.unanswered(second);
    assert!(said.contains("hole") && said.contains(".incomplete."), "{said}");
    // The whole one may still come.
    fs::copy(source().data_dir.join("pg_wal").join(second), scene.wal(second)).unwrap();
    scene.archived(second);
    assert_eq!(scene.delivered(second), fs::read(scene.wal(second)).unwrap());
}

#[test]
fn a_hole_is_no_end() {
    let scene = Scene::new();
    let [first, second, third, fourth, ..] = &*source().segments else { unreachable!() };
    scene.archived(first);
    scene.archived(third);
    let said = scene.unanswered(second);
    assert!(said.contains("a hole, not the end of the archive"), "{said}");
    scene.absent(fourth);
    fs::write(scene.wal("00000003.history"), "1\t0/3000000\tx\n").unwrap();
    scene.archived("00000003.history");
    let said = scene.unanswered("00000002.history");
    assert!(said.contains("would follow an older timeline"), "{said}");
    scene.absent("00000004.history");
}

#[test]
fn history_backup_and_partial_files_have_names_of_their_own() {
    let scene = Scene::new();
    let name = &source().segments[1];
    let history = "1\t0/3000000\tno recovery target specified\n";
    let backup = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n";
    let backup_name = format!("{name}.00000028.backup");
    let partial = format!("{name}.partial");
    fs::write(scene.wal("00000002.history"), history).unwrap();
    fs::write(scene.wal(&backup_name), backup).unwrap();
    let whole = fs::read(scene.wal(name)).unwrap();
    let mut cut = whole.clone();
    cut[256 << 10..].fill(0);
    fs::write(scene.wal(&partial), &cut).unwrap();

    scene.absent("00000002.history");
    scene.archived(&partial);
    scene.absent(name);
    scene.archived("00000002.history");
    scene.archived(&backup_name);
    scene.archived(name);
    assert_eq!(scene.delivered("00000002.history"), history.as_bytes());
    assert_eq!(scene.delivered(&backup_name), backup.as_bytes());
    assert_eq!(scene.delivered(&partial), cut);
    assert_eq!(scene.delivered(name), whole);
    // Another standby's partial of the same name is no conflict, but cannot be served by name any more.
    fs::write(scene.wal(&partial), &whole).unwrap();
    scene.archived(&partial);
    assert!(scene.unanswered(&partial).contains("2 times"));
    // A history file never changes.
    fs::write(scene.wal("00000002.history"), "1\t0/4000000\tx\n").unwrap();
    assert!(scene.refused("00000002.history").contains("already stored"));
}

#[test]
fn damaged_objects_are_never_served_and_good_copies_are_preferred() {
    let scene = Scene::new().without_agent();
    let name = &source().segments[0];
    let original = fs::read(scene.wal(name)).unwrap();
    scene.archived(name);
    let object = scene.object(name);
    let good = fs::read(&object).unwrap();
    let flip = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 4;
        bytes
    };
    let envelope = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        let crc = crc32fast::hash(&bytes[..156]).to_le_bytes();
        bytes[156..160].copy_from_slice(&crc);
        bytes
    };
    let body_at = 168 + u32::from_le_bytes(good[164..168].try_into().unwrap()) as usize;
    let hostile = [
        ("empty", Vec::new()),
        ("cut in the envelope", good[..100].to_vec()),
        ("cut in the body", good[..good.len() - 1].to_vec()),
        ("longer", [&good[..], b"x"].concat()),
        ("envelope flipped", flip(70)),
        ("summary flipped", flip(200)),
        ("body flipped", flip(body_at + 1000)),
        ("plain length absurd", envelope(&|bytes| bytes[32..40].fill(0xFF))),
        ("body length absurd", envelope(&|bytes| bytes[40..48].fill(0xFF))),
        ("summary length absurd", envelope(&|bytes| bytes[20..24].fill(0xFF))),
        ("another name", envelope(&|bytes| bytes[96..120].copy_from_slice(b"000000010000000000000077"))),
        ("a name with folders", envelope(&|bytes| bytes[96..104].copy_from_slice(b"../../et"))),
        ("another cluster", envelope(&|bytes| bytes[48] ^= 1)),
        ("another digest", envelope(&|bytes| bytes[64] ^= 1)),
        ("not one of ours", vec![0; 4096]),
    ];
    for (what, bytes) in &hostile {
        replace(&object, bytes);
        let (status, said, file) = scene.restore(name);
        assert_eq!((status, file), (126, None), "{what}: {said}");
        assert!(said.contains("error:") && said.contains("next:"), "{what}: {said}");
    }
    replace(&object, &flip(body_at + 1000));
    let said = scene.archived(name);
    assert!(said.contains("damaged") && said.contains(".wal.r"), "{said}");
    assert_eq!(scene.delivered(name), original);
    assert_eq!(scene.archived(name), "", "the good copy is found");
    // A newer format is not damage: it is refused, and nothing is written beside it.
    replace(&object, &envelope(&|bytes| bytes[16] = 2));
    assert!(scene.refused(name).contains("format 2"));
}

#[test]
fn a_decompression_bomb_is_stopped() {
    let scene = Scene::new();
    let name = &source().segments[0];
    scene.archived(name);
    let object = scene.object(name);
    let good = fs::read(&object).unwrap();
    let zeros = vec![0; 256 << 20];
    let mut lz4 = Command::new("lz4")
        .args(["-c", "--content-size"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = lz4.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&zeros));
    let bomb = lz4.wait_with_output().unwrap().stdout;
    writer.join().unwrap().unwrap();
    let mut bytes = good[..168 + u32::from_le_bytes(good[164..168].try_into().unwrap()) as usize].to_vec();
    bytes[40..48].copy_from_slice(&(bomb.len() as u64).to_le_bytes());
    bytes[60..64].copy_from_slice(&crc32fast::hash(&bomb).to_le_bytes());
    let crc = crc32fast::hash(&bytes[..156]).to_le_bytes();
    bytes[156..160].copy_from_slice(&crc);
    bytes.extend(bomb);
    replace(&object, &bytes);
    let (status, said, file) = scene.restore(name);
    assert_eq!((status, file), (126, None), "{said}");
}

#[test]
fn usage_and_configuration_mistakes_never_read_as_absent() {
    let scene = Scene::new();
    let name = &*source().segments[0];
    let restore = |args: &[&str], config: Option<&Path>| {
        let mut command = scene.stage.command(&bins::restore_cmd());
        command.args(args).current_dir(&scene.data_dir);
        if let Some(config) = config {
            command.env("WALSHIP_CONFIG", config);
        }
        let output = scene.stage.run(&mut command);
        (output.status.code(), text(&output))
    };
    for args in [
        &[][..],
        &[name],
        &["--nonsense", name, "pg_wal/RECOVERYXLOG"],
        &[name, "pg_wal/RECOVERYXLOG", "pg_wal/RECOVERYXLOG"],
        &["../../etc/passwd", "pg_wal/RECOVERYXLOG"],
        &["000000010000000a00000001", "pg_wal/RECOVERYXLOG"],
        &["--cluster", "../x", name, "pg_wal/RECOVERYXLOG"],
    ] {
        assert_eq!(restore(args, None).0, Some(126), "{args:?}");
    }
    let args = [name, "pg_wal/RECOVERYXLOG"];
    assert_eq!(restore(&args, Some(Path::new("/nowhere/walship.toml"))).0, Some(126));
    let wrong = scene.stage.path().join("wrong.toml");
    fs::write(&wrong, "retires = 3").unwrap();
    let (status, said) = restore(&args, Some(&wrong));
    assert!(status == Some(126) && said.contains("retires"), "{status:?} {said}");
    assert_eq!(restore(&["--help"], None).0, Some(0));
    assert_eq!(restore(&["--version"], None).0, Some(0));

    // Without walship there is no answer either.
    let mut command = scene.stage.command(&bins::restore_cmd());
    command.args(args).current_dir(&scene.data_dir).env("WALSHIP_BIN", "/nowhere/walship");
    assert_eq!(scene.stage.run(&mut command).status.code(), Some(126));

    for (args, variable) in [
        (&[][..], None),
        (&["--nonsense", "pg_wal/x"], None),
        (&["pg_wal/x"], Some(("WALSHIP_CONFIG", "/nowhere/walship.toml"))),
        (&["pg_wal/x"], Some(("WALSHIP_BIN", "/nowhere/walship"))),
        (&["pg_wal/x"], Some(("WALSHIP_CLUSTER", "other"))),
    ] {
        let mut command = scene.stage.command(&bins::archive_cmd());
        command.args(args).current_dir(&scene.data_dir).envs(variable);
        let status = scene.stage.run(&mut command).status.code();
        assert!(
            status.is_some_and(|status| (1..=125).contains(&status)),
            "{args:?} {variable:?}: {status:?}"
        );
    }
}

#[test]
fn a_repository_that_is_not_there_is_an_outage() {
    let scene = Scene::new();
    let name = &source().segments[0];
    scene.archived(name);
    let root = scene.stage.repository_dir();
    let away = root.with_extension("away");
    fs::rename(&root, &away).unwrap();
    scene.refused(name);
    scene.unanswered(name);
    // The empty mount point.
    fs::create_dir(&root).unwrap();
    scene.refused(name);
    scene.unanswered(name);
    scene.unanswered("00000002.history");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0, "nothing was written into the mount point");
    fs::remove_dir(&root).unwrap();
    fs::rename(&away, &root).unwrap();
    // A repository that lost its lineage marker may have lost more.
    let marker = root.join("main/lineages/0001.json");
    fs::rename(&marker, root.join("marker")).unwrap();
    scene.unanswered("000000010000000F00000001");
    fs::rename(root.join("marker"), &marker).unwrap();
    scene.absent("000000010000000F00000001");
}

#[test]
fn full_and_read_only_repositories_refuse_and_lose_nothing() {
    let scene = Scene::new();
    let name = &source().segments[0];
    let script = "set -e; mkdir -p \"$1\"; mount -t tmpfs -o size=512k tmpfs \"$1\"; cp -r \"$2\"/. \"$1\"/; \
                  head -c 480k /dev/zero > \"$1\"/filler || true; cd \"$3\"; \
                  set +e; \"$4\" pg_wal/\"$5\"; echo full $?; rm \"$1\"/filler; mount -o remount,ro \"$1\"; \
                  \"$4\" pg_wal/\"$5\"; echo read-only $?; mount -o remount,rw \"$1\"; \"$4\" pg_wal/\"$5\"; echo good $?";
    let root = scene.stage.repository_dir();
    let copy = scene.stage.path().join("copy");
    fs::rename(&root, &copy).unwrap();
    let mut command = scene.stage.command(Path::new("unshare"));
    command.args(["-rm", "sh", "-c", script, "sh"]).args([&root, &copy, &scene.data_dir]);
    command.arg(bins::archive_cmd()).arg(name);
    let output = scene.stage.run(&mut command);
    let said = text(&output);
    let status = |word: &str| -> i32 {
        let line = said.lines().find_map(|line| line.strip_prefix(word));
        line.unwrap_or_else(|| panic!("{said}")).trim().parse().unwrap()
    };
    assert!((1..=125).contains(&status("full ")), "{said}");
    assert!((1..=125).contains(&status("read-only ")), "{said}");
    assert_eq!(status("good "), 0, "{said}");
}

/// Answers every request with the same bytes, or never.
fn answering(answer: Option<&'static str>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut request = [0; 16 << 10];
                let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
                let _ = stream.read(&mut request);
                match answer {
                    Some(answer) => drop(stream.write_all(answer.as_bytes())),
                    None => std::thread::sleep(Duration::from_secs(20)),
                }
            });
        }
    });
    port
}

fn s3_scene(port: u16) -> Scene {
    let lines = format!(
        "restore_retry_ms = 0\n[s3]\nendpoint = \"http://127.0.0.1:{port}\"\naccess_key_id = \"AK\"\n\
         secret_access_key = \"SK\"\nregion = \"us-east-1\"\n\
         [limits]\nconnect_ms = 500\nrequest_ms = 1000\ndeadline_ms = 2000\n"
    );
    let stage = Stage::folder("main").configured(&lines);
    let text = fs::read_to_string(stage.config()).unwrap().replace(stage.url(), "s3://some-bucket/walship");
    fs::write(stage.config(), text).unwrap();
    Scene::around(stage)
}

#[test]
fn a_store_that_refuses_is_dead_or_slow_gives_no_answer() {
    let name = &source().segments[0];
    let error = |status: &str, code: &str| {
        let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>x</Message></Error>");
        let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\n");
        &*format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).leak()
    };
    let proxy = "HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: 13\r\n\r\n<html></html>";
    let cases: Vec<(&str, u16)> = vec![
        ("connection refused", postgres::free_port()),
        ("never answers", answering(None)),
        ("403", answering(Some(error("403 Forbidden", "AccessDenied")))),
        ("missing bucket", answering(Some(error("404 Not Found", "NoSuchBucket")))),
        ("404 of a proxy", answering(Some(proxy))),
        ("429", answering(Some(error("429 Too Many Requests", "SlowDown")))),
        ("500", answering(Some(error("500 Internal Server Error", "InternalError")))),
        ("503", answering(Some(error("503 Service Unavailable", "SlowDown")))),
        // Even a store that says that nothing is there is no archive without its marker.
        ("nothing there", answering(Some(error("404 Not Found", "NoSuchKey")))),
    ];
    let checks = cases.into_iter().map(|(what, port)| {
        std::thread::spawn(move || {
            let scene = s3_scene(port);
            let started = Instant::now();
            let said = scene.refused(name);
            assert!(started.elapsed() < Duration::from_secs(30), "{what}: {:?}", started.elapsed());
            assert!(
                said.contains("error:") && said.contains("safe:") && said.contains("next:"),
                "{what}: {said}"
            );
            let (status, said, file) = scene.restore(name);
            assert_eq!((status, file), (126, None), "{what}: {said}");
            fs::write(scene.data_dir.join("standby.signal"), "").unwrap();
            let (status, said, file) = scene.restore("00000002.history");
            assert_eq!((status, file), (75, None), "{what}: {said}");
        })
    });
    let checks: Vec<_> = checks.collect();
    for check in checks {
        check.join().unwrap();
    }
}

#[test]
fn a_second_required_repository_must_have_the_file_too() {
    let scene = Scene::new();
    let name = &source().segments[0];
    let second = scene.stage.path().join("second");
    let url = format!("{} file://{}", scene.stage.url(), second.display());
    let mut archive = scene.stage.command(&bins::archive_cmd());
    archive.arg(format!("pg_wal/{name}")).current_dir(&scene.data_dir).env("WALSHIP_REPO", &url);
    let status = scene.stage.run(&mut archive).status.code().unwrap();
    assert!((1..=125).contains(&status));
    assert!(scene.object(name).exists(), "the second one's outage keeps nothing from the first");
    let mut init = scene.stage.walship(&["init", "--data-dir", scene.data_dir.to_str().unwrap()]);
    scene.stage.ok(init.env("WALSHIP_REPO", &url));
    scene.stage.ok(&mut archive);
    // Gone from the first, the second has it.
    fs::remove_file(scene.object(name)).unwrap();
    let mut restore = scene.stage.command(&bins::restore_cmd());
    restore.args([name, "pg_wal/RECOVERYXLOG"]).current_dir(&scene.data_dir).env("WALSHIP_REPO", &url);
    scene.stage.ok(&mut restore);
    assert_eq!(fs::read(scene.wal("RECOVERYXLOG")).unwrap(), fs::read(scene.wal(name)).unwrap());
}

#[test]
fn an_older_timelines_segment_is_not_served_past_the_fork() {
    let scene = Scene::new();
    let [first, second, ..] = &*source().segments else { unreachable!() };
    let original = fs::read(scene.wal(second)).unwrap();
    for name in [first, second] {
        scene.archived(name);
    }
    // Timeline 2 leaves timeline 1 in the middle of the second segment; its own is not archived yet.
    let start = u64::from_str_radix(&second[16..], 16).unwrap() << 20;
    let switch = start + (100 << 10);
    fs::write(scene.wal("00000002.history"), format!("1\t0/{switch:X}\tno recovery target specified\n"))
        .unwrap();
    scene.archived("00000002.history");
    fs::write(scene.data_dir.join("postmaster.pid"), "1\n/data\n1700000000\n5432\n").unwrap();
    fs::write(scene.data_dir.join("standby.signal"), "").unwrap();
    assert_eq!(scene.delivered(second), original, "a server that never asked for timeline 2 gets all of it");

    let newer = format!("00000002{}", &second[8..]);
    scene.absent(&newer);
    let cut = scene.delivered(second);
    assert_eq!(cut[..100 << 10], original[..100 << 10]);
    assert!(cut[100 << 10..].iter().all(|byte| *byte == 0), "nothing behind the fork");

    // Unknown on the newer timeline is unknown on the older one.
    let object = scene.object(&newer);
    fs::create_dir_all(object.parent().unwrap()).unwrap();
    fs::write(&object, "damaged").unwrap();
    let (status, said, _) = scene.restore(&newer);
    assert_eq!(status, 75, "{said}");
    let (status, said, file) = scene.restore(second);
    assert_eq!((status, file), (75, None), "{said}");
}
