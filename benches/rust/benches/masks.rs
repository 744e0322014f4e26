//! Masks, levels and weights of rows that are already there; elements are tokens.

use bd3lm_benches::{config, spec};
use bd3lm_core::data::batch::{NoiseBatch, noise};
use bd3lm_core::noise::NoiseKey;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Few enough for the calling thread.
const TOKENS: usize = 1 << 16;

fn masks(c: &mut Criterion) {
    let x0 = vec![7; TOKENS];
    let mut mask = vec![0; TOKENS];
    for name in ["unclipped", "clipped", "count"] {
        let spec = spec(name);
        let mut group = c.benchmark_group(format!("masks/{name}"));
        group.throughput(Throughput::Elements(TOKENS as u64));
        for l in [128, 1024] {
            let noisable: Vec<u8> = (0..TOKENS).map(|i| u8::from(i % l > 0)).collect();
            for s in [4, 16] {
                let (mut mask_prob, mut weight) = (vec![0.0; TOKENS / s], vec![0.0; TOKENS / s]);
                let mut step = 0;
                group.bench_function(BenchmarkId::from_parameter(format!("L={l} S={s}")), |b| {
                    b.iter(|| {
                        step += 1;
                        let key = NoiseKey {
                            seed: 1,
                            step,
                            row: 0,
                            rows: (TOKENS / l) as u64,
                        };
                        let out = NoiseBatch {
                            mask: &mut mask,
                            mask_prob: &mut mask_prob,
                            weight: &mut weight,
                        };
                        noise(&spec, key, l, s, &x0, &noisable, out).expect("they fit");
                    });
                });
            }
        }
    }
}

criterion_group! { name = benches; config = config(); targets = masks }
criterion_main!(benches);
