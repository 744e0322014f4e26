//! Rows of L tokens as plans over documents: nothing is copied until a row is gathered.
//!
//! Every row begins with BOS, which is clean and never scored (docs/math.md §1). A plan says which
//! tokens follow it and where; changing L, S or the plan never touches the token files.

use std::ops::Range;

use crate::data::store::{TokenStore, Tokens};
use crate::error::{Error, Result, named};

/// Layout of documents in rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Concatenate everything and cut: no padding, blocks may straddle documents.
    Wrap {
        /// Close every row with an EOS of its own, as the paper's code does.
        row_eos: bool,
        /// Score only the last so many tokens of each row; rows then overlap by the rest.
        stride: Option<usize>,
    },
    /// Documents in order; each starts on a block boundary with a BOS of its own, and continues in
    /// the next row where it does not fit.
    Aligned,
    /// Aligned, and a document stays whole where a row can hold it (best-fit decreasing).
    BestFit,
}

impl Packing {
    fn name(self) -> &'static str {
        match self {
            Packing::Wrap { .. } => Self::NAMES[0],
            Packing::Aligned => Self::NAMES[1],
            Packing::BestFit => Self::NAMES[2],
        }
    }

    /// Names of all packings, as configs and the command line spell them.
    pub const NAMES: [&'static str; 3] = ["wrap", "aligned", "best_fit"];

    /// The packing of this name; only `wrap` has an EOS a row, or a stride.
    ///
    /// # Errors
    /// An unknown name, or an option that the packing does not have.
    pub fn parse(name: &str, row_eos: bool, stride: Option<usize>) -> Result<Self> {
        let [wrap, aligned, best_fit] = Self::NAMES;
        let table = [
            (wrap, Packing::Wrap { row_eos, stride }),
            (aligned, Packing::Aligned),
            (best_fit, Packing::BestFit),
        ];
        let packing = named("packing", name, &table)?;
        if name != wrap && (row_eos || stride.is_some()) {
            let allowed = "wrap where rows have a stride or an EOS of their own";
            return Err(Error::config("packing", name, allowed));
        }
        Ok(packing)
    }
}

/// A run of tokens inside a row, behind a BOS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    /// First token, counted over all documents.
    start: u64,
    /// Number of tokens, the BOS in front not included.
    len: u32,
    /// Position of that BOS in the row.
    at: u32,
    /// Number of its first tokens that are a prompt: clean, and never scored.
    clean: u32,
}

/// Rows of `seq_len` tokens aligned to `block_size`, over one data set.
#[derive(Clone, Debug)]
pub struct RowPlan {
    seq_len: usize,
    num_rows: usize,
    num_stream_tokens: u64,
    layout: Layout,
}

#[derive(Clone, Debug)]
enum Layout {
    /// Row r holds the tokens from `r·step` on.
    Wrap {
        step: usize,
        row_eos: bool,
        scored: usize,
    },
    /// Row r holds `segments[rows[r]..rows[r + 1]]`.
    Segments {
        rows: Vec<u32>,
        segments: Vec<Segment>,
    },
}

/// Buffers that one row is written to.
pub struct RowBuffers<'a> {
    /// Ids `[L]`.
    pub x0: &'a mut [i64],
    /// 1 where a token may be noised and is scored `[L]`.
    pub noisable: &'a mut [u8],
    /// Document of each position, -1 for padding `[L]`. Without `documents`, the row counts as one,
    /// and where the plan also has no padding, this may be empty.
    pub doc_ids: &'a mut [i32],
}

impl RowPlan {
    /// Plans the rows of a data set.
    ///
    /// `keep_last` keeps a last row that is not full, padded: for scoring, where every token
    /// counts. Without it `Wrap` drops the tokens that do not fill a row. The other plans pad
    /// anyway and drop nothing.
    ///
    /// # Errors
    /// [`Error::Config`] for a block size that does not divide L, an L below 2 (3 with
    /// `row_eos`), a stride that is no multiple of S below L, a corpus too short for one row, or
    /// prompts in another packing than [`Packing::BestFit`].
    pub fn new(
        store: &TokenStore,
        seq_len: usize,
        block_size: usize,
        packing: Packing,
        keep_last: bool,
    ) -> Result<Self> {
        let shortest = match packing {
            Packing::Wrap { row_eos: true, .. } => 3,
            _ => 2,
        };
        if seq_len < shortest || seq_len > 1 << 24 {
            let allowed = format!("{shortest} to {}", 1 << 24);
            return Err(Error::config("seq_len", seq_len, allowed));
        }
        if block_size == 0 || !seq_len.is_multiple_of(block_size) {
            let allowed = format!("a divisor of seq_len = {seq_len}");
            return Err(Error::config("block_size", block_size, allowed));
        }
        if packing != Packing::BestFit && !store.prompts().is_empty() {
            return Err(Error::config(
                "packing",
                packing.name(),
                "best_fit: this data set has prompts, which stay in a row with their responses",
            ));
        }
        let total = store.num_tokens() as u64;
        let plan = match packing {
            Packing::Wrap { row_eos, stride } => {
                wrap(total, seq_len, block_size, row_eos, stride, keep_last)?
            }
            Packing::Aligned => aligned(store.doc_offsets(), seq_len, block_size),
            Packing::BestFit => best_fit(store, seq_len, block_size),
        };
        if plan.num_rows == 0 {
            return Err(Error::config(
                "seq_len",
                seq_len,
                format!("shorter: the data set's {total} tokens do not fill one row"),
            ));
        }
        Ok(plan)
    }

    /// L.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Returns whether any row may hold padding.
    pub fn may_pad(&self) -> bool {
        match &self.layout {
            Layout::Wrap { step, row_eos, .. } => {
                let room = self.seq_len - 1 - usize::from(*row_eos);
                let ends = self.num_rows.saturating_sub(1) * step + room;
                ends as u64 > self.num_stream_tokens
            }
            Layout::Segments { .. } => true,
        }
    }

    /// Tokens of the data set that are no prompt, whether or not they fell into a row.
    pub fn num_stream_tokens(&self) -> u64 {
        self.num_stream_tokens
    }

    /// Calls `f` with each run of tokens of the store that a row is made of.
    pub fn spans(&self, store: &TokenStore, row: usize, mut f: impl FnMut(Range<usize>)) {
        match &self.layout {
            Layout::Wrap { step, row_eos, .. } => {
                let start = row * step;
                let room = self.seq_len - 1 - usize::from(*row_eos);
                f(start..store.num_tokens().min(start + room));
            }
            Layout::Segments { rows, segments } => {
                for segment in &segments[rows[row] as usize..rows[row + 1] as usize] {
                    f(segment.start as usize..segment.start as usize + segment.len as usize);
                }
            }
        }
    }

    /// Prefetches the tokens of a row that is soon gathered.
    pub fn prefetch(&self, store: &TokenStore, tokens: Tokens<'_>, row: usize) {
        self.spans(store, row, |span| tokens.prefetch(span.start, span.len()));
    }

    /// Writes row `row < num_rows`; returns whether it holds padding. `tokens` are those of the
    /// store, or copies of those of the row.
    ///
    /// With `documents`, `doc_ids` tells documents apart (numbered from 0 in each row); else
    /// every token of the row counts as document 0.
    pub fn gather(
        &self,
        store: &TokenStore,
        tokens: Tokens<'_>,
        row: usize,
        documents: bool,
        out: &mut RowBuffers<'_>,
    ) -> bool {
        let vocab = store.vocab();
        let (bos, eos) = (i64::from(vocab.bos_id), i64::from(vocab.eos_id));
        match &self.layout {
            Layout::Wrap {
                step,
                row_eos,
                scored,
            } => {
                let room = self.seq_len - 1 - usize::from(*row_eos);
                let start = row * step;
                let len = room.min(tokens.len() - start);
                let segment = Segment {
                    start: start as u64,
                    len: len as u32,
                    at: 0,
                    clean: 0,
                };
                place(tokens, segment, bos, 0, out);
                let mut end = 1 + len;
                if *row_eos {
                    out.x0[end] = eos;
                    out.noisable[end] = 1;
                    if !out.doc_ids.is_empty() {
                        out.doc_ids[end] = 0;
                    }
                    end += 1;
                }
                if row > 0 {
                    // Tokens that the previous row scored are context.
                    let context = self.seq_len - scored;
                    out.noisable[..context.min(end)].fill(0);
                }
                if documents {
                    mark_documents(store.doc_offsets(), start as u64, &mut out.doc_ids[1..end]);
                    out.doc_ids[0] = 0;
                }
                pad(out, end, bos)
            }
            Layout::Segments { rows, segments } => {
                let mut end = 0;
                let mut padded = false;
                let mine = &segments[rows[row] as usize..rows[row + 1] as usize];
                for (number, segment) in mine.iter().enumerate() {
                    padded |= fill_padding(out, end, segment.at as usize, bos);
                    place(tokens, *segment, bos, number as i32, out);
                    end = segment.at as usize + 1 + segment.len as usize;
                }
                pad(out, end, bos) | padded
            }
        }
    }
}

/// BOS and the tokens of a segment, as document `number` of the row.
fn place(tokens: Tokens<'_>, segment: Segment, bos: i64, number: i32, out: &mut RowBuffers<'_>) {
    let (at, len) = (segment.at as usize, segment.len as usize);
    out.x0[at] = bos;
    tokens.copy_to(segment.start as usize, &mut out.x0[at + 1..at + 1 + len]);
    let scored = at + 1 + segment.clean as usize;
    out.noisable[at..scored].fill(0);
    out.noisable[scored..at + 1 + len].fill(1);
    if !out.doc_ids.is_empty() {
        out.doc_ids[at..at + 1 + len].fill(number);
    }
}

/// Padding up to the end of the row; returns whether there was any.
fn pad(out: &mut RowBuffers<'_>, from: usize, bos: i64) -> bool {
    let end = out.x0.len();
    fill_padding(out, from, end, bos)
}

fn fill_padding(out: &mut RowBuffers<'_>, from: usize, to: usize, bos: i64) -> bool {
    if from == to {
        return false;
    }
    // BOS is as good an id as any: padding is never a key, never noised, never scored.
    out.x0[from..to].fill(bos);
    out.noisable[from..to].fill(0);
    out.doc_ids[from..to].fill(-1);
    true
}

/// Numbers the documents of consecutive tokens from 0, where each one begins.
fn mark_documents(offsets: &[u64], start: u64, out: &mut [i32]) {
    let mut document = offsets.partition_point(|o| *o <= start);
    let mut number = 0;
    for (i, id) in out.iter_mut().enumerate() {
        while document < offsets.len() && offsets[document] <= start + i as u64 {
            document += 1;
            number += 1;
        }
        *id = number;
    }
}

fn wrap(
    total: u64,
    seq_len: usize,
    block_size: usize,
    row_eos: bool,
    stride: Option<usize>,
    keep_last: bool,
) -> Result<RowPlan> {
    if let Some(stride) = stride {
        if row_eos {
            let allowed = "left out where rows close with EOS";
            return Err(Error::config("stride", stride, allowed));
        }
        if stride == 0 || stride >= seq_len || !stride.is_multiple_of(block_size) {
            let allowed = format!("a multiple of {block_size} below {seq_len}");
            return Err(Error::config("stride", stride, allowed));
        }
    }
    let room = (seq_len - 1 - usize::from(row_eos)) as u64;
    let step = stride.map_or(room, |s| s as u64);
    let beyond = total.saturating_sub(room);
    let num_rows = match (keep_last, total) {
        (true, 0) => 0,
        (true, _) => 1 + beyond.div_ceil(step),
        (false, _) if total < room => 0,
        (false, _) => 1 + beyond / step,
    };
    Ok(RowPlan {
        seq_len,
        num_rows: num_rows as usize,
        num_stream_tokens: total,
        layout: Layout::Wrap {
            step: step as usize,
            row_eos,
            scored: stride.unwrap_or(seq_len),
        },
    })
}

fn aligned(offsets: &[u64], seq_len: usize, block_size: usize) -> RowPlan {
    let mut rows = vec![0u32];
    let mut segments: Vec<Segment> = Vec::new();
    let mut at = 0;
    for w in offsets.windows(2) {
        let (mut start, end) = (w[0], w[1]);
        while start < end {
            // A BOS with nothing behind it would be a wasted block.
            if at + 1 >= seq_len {
                rows.push(segments.len() as u32);
                at = 0;
            }
            let len = (end - start).min((seq_len - at - 1) as u64);
            segments.push(Segment {
                start,
                len: len as u32,
                at: at as u32,
                clean: 0,
            });
            start += len;
            at = (at + 1 + len as usize).next_multiple_of(block_size);
        }
    }
    if at > 0 {
        rows.push(segments.len() as u32);
    }
    from_segments(offsets, seq_len, rows, segments)
}

/// Best-fit decreasing over segment lengths, which are small integers: a stack of open rows for
/// each amount of free room, and a lookup of the smallest that fits.
fn best_fit(store: &TokenStore, seq_len: usize, block_size: usize) -> RowPlan {
    let room = (seq_len - 1) as u64;
    let offsets = store.doc_offsets();
    let mut pieces: Vec<(u64, u32, u32)> = Vec::new();
    for (document, w) in offsets.windows(2).enumerate() {
        let prompt = store.prompts().get(document).map_or(0, |n| u64::from(*n));
        // A prompt that does not fit a row with its response loses its beginning.
        let mut start = w[0].max((w[0] + prompt).min(w[1].saturating_sub(room)));
        while start < w[1] {
            let len = (w[1] - start).min(room);
            let clean = (w[0] + prompt).saturating_sub(start).min(len);
            if clean < len {
                pieces.push((start, len as u32, clean as u32));
            }
            start += len;
        }
    }
    // Stable, so that equal lengths keep their order.
    pieces.sort_by_key(|(_, len, _)| std::cmp::Reverse(*len));
    let blocks = seq_len / block_size;
    let mut open: Vec<Vec<u32>> = vec![Vec::new(); blocks + 1]; // by free blocks
    let mut used: Vec<Vec<Segment>> = Vec::new();
    for (start, len, clean) in pieces {
        let need = (1 + len as usize).div_ceil(block_size);
        let (row, free) = match (need..=blocks).find(|free| !open[*free].is_empty()) {
            Some(free) => (open[free].pop().expect("found non-empty") as usize, free),
            None => {
                used.push(Vec::new());
                (used.len() - 1, blocks)
            }
        };
        let at = ((blocks - free) * block_size) as u32;
        used[row].push(Segment {
            start,
            len,
            at,
            clean,
        });
        open[free - need].push(row as u32);
    }
    let mut rows = vec![0u32];
    let mut segments = Vec::new();
    for row in used {
        segments.extend(row);
        rows.push(segments.len() as u32);
    }
    let mut plan = from_segments(offsets, seq_len, rows, segments);
    plan.num_stream_tokens -= store.prompts().iter().map(|n| u64::from(*n)).sum::<u64>();
    plan
}

fn from_segments(
    offsets: &[u64],
    seq_len: usize,
    rows: Vec<u32>,
    segments: Vec<Segment>,
) -> RowPlan {
    RowPlan {
        seq_len,
        num_rows: rows.len() - 1,
        num_stream_tokens: offsets[offsets.len() - 1] - offsets[0],
        layout: Layout::Segments { rows, segments },
    }
}

#[cfg(test)]
mod tests;
