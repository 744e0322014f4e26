//! Every instruction set against attention in float64, with an inaccessible page on either side of
//! every buffer.

mod reference;

use super::layout::{round_bf16, widen};
use super::*;
use crate::cpu::guarded::Guarded;
use proptest::prelude::*;
use reference::{Arrays, Gradients};

const ISAS: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

/// Sizes of one call, and the mask as ranges of every query.
#[derive(Clone, Debug)]
pub(super) struct Case {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    width: usize,
    /// Rows hold all heads, as a projection leaves them, or each head has rows of its own.
    heads_inside: bool,
    clean_offset: usize,
    /// clean_lo, clean_hi, noised_lo, noised_hi.
    ranges: [Vec<i32>; 4],
    seed: u64,
}

impl Case {
    /// The training mask of docs/math.md §7: xt then x0.
    fn training(seq_len: usize, block: usize, width: usize) -> Case {
        let mut ranges: [Vec<i32>; 4] = Default::default();
        for clean in [false, true] {
            for i in 0..seq_len {
                let start = i / block * block;
                let end = (start + block).min(seq_len);
                let row = if clean {
                    [0, end, 0, 0]
                } else {
                    [0, start, start, end]
                };
                for (range, bound) in ranges.iter_mut().zip(row) {
                    range.push(bound as i32);
                }
            }
        }
        Case {
            batch: 1,
            heads: 2,
            kv_heads: 2,
            queries: 2 * seq_len,
            keys: 2 * seq_len,
            width,
            heads_inside: true,
            clean_offset: seq_len,
            ranges,
            seed: 1,
        }
    }

    fn tensor(&self, heads: usize, rows: usize) -> ([usize; 4], [isize; 4]) {
        let (h, t, d) = (heads as isize, rows as isize, self.width as isize);
        let strides = if self.heads_inside {
            [t * h * d, d, h * d, 1]
        } else {
            [h * t * d, t * d, d, 1]
        };
        ([self.batch, heads, rows, self.width], strides)
    }
}

/// Buffers of one tensor's values, at the end of their pages or at the beginning.
struct Held {
    memory: Guarded,
    tensor: Tensor,
}

impl Held {
    fn new(case: &Case, heads: usize, rows: usize, values: &[f64], dtype: Dtype) -> Held {
        let (shape, strides) = case.tensor(heads, rows);
        let bytes: Vec<u8> = match dtype {
            Dtype::F32 => values
                .iter()
                .flat_map(|&x| (x as f32).to_ne_bytes())
                .collect(),
            Dtype::Bf16 => values
                .iter()
                .flat_map(|&x| round_bf16(x as f32).to_ne_bytes())
                .collect(),
        };
        let memory = Guarded::new(&bytes, case.seed.is_multiple_of(2));
        let tensor = Tensor {
            ptr: memory.ptr(),
            dtype,
            shape,
            strides,
        };
        Held { memory, tensor }
    }

    fn values(&self) -> Vec<f64> {
        let bytes = self.memory.bytes();
        match self.tensor.dtype {
            Dtype::F32 => {
                let value = |b: &[u8]| f64::from(f32::from_ne_bytes(b.try_into().unwrap()));
                bytes.chunks_exact(4).map(value).collect()
            }
            Dtype::Bf16 => {
                let value = |b: &[u8]| f64::from(widen(u16::from_ne_bytes(b.try_into().unwrap())));
                bytes.chunks_exact(2).map(value).collect()
            }
        }
    }
}

/// Values around zero, a function of the seed, as the dtype holds them.
fn noise(seed: u64, len: usize, dtype: Dtype) -> Vec<f64> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            let mut sum = -6.0;
            for _ in 0..12 {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                sum += (state >> 40) as f64 / (1u64 << 24) as f64;
            }
            match dtype {
                Dtype::F32 => f64::from(sum as f32),
                Dtype::Bf16 => f64::from(widen(round_bf16(sum as f32))),
            }
        })
        .collect()
}

/// Output, log-sum-exp and gradients dq, dk, dv of the kernels.
fn run(case: &Case, isa: Isa, dtype: Dtype, threads: usize) -> [Vec<f64>; 5] {
    let Case {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        width,
        ..
    } = *case;
    let (nq, nk) = (
        batch * heads * queries * width,
        batch * kv_heads * keys * width,
    );
    let held = |heads, rows, values: &[f64]| Held::new(case, heads, rows, values, dtype);
    let q = held(heads, queries, &noise(case.seed, nq, dtype));
    let k = held(kv_heads, keys, &noise(case.seed + 1, nk, dtype));
    let v = held(kv_heads, keys, &noise(case.seed + 2, nk, dtype));
    let d_out = held(heads, queries, &noise(case.seed + 3, nq, dtype));
    let [out, dq] = [0, 1].map(|_| held(heads, queries, &vec![f64::NAN; nq]));
    let [dk, dv] = [0, 1].map(|_| held(kv_heads, keys, &vec![f64::NAN; nk]));
    let lse = Guarded::new(&vec![0xff; 4 * batch * heads * queries], true);
    let ranges = case.ranges.each_ref().map(|r| {
        let bytes: Vec<u8> = r.iter().flat_map(|x| x.to_ne_bytes()).collect();
        Guarded::new(&bytes, true)
    });
    let [clean_lo, clean_hi, noised_lo, noised_hi] = ranges.each_ref().map(Guarded::i32s);
    let forward = Forward {
        q: q.tensor,
        k: k.tensor,
        v: v.tensor,
        mask: Mask {
            ranges: Ranges {
                clean_lo,
                clean_hi,
                noised_lo,
                noised_hi,
            },
            clean_offset: case.clean_offset,
        },
        out: out.tensor,
        lse: LogSumExp(lse.ptr().cast()),
        options: Options {
            threads,
            isa: Some(isa),
            scale: 1.0 / (width as f32).sqrt(),
        },
    };
    // SAFETY: the buffers have the sizes of the tensors, and nothing else uses them.
    unsafe { super::forward(&forward).unwrap() };
    let lse_values = lse.bytes().chunks_exact(4);
    let lse_values = lse_values
        .map(|b| f64::from(f32::from_ne_bytes(b.try_into().unwrap())))
        .collect();
    let backward = Backward {
        forward,
        d_out: d_out.tensor,
        dq: dq.tensor,
        dk: dk.tensor,
        dv: dv.tensor,
    };
    // SAFETY: as above.
    unsafe { super::backward(&backward).unwrap() };
    [
        out.values(),
        lse_values,
        dq.values(),
        dk.values(),
        dv.values(),
    ]
}

fn expected(case: &Case, dtype: Dtype) -> Gradients {
    let (nq, nk) = (
        case.batch * case.heads * case.queries * case.width,
        case.batch * case.kv_heads * case.keys * case.width,
    );
    reference::attention(
        case,
        &Arrays {
            q: noise(case.seed, nq, dtype),
            k: noise(case.seed + 1, nk, dtype),
            v: noise(case.seed + 2, nk, dtype),
            d_out: noise(case.seed + 3, nq, dtype),
        },
    )
}

/// Largest difference, relative to the largest value where that exceeds one.
fn difference(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want
        .iter()
        .filter(|x| x.is_finite())
        .fold(1f64, |m, x| m.max(x.abs()));
    let each = got
        .iter()
        .zip(want)
        .map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() / scale });
    each.fold(
        0.0,
        |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) },
    )
}

fn check(case: &Case) {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let want = expected(case, dtype);
        for isa in ISAS.into_iter().filter(|isa| isa.is_available()) {
            let got = run(case, isa, dtype, 1);
            let limits = match dtype {
                Dtype::F32 => [2e-6, 2e-6, 5e-6, 5e-6, 5e-6],
                // sum(out * d_out) of an output rounded to bf16 may cancel in the gradients.
                Dtype::Bf16 => [1e-2, 1e-2, 3e-2, 3e-2, 3e-2],
            };
            let want = [&want.out, &want.lse, &want.dq, &want.dk, &want.dv];
            for (i, limit) in limits.into_iter().enumerate() {
                let error = difference(&got[i], want[i]);
                let what = ["out", "lse", "dq", "dk", "dv"][i];
                assert!(
                    error <= limit,
                    "{isa:?} {dtype:?} {what}: {error:.1e}, {case:?}"
                );
            }
        }
    }
}

#[test]
fn training_masks_match_the_reference() {
    for (seq_len, block, width) in [
        (64, 16, 32),
        (77, 5, 16),
        (130, 4, 64),
        (33, 33, 40),
        (50, 1, 24),
        (150, 16, 128),
        (3, 2, 7),
    ] {
        check(&Case::training(seq_len, block, width));
    }
}

/// No batch row, no query, no key: empty or zero outputs, and zero gradients.
#[test]
fn empty_inputs_give_empty_outputs_and_zero_gradients() {
    let case = Case::training(8, 2, 16);
    let none = Case {
        batch: 0,
        ..Case::training(8, 2, 16)
    };
    let no_queries = Case {
        queries: 0,
        ranges: Default::default(),
        ..Case::training(8, 2, 16)
    };
    let no_keys = Case {
        keys: 0,
        clean_offset: 0,
        ranges: case.ranges.each_ref().map(|r| vec![0; r.len()]),
        ..Case::training(8, 2, 16)
    };
    for case in [none, no_queries, no_keys] {
        for isa in ISAS.into_iter().filter(|isa| isa.is_available()) {
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let [out, lse, dq, dk, dv] = run(&case, isa, dtype, 2);
                let queries = case.batch * case.heads * case.queries;
                let keys = case.batch * case.kv_heads * case.keys;
                assert_eq!(out, vec![0.0; queries * case.width]);
                assert_eq!(lse, vec![f64::NEG_INFINITY; queries]);
                assert_eq!(dq, out);
                assert_eq!(dk, vec![0.0; keys * case.width]);
                assert_eq!(dv, dk);
            }
        }
    }
}

/// Scratch is used again: an odd width leaves half a unit of bf16 that the last call may have
/// filled.
#[test]
fn odd_widths_meet_no_leftovers() {
    for width in [31, 33, 63, 95, 127] {
        let full = Case::training(40, 4, width + 1);
        let odd = Case::training(40, 4, width);
        for isa in ISAS.into_iter().filter(|isa| isa.is_available()) {
            run(&full, isa, Dtype::Bf16, 1);
        }
        check(&odd);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let mut case = Case::training(260, 16, 32);
    case.batch = 2;
    case.heads = 4;
    for isa in ISAS.into_iter().filter(|isa| isa.is_available()) {
        let one = run(&case, isa, Dtype::F32, 1);
        for threads in [2, 3] {
            let many = run(&case, isa, Dtype::F32, threads);
            for (a, b) in one.iter().zip(&many) {
                assert!(
                    a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits()),
                    "{isa:?}"
                );
            }
        }
    }
}

#[test]
fn callers_may_run_side_by_side() {
    let mut case = Case::training(200, 8, 32);
    case.batch = 4;
    let want = run(&case, Isa::best(), Dtype::F32, 1);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    assert!(run(&case, Isa::best(), Dtype::F32, 2) == want);
                }
            });
        }
    });
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let case = Case::training(8, 4, 16);
    let n = 2 * 16 * 16;
    let held = || Held::new(&case, 2, 16, &vec![0.0; n], Dtype::F32);
    let (q, out) = (held(), held());
    let lse = Guarded::new(&[0; 4 * 32], true);
    let call = |change: &dyn Fn(&mut Forward<'_>)| {
        let [clean_lo, clean_hi, noised_lo, noised_hi] = case.ranges.each_ref().map(|r| &r[..]);
        let mut args = Forward {
            q: q.tensor,
            k: q.tensor,
            v: q.tensor,
            mask: Mask {
                ranges: Ranges {
                    clean_lo,
                    clean_hi,
                    noised_lo,
                    noised_hi,
                },
                clean_offset: 8,
            },
            out: out.tensor,
            lse: LogSumExp(lse.ptr().cast()),
            options: Options {
                threads: 1,
                isa: None,
                scale: 0.25,
            },
        };
        change(&mut args);
        // SAFETY: the buffers have the sizes of the tensors; faults that `change` makes are refused.
        unsafe { super::forward(&args) }.map_err(|e| e.to_string())
    };
    assert!(call(&|_| ()).is_ok());
    type Spoil = &'static dyn Fn(&mut Forward<'_>);
    let wrong: [(&str, Spoil); 10] = [
        ("q =", &|a| a.q.strides[3] = 2),
        ("k =", &|a| a.k.shape[3] = 8),
        ("v =", &|a| a.v.dtype = Dtype::Bf16),
        ("k =", &|a| a.k.shape[1] = 3),
        ("out =", &|a| a.out.strides[2] = 0),
        ("out =", &|a| a.out.ptr = a.out.ptr.wrapping_add(1)),
        ("lse =", &|a| a.lse = LogSumExp(std::ptr::null_mut())),
        ("mask =", &|a| a.mask.clean_offset = 9),
        ("mask =", &|a| a.mask.ranges.noised_hi = &[0; 3]),
        ("threads =", &|a| a.options.threads = 0),
    ];
    for (name, change) in wrong {
        let message = call(change).expect_err(name);
        assert!(message.starts_with(name), "{message}");
    }
}

prop_compose! {
    /// Ranges of every kind, not only those of a block mask: empty, overlapping, the whole.
    fn any_case()(
        batch in 1..3usize, kv_heads in 1..3usize, shared in 1..4usize, queries in 1..150usize,
        clean in 1..130usize, noised in 0..130usize, width in 1..70usize,
        heads_inside: bool, each_row: bool, seed in 0..1000u64,
        bounds in prop::collection::vec((0.0..1f64, 0.0..1.2f64, 0.0..1f64, -0.2..0.5f64), 300),
    ) -> Case {
        let rows = if each_row { batch * queries } else { queries };
        let mut ranges: [Vec<i32>; 4] = Default::default();
        for &(clean_lo, clean_len, noised_lo, noised_len) in bounds.iter().cycle().take(rows) {
            let range = |lo: f64, len: f64, limit: usize| {
                let lo = (lo * limit as f64) as i32;
                (lo, (lo + (len * limit as f64) as i32).min(limit as i32))
            };
            let (a, b) = range(clean_lo, clean_len, clean);
            let (c, d) = range(noised_lo, noised_len, noised);
            for (range, bound) in ranges.iter_mut().zip([a, b, c, d]) {
                range.push(bound);
            }
        }
        Case {
            batch, heads: kv_heads * shared, kv_heads, queries, keys: clean + noised, width,
            heads_inside, clean_offset: noised, ranges, seed,
        }
    }
}

proptest! {
    #[test]
    fn splitting_covers_every_key_once(
        a in (0..60usize, 0..60usize), b in (0..60usize, 0..60usize), step in 1..14usize,
    ) {
        let ranges = [a.0..a.0 + a.1, b.0..b.0 + b.1];
        let mut seen = [[0; 160]; 2];
        for part in tiles::split(ranges[0].clone(), ranges[1].clone(), step) {
            let keys = part.keys.start..part.keys.start + part.keys.len().next_multiple_of(step);
            for grain in (part.grain..part.grain + part.grains).filter(|_| !keys.is_empty()) {
                keys.clone().for_each(|key| seen[grain][key] += 1);
            }
        }
        for (grain, range) in ranges.into_iter().enumerate() {
            prop_assert!(seen[grain].iter().all(|&n| n <= 1));
            prop_assert!(range.into_iter().all(|key| seen[grain][key] == 1));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_ranges_match_the_reference(case in any_case()) {
        check(&case);
    }

    #[test]
    fn few_queries_match_the_reference(case in any_case(), queries in 1..6usize) {
        let mut case = case;
        let rows = case.ranges[0].len() / case.queries;
        case.queries = queries.min(case.queries);
        for range in &mut case.ranges {
            range.truncate(rows * case.queries);
        }
        check(&case);
    }
}
