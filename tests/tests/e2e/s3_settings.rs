//! How operators tell walship where a bucket is and who may use it: the real programs, AWS's own
//! variables, files and services.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use walship::pg::SegmentSize;
use walship::repository::Repository;
use walship::storage::{self, StorageConfig};
use walship_tests::fake_http::FakeHttp;
use walship_tests::process::{RunOptions, run};
use walship_tests::s3_inprocess::{ACCESS_KEY, BUCKET, S3Server, SECRET_KEY};
use walship_tests::{bins, weed::WeedServer};

/// Makes the repository that the programs are to find.
fn prepare(config: &StorageConfig) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let now = chrono::Utc::now();
        let storage: Arc<dyn storage::Storage> = storage::open(config).unwrap();
        let repository = Repository::create(storage, now).await.unwrap();
        let cluster = repository.create_cluster(&"main".parse().unwrap(), now).await.unwrap();
        cluster.register_lineage(42, SegmentSize::DEFAULT, 15, now).await.unwrap();
    });
}

/// `walship check --offline` of the repository `s3://BUCKET/p`, with nothing in its environment but this.
fn check(env: &[(&str, &str)], args: &[&str]) -> Command {
    let mut command = Command::new(bins::walship());
    command
        .env_clear()
        .envs(env.iter().copied())
        .env("HOME", "/nonexistent")
        .env("WALSHIP_DEADLINE_MS", "30000");
    command
        .args(["check", "--offline", "--cluster", "main", "--repo", &format!("s3://{BUCKET}/p")])
        .args(args);
    command
}

fn succeeds(mut command: Command) {
    let output = run(&mut command, RunOptions::default());
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("holds cluster \"main\""), "{command:?}: {text}");
}

fn fails(mut command: Command) -> String {
    let output = run(&mut command, RunOptions::default());
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{command:?}: {text}");
    assert!(!text.contains(SECRET_KEY), "{text}");
    text.into_owned()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

const OFF: (&str, &str) = ("AWS_EC2_METADATA_DISABLED", "true");

#[test]
fn the_bucket_stands_in_the_host_name_when_asked_for() {
    let server = S3Server::start_virtual_hosts("s3.test");
    prepare(&server.config("p"));
    server.take_log();
    // A name service of our own, seen by the program alone.
    let folder = tempfile::tempdir().unwrap();
    let hosts = folder.path().join("hosts");
    fs::write(&hosts, format!("127.0.0.1 s3.test {BUCKET}.s3.test\n")).unwrap();
    let endpoint = format!("http://s3.test:{}", server.address().port());
    let env = [
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
        ("AWS_REGION", "us-east-1"),
        OFF,
    ];
    for (addressing, start) in
        [("virtual", "/p/"), ("path", "/walship-test/p/"), ("auto", "/walship-test/p/")]
    {
        let asked = check(&env, &["--s3-endpoint", &endpoint, "--s3-addressing", addressing]);
        let mut command = Command::new("unshare");
        let script = format!("mount --bind {} /etc/hosts && exec \"$@\"", path(&hosts));
        command.args(["--mount", "sh", "-c", &script, "sh"]).arg(asked.get_program()).args(asked.get_args());
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.envs(asked.get_envs().filter_map(|(name, value)| Some((name, value?))));
        succeeds(command);
        let log = server.take_log();
        assert!(log.iter().any(|seen| seen.path.starts_with(start)), "{addressing}: {log:?}");
        assert_eq!(log.iter().any(|seen| seen.path.starts_with("/p/")), addressing == "virtual");
    }
}

#[test]
fn profiles_and_credentials_files_are_read() {
    let server = S3Server::start();
    prepare(&server.config("p"));
    let folder = tempfile::tempdir().unwrap();
    let (config, credentials) = (folder.path().join("config"), folder.path().join("credentials"));
    let endpoint = server.endpoint();
    fs::write(
        &config,
        format!(
            "[default]\nregion = nowhere-1\n\n[profile archive]\nregion = us-east-1\nendpoint_url = {endpoint}\n\n\
             [profile helped]\nregion = us-east-1\nendpoint_url = {endpoint}\ncredential_process = \
             echo '{{\"Version\": 1, \"AccessKeyId\": \"{ACCESS_KEY}\", \"SecretAccessKey\": \"{SECRET_KEY}\"}}'\n"
        ),
    )
    .unwrap();
    fs::write(
        &credentials,
        format!(
            "[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = wrong\n\n\
             [archive]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        ),
    )
    .unwrap();
    let files =
        [("AWS_CONFIG_FILE", path(&config)), ("AWS_SHARED_CREDENTIALS_FILE", path(&credentials)), OFF];
    let with = |name, value| [&files[..], &[(name, value)]].concat();
    succeeds(check(&with("AWS_PROFILE", "archive"), &[]));
    succeeds(check(&with("WALSHIP_S3_PROFILE", "archive"), &[]));
    succeeds(check(&files, &["--s3-profile", "archive"]));
    succeeds(check(&with("PATH", "/usr/bin:/bin"), &["--s3-profile", "helped"]));
    let wrong = fails(check(&files, &["--s3-endpoint", &endpoint]));
    assert!(wrong.contains("does not accept the credentials"), "{wrong}");
    let none = fails(check(&files, &["--s3-profile", "archive-nobody-wrote", "--s3-endpoint", &endpoint]));
    assert!(none.contains("no credentials for the store were found"), "{none}");
}

/// Credentials as AWS's services hand them out for an hour.
fn expiration() -> String {
    (chrono::Utc::now() + chrono::TimeDelta::hours(1)).to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}

#[test]
fn an_instance_role_gives_credentials() {
    let server = S3Server::start();
    prepare(&server.config("p"));
    let metadata = FakeHttp::start(|asked| match (asked.method.as_str(), asked.path.as_str()) {
        ("PUT", "/latest/api/token") => (200, "text/plain", "session-token-of-imds".to_owned()),
        _ if asked.header("x-aws-ec2-metadata-token") != Some("session-token-of-imds") => {
            (401, "text/plain", String::new())
        }
        ("GET", "/latest/meta-data/iam/security-credentials/") => (200, "text/plain", "archiver".to_owned()),
        ("GET", "/latest/meta-data/iam/security-credentials/archiver") => {
            let text = format!(
                "{{\"Code\": \"Success\", \"Type\": \"AWS-HMAC\", \"LastUpdated\": \"2026-01-01T00:00:00Z\", \
                 \"AccessKeyId\": \"{ACCESS_KEY}\", \"SecretAccessKey\": \"{SECRET_KEY}\", \
                 \"Token\": \"of-the-role\", \"Expiration\": \"{}\"}}",
                expiration()
            );
            (200, "application/json", text)
        }
        ("GET", "/latest/meta-data/placement/region") => (200, "text/plain", "us-east-1".to_owned()),
        _ => (404, "text/plain", String::new()),
    });
    let (imds, endpoint) = (metadata.endpoint(), server.endpoint());
    let env = [("AWS_EC2_METADATA_SERVICE_ENDPOINT", imds.as_str()), ("AWS_ENDPOINT_URL", &endpoint)];
    succeeds(check(&env, &[]));
    assert!(metadata.log().iter().any(|asked| asked.path.ends_with("/archiver")), "{:?}", metadata.log());
    let off = fails(check(&[&env[..], &[OFF]].concat(), &["--s3-region", "us-east-1"]));
    assert!(off.contains("no credentials for the store were found"), "{off}");
}

#[test]
fn a_web_identity_gives_credentials() {
    let server = S3Server::start();
    prepare(&server.config("p"));
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    fs::write(&token, "token-of-the-pod").unwrap();
    let sts = FakeHttp::start(|asked| {
        let ours = ["Action=AssumeRoleWithWebIdentity", "WebIdentityToken=token-of-the-pod", "RoleArn=arn"];
        if !ours.iter().all(|word| asked.body.contains(word)) {
            return (
                400,
                "text/xml",
                "<ErrorResponse><Error><Code>InvalidIdentityToken</Code></Error></ErrorResponse>".to_owned(),
            );
        }
        let text = format!(
            "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
             <AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{ACCESS_KEY}</AccessKeyId>\
             <SecretAccessKey>{SECRET_KEY}</SecretAccessKey><SessionToken>of-the-pod</SessionToken>\
             <Expiration>{}</Expiration></Credentials><AssumedRoleUser><Arn>arn:aws:sts::1:x</Arn>\
             <AssumedRoleId>x:y</AssumedRoleId></AssumedRoleUser></AssumeRoleWithWebIdentityResult>\
             </AssumeRoleWithWebIdentityResponse>",
            expiration()
        );
        (200, "text/xml", text)
    });
    let (service, endpoint) = (sts.endpoint(), server.endpoint());
    let env = [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", path(&token)),
        ("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/archiver"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL_STS", &service),
        ("AWS_ENDPOINT_URL_S3", &endpoint),
        OFF,
    ];
    succeeds(check(&env, &["--s3-addressing", "path"]));
    fs::write(&token, "token-of-a-stranger").unwrap();
    let refused = fails(check(&env, &["--s3-addressing", "path"]));
    assert!(refused.contains("credentials could not be fetched"), "{refused}");
    assert_eq!(sts.log().last().map(|asked| asked.method.clone()), Some("POST".to_owned()));
}

#[test]
fn an_authority_of_ones_own_is_trusted_by_setting_or_variable() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, certificate, key) = super::storage::own_authority(folder.path());
    let server = WeedServer::start_tls(&certificate, &key, &authority);
    prepare(&server.config("p"));
    let endpoint = server.endpoint();
    let env = [("AWS_ACCESS_KEY_ID", ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", SECRET_KEY), OFF];
    let with = |name, value| [&env[..], &[(name, value)]].concat();
    let args = ["--s3-endpoint", endpoint.as_str()];
    succeeds(check(&env, &[&args[..], &["--s3-ca-file", path(&authority)]].concat()));
    succeeds(check(&with("WALSHIP_S3_CA_FILE", path(&authority)), &args));
    succeeds(check(&with("AWS_CA_BUNDLE", path(&authority)), &args));
    let config = folder.path().join("walship.toml");
    fs::write(&config, format!("[s3]\nca_file = {:?}\nendpoint = {endpoint:?}\n", path(&authority))).unwrap();
    succeeds(check(&with("AWS_CA_BUNDLE", "/nonexistent"), &["--config", path(&config)]));
    let untrusted = fails(check(&env, &args));
    assert!(untrusted.contains("TLS to the store failed") && untrusted.contains("ca_file"), "{untrusted}");
}
