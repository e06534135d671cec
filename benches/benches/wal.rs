//! Decoding and encoding one WAL segment, for a quick look while changing that code.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use walship::codec::Compression;
use walship_benches::object;
use walship_benches::wal::{Kind, pgbench};

fn segments(criterion: &mut Criterion) {
    for kind in Kind::ALL {
        let segments = pgbench(kind);
        let segment = segments.last().expect("there are segments");
        let mut group = criterion.benchmark_group(kind.title());
        group.throughput(Throughput::BytesDecimal(segment.bytes.len() as u64));
        group.bench_function("scan", |bencher| bencher.iter(|| black_box(object::scan(segment))));
        for compression in [Compression::Lz4, Compression::Zstd(1)] {
            group.bench_function(format!("encode {compression}"), |bencher| {
                bencher.iter(|| black_box(object::encode(segment, compression)));
            });
            let (envelope, _, body) = object::encode(segment, compression);
            let mut plain = Vec::with_capacity(segment.bytes.len());
            group.bench_function(format!("decode {compression}"), |bencher| {
                bencher.iter(|| {
                    plain.clear();
                    object::decode(&envelope, &body, &mut plain);
                });
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = segments
}
criterion_main!(benches);
