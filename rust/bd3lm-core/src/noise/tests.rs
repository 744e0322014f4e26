use super::binomial::{CHOOSE, truncated_binomial};
use super::*;
use crate::noise::schedule::MIN_LEVEL;
use crate::noise::schedule::tests::{all, tabulated};
use crate::random::{Domain, Stream};
use proptest::prelude::*;
use statrs::function::beta::{beta_reg, ln_beta};
use std::sync::Arc;

fn spec(schedule: Schedule, estimator: Estimator, clip: Option<(f64, f64)>) -> NoiseSpec {
    NoiseSpec::new(schedule, estimator, clip, false, Weighting::Nelbo, None).unwrap()
}

struct Drawn {
    mask: Vec<u8>,
    prob: Vec<f32>,
    weight: Vec<f32>,
}

fn draw(spec: &NoiseSpec, key: NoiseKey, noisable: &[u8], block_size: usize) -> Drawn {
    let blocks = noisable.len() / block_size;
    let mut out = Drawn {
        mask: vec![9; noisable.len()],
        prob: vec![0.0; blocks],
        weight: vec![0.0; blocks],
    };
    let ids = vec![0; noisable.len()];
    spec.noise_row(
        &key,
        &ids,
        noisable,
        block_size,
        &mut out.mask,
        &mut out.prob,
        &mut out.weight,
        &mut Scratch::default(),
    );
    out
}

fn key(step: u64, row: u64, rows: u64) -> NoiseKey {
    NoiseKey {
        seed: 1,
        step,
        row,
        rows,
    }
}

/// A made-up denoiser: CE of a masked position depends on the whole mask.
fn nats(mask: &[u8]) -> f64 {
    let k: u32 = mask.iter().map(|m| u32::from(*m)).sum();
    mask.iter()
        .enumerate()
        .map(|(i, m)| f64::from(*m) * (1.0 + i as f64 * 0.3) * (1.0 + f64::from(k)).ln())
        .sum()
}

/// The sum of docs/math.md §4 over all subsets, each weighted by an integral over p.
fn exact(n: usize, weight: impl Fn(f64, f64) -> f64) -> f64 {
    (1u32..1 << n)
        .map(|bits| {
            let mask: Vec<u8> = (0..n).map(|i| (bits >> i & 1) as u8).collect();
            let k = f64::from(bits.count_ones());
            nats(&mask) * weight(k, n as f64 - k + 1.0)
        })
        .sum()
}

fn estimate(spec: &NoiseSpec, block_size: usize, steps: u64) -> (f64, f64) {
    let (blocks, rows) = (32, 4);
    let noisable = vec![1; block_size * blocks];
    let mut values = Vec::new();
    for step in 0..steps {
        for row in 0..rows {
            let d = draw(spec, key(step, row, rows), &noisable, block_size);
            for b in 0..blocks {
                let mask = &d.mask[b * block_size..(b + 1) * block_size];
                values.push(f64::from(d.weight[b]) * nats(mask));
            }
        }
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

/// Every schedule's clipped estimator has the incomplete-Beta expectation of docs/math.md §4, with
/// masks and with counts. Unclipped is the clip [1e-3, 1].
#[test]
fn every_schedule_is_unbiased() {
    let mut schedules = all();
    schedules.push(tabulated(&schedules[4]));
    schedules.push(tabulated(&schedules[6]));
    for schedule in schedules {
        for (a, b) in [(1e-3, 1.0), (0.3, 0.8), (0.45, 0.95)] {
            let (pa, pb) = (schedule.mask_prob(a), schedule.mask_prob(b));
            let truth = exact(4, |x, y| {
                ln_beta(x, y).exp() * (beta_reg(x, y, pb) - beta_reg(x, y, pa)) / (b - a)
            });
            for estimator in [
                Estimator::Bernoulli { strata: true },
                Estimator::Count {
                    probs: None,
                    stratum: None,
                },
            ] {
                // ∫ w dt over the interval: an average over t needs its width.
                let (mean, error) = estimate(
                    &spec(schedule.clone(), estimator.clone(), Some((a, b))),
                    4,
                    400,
                );
                assert!(
                    (mean - truth).abs() < 5.0 * error + 1e-3 * truth,
                    "{} {estimator:?} [{a}, {b}]: {mean} ± {error}, exact {truth}",
                    schedule.name()
                );
            }
        }
    }
}

#[test]
fn count_is_exact_for_every_schedule_and_any_q() {
    let truth = exact(4, |x, y| ln_beta(x, y).exp());
    for probs in [None, Some(vec![0.1, 0.2, 0.3, 0.4])] {
        let estimator = Estimator::Count {
            probs,
            stratum: None,
        };
        let (mean, error) = estimate(&spec(Schedule::LogLinear, estimator, None), 4, 400);
        assert!(
            (mean - truth).abs() < 5.0 * error,
            "{mean} ± {error}, exact {truth}"
        );
    }
}

/// The strata of k together are unbiased, and each alone is not the whole distribution.
#[test]
fn strata_of_counts_cover_all_counts() {
    let truth = exact(8, |x, y| ln_beta(x, y).exp());
    let parts = 4;
    let means: Vec<f64> = (0..parts)
        .map(|j| {
            let estimator = Estimator::Count {
                probs: None,
                stratum: Some((j, parts)),
            };
            estimate(&spec(Schedule::LogLinear, estimator, None), 8, 200).0
        })
        .collect();
    let mean = means.iter().sum::<f64>() / f64::from(parts);
    assert!(
        (mean / truth - 1.0).abs() < 0.01,
        "{means:?} against {truth}"
    );
}

/// Every stratum of the global batch is used exactly once, by whichever row.
#[test]
fn bernoulli_levels_are_one_a_stratum() {
    let s = spec(
        Schedule::LogLinear,
        Estimator::Bernoulli { strata: true },
        None,
    );
    let (rows, blocks) = (8u64, 16);
    let mut levels: Vec<f64> = (0..rows)
        .flat_map(|row| draw(&s, key(5, row, rows), &vec![1; blocks * 4], 4).prob)
        .map(f64::from)
        .collect();
    levels.sort_by(f64::total_cmp);
    let total = levels.len() as f64;
    for (i, p) in levels.iter().enumerate() {
        let u = (p - MIN_LEVEL) / (1.0 - MIN_LEVEL) * total;
        assert!(u > i as f64 - 1e-3 && u < i as f64 + 1.0 + 1e-3, "{i}: {u}");
    }
    // and position in the row says nothing about the level
    let mut first = 0.0;
    for step in 0..400 {
        first += f64::from(draw(&s, key(step, 0, rows), &vec![1; blocks * 4], 4).prob[0]);
    }
    assert!((first / 400.0 - 0.5).abs() < 0.07);
}

#[test]
fn resample_is_the_truncated_binomial() {
    let s = NoiseSpec::new(
        Schedule::LogLinear,
        Estimator::Bernoulli { strata: false },
        Some((0.3, 0.8)),
        true,
        Weighting::Nelbo,
        None,
    )
    .unwrap();
    s.check(16, 4).unwrap();
    for step in 0..500 {
        let d = draw(&s, key(step, 0, 1), &[1; 64], 4);
        for block in d.mask.chunks(4) {
            let k: u8 = block.iter().sum();
            assert!(
                (2..=3).contains(&k),
                "0.3 <= k/4 <= 0.8 allows 2 and 3, not {k}"
            );
        }
    }
    // the law itself: chi-square of k at p = 0.4, n = 10, restricted to 3..=8
    let (n, p, lo, hi, draws) = (10usize, 0.4f64, 3usize, 8usize, 20_000);
    let mut stream = Stream::new(3, Domain::Level, 0, 0);
    let mut counts = vec![0.0; hi + 1];
    for _ in 0..draws {
        counts[truncated_binomial(n, p, lo, hi, stream.next_f64())] += 1.0;
    }
    let choose = |k: usize| {
        (0..k)
            .map(|i| (n - i) as f64 / (i + 1) as f64)
            .product::<f64>()
    };
    let pmf: Vec<f64> = (lo..=hi)
        .map(|k| choose(k) * p.powi(k as i32) * (1.0 - p).powi((n - k) as i32))
        .collect();
    let total: f64 = pmf.iter().sum();
    let chi: f64 = (lo..=hi)
        .map(|k| {
            let expected = f64::from(draws) * pmf[k - lo] / total;
            (counts[k] - expected).powi(2) / expected
        })
        .sum();
    assert!(chi < 20.5, "chi-square {chi} with 5 degrees"); // 0.1%
}

#[test]
fn a_clip_that_holds_no_count_is_refused() {
    let s = NoiseSpec::new(
        Schedule::LogLinear,
        Estimator::Bernoulli { strata: true },
        Some((0.3, 0.45)),
        true,
        Weighting::Nelbo,
        None,
    )
    .unwrap();
    let message = s.check(16, 4).unwrap_err().to_string();
    assert!(
        message.contains("[0.3, 0.45]") && message.contains("k/4"),
        "{message}"
    );
    s.check(16, 8).unwrap(); // 3/8 fits

    // Only k = 0 fits at S = 1: nothing would ever be masked.
    let bernoulli = Estimator::Bernoulli { strata: true };
    let low = Some((0.0, 0.5));
    let s = NoiseSpec::new(
        Schedule::LogLinear,
        bernoulli.clone(),
        low,
        true,
        Weighting::Nelbo,
        None,
    )
    .unwrap();
    assert!(
        s.check(16, 1)
            .unwrap_err()
            .to_string()
            .contains("of k >= 1")
    );
    s.check(16, 2).unwrap();

    // At [1, 1] every share is 1, so there is nothing left to resample.
    let ones = Some((1.0, 1.0));
    let s = NoiseSpec::new(
        Schedule::LogLinear,
        bernoulli,
        ones,
        true,
        Weighting::Nelbo,
        None,
    )
    .unwrap();
    s.check(16, 1).unwrap();
    assert_eq!(*s.estimator(), Estimator::Full);
}

#[test]
fn clip_at_one_masks_everything_with_weight_one() {
    let s = spec(
        Schedule::Square,
        Estimator::Bernoulli { strata: true },
        Some((1.0, 1.0)),
    );
    let d = draw(&s, key(0, 0, 1), &[0, 1, 1, 1], 1);
    assert_eq!(d.mask, [0, 1, 1, 1]);
    assert_eq!(d.weight[1..], [1.0, 1.0, 1.0]);
}

#[test]
fn wrong_combinations_are_refused() {
    let gamma: Arc<[f32]> = vec![1.0; 4].into();
    let count = Estimator::Count {
        probs: None,
        stratum: None,
    };
    let make = |estimator, clip, resample, gamma| {
        NoiseSpec::new(
            Schedule::LogLinear,
            estimator,
            clip,
            resample,
            Weighting::Nelbo,
            gamma,
        )
    };
    assert!(make(count.clone(), None, false, Some(gamma)).is_err());
    assert!(make(count.clone(), Some((0.3, 0.8)), true, None).is_err());
    assert!(make(count.clone(), Some((0.8, 0.3)), false, None).is_err());
    assert!(make(count, Some((0.0, 1e-3)), false, None).is_err());
    assert!(make(Estimator::Full, Some((0.3, 0.8)), false, None).is_err());
    let paper = Schedule::bimodal((0.3, 0.2), (0.8, 0.2), 0.6, true).unwrap();
    let clip = Some((0.1, 0.9));
    let made = NoiseSpec::new(
        paper,
        Estimator::Bernoulli { strata: true },
        clip,
        false,
        Weighting::Nelbo,
        None,
    );
    assert!(made.unwrap_err().to_string().contains("paper_weights"));
}

/// The Beta mean of a weighting equals the average of draws from that Beta.
#[test]
fn count_weights_carry_the_mean_of_the_weighting() {
    for weighting in [
        Weighting::Iddpm,
        Weighting::FlowMatching,
        Weighting::Sigmoid { k: 1.0 },
        Weighting::Simple,
        Weighting::Edm,
    ] {
        let estimator = Estimator::Count {
            probs: None,
            stratum: None,
        };
        let schedule = Schedule::SquareRoot;
        let s = NoiseSpec::new(schedule.clone(), estimator, None, false, weighting, None).unwrap();
        let mut stream = Stream::new(9, Domain::Level, 0, 0);
        for (k, n) in [(1usize, 4usize), (2, 4), (4, 4), (3, 16)] {
            let draws: Vec<f64> = (0..40_000)
                .map(|_| {
                    let p = s.level_given_count(k, n, (0.0, 1.0), stream.next_f64());
                    weighting.at(&schedule, schedule.inverse(p).unwrap(), p)
                })
                .collect();
            let mean = draws.iter().sum::<f64>() / draws.len() as f64;
            let got = s.count_factor(k, n);
            assert!(
                (got / mean - 1.0).abs() < 0.06,
                "{weighting:?} {k}/{n}: {got} {mean}"
            );
        }
    }
    // simple under loglinear is p, whose mean under Beta(k, n-k+1) is k/(n+1)
    let s = NoiseSpec::new(
        Schedule::LogLinear,
        Estimator::Count {
            probs: None,
            stratum: None,
        },
        None,
        false,
        Weighting::Simple,
        None,
    )
    .unwrap();
    assert!((s.count_factor(3, 4) - 0.6).abs() < 1e-12);
}

/// A loss c(p) of a model that reads the level: the mean of weight·c is ∫ w̃·w·E[k]·c dt / (b − a).
#[test]
fn time_conditioned_counts_take_the_weighting_at_their_level() {
    let (n, rows, schedule) = (4, 4000u64, Schedule::LogLinear);
    let loss = |p: f64| 3.0 - 2.0 * p;
    for clip in [None, Some((0.2, 0.9))] {
        for weighting in [
            Weighting::Sigmoid { k: 0.5 },
            Weighting::Iddpm,
            Weighting::Simple,
        ] {
            let spec = NoiseSpec::new(
                schedule.clone(),
                Estimator::Count {
                    probs: None,
                    stratum: None,
                },
                clip,
                false,
                weighting,
                None,
            )
            .unwrap()
            .for_time_conditioned();
            let (mut sum, mut square) = (0.0, 0.0);
            for row in 0..rows {
                let drawn = draw(&spec, key(0, row, rows), &[1; 4], 4);
                let k: f64 = drawn.mask.iter().map(|m| f64::from(*m)).sum();
                let p = f64::from(drawn.prob[0]);
                let value = f64::from(drawn.weight[0]) * k * loss(p);
                sum += value;
                square += value * value;
            }
            let mean = sum / rows as f64;
            let error = ((square / rows as f64 - mean * mean) / rows as f64).sqrt();
            // k has mean n·p and w = 1/p.
            let (a, b) = clip.unwrap_or((0.0, 1.0));
            let nodes = 20_000;
            let want: f64 = (0..nodes)
                .map(|i| a + (b - a) * (f64::from(i) + 0.5) / f64::from(nodes))
                .map(|p| f64::from(n) * weighting.at(&schedule, p, p) * loss(p))
                .sum::<f64>()
                / f64::from(nodes);
            assert!(
                (mean - want).abs() < 4.0 * error + 1e-6,
                "{weighting:?}, {clip:?}: {mean} against {want} ± {error}"
            );
        }
    }
}

/// The level of a clipped count has the Beta distribution inside the clip; also for the large blocks
/// of MDLM, where the inverse of `statrs` does not terminate.
#[test]
fn levels_of_clipped_counts_are_quantiles() {
    for (a, b) in [(0.0, 0.1), (0.3, 0.8), (0.95, 1.0)] {
        let clip = Some((a, b));
        let counts = Estimator::Count {
            probs: None,
            stratum: None,
        };
        let s = spec(Schedule::LogLinear, counts, clip);
        for n in [1usize, 2, 4, 127, 1023] {
            for k in [1, n / 2 + 1, n - n / 8] {
                let (x, y) = (k as f64, (n - k + 1) as f64);
                let (lo, hi) = (beta_reg(x, y, a), beta_reg(x, y, b));
                for v in [1e-9, 0.3, 0.999] {
                    let p = s.level_given_count(k, n, (a, b), v);
                    assert!((a..=b).contains(&p), "{k}/{n} in [{a}, {b}]: {p}");
                    let got = beta_reg(x, y, p) - lo;
                    assert!((got - v * (hi - lo)).abs() < 1e-9, "{k}/{n}: {p}");
                }
            }
        }
        // Rows of one large block: every seed comes to an end.
        for step in 0..200 {
            draw(&s, key(step, 0, 1), &[1; 1024], 1024);
        }
    }
}

/// The total weight of a level is 1 with `simple`, so the factor of a count is k times the mean
/// over t of the binomial law: for every schedule, the cosine's mass below ε included.
#[test]
fn count_weights_of_simple_are_means_over_t() {
    for schedule in all() {
        let estimator = Estimator::Count {
            probs: None,
            stratum: None,
        };
        let s = NoiseSpec::new(
            schedule.clone(),
            estimator,
            None,
            false,
            Weighting::Simple,
            None,
        )
        .unwrap();
        for (k, n) in [(1usize, 1usize), (1, 4), (3, 4), (4, 4)] {
            let nodes = 100_000;
            let mean: f64 = (0..nodes)
                .map(|i| {
                    let p = schedule.mask_prob((f64::from(i) + 0.5) / f64::from(nodes));
                    let (k, misses) = (k as i32, (n - k) as i32);
                    CHOOSE[n][k as usize] * p.powi(k) * (1.0 - p).powi(misses)
                })
                .sum::<f64>()
                / f64::from(nodes);
            let (got, want) = (s.count_factor(k, n), k as f64 * mean);
            assert!(
                (got / want - 1.0).abs() < 1e-4,
                "{} {k}/{n}: {got} {want}",
                schedule.name()
            );
        }
    }
}

/// Rarer tokens are masked more often, and the block's mean stays p.
#[test]
fn frequency_masking_keeps_the_mean() {
    let gamma: Arc<[f32]> = vec![1.5, 0.5].into();
    let s = NoiseSpec::new(
        Schedule::LogLinear,
        Estimator::Bernoulli { strata: false },
        Some((0.4, 0.400001)),
        false,
        Weighting::Nelbo,
        Some(gamma),
    )
    .unwrap();
    let ids: Vec<i64> = (0..64).map(|i| i % 2).collect();
    let mut sums = [0.0, 0.0];
    let steps = 2000;
    for step in 0..steps {
        let (mut mask, mut p, mut w) = (vec![0; 64], vec![0.0; 1], vec![0.0; 1]);
        s.noise_row(
            &key(step, 0, 1),
            &ids,
            &[1; 64],
            64,
            &mut mask,
            &mut p,
            &mut w,
            &mut Scratch::default(),
        );
        for (m, id) in mask.iter().zip(&ids) {
            sums[*id as usize] += f64::from(*m);
        }
    }
    let total = 32.0 * steps as f64;
    let (common, rare) = (sums[0] / total, sums[1] / total);
    assert!(rare > common + 0.2, "{common} {rare}");
    assert!((0.5 * (common + rare) - 0.4).abs() < 0.005);
}

proptest! {
    #[test]
    fn masks_stay_inside_noisable(
        noisable in proptest::collection::vec(0u8..2, 24),
        step: u64,
        size in prop_oneof![Just(1usize), Just(2), Just(4), Just(8), Just(24)],
        counted: bool,
    ) {
        let estimator = if counted {
            Estimator::Count { probs: None, stratum: None }
        } else {
            Estimator::Bernoulli { strata: true }
        };
        let d = draw(&spec(Schedule::Square, estimator, None), key(step, 1, 3), &noisable, size);
        for (b, block) in d.mask.chunks(size).enumerate() {
            let allowed = &noisable[b * size..(b + 1) * size];
            let n: u8 = allowed.iter().sum();
            let k: u8 = block.iter().sum();
            prop_assert!(block.iter().zip(allowed).all(|(m, a)| m <= a));
            if counted && n > 0 {
                prop_assert!(k >= 1, "count never leaves a block empty");
                let expected = f32::from(n) / f32::from(k);
                prop_assert!((d.weight[b] - expected).abs() < 1e-5 * expected);
            }
            if n == 0 {
                prop_assert_eq!(d.weight[b], 0.0);
            }
        }
    }

    #[test]
    fn counts_are_uniform_subsets(step in 0u64..50) {
        // over many blocks each position is masked equally often
        let s = spec(
            Schedule::LogLinear,
            Estimator::Count { probs: None, stratum: None },
            None,
        );
        let d = draw(&s, key(step, 0, 1), &vec![1; 4 * 4096], 4);
        for i in 0..4 {
            let share = d.mask.iter().skip(i).step_by(4).map(|m| f64::from(*m)).sum::<f64>() / 4096.0;
            prop_assert!((share - 0.625).abs() < 0.04, "position {i}: {share}");
        }
    }
}
