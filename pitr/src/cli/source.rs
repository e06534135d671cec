//! From the configuration to one lineage and its catalog, and back to a `restore_command`.

use std::env;
use std::path::{Path, PathBuf};

use walship::catalog::Catalog;
use walship::config::{Config, DEFAULT_PATH, Overrides};
use walship::repository::{
    ClusterName, ClusterRepository, LineageRepository, load_catalog, open_same_lineage,
};
use walship::spool::{self, Waiting};
use walship::storage::StorageConfig;
use walship::{Error, Result, storage};

use super::args::SourceArgs;
use super::output;

/// Variables of our own that hold S3 credentials; they outrank the configuration file.
const OWN_CREDENTIALS: &[&str] =
    &["WALSHIP_S3_SECRET_ACCESS_KEY", "WALSHIP_S3_ACCESS_KEY_ID", "WALSHIP_S3_SESSION_TOKEN"];

/// AWS's variables that lead to credentials; they count where the configuration names none.
const AWS_CREDENTIALS: &[&str] = &[
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
];

/// One lineage, opened, and what it holds.
pub(super) struct Source {
    pub(super) repository: LineageRepository,
    pub(super) catalog: Catalog,
}

impl Source {
    /// Opens the lineage in every configured repository that can be read.
    pub(super) async fn open(args: &SourceArgs) -> Result<Self> {
        Self::of(open_lineages(args).await?.0).await
    }

    /// Reads what a lineage holds.
    pub(super) async fn of(repository: LineageRepository) -> Result<Self> {
        let catalog = load_catalog(&repository).await?;
        Ok(Self { repository, catalog })
    }
}

/// Returns the chosen lineage, as all configured repositories hold it that can be read, and the cluster that it
/// belongs to.
pub(super) async fn open_lineages(args: &SourceArgs) -> Result<(LineageRepository, ClusterRepository)> {
    open_configured(args.lineage, &Config::load(&args.overrides)?).await
}

/// Returns a lineage by its number, whatever the arguments choose.
pub(super) async fn open_lineage(args: &SourceArgs, number: u32) -> Result<LineageRepository> {
    Ok(open_configured(Some(number), &Config::load(&args.overrides)?).await?.0)
}

/// Returns the same, opened with the credentials that removal may have of its own.
pub(super) async fn open_for_removal(args: &SourceArgs, mut config: Config) -> Result<LineageRepository> {
    config.repositories = config.repositories.iter().map(StorageConfig::for_removal).collect();
    Ok(open_configured(args.lineage, &config).await?.0)
}

async fn open_configured(
    lineage: Option<u32>,
    config: &Config,
) -> Result<(LineageRepository, ClusterRepository)> {
    let cluster: ClusterName = config.cluster.parse()?;
    let opens = config.repositories.iter().map(async |place| {
        let opened = async { ClusterRepository::open(storage::open(place)?, &cluster).await };
        (place.url.clone(), opened.await)
    });
    let opened = futures_util::future::join_all(opens).await;
    let (repository, opened) = open_same_lineage(opened, lineage).await?;
    if let Some(folder) = &config.receive.spool {
        note_spool(&repository, folder, &config.cluster);
    }
    Ok((repository, opened))
}

/// Notes that the spool of a receiver which is gone holds WAL: what it acknowledged may be there alone.
fn note_spool(repository: &LineageRepository, folder: &std::path::Path, cluster: &str) {
    match spool::waiting(folder, cluster) {
        Ok(Some(Waiting { in_use: false, folder, segments, file_bytes })) => repository.note(format!(
            "the spool {} holds WAL of {segments} segments ({file_bytes} bytes) that may be in no repository yet, and no \
             receiver is at work: store it with `walship receive --drain`",
            folder.display()
        )),
        Ok(_) => {}
        Err(error) => repository.note(format!("whether the receiver's spool holds more WAL is not known: {error}")),
    }
}

/// Says on standard error what is to be known about the repositories.
pub(super) fn say_notes(repository: &LineageRepository) {
    repository.notes().iter().for_each(|note| eprintln!("note:  {}", output::clean(note)));
}

/// Returns the arguments that lead `restore-cmd` to the same repository when PostgreSQL runs it: its
/// environment will be the server's, so what came by flag or variable is spelled out. Secrets are not.
///
/// A repository that could not be read is left out: without its answer nobody could say that a timeline does not
/// exist, which PostgreSQL asks before it opens.
pub(super) fn restore_cmd_arguments(
    overrides: &Overrides,
    repository: &LineageRepository,
) -> Result<Vec<String>> {
    // Pinned: a lineage that is registered later must not serve this recovery. Where the repositories number it
    // differently, the restored data directory's system identifier must do.
    let number = repository.lineage().number;
    let mut arguments = Vec::new();
    if repository.each().iter().all(|one| one.lineage().number == number) {
        arguments.extend(["--lineage".to_owned(), number.to_string()]);
    }
    for url in repository.unreadable().iter().chain(&overrides.without_repo) {
        arguments.extend(["--without-repo".to_owned(), url.clone()]);
    }
    let config = overrides.config.clone().or_else(|| env::var_os("WALSHIP_CONFIG").map(PathBuf::from));
    if let Some(config) = config {
        let path = std::path::absolute(&config)
            .map_err(|error| Error::from_io(format!("resolving {}", config.display()), error))?;
        if path != Path::new(DEFAULT_PATH) {
            arguments.extend(["--config".to_owned(), text(&path)?]);
        }
    }
    let repositories = match (&*overrides.repo, env::var("WALSHIP_REPO")) {
        ([], Ok(list)) => list.split([',', ' ']).filter(|url| !url.is_empty()).map(str::to_owned).collect(),
        (flags, _) => flags.to_vec(),
    };
    for url in repositories {
        arguments.extend(["--repo".to_owned(), url]);
    }
    let path_text = |path: &Option<PathBuf>| path.as_deref().map(text).transpose();
    for (flag, variable, value) in [
        ("--cluster", "WALSHIP_CLUSTER", overrides.cluster.clone()),
        ("--s3-endpoint", "WALSHIP_S3_ENDPOINT", overrides.s3_endpoint.clone()),
        ("--s3-region", "WALSHIP_S3_REGION", overrides.s3_region.clone()),
        ("--s3-addressing", "WALSHIP_S3_ADDRESSING", overrides.s3_addressing.clone()),
        ("--s3-ca-file", "WALSHIP_S3_CA_FILE", path_text(&overrides.s3_ca_file)?),
        ("--s3-profile", "WALSHIP_S3_PROFILE", overrides.s3_profile.clone()),
    ] {
        if let Some(value) = value.or_else(|| env::var(variable).ok()).filter(|value| !value.is_empty()) {
            arguments.extend([flag.to_owned(), value]);
        }
    }
    Ok(arguments)
}

/// Returns what to do when this command's S3 credentials came from its environment: secrets are not written
/// into `restore_command`, and the restored server has an environment of its own.
pub(super) fn credentials_note(overrides: &Overrides) -> Result<Option<String>> {
    let config = Config::load(overrides)?;
    let set = |name: &&&str| env::var_os(name).is_some_and(|value| !value.is_empty());
    Ok(credentials_note_for(&config.repositories, |names| names.iter().find(set).copied()))
}

fn credentials_note_for(
    repositories: &[StorageConfig],
    first_set: impl Fn(&'static [&'static str]) -> Option<&'static str>,
) -> Option<String> {
    let on_s3 = |place: &&StorageConfig| place.url.starts_with("s3://");
    let variable = first_set(OWN_CREDENTIALS).filter(|_| repositories.iter().any(|place| on_s3(&place)));
    let without = |place: &StorageConfig| place.s3.access_key_id.is_none() && place.s3.profile.is_none();
    let variable = variable
        .or_else(|| first_set(AWS_CREDENTIALS).filter(|_| repositories.iter().filter(on_s3).any(without)))?;
    Some(format!(
        "this command took its S3 credentials from the environment ({variable}), and restore_command runs in \
         the environment of the restored server: set them there, or put access_key_id and secret_access_key into \
         the configuration file (mode 0600), or recovery cannot fetch WAL"
    ))
}

/// Returns the absolute path of `restore-cmd`: the one given, or the one beside this program.
///
/// # Errors
/// [`Error::Missing`] when it is not there: the restored server could not recover.
pub(super) fn restore_cmd(given: Option<&Path>) -> Result<String> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => {
            let own = env::current_exe().map_err(|error| Error::from_io("finding this program", error))?;
            own.with_file_name("restore-cmd")
        }
    };
    let absolute = std::path::absolute(&path)
        .map_err(|error| Error::from_io(format!("resolving {}", path.display()), error))?;
    if !absolute.is_file() {
        return Err(Error::missing(format!("{} is not there", absolute.display()))
            .with_next("Install restore-cmd beside pitr, or name it with --restore-cmd."));
    }
    text(&absolute)
}

fn text(path: &Path) -> Result<String> {
    let text = path.to_str().filter(|text| !text.contains(['\n', '\r']));
    text.map(str::to_owned)
        .ok_or_else(|| Error::invalid(format!("{} cannot stand in a configuration file", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_that_the_server_will_not_have_are_named() {
        let place = |url: &str| StorageConfig {
            url: url.to_owned(),
            s3: Default::default(),
            limits: Default::default(),
        };
        let note = |place: &StorageConfig, variable: &'static str| {
            let first =
                |names: &'static [&'static str]| names.iter().find(|name| **name == variable).copied();
            credentials_note_for(std::slice::from_ref(place), first)
        };
        let (bare, mut full, folder) = (place("s3://b/x"), place("s3://b/x"), place("file:///srv/walship"));
        full.s3.access_key_id = Some("AK".into());
        for (place, variable, told) in [
            (&bare, "WALSHIP_S3_SECRET_ACCESS_KEY", true),
            (&bare, "AWS_SECRET_ACCESS_KEY", true),
            (&bare, "AWS_PROFILE", true),
            (&bare, "HOME", false),
            (&full, "AWS_SECRET_ACCESS_KEY", false),
            (&full, "WALSHIP_S3_SECRET_ACCESS_KEY", true),
            (&folder, "WALSHIP_S3_SECRET_ACCESS_KEY", false),
            (&folder, "AWS_SECRET_ACCESS_KEY", false),
        ] {
            let note = note(place, variable);
            assert_eq!(note.is_some(), told, "{place:?} {variable}");
            assert!(note.is_none_or(|note| note.contains(variable)));
        }
    }
}
