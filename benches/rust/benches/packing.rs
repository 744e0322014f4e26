//! Plans over four million tokens, and the clean rows they give; elements are tokens.

use bd3lm_benches::{VOCAB, config, lengths};
use bd3lm_core::data::batch::{CleanBatch, gather};
use bd3lm_core::data::pack::{Packing, RowPlan};
use bd3lm_core::data::store::TokenStore;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const PLANS: [(&str, Packing); 3] = [
    (
        "wrap",
        Packing::Wrap {
            row_eos: false,
            stride: None,
        },
    ),
    ("aligned", Packing::Aligned),
    ("best_fit", Packing::BestFit),
];

fn packing(c: &mut Criterion) {
    let lengths = lengths(32_000);
    let total: u64 = lengths.iter().sum();
    let ids = (0..total).map(|i| (i % 50_000) as i32).collect();
    let store = TokenStore::from_arrays(ids, &lengths, VOCAB).expect("ids are in range");
    let mut group = c.benchmark_group("packing/plan");
    group.throughput(Throughput::Elements(total));
    for (name, packing) in PLANS {
        for l in [128, 1024] {
            group.bench_function(BenchmarkId::new(name, format!("L={l}")), |b| {
                b.iter(|| RowPlan::new(&store, l, 16, packing, false).expect("it fits"));
            });
        }
    }
    group.finish();
    let mut group = c.benchmark_group("packing/rows");
    for (name, packing) in PLANS {
        for l in [128, 1024] {
            let plan = RowPlan::new(&store, l, 16, packing, false).expect("it fits");
            let rows: Vec<u64> = (0..(1 << 16) / l as u64).collect();
            let n = rows.len() * l;
            let (mut x0, mut noisable, mut doc_ids) = (vec![0; n], vec![0; n], vec![0; n]);
            group.throughput(Throughput::Elements(n as u64));
            group.bench_function(BenchmarkId::new(name, format!("L={l}")), |b| {
                b.iter(|| {
                    let out = CleanBatch {
                        x0: &mut x0,
                        noisable: &mut noisable,
                        doc_ids: &mut doc_ids,
                    };
                    gather(&store, store.tokens(), &plan, &rows, name != "wrap", out)
                        .expect("rows exist")
                });
            });
        }
    }
}

criterion_group! { name = benches; config = config(); targets = packing }
criterion_main!(benches);
