//! Whole processes that move one segment, beside `cp` and `lz4`.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use walship::pg::SegmentSize;
use walship::repository::Repository;
use walship::storage::fs::FsStorage;
use walship_tests::bins;
use walship_tests::stage::Stage;

use super::Effort;
use crate::measure::{Contender, Measurement, compete, process, table};
use crate::object;
use crate::wal::{Kind, Segment, pgbench};

/// A folder repository and a `pg_wal` with the segments in it.
struct Place {
    stage: Stage,
    segments: Vec<Segment>,
    wal: PathBuf,
}

impl Place {
    fn new(kind: Kind) -> Self {
        let stage = Stage::folder("main");
        let segments = pgbench(kind);
        let system_identifier = object::scan(&segments[0]).system_identifier;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime can be made").block_on(async {
            let now = chrono::Utc::now();
            let storage = FsStorage::create_root(&stage.repository_dir()).expect("the folder is new");
            let repository = Repository::create(Arc::new(storage), now).await.expect("the folder is new");
            let name = stage.cluster().parse().expect("the name is legal");
            let cluster = repository.create_cluster(&name, now).await.expect("the folder is new");
            cluster
                .register_lineage(system_identifier, SegmentSize::DEFAULT, 15, now)
                .await
                .expect("the folder is new")
        });
        let wal = stage.path().join("data/pg_wal");
        fs::create_dir_all(&wal).expect("the scratch folder has room");
        for segment in &segments {
            fs::copy(&segment.path, wal.join(segment.name.to_string())).expect("the scratch folder has room");
        }
        Self { stage, segments, wal }
    }

    fn source(&self, round: usize) -> PathBuf {
        self.wal.join(self.segments[round % self.segments.len()].name.to_string())
    }

    /// Where the segment of this round is stored.
    fn stored(&self, round: usize) -> PathBuf {
        let name = self.segments[round % self.segments.len()].name.to_string();
        let folder = format!("main/0001/wal/{}/{}", &name[..8], &name[8..16]);
        self.stage.repository_dir().join(folder).join(format!("{name}.wal"))
    }

    fn run(&self, argv: &[&str]) -> Measurement {
        process(argv, &[("WALSHIP_CONFIG", text(&self.stage.config()))], self.stage.path())
    }

    fn shell(&self, script: &str, from: &Path, to: &Path) -> Measurement {
        self.run(&["sh", "-c", script, "sh", text(from), text(to)])
    }
}

/// One segment into the repository and out of it.
pub fn processes(effort: Effort) -> String {
    let mut result = String::new();
    for kind in Kind::ALL {
        let place = Place::new(kind);
        let (archive_cmd, restore_cmd) = (bins::archive_cmd(), bins::restore_cmd());
        let copy = place.stage.path().join("copy");
        let push = |compression: &'static str| {
            let (place, archive_cmd) = (&place, text(&archive_cmd));
            move |round: usize| {
                // Every push is the first one of its segment.
                let _ = fs::remove_file(place.stored(round));
                let source = place.source(round);
                place.run(&[archive_cmd, "--compression", compression, text(&source)])
            }
        };
        let shell = |script: &'static str| {
            let (place, copy) = (&place, &copy);
            move |round: usize| {
                let _ = fs::remove_file(copy);
                place.shell(script, &place.source(round), copy)
            }
        };
        let rows = compete(
            effort.rounds,
            vec![
                Contender::new(
                    "`lz4 < in > out && sync out`",
                    shell("lz4 -q < \"$1\" > \"$2\" && sync \"$2\""),
                ),
                Contender::new("`cp in out`, not durable", shell("exec cp \"$1\" \"$2\"")),
                Contender::new("`cp in out && sync out`", shell("cp \"$1\" \"$2\" && sync \"$2\"")),
                Contender::new(
                    "`zstd -1 < in > out && sync out`",
                    shell("zstd -q -1 < \"$1\" > \"$2\" && sync \"$2\""),
                ),
                Contender::new("`archive-cmd`, zstd:1", push("zstd:1")),
                Contender::new("`archive-cmd`, lz4", push("lz4")),
            ],
        );
        let _ = write!(result, "\npush one segment, {}\n\n{}", kind.title(), table(&rows, None));

        // What the last contender left: LZ4 objects; of every segment, whatever the rounds were.
        for round in 0..place.segments.len() {
            push("lz4")(round);
        }
        let target = place.wal.join("RECOVERYXLOG");
        let rows = compete(
            effort.rounds,
            vec![
                Contender::new("`lz4 -d < object > out && sync out`", |round| {
                    let _ = fs::remove_file(&copy);
                    place.shell("lz4 -dq < \"$1\" > \"$2\" && sync \"$2\"", &place.stored(round), &copy)
                }),
                Contender::new("`cp segment out`, not durable", |round| {
                    let _ = fs::remove_file(&copy);
                    place.shell("exec cp \"$1\" \"$2\"", &place.source(round), &copy)
                }),
                Contender::new("`restore-cmd`", |round| {
                    let _ = fs::remove_file(&target);
                    let name = place.segments[round % place.segments.len()].name.to_string();
                    place.run(&[text(&restore_cmd), &name, text(&target)])
                }),
            ],
        );
        let _ = write!(result, "\nfetch one segment, {}\n\n{}", kind.title(), table(&rows, None));
    }
    result
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("scratch paths are UTF-8")
}
