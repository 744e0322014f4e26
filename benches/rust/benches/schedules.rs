//! Level to probability and weight, a value at a time.

use std::hint::black_box;

use bd3lm_benches::config;
use bd3lm_core::noise::Schedule;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn schedules(c: &mut Criterion) {
    let all = [
        Schedule::LogLinear,
        Schedule::Square,
        Schedule::SquareRoot,
        Schedule::Logarithmic,
        Schedule::cosine(1e-3).expect("in range"),
        Schedule::gaussian(0.5, 0.2).expect("in range"),
        Schedule::bimodal((0.3, 0.2), (0.8, 0.2), 0.6, false).expect("in range"),
    ];
    let levels: Vec<f64> = (1..=1024).map(|i| f64::from(i) / 1024.0).collect();
    let mut group = c.benchmark_group("schedule");
    group.throughput(Throughput::Elements(levels.len() as u64));
    for schedule in all {
        group.bench_function(schedule.name(), |b| {
            b.iter(|| {
                let both = |t: &f64| schedule.mask_prob(*t) + schedule.loss_weight(*t);
                black_box(&levels).iter().map(both).sum::<f64>()
            });
        });
    }
}

criterion_group! { name = benches; config = config(); targets = schedules }
criterion_main!(benches);
