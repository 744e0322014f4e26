//! Shared parts of the benches: document lengths, noise specifications, measuring times.

use std::time::Duration;

use bd3lm_core::data::store::Vocab;
use bd3lm_core::noise::{Estimator, NoiseSpec, Schedule, Weighting};
use criterion::Criterion;

/// A vocabulary of 16 bits.
pub const VOCAB: Vocab = Vocab {
    vocab_size: 50_258,
    bos_id: 50_256,
    eos_id: 50_256,
    mask_id: 50_257,
};

/// Lengths of `n` documents, 20 to about 2,000 tokens, the short ones more frequent.
pub fn lengths(n: u64) -> Vec<u64> {
    (0..n).map(|i| 20 + 2_000 / (1 + (i * 7919) % 97)).collect()
}

/// Noise under `loglinear`, by a name.
pub fn spec(name: &str) -> NoiseSpec {
    let bernoulli = Estimator::Bernoulli { strata: true };
    let count = Estimator::Count {
        probs: None,
        stratum: None,
    };
    let (estimator, clip, resample) = match name {
        "unclipped" => (bernoulli, None, false),
        "clipped" => (bernoulli, Some((0.3, 0.8)), true),
        "count" => (count, None, false),
        _ => panic!("no noise is called {name}"),
    };
    NoiseSpec::new(
        Schedule::LogLinear,
        estimator,
        clip,
        resample,
        Weighting::Nelbo,
        None,
    )
    .expect("these go together")
}

/// Short measurements: all benches together take a minute or two.
pub fn config() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .without_plots()
}
