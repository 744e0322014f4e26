//! Gather and noise in one pass: rows go from the token file into the caller's buffers.

use rayon::prelude::*;

use crate::cpu::buffers::{check_len, whole_rows};
use crate::cpu::multiversion::multiversion;
use crate::cpu::threads::is_owner;
use crate::data::pack::{RowBuffers, RowPlan};
use crate::data::store::{TokenStore, Tokens};
use crate::error::{Error, Result};
use crate::noise::{NoiseKey, NoiseSpec, Scratch};

/// Batches below so many tokens are filled by the calling thread: starting others costs more.
const PARALLEL_TOKENS: usize = 1 << 17;

/// Returns whether other threads take part in a batch. In a forked child they never do: rayon's
/// threads do not survive a fork.
fn is_parallel(tokens: usize) -> bool {
    tokens >= PARALLEL_TOKENS && is_owner()
}

/// Shuffled rows lie anywhere in memory: while one is copied, the next so many are fetched.
const ROWS_AHEAD: usize = 4;

/// Buffers of B clean rows of L tokens.
pub struct CleanBatch<'a> {
    /// Ids [B, L].
    pub x0: &'a mut [i64],
    /// 1 where a token may be noised [B, L].
    pub noisable: &'a mut [u8],
    /// Documents, -1 for padding [B, L]; may be empty where `documents` is false and
    /// [`RowPlan::may_pad`] is false.
    pub doc_ids: &'a mut [i32],
}

/// Buffers of the noise of B rows of L tokens in K blocks.
pub struct NoiseBatch<'a> {
    /// 1 where a token is masked [B, L].
    pub mask: &'a mut [u8],
    /// Level of each block [B, K].
    pub mask_prob: &'a mut [f32],
    /// Loss weight of each block's masked tokens [B, K].
    pub weight: &'a mut [f32],
}

/// Noised ids of a training step, and the positions and weights of its loss.
pub struct NoisedBatch<'a> {
    /// Ids with the mask token where tokens are masked [B, L].
    pub xt: &'a mut [i64],
    /// The noise itself.
    pub noise: NoiseBatch<'a>,
    /// Room for the flat positions b·L+i of masked tokens [B·L].
    pub masked: &'a mut [i64],
    /// Room for the loss weight of each of them [B·L].
    pub masked_weight: &'a mut [f32],
}

/// Counts of a filled batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// Tokens that may be noised.
    pub noisable: u64,
    /// Tokens that are masked: the part of `masked` that was written.
    pub masked: usize,
    /// True if any row holds padding.
    pub padded: bool,
}

fn check_rows(plan: &RowPlan, rows: &[u64]) -> Result<()> {
    match rows.iter().find(|r| **r >= plan.num_rows() as u64) {
        None => Ok(()),
        Some(row) => Err(Error::config(
            "row",
            row,
            format!("below the {} rows", plan.num_rows()),
        )),
    }
}

/// Prefetches the first rows, all at once.
fn prefetch_first(store: &TokenStore, tokens: Tokens<'_>, plan: &RowPlan, rows: &[u64]) {
    for row in rows.iter().take(ROWS_AHEAD) {
        plan.prefetch(store, tokens, *row as usize);
    }
}

/// Prefetches the row that is read [`ROWS_AHEAD`] rows after row `index`.
fn prefetch_after(
    store: &TokenStore,
    tokens: Tokens<'_>,
    plan: &RowPlan,
    rows: &[u64],
    index: usize,
) {
    if let Some(row) = rows.get(index + ROWS_AHEAD) {
        plan.prefetch(store, tokens, *row as usize);
    }
}

/// Checks that rows `key.row..key.row + rows` are in the global batch, and that its blocks can be
/// numbered.
fn check_key(key: &NoiseKey, rows: usize, blocks: usize) -> Result<()> {
    let end = key.row.checked_add(rows as u64);
    if end.is_none_or(|end| end > key.rows) {
        let allowed = format!("at least first_row = {} and these {rows} rows", key.row);
        return Err(Error::config("num_rows", key.rows, allowed));
    }
    let all = key.rows.checked_mul(blocks as u64);
    if all.is_none_or(|all| all > 1 << 63) {
        let allowed = format!("few enough that its {blocks} blocks a row number at most 2^63");
        return Err(Error::config("num_rows", key.rows, allowed));
    }
    Ok(())
}

impl<'a> CleanBatch<'a> {
    fn check(&self, plan: &RowPlan, documents: bool, tokens: usize) -> Result<()> {
        check_len("x0", tokens, self.x0.len())?;
        check_len("noisable", tokens, self.noisable.len())?;
        if self.doc_ids.is_empty() && !documents && !plan.may_pad() {
            return Ok(());
        }
        check_len("doc_ids", tokens, self.doc_ids.len())
    }

    /// Cuts buffers of checked sizes into rows of L tokens.
    fn split(self, l: usize) -> impl Iterator<Item = RowBuffers<'a>> {
        let mut doc_ids = self.doc_ids.chunks_mut(l);
        let rows = self.x0.chunks_mut(l).zip(self.noisable.chunks_mut(l));
        rows.map(move |(x0, noisable)| RowBuffers {
            x0,
            noisable,
            doc_ids: doc_ids.next().unwrap_or_default(),
        })
    }
}

impl NoiseBatch<'_> {
    fn check(&self, tokens: usize, blocks: usize) -> Result<()> {
        check_len("mask", tokens, self.mask.len())?;
        check_len("mask_prob", blocks, self.mask_prob.len())?;
        check_len("weight", blocks, self.weight.len())
    }
}

/// Writes the given rows; returns whether any holds padding. `tokens` and `documents` as in
/// [`RowPlan::gather`].
///
/// # Errors
/// A row that the plan does not have, or a buffer of another size.
pub fn gather(
    store: &TokenStore,
    tokens: Tokens<'_>,
    plan: &RowPlan,
    rows: &[u64],
    documents: bool,
    out: CleanBatch<'_>,
) -> Result<bool> {
    check_rows(plan, rows)?;
    let l = plan.seq_len();
    out.check(plan, documents, rows.len() * l)?;
    prefetch_first(store, tokens, plan, rows);
    let one = |(index, mut buffers): (usize, RowBuffers<'_>)| {
        prefetch_after(store, tokens, plan, rows, index);
        plan.gather(store, tokens, rows[index] as usize, documents, &mut buffers)
    };
    let parts = out.split(l).enumerate();
    if !is_parallel(rows.len() * l) {
        return Ok(parts.map(one).fold(false, |any, padded| any | padded));
    }
    let parts: Vec<_> = parts.collect();
    Ok(parts
        .into_par_iter()
        .map(one)
        .reduce(|| false, |a, b| a | b))
}

/// Noises rows that are already there: row i of the buffers has the randomness of `key.row + i`.
///
/// # Errors
/// Those of [`NoiseSpec::check`], or a buffer of another size.
pub fn noise(
    spec: &NoiseSpec,
    key: NoiseKey,
    seq_len: usize,
    block_size: usize,
    x0: &[i64],
    noisable: &[u8],
    out: NoiseBatch<'_>,
) -> Result<()> {
    spec.check(seq_len, block_size)?;
    whole_rows("x0", x0.len(), seq_len)?;
    let k = seq_len / block_size;
    let rows = x0.len() / seq_len;
    check_len("noisable", x0.len(), noisable.len())?;
    // The union of all bytes is found in vector registers; a search for the first one is not.
    if noisable.iter().fold(0, |all, n| all | n) > 1 {
        let other = noisable.iter().find(|n| **n > 1).unwrap_or(&0);
        return Err(Error::config("noisable", other, "0 or 1"));
    }
    check_key(&key, rows, k)?;
    out.check(x0.len(), rows * k)?;
    let one = |scratch: &mut Scratch, i: usize, ids, noisable, mask, prob, weight| {
        let key = NoiseKey {
            row: key.row + i as u64,
            ..key
        };
        spec.noise_row(&key, ids, noisable, block_size, mask, prob, weight, scratch);
    };
    if !is_parallel(x0.len()) {
        let mut scratch = Scratch::default();
        let parts = x0
            .chunks(seq_len)
            .zip(noisable.chunks(seq_len))
            .zip(out.mask.chunks_mut(seq_len))
            .zip(out.mask_prob.chunks_mut(k))
            .zip(out.weight.chunks_mut(k));
        for (i, ((((ids, noisable), mask), prob), weight)) in parts.enumerate() {
            one(&mut scratch, i, ids, noisable, mask, prob, weight);
        }
        return Ok(());
    }
    x0.par_chunks(seq_len)
        .zip(noisable.par_chunks(seq_len))
        .zip(out.mask.par_chunks_mut(seq_len))
        .zip(out.mask_prob.par_chunks_mut(k))
        .zip(out.weight.par_chunks_mut(k))
        .enumerate()
        .for_each_init(
            Scratch::default,
            |scratch, (i, ((((ids, noisable), mask), prob), weight))| {
                one(scratch, i, ids, noisable, mask, prob, weight);
            },
        );
    Ok(())
}

/// Buffers of B noised rows of L tokens in K blocks, owned.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs, reason = "as in CleanBatch, NoiseBatch and NoisedBatch")]
pub struct OwnedBatch {
    pub x0: Vec<i64>,
    pub noisable: Vec<u8>,
    pub doc_ids: Vec<i32>,
    pub xt: Vec<i64>,
    pub mask: Vec<u8>,
    pub mask_prob: Vec<f32>,
    pub weight: Vec<f32>,
    pub masked: Vec<i64>,
    pub masked_weight: Vec<f32>,
}

impl OwnedBatch {
    /// Room for `rows` rows of `seq_len` tokens in blocks of `block_size`.
    pub fn new(rows: usize, seq_len: usize, block_size: usize) -> Self {
        let (tokens, blocks) = (rows * seq_len, rows * (seq_len / block_size));
        OwnedBatch {
            x0: vec![0; tokens],
            noisable: vec![0; tokens],
            doc_ids: vec![0; tokens],
            xt: vec![0; tokens],
            mask: vec![0; tokens],
            mask_prob: vec![0.0; blocks],
            weight: vec![0.0; blocks],
            masked: vec![0; tokens],
            masked_weight: vec![0.0; tokens],
        }
    }

    /// The buffers as [`gather_noised`] takes them.
    pub fn views(&mut self) -> (CleanBatch<'_>, NoisedBatch<'_>) {
        let clean = CleanBatch {
            x0: &mut self.x0,
            noisable: &mut self.noisable,
            doc_ids: &mut self.doc_ids,
        };
        let noised = NoisedBatch {
            xt: &mut self.xt,
            noise: NoiseBatch {
                mask: &mut self.mask,
                mask_prob: &mut self.mask_prob,
                weight: &mut self.weight,
            },
            masked: &mut self.masked,
            masked_weight: &mut self.masked_weight,
        };
        (clean, noised)
    }
}

/// Gathers and noises rows for a training step.
///
/// # Errors
/// As [`gather`] and [`noise`].
#[allow(clippy::too_many_arguments)]
pub fn gather_noised(
    store: &TokenStore,
    tokens: Tokens<'_>,
    plan: &RowPlan,
    spec: &NoiseSpec,
    key: NoiseKey,
    rows: &[u64],
    block_size: usize,
    documents: bool,
    clean: CleanBatch<'_>,
    out: NoisedBatch<'_>,
) -> Result<Filled> {
    let l = plan.seq_len();
    let size = rows.len() * l;
    check_len("xt", size, out.xt.len())?;
    check_len("masked", size, out.masked.len())?;
    check_len("masked_weight", size, out.masked_weight.len())?;
    let noise = out.noise;
    check_rows(plan, rows)?;
    spec.check(l, block_size)?;
    check_key(&key, rows.len(), l / block_size)?;
    clean.check(plan, documents, size)?;
    noise.check(size, size / block_size)?;
    let k = l / block_size;
    let mask_id = i64::from(store.vocab().mask_id);
    prefetch_first(store, tokens, plan, rows);
    let one = |scratch: &mut Scratch, index: usize, row: u64, mut out: RowOut<'_>| {
        prefetch_after(store, tokens, plan, rows, index);
        let padded = plan.gather(store, tokens, row as usize, documents, &mut out.clean);
        let key = NoiseKey {
            row: key.row + index as u64,
            ..key
        };
        spec.noise_row(
            &key,
            out.clean.x0,
            out.clean.noisable,
            block_size,
            out.mask,
            out.mask_prob,
            out.weight,
            scratch,
        );
        replace_masked(out.clean.x0, out.mask, mask_id, out.xt);
        Filled {
            noisable: out.clean.noisable.iter().map(|n| u64::from(*n)).sum(),
            masked: out.list((index * l) as i64, block_size),
            padded,
        }
    };
    let outs = RowOut::split(clean, noise, out.xt, out.masked, out.masked_weight, l, k);
    let filled: Vec<Filled> = if !is_parallel(size) {
        let mut scratch = Scratch::default();
        let parts = outs.into_iter().zip(rows).enumerate();
        parts
            .map(|(i, (out, row))| one(&mut scratch, i, *row, out))
            .collect()
    } else {
        let parts = outs.into_par_iter().zip(rows).enumerate();
        parts
            .map_init(Scratch::default, |scratch, (i, (out, row))| {
                one(scratch, i, *row, out)
            })
            .collect()
    };
    // Each row has listed its masked tokens in its own room; here the lists close up.
    let mut all = Filled {
        noisable: 0,
        masked: 0,
        padded: false,
    };
    for (i, row) in filled.iter().enumerate() {
        let room = i * l..i * l + row.masked;
        out.masked.copy_within(room.clone(), all.masked);
        out.masked_weight.copy_within(room, all.masked);
        all.noisable += row.noisable;
        all.masked += row.masked;
        all.padded |= row.padded;
    }
    Ok(all)
}

/// The part of all buffers that belongs to one row.
struct RowOut<'a> {
    clean: RowBuffers<'a>,
    xt: &'a mut [i64],
    mask: &'a mut [u8],
    mask_prob: &'a mut [f32],
    weight: &'a mut [f32],
    masked: &'a mut [i64],
    masked_weight: &'a mut [f32],
}

impl<'a> RowOut<'a> {
    /// Cuts buffers of checked sizes into rows of L tokens and K blocks.
    fn split(
        clean: CleanBatch<'a>,
        noise: NoiseBatch<'a>,
        xt: &'a mut [i64],
        masked: &'a mut [i64],
        masked_weight: &'a mut [f32],
        l: usize,
        k: usize,
    ) -> Vec<Self> {
        let mut xt = xt.chunks_mut(l);
        let mut mask = noise.mask.chunks_mut(l);
        let mut mask_prob = noise.mask_prob.chunks_mut(k);
        let mut weight = noise.weight.chunks_mut(k);
        let mut masked = masked.chunks_mut(l);
        let mut masked_weight = masked_weight.chunks_mut(l);
        let row = |clean| {
            Some(RowOut {
                clean,
                xt: xt.next()?,
                mask: mask.next()?,
                mask_prob: mask_prob.next()?,
                weight: weight.next()?,
                masked: masked.next()?,
                masked_weight: masked_weight.next()?,
            })
        };
        clean.split(l).map_while(row).collect()
    }

    /// Lists the masked tokens at the front of the row's room, with their weights; returns their
    /// number. `first` is the flat position of the row's first token.
    fn list(&mut self, first: i64, block_size: usize) -> usize {
        let mut count = 0;
        let blocks = self.mask.chunks_exact(block_size).zip(&*self.weight);
        for (block, (masks, weight)) in blocks.enumerate() {
            let start = block * block_size;
            for (i, m) in masks.iter().enumerate() {
                // Written always, kept only where masked: no branch to mispredict. `count` never
                // passes the token that is looked at.
                self.masked[count] = first + (start + i) as i64;
                self.masked_weight[count] = *weight;
                count += usize::from(*m);
            }
        }
        count
    }
}

multiversion! {
    fn replace_masked(x0: &[i64], mask: &[u8], mask_id: i64, xt: &mut [i64]) {
        for ((xt, x0), mask) in xt.iter_mut().zip(x0).zip(mask) {
            *xt = if *mask == 1 { mask_id } else { *x0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::pack::Packing;
    use crate::data::store::Vocab;
    use crate::noise::Estimator;
    use crate::noise::Schedule;
    use crate::noise::Weighting;

    const VOCAB: Vocab = Vocab {
        vocab_size: 1 << 20,
        bos_id: 1,
        eos_id: 2,
        mask_id: 3,
    };

    fn plan(tokens: i32, l: usize, s: usize) -> (TokenStore, RowPlan) {
        let ids = (10..10 + tokens).collect();
        let store = TokenStore::from_arrays(ids, &[tokens as u64], VOCAB).unwrap();
        let packing = Packing::Wrap {
            row_eos: false,
            stride: None,
        };
        let plan = RowPlan::new(&store, l, s, packing, true).unwrap();
        (store, plan)
    }

    fn spec() -> NoiseSpec {
        let estimator = Estimator::Count {
            probs: None,
            stratum: None,
        };
        NoiseSpec::new(
            Schedule::LogLinear,
            estimator,
            None,
            false,
            Weighting::Nelbo,
            None,
        )
        .unwrap()
    }

    fn fill(
        (store, plan): &(TokenStore, RowPlan),
        s: usize,
        rows: &[u64],
        first: u64,
        global: u64,
    ) -> (OwnedBatch, Filled) {
        let mut b = OwnedBatch::new(rows.len(), plan.seq_len(), s);
        let key = NoiseKey {
            seed: 5,
            step: 2,
            row: first,
            rows: global,
        };
        let (clean, noised) = b.views();
        let filled = gather_noised(
            store,
            store.tokens(),
            plan,
            &spec(),
            key,
            rows,
            s,
            false,
            clean,
            noised,
        )
        .unwrap();
        (b, filled)
    }

    /// Documents need no buffer where no row can hold padding; elsewhere its absence is an error.
    #[test]
    fn documents_may_be_left_out_where_no_row_pads() {
        let rows = [3, 0, 5];
        let run = |data: &(TokenStore, RowPlan), documents, ids: usize| {
            let (mut x0, mut noisable, mut doc_ids) = (vec![-7; 48], vec![7; 48], vec![-7; ids]);
            let clean = CleanBatch {
                x0: &mut x0,
                noisable: &mut noisable,
                doc_ids: &mut doc_ids,
            };
            let padded = gather(&data.0, data.0.tokens(), &data.1, &rows, documents, clean)?;
            Ok::<_, Error>((x0, noisable, padded))
        };
        let full = plan(15 * 6, 16, 4);
        assert!(!full.1.may_pad());
        let without = run(&full, false, 0).unwrap();
        assert_eq!(without, run(&full, false, 48).unwrap());
        assert!(!without.2 && without.0[1] == 10 + 3 * 15);
        let padded = plan(15 * 6 - 1, 16, 4);
        assert!(padded.1.may_pad());
        for (data, documents) in [(&full, true), (&padded, false)] {
            let refused = run(data, documents, 0).unwrap_err().to_string();
            assert!(refused.contains("doc_ids = 0 elements"), "{refused}");
        }
    }

    #[test]
    fn parts_agree_with_each_other() {
        let data = plan(1000, 16, 4);
        let (b, filled) = fill(&data, 4, &[3, 0, 66], 0, 3);
        assert!(filled.padded && b.doc_ids[3 * 16 - 1] == -1);
        assert_eq!(
            filled.noisable,
            b.noisable.iter().map(|n| u64::from(*n)).sum::<u64>()
        );
        let flat: Vec<i64> = (0..48).filter(|i| b.mask[*i as usize] == 1).collect();
        assert_eq!(b.masked[..filled.masked], flat);
        for (at, w) in b.masked[..filled.masked].iter().zip(&b.masked_weight) {
            assert_eq!(*w, b.weight[*at as usize / 4]);
        }
        for i in 0..48 {
            assert_eq!(b.xt[i], if b.mask[i] == 1 { 3 } else { b.x0[i] });
        }
    }

    /// A micro-batch has the noise that its rows have in the whole batch, and so have the rows of
    /// a batch large enough for several threads.
    #[test]
    fn noise_does_not_depend_on_the_cut() {
        let data = plan(300_000, 128, 4);
        let rows: Vec<u64> = (0..2000).collect();
        let (whole, _) = fill(&data, 4, &rows, 0, 2000);
        for part in [0..700usize, 700..2000] {
            let (b, _) = fill(&data, 4, &rows[part.clone()], part.start as u64, 2000);
            assert_eq!(b.xt, whole.xt[part.start * 128..part.end * 128]);
            assert_eq!(b.weight, whole.weight[part.start * 32..part.end * 32]);
        }
    }

    /// Rows outside the global batch, and numbers that cannot be multiplied.
    #[test]
    fn noise_of_impossible_numbers_is_refused() {
        let refused = |seq_len: usize, block_size: usize, row: u64, rows: u64, n: u8| {
            let mut b = OwnedBatch::new(2, 8, 4);
            let key = NoiseKey {
                seed: 0,
                step: 0,
                row,
                rows,
            };
            let (x0, noisable) = (vec![9; 16], vec![n; 16]);
            let (_, out) = b.views();
            let done = noise(&spec(), key, seq_len, block_size, &x0, &noisable, out.noise);
            done.map_err(|e| e.to_string()).err().unwrap_or_default()
        };
        assert_eq!(refused(8, 4, 3, 5, 1), "");
        assert!(refused(0, 4, 0, 2, 1).contains("seq_len = 0: must be at least 1"));
        assert!(refused(8, 0, 0, 2, 1).contains("block_size = 0"));
        assert!(refused(8, 4, 4, 5, 1).contains("num_rows = 5: must be at least first_row = 4"));
        assert!(refused(8, 4, u64::MAX, u64::MAX, 1).contains("num_rows = 18446744073709551615"));
        assert!(refused(8, 4, 0, u64::MAX, 1).contains("number at most 2^63"));
        assert!(refused(8, 4, 0, 2, 7).contains("noisable = 7: must be 0 or 1"));
    }

    #[test]
    fn wrong_rows_and_buffers_are_named() {
        let (store, plan) = plan(100, 16, 4);
        let wrong = |row: u64, size: usize| {
            let clean = CleanBatch {
                x0: &mut vec![0; size],
                noisable: &mut [],
                doc_ids: &mut [],
            };
            let refused = gather(&store, store.tokens(), &plan, &[row], false, clean);
            refused.unwrap_err().to_string()
        };
        let far = wrong(7, 16);
        assert!(far.contains("row = 7: must be below the 7 rows"), "{far}");
        let short = wrong(0, 15);
        assert!(short.contains("x0 = 15 elements"), "{short}");
    }
}
