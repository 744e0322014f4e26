//! Linear layers with prepacked weights, for decoding.
//!
//! Every output is one sum over the inputs in their order, so that a row gives the same bits in any
//! batch and with any number of threads.

use crate::cpu::buffers::{Parts, reserve};
use crate::cpu::simd::portable::Portable;
use crate::cpu::simd::{Simd, dispatch};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{
    avx2::Avx2,
    avx512::{Avx512, Avx512Bf16},
};
use crate::cpu::{Isa, scratch, threads::parallel};
use crate::error::{Error, Result};
use crate::kernels::activation::Activation;
use crate::kernels::product::product;

/// Operation on the result of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// Writes it.
    Write,
    /// Adds it to the output.
    Add,
    /// Writes its activation.
    Activate(Activation),
}

/// Vectors of columns in a panel.
const VECTORS: usize = 2;
/// Lanes of the widest vectors.
const MAX_LANES: usize = 16;
/// Multiplications that pay for another thread: some tens of microseconds.
const WORTH: usize = 1 << 20;

/// A 64-byte line of units, so that no load crosses a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; MAX_LANES]);

/// The prepacked matrix and bias of a linear layer.
pub struct Packed {
    isa: Isa,
    inputs: usize,
    outputs: usize,
    /// Panels of `VECTORS · W` columns, each row by row.
    panels: Vec<Line>,
    /// Bias of every column of every panel.
    bias: Vec<f32>,
}

impl Packed {
    /// Packs `weight` [N, K], row-major, and the bias `[N]`; with `bf16`, rounds to bf16.
    ///
    /// # Errors
    /// Sizes that do not fit together, or bf16 on a processor without bf16 products.
    pub fn new(weight: &[f32], bias: Option<&[f32]>, inputs: usize, bf16: bool) -> Result<Self> {
        let isa = if bf16 {
            Isa::Avx512Bf16
        } else {
            Isa::best().min(Isa::Avx512)
        };
        Self::for_isa(weight, bias, inputs, isa)
    }

    fn for_isa(weight: &[f32], bias: Option<&[f32]>, inputs: usize, isa: Isa) -> Result<Self> {
        if !isa.is_available() {
            let allowed = "fp32: this processor has no bf16 products";
            return Err(Error::config("precision", "bf16", allowed));
        }
        let outputs = weight.len().checked_div(inputs).unwrap_or(0);
        if outputs == 0
            || outputs * inputs != weight.len()
            || bias.is_some_and(|b| b.len() != outputs)
        {
            let given = format!("{} weights for {inputs} inputs", weight.len());
            return Err(Error::config(
                "linear",
                given,
                "whole rows, and a bias of as many",
            ));
        }
        let mut packed = Self {
            isa,
            inputs,
            outputs,
            panels: Vec::new(),
            bias: Vec::new(),
        };
        let (columns, pair) = (packed.columns(), packed.pair());
        let panels = outputs.div_ceil(columns);
        let panel_units = packed.depth() * columns;
        packed.bias = vec![0.0; panels * columns];
        if let Some(bias) = bias {
            packed.bias[..outputs].copy_from_slice(bias);
        }
        packed.panels = lines(panels.saturating_mul(panel_units).div_ceil(MAX_LANES))?;
        for (column, row) in weight.chunks_exact(inputs).enumerate() {
            let first = column / columns * panel_units + column % columns;
            for (depth, unit) in row.chunks(pair).enumerate() {
                let at = first + depth * columns;
                packed.panels[at / MAX_LANES].0[at % MAX_LANES] = match (pair, unit) {
                    (1, [x]) => *x,
                    (_, [x]) => unit_of(*x, 0.0),
                    (_, unit) => unit_of(unit[0], unit[1]),
                };
            }
        }
        Ok(packed)
    }

    /// N, the number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// K, the number of inputs.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Forms x·Wᵀ + b [M, N] for rows x [M, K], and hands it to the epilogue.
    ///
    /// # Errors
    /// Buffers that do not hold as many rows.
    pub fn apply(
        &self,
        x: &[f32],
        out: &mut [f32],
        epilogue: Epilogue,
        threads: usize,
    ) -> Result<()> {
        let rows = x.len() / self.inputs;
        if rows * self.inputs != x.len() || out.len() != rows * self.outputs {
            let given = format!("{} values", x.len());
            let allowed = format!("rows of {} and as many of {}", self.inputs, self.outputs);
            return Err(Error::config("linear", given, allowed));
        }
        dispatch!(self.isa, S => self.apply_as::<S>(x, rows, out, epilogue, threads));
        Ok(())
    }

    /// Runs with the vectors that the matrix was packed for; where these multiply pairs of bf16,
    /// rounds the rows to pairs first.
    fn apply_as<S: Panel>(
        &self,
        x: &[f32],
        rows: usize,
        out: &mut [f32],
        epilogue: Epilogue,
        threads: usize,
    ) {
        if S::PAIR == 1 {
            return self.run::<S>(x, rows, out, epilogue, threads);
        }
        let count = rows * self.depth();
        scratch::with(&[count], |scratch| {
            let units = scratch.slice(count);
            // SAFETY: a matrix is packed only for an instruction set of this processor.
            unsafe { S::round(x, self.inputs, units) };
            self.run::<S>(units, rows, out, epilogue, threads);
        });
    }

    fn run<S: Panel>(
        &self,
        x: &[f32],
        rows: usize,
        out: &mut [f32],
        epilogue: Epilogue,
        threads: usize,
    ) {
        let columns = self.columns();
        let panels = self.outputs.div_ceil(columns);
        let work = rows * self.inputs * self.outputs;
        let threads = threads.min(1 + work / WORTH);
        // A few pieces a thread balance the load.
        let pieces = (4 * threads).min(panels);
        let to = Parts::new(out);
        parallel(threads, pieces, |piece| {
            let mine = panels * piece / pieces..panels * (piece + 1) / pieces;
            for panel in mine.clone() {
                let at = panel * self.depth() * columns / MAX_LANES;
                let job = Job {
                    x: x.as_ptr(),
                    rows,
                    depth: self.depth(),
                    panel: self.panels[at..].as_ptr().cast(),
                    bias: self.bias[panel * columns..].as_ptr(),
                    out: to.at(panel * columns),
                    ld: self.outputs,
                    live: columns.min(self.outputs - panel * columns),
                    add: epilogue == Epilogue::Add,
                };
                // SAFETY: the panel, its bias and the rows exist; `live` columns of every row of
                // the output are this panel's alone; the instruction set is this matrix's.
                unsafe { S::panel(&job) };
            }
            let Epilogue::Activate(activation) = epilogue else {
                return;
            };
            let span = mine.start * columns..self.outputs.min(mine.end * columns);
            for row in 0..rows {
                // SAFETY: these columns of every row are this piece's alone, and written above.
                activation
                    .in_place(unsafe { to.part(row * self.outputs + span.start, span.len()) });
            }
        });
    }

    /// Columns of a panel.
    fn columns(&self) -> usize {
        VECTORS * if self.isa >= Isa::Avx512 { 16 } else { 8 }
    }

    /// Inputs in a unit.
    fn pair(&self) -> usize {
        if self.isa == Isa::Avx512Bf16 { 2 } else { 1 }
    }

    /// Units summed over.
    fn depth(&self) -> usize {
        self.inputs.div_ceil(self.pair())
    }
}

/// Zeros on huge pages, where the system has them: every token reads the whole matrix, and with
/// small pages half of the time goes into TLB misses.
fn lines(count: usize) -> Result<Vec<Line>> {
    let mut lines: Vec<Line> = Vec::new();
    reserve("linear", &mut lines, count)?;
    #[cfg(target_os = "linux")]
    // SAFETY: advice about whole pages inside an allocation of ours, which changes no content.
    unsafe {
        let page = 4096;
        let start = lines.as_mut_ptr() as usize;
        let first = start.next_multiple_of(page);
        let bytes = (start + count * size_of::<Line>()).saturating_sub(first);
        libc::madvise(first as *mut _, bytes, libc::MADV_HUGEPAGE);
    }
    lines.resize(count, Line([0.0; MAX_LANES]));
    Ok(lines)
}

/// Two neighbours as bf16, rounded to nearest, ties to even.
fn unit_of(even: f32, odd: f32) -> f32 {
    let bits = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
    f32::from_bits(bits(even) | bits(odd) << 16)
}

/// All rows times one panel.
struct Job {
    x: *const f32,
    rows: usize,
    depth: usize,
    panel: *const f32,
    bias: *const f32,
    out: *mut f32,
    /// Row length of `out`.
    ld: usize,
    /// Columns that exist.
    live: usize,
    /// Adds to the output instead of writing it.
    add: bool,
}

/// The inner loops of one instruction set.
///
/// # Safety
/// Both methods need the instruction set.
trait Panel: Simd {
    /// All rows times one panel.
    ///
    /// # Safety
    /// The job points to buffers of the sizes it names.
    unsafe fn panel(job: &Job);

    /// Rows of `width` values as rows of pairs; an odd one is paired with zero.
    ///
    /// # Safety
    /// The instruction set.
    unsafe fn round(x: &[f32], width: usize, units: &mut [f32]);
}

/// # Safety
/// The job points to buffers of the sizes it names, and the processor has the instructions of `S`.
#[inline(always)]
unsafe fn panel<S: Simd, const MOST: usize>(job: &Job) {
    let mut row = 0;
    // SAFETY: rows `row..` exist by the loop's bound.
    unsafe {
        // 16 rows are two tiles of 8: a tile of 4 would wait for the latency of its own sums.
        while row + MOST <= job.rows && !(MOST > 8 && job.rows - row == 16) {
            tile::<S, MOST>(job, row);
            row += MOST;
        }
        while MOST > 8 && row + 8 <= job.rows {
            tile::<S, 8>(job, row);
            row += 8;
        }
        while row + 4 <= job.rows {
            tile::<S, 4>(job, row);
            row += 4;
        }
        while row < job.rows {
            tile::<S, 1>(job, row);
            row += 1;
        }
    }
}

/// # Safety
/// As [`panel`]; rows `row .. row + ROWS` exist.
#[inline(always)]
unsafe fn tile<S: Simd, const ROWS: usize>(job: &Job, row: usize) {
    // SAFETY: by the contract; a panel's columns are VECTORS · W, of which `live` are written.
    unsafe {
        let mut acc = [[S::splat(0.0); VECTORS]; ROWS];
        for start in &mut acc {
            for (n, x) in start.iter_mut().enumerate() {
                *x = S::load(job.bias.add(n * S::W));
            }
        }
        let x = job.x.add(row * job.depth);
        let acc = product::<S, ROWS, VECTORS>(
            x,
            (job.depth, 1),
            job.panel,
            VECTORS * S::W,
            job.depth,
            acc,
        );
        for (i, sums) in acc.iter().enumerate() {
            let out = job.out.add((row + i) * job.ld);
            let mut whole = [0f32; VECTORS * MAX_LANES];
            let edge = job.live < VECTORS * S::W;
            let to = if edge { whole.as_mut_ptr() } else { out };
            if edge && job.add {
                to.copy_from_nonoverlapping(out, job.live);
            }
            for (n, x) in sums.iter().enumerate() {
                let to = to.add(n * S::W);
                S::store(to, if job.add { S::add(S::load(to), *x) } else { *x });
            }
            if edge {
                out.copy_from_nonoverlapping(to, job.live);
            }
        }
    }
}

/// # Safety
/// As [`Panel::round`].
#[inline(always)]
unsafe fn round<S: Simd>(x: &[f32], width: usize, units: &mut [f32]) {
    for (row, units) in x
        .chunks_exact(width)
        .zip(units.chunks_exact_mut(width.div_ceil(2)))
    {
        let whole = width / S::W * S::W;
        for at in (0..whole).step_by(S::W) {
            // SAFETY: W values at `at`, and half as many units.
            unsafe {
                let lanes = S::load(row.as_ptr().add(at));
                S::store_units(units.as_mut_ptr().add(at / 2), lanes);
            }
        }
        for (unit, pair) in units[whole / 2..].iter_mut().zip(row[whole..].chunks(2)) {
            *unit = unit_of(pair[0], pair.get(1).copied().unwrap_or(0.0));
        }
    }
}

macro_rules! panel {
    ($simd:ty, $rows:literal $(, $features:literal)?) => {
        impl Panel for $simd {
            $(#[target_feature(enable = $features)])?
            unsafe fn panel(job: &Job) {
                // SAFETY: by the contract.
                unsafe { panel::<$simd, $rows>(job) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn round(x: &[f32], width: usize, units: &mut [f32]) {
                // SAFETY: by the contract.
                unsafe { round::<$simd>(x, width, units) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
panel!(
    Avx512Bf16,
    12,
    "avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma"
);
#[cfg(target_arch = "x86_64")]
panel!(Avx512, 12, "avx512f,avx512dq,avx512bw,avx512vl,fma");
#[cfg(target_arch = "x86_64")]
panel!(Avx2, 4, "avx2,fma");
panel!(Portable, 4);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::activation::activate;
    use crate::random::{Domain, Stream};

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut stream = Stream::new(seed, Domain::Mask, 0, 0);
        (0..count)
            .map(|_| (stream.next_f64() * 2.0 - 1.0) as f32)
            .collect()
    }

    fn rounded(x: &[f32], isa: Isa) -> Vec<f64> {
        let round = |x: f32| {
            if isa == Isa::Avx512Bf16 {
                half::bf16::from_f32(x).to_f32()
            } else {
                x
            }
        };
        x.iter().map(|&x| f64::from(round(x))).collect()
    }

    fn isas() -> impl Iterator<Item = Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16]
            .into_iter()
            .filter(|isa| isa.is_available())
    }

    #[test]
    fn equals_float64() {
        for isa in isas() {
            for (rows, inputs, outputs) in [
                (1, 1, 1),
                (3, 7, 5),
                (13, 33, 70),
                (29, 64, 32),
                (16, 256, 1000),
            ] {
                let (w, x, b) = (
                    numbers(outputs * inputs, 1),
                    numbers(rows * inputs, 2),
                    numbers(outputs, 3),
                );
                for bias in [None, Some(&b[..])] {
                    let packed = Packed::for_isa(&w, bias, inputs, isa).unwrap();
                    assert_eq!(packed.outputs(), outputs);
                    let (w, x64) = (rounded(&w, isa), rounded(&x, isa));
                    for threads in [1, 3] {
                        let mut out = vec![f32::NAN; rows * outputs];
                        packed
                            .apply(&x, &mut out, Epilogue::Write, threads)
                            .unwrap();
                        for (i, out) in out.iter().enumerate() {
                            let (r, n) = (i / outputs, i % outputs);
                            let sum: f64 = (0..inputs)
                                .map(|k| w[n * inputs + k] * x64[r * inputs + k])
                                .sum();
                            let want = sum + bias.map_or(0.0, |b| f64::from(b[n]));
                            assert!(
                                (f64::from(*out) - want).abs() < 3e-5,
                                "{isa:?} {rows} {inputs} {outputs} {i}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rows_do_not_see_each_other() {
        for isa in isas() {
            let (rows, inputs, outputs) = (31, 50, 77);
            let (w, x) = (numbers(outputs * inputs, 1), numbers(rows * inputs, 2));
            let packed = Packed::for_isa(&w, None, inputs, isa).unwrap();
            let mut together = vec![0.0; rows * outputs];
            packed.apply(&x, &mut together, Epilogue::Write, 2).unwrap();
            for r in 0..rows {
                let mut alone = vec![0.0; outputs];
                let row = &x[r * inputs..(r + 1) * inputs];
                packed.apply(row, &mut alone, Epilogue::Write, 1).unwrap();
                assert_eq!(alone, together[r * outputs..(r + 1) * outputs]);
            }
        }
    }

    /// All buffers lie between inaccessible pages.
    #[test]
    fn nothing_beside_the_buffers_is_touched() {
        use crate::cpu::guarded::Guarded;
        let zeros = |count: usize, at_end| Guarded::new(&vec![0; 4 * count], at_end);
        for isa in isas() {
            for (rows, inputs, outputs) in [(1, 1, 1), (3, 33, 31), (8, 17, 65), (13, 64, 97)] {
                let packed =
                    Packed::for_isa(&numbers(outputs * inputs, 1), None, inputs, isa).unwrap();
                for at_end in [false, true] {
                    let (mut x, mut out) =
                        (zeros(rows * inputs, at_end), zeros(rows * outputs, at_end));
                    x.f32s().copy_from_slice(&numbers(rows * inputs, 2));
                    for after in [
                        Epilogue::Write,
                        Epilogue::Add,
                        Epilogue::Activate(Activation::Gelu),
                    ] {
                        packed.apply(x.f32s(), out.f32s(), after, 2).unwrap();
                    }
                    assert!(out.f32s().iter().any(|x| *x != 0.0));
                }
            }
        }
    }

    #[test]
    fn what_comes_after_a_product() {
        let (rows, inputs, outputs) = (13, 20, 77);
        let (w, x) = (numbers(outputs * inputs, 1), numbers(rows * inputs, 2));
        let before = numbers(rows * outputs, 3);
        for isa in isas() {
            let packed = Packed::for_isa(&w, Some(&before[..outputs]), inputs, isa).unwrap();
            let run = |after, threads| {
                let mut out = before.clone();
                packed.apply(&x, &mut out, after, threads).unwrap();
                out
            };
            let plain = run(Epilogue::Write, 1);
            let mut gelu = vec![0.0; plain.len()];
            activate(Activation::Gelu, &plain, &[0.0], &mut gelu, 1).unwrap();
            for threads in [1, 3] {
                assert_eq!(run(Epilogue::Activate(Activation::Gelu), threads), gelu);
                let added = before.iter().zip(&plain).map(|(a, b)| a + b);
                assert!(run(Epilogue::Add, threads).into_iter().eq(added));
                let squares = plain.iter().map(|x| x.max(0.0) * x.max(0.0));
                assert!(
                    run(Epilogue::Activate(Activation::SquaredRelu), threads)
                        .into_iter()
                        .eq(squares)
                );
            }
        }
    }

    #[test]
    fn wrong_input_is_named() {
        assert!(Packed::new(&[0.0; 7], None, 3, false).is_err());
        assert!(Packed::new(&[], None, 3, false).is_err());
        assert!(Packed::new(&[0.0; 6], Some(&[0.0; 3]), 3, false).is_err());
        let packed = Packed::new(&[0.0; 6], None, 3, false).unwrap();
        let refused = |x: usize, out: usize| {
            packed.apply(&vec![0.0; x], &mut vec![0.0; out], Epilogue::Write, 1)
        };
        assert!(
            refused(4, 2)
                .unwrap_err()
                .to_string()
                .contains("rows of 3 and as many of 2")
        );
        assert!(refused(3, 4).is_err());
        assert!(refused(0, 0).is_ok());
    }
}
