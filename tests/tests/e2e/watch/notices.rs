//! Notices, received by a real HTTP server and a real command.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use walship_tests::fake_http::FakeHttp;
use walship_tests::postgres::{PgServer, primary_major};
use walship_tests::stage::Stage;
use walship_tests::{tls, wait};

use super::Serving;
use crate::storage::own_authority;

const HOLD: Duration = Duration::from_secs(4);

/// A repository in a folder that can be taken away.
struct Scene {
    stage: Stage,
    hook: FakeHttp,
    asked: Arc<AtomicUsize>,
}

impl Scene {
    /// The first `failures` requests fail: with a status, or for the last of them with silence.
    fn new(failures: usize, form: &str, rest: &str) -> Self {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let hook = FakeHttp::start(move |_| {
            let number = count.fetch_add(1, Ordering::SeqCst);
            match number {
                number if number + 1 == failures => {
                    std::thread::sleep(Duration::from_secs(11));
                    (200, "text/plain", String::new())
                }
                number if number < failures => (500, "text/plain", "hush".to_owned()),
                _ => (204, "text/plain", String::new()),
            }
        });
        let stage = Stage::folder("main");
        let command = format!("cat >> {0}; echo >> {0}", stage.path().join("told").display());
        let stage = stage.configured(&format!(
            "[notify]\nwebhook = \"{}/services/hush?token=hush\"\nwebhook_form = \"{form}\"\ncommand = {command:?}\n\
             hold = \"{}s\"\n{rest}[watch]\n\
             disk_warning_percent = 100\ndisk_critical_percent = 100\n",
            hook.endpoint(),
            HOLD.as_secs()
        ));
        let server = stage.archiving(PgServer::builder(primary_major())).start();
        stage.init(&server);
        stage.backup(&server);
        Self { stage, hook, asked }
    }

    fn away(&self) -> PathBuf {
        self.stage.path().join("away")
    }

    fn take_away(&self) {
        fs::rename(self.stage.repository_dir(), self.away()).unwrap();
    }

    fn bring_back(&self) {
        fs::rename(self.away(), self.stage.repository_dir()).unwrap();
    }

    /// What the command was told.
    fn told(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.stage.path().join("told")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    fn wait_told(&self, many: usize) -> Value {
        wait::until(&format!("{many} notices are told"), || self.told().len() >= many);
        let told = self.told();
        assert_eq!(told.len(), many, "{told:#?}");
        told[many - 1].clone()
    }
}

fn state(path: &Path) -> String {
    fs::read_to_string(path.join("state/serve-main.json")).unwrap_or_default()
}

#[test]
fn notices_arrive_in_order_in_spite_of_failures_and_once() {
    let scene = Scene::new(3, "json", "");
    let mut serving = Serving::start(&scene.stage, None);
    scene.take_away();
    let problem = scene.wait_told(1);
    for (key, value) in [
        ("event", "problem"),
        ("cluster", "main"),
        ("kind", "repository_unreachable"),
        ("severity", "critical"),
        ("subject", scene.stage.url()),
    ] {
        assert_eq!(problem[key], value, "{problem}");
    }
    assert!(problem["text"].as_str().unwrap().contains("is it mounted?"), "{problem}");
    let page =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/monitoring.md")).unwrap();
    for key in problem.as_object().unwrap().keys() {
        assert!(page.contains(&format!("\n| `{key}` |")), "{key} is not in docs/monitoring.md");
    }
    // Killed while the webhook does not take it: the next one delivers that, and nothing twice.
    wait::until("the webhook was tried", || scene.asked.load(Ordering::SeqCst) >= 1);
    wait::until("the state is kept", || state(scene.stage.path()).contains("\"attempts\":1"));
    serving.kill9();
    let mut serving = Serving::start(&scene.stage, None);
    wait::until("the webhook takes the notice", || scene.hook.log().len() >= 4);
    scene.bring_back();
    let recovery = scene.wait_told(2);
    assert_eq!(
        (&recovery["event"], &recovery["since"]),
        (&"recovery".into(), &problem["since"]),
        "{recovery}"
    );
    wait::until("the webhook takes the recovery", || scene.hook.log().len() >= 5);
    let metrics = serving.fresh();
    assert_eq!(metrics.one("walship_notices_waiting", &[]), 0.0);
    let said = serving.said();
    assert!(serving.terminate().success());
    let log = scene.hook.log();
    assert_eq!(log.len(), 5, "{log:#?}");
    for asked in &log {
        assert_eq!((&*asked.method, &*asked.path), ("POST", "/services/hush?token=hush"));
        assert_eq!(asked.header("content-type"), Some("application/json"));
    }
    let bodies: Vec<Value> = log.iter().map(|asked| serde_json::from_str(&asked.body).unwrap()).collect();
    assert!(bodies[..4].iter().all(|body| *body == problem), "{bodies:#?}");
    assert_eq!(bodies[4], recovery);
    assert!(!said.contains("hush") && !state(scene.stage.path()).contains("hush"), "{said}");
    assert_eq!(scene.told().len(), 2);
}

#[test]
fn what_flaps_is_not_told_and_what_lasts_is_told_again() {
    let scene = Scene::new(0, "text", "repeat = \"3s\"\n");
    let mut serving = Serving::start(&scene.stage, None);
    let until = Instant::now() + HOLD * 3;
    while Instant::now() < until {
        scene.take_away();
        serving.wait("it is missed", |metrics| metrics.has_problem("repository_unreachable"));
        scene.bring_back();
        serving.wait("it is back", |metrics| !metrics.has_problem("repository_unreachable"));
    }
    assert!(scene.hook.log().is_empty() && scene.told().is_empty(), "{:?}", scene.told());
    scene.take_away();
    wait::until("it is told and told again", || scene.hook.log().len() >= 3);
    scene.bring_back();
    wait::until("it is over", || {
        scene.hook.log().last().is_some_and(|asked| asked.body.contains("walship OK: main: it is over"))
    });
    assert!(serving.terminate().success());
    let texts: Vec<String> = scene
        .hook
        .log()
        .iter()
        .map(|asked| {
            let body: Value = serde_json::from_str(&asked.body).unwrap();
            assert_eq!(body.as_object().unwrap().len(), 1, "chats take one key: {body}");
            body["text"].as_str().unwrap().to_owned()
        })
        .collect();
    assert!(texts[0].starts_with("walship CRITICAL: main: the repository folder"), "{texts:#?}");
    assert!(texts[1].starts_with("walship still CRITICAL: main:"), "{texts:#?}");
    let events: Vec<_> = scene.told().iter().map(|one| one["event"].clone()).collect();
    assert_eq!(events.first(), Some(&"problem".into()));
    assert_eq!(events.last(), Some(&"recovery".into()));
    assert_eq!(events.iter().filter(|event| **event == "problem").count(), 1, "{events:?}");
}

/// Whoever answers at the address is told nothing before it has shown a certificate of an authority that this machine trusts.
#[test]
fn a_webhook_over_tls_is_told_where_its_certificate_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, certificate, key) = own_authority(folder.path());
    let strangers = tempfile::tempdir().unwrap();
    let (stranger, ..) = own_authority(strangers.path());
    let hook = FakeHttp::start(|_| (200, "text/plain", "ok".to_owned()));
    let address = tls::in_front_of(hook.address(), &certificate, &key);
    let stage = Stage::folder("main")
        .configured(&format!("[notify]\nwebhook = \"https://user:hush@{address}/hush\"\nhold = \"1s\"\n"));
    let server = stage.archiving(PgServer::builder(primary_major())).start();
    stage.init(&server);
    fs::rename(stage.repository_dir(), stage.path().join("away")).unwrap();

    let trusting =
        |authority| Serving::start_in(&stage, None, &["--interval", "1"], &[("SSL_CERT_FILE", authority)]);
    let mut serving = trusting(&stranger);
    wait::until("the notice waits", || state(stage.path()).contains("\"attempts\":1"));
    assert!(hook.log().is_empty(), "{:?}", hook.log());
    let said = serving.said();
    assert!(said.contains("certificate") && !said.contains("hush"), "{said}");
    assert!(serving.terminate().success());

    let mut serving = trusting(&authority);
    wait::until("the webhook takes the notice", || !hook.log().is_empty());
    assert!(serving.terminate().success());
    let asked = &hook.log()[0];
    assert_eq!((&*asked.method, &*asked.path), ("POST", "/hush"));
    assert_eq!(asked.header("authorization"), Some("Basic dXNlcjpodXNo"), "user:hush");
    let body: Value = serde_json::from_str(&asked.body).unwrap();
    assert_eq!((&body["event"], &body["kind"]), (&"problem".into(), &"repository_unreachable".into()));
}

#[test]
fn what_is_taken_out_of_the_configuration_is_watched_no_more_and_did_not_recover() {
    let scene = Scene::new(0, "json", "");
    let mut serving = Serving::start(&scene.stage, None);
    scene.take_away();
    let problem = scene.wait_told(1);
    assert!(serving.terminate().success());
    // The archive is at another address from now on.
    let config = scene.stage.config();
    let elsewhere = format!("file://{}", scene.away().display());
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace(scene.stage.url(), &elsewhere)).unwrap();
    let mut serving = Serving::start(&scene.stage, None);
    let unwatched = scene.wait_told(2);
    assert_eq!(unwatched["event"], "unwatched", "{unwatched}");
    for key in ["kind", "subject", "severity", "since"] {
        assert_eq!(unwatched[key], problem[key], "{key}");
    }
    assert!(unwatched["next"].as_str().unwrap().contains("not in the configuration"), "{unwatched}");
    assert_eq!(serving.fresh().problems(), []);
    assert!(serving.terminate().success());
    assert_eq!(scene.told().len(), 2, "{:#?}", scene.told());
}

#[test]
fn a_webhook_that_is_none_is_refused_without_showing_it() {
    let stage = Stage::folder("main").configured("[notify]\nwebhook = \"hush://h/hush\"\n");
    let server = PgServer::builder(primary_major()).start();
    stage.init(&server);
    let error = stage.fails(&mut stage.walship(&["serve", "--offline", "--listen", "127.0.0.1:0"]), 1);
    assert_eq!(error.lines().count(), 3, "{error}");
    assert!(!error.contains("hush"), "{error}");
}
