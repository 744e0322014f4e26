//! A data set on disk: opening it, and shuffled noised batches out of it; elements are tokens.

use bd3lm_benches::{VOCAB, config, lengths, spec};
use bd3lm_core::data::batch::{OwnedBatch, gather_noised};
use bd3lm_core::data::order::Order;
use bd3lm_core::data::pack::{Packing, RowPlan};
use bd3lm_core::data::store::{Recipe, TokenStore, Verify, write_documents};
use bd3lm_core::noise::NoiseKey;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn batches(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let target = folder.path().join("set");
    let documents: Vec<Vec<u32>> = (0u64..)
        .zip(lengths(32_000))
        .map(|(document, length)| {
            let ids = (0..length - 1).map(|i| ((document + i) % 50_000) as u32);
            ids.collect()
        })
        .collect();
    let recipe = Recipe {
        vocab: VOCAB,
        tokenizer: "{}".into(),
        detokenizer: None,
        no_eos: false,
    };
    let documents = documents.iter().map(Vec::as_slice);
    let manifest = write_documents(&target, recipe, documents).expect("room on the disk");
    let total = manifest.num_tokens;

    let mut group = c.benchmark_group("store/open");
    group.throughput(Throughput::Elements(total));
    for (name, verify) in [("sizes", Verify::Never), ("digests", Verify::Always)] {
        group.bench_function(name, |b| {
            b.iter(|| TokenStore::open(&target, verify).expect("it was just written"));
        });
    }
    group.finish();

    let store = TokenStore::open(&target, Verify::Never).expect("it was just written");
    let mut group = c.benchmark_group("batches");
    for l in [128, 1024] {
        let wrap = Packing::Wrap {
            row_eos: false,
            stride: None,
        };
        let plan = RowPlan::new(&store, l, 16, wrap, false).expect("it fits");
        let order = Order::new(1, plan.num_rows() as u64).expect("there are rows");
        // One batch for the calling thread, one that is shared out.
        for batch in [(1 << 16) / l, (1 << 18) / l] {
            let mut buffers = OwnedBatch::new(batch, l, 16);
            let mut rows = vec![0; batch];
            group.throughput(Throughput::Elements((batch * l) as u64));
            for noise in ["unclipped", "count"] {
                let spec = spec(noise);
                let mut step = 0;
                let id = BenchmarkId::new(noise, format!("L={l} S=16 B={batch}"));
                group.bench_function(id, |b| {
                    b.iter(|| {
                        step += 1;
                        order
                            .fill(step * batch as u64, &mut rows)
                            .expect("few places");
                        let key = NoiseKey {
                            seed: 1,
                            step,
                            row: 0,
                            rows: batch as u64,
                        };
                        let (clean, noised) = buffers.views();
                        gather_noised(
                            &store,
                            store.tokens(),
                            &plan,
                            &spec,
                            key,
                            &rows,
                            16,
                            false,
                            clean,
                            noised,
                        )
                        .expect("rows exist")
                    });
                });
            }
        }
    }
}

criterion_group! { name = benches; config = config(); targets = batches }
criterion_main!(benches);
