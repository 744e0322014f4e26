//! Forward: output and log-sum-exp of one head of keys, for every head of queries that reads it.

use super::backend::{Backend, FORWARD_STEP, NV, Operand, QT, ROWS, Run, Softmax};
use super::layout::{Ahead, Rows, row_units};
use super::tiles::{GRAIN, Part, Stream, Tile};
use crate::cpu::scratch::{self, Scratch};
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Keys whose scores are held at once: they, K and V stay in the first-level cache.
const KEYS: usize = 96;

/// One head of keys and values.
pub(super) struct Head {
    pub k: Rows,
    pub v: Rows,
    pub num_keys: usize,
    /// Factor of q . k.
    pub scale: f32,
}

/// One head of queries.
pub(super) struct Queries {
    pub q: Rows,
    pub out: Rows,
    /// Log-sum-exp, one value a query.
    pub lse: *mut f32,
}

/// Sizes of the packed matrices, in units.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    /// Row length of operands that are broadcast.
    pub ld: usize,
    /// Row length of operands that are read as vectors, and of results.
    pub ld_wide: usize,
    /// Columns of those that are worked on.
    pub wide: usize,
    /// Units summed over in q . k.
    pub depth: usize,
}

impl Layout {
    pub fn new<B: Backend>(width: usize) -> Layout {
        let ld = row_units(width, B::PAIR);
        Layout {
            ld,
            ld_wide: if B::PAIR == 1 {
                ld
            } else {
                width.next_multiple_of(16)
            },
            wide: width.next_multiple_of(B::W),
            depth: width.div_ceil(B::PAIR),
        }
    }
}

struct Buffers {
    k: *mut f32,
    v: *mut f32,
    qt: *mut f32,
    s: *mut f32,
    out: *mut f32,
    /// Maxima of a block; then max, sum, shrink, 1/sum of the running softmax.
    lanes: [*mut f32; 5],
}

/// # Safety
/// All rows exist that the plan and `num_keys` name, and the processor has the backend's
/// instructions. Nothing else writes `out` and `lse` of these queries.
///
/// `next` are rows that this thread will probably read after this call.
pub(super) unsafe fn forward<B: Backend>(
    head: &Head,
    queries: &[Queries],
    tiles: &[Tile],
    next: &[(Rows, Range<usize>)],
) {
    let layout = Layout::new::<B>(head.k.width);
    let padded = (head.num_keys + FORWARD_STEP).next_multiple_of(2);
    let group = NV * B::W;
    let lengths = [
        padded * layout.ld,
        padded * layout.ld_wide,
        QT * layout.ld,
        QT * layout.ld,
        KEYS * group,
        group * layout.ld_wide,
        5 * group.next_multiple_of(16),
    ];
    scratch::with(&lengths, |scratch: &mut Scratch<'_>| {
        let [k, v, q, qt, s, out, lanes] = lengths.map(|len| scratch.take(len));
        // SAFETY: `lanes` holds five pieces of `group` values.
        let lanes = [0, 1, 2, 3, 4].map(|i| unsafe { lanes.add(i * group) });
        let buffers = Buffers {
            k,
            v,
            qt,
            s,
            out,
            lanes,
        };
        // SAFETY: `padded` rows in both pieces; the rows of K and V exist.
        unsafe {
            B::rows(&head.k, 0, head.num_keys, padded, k, layout.ld);
            if B::PAIR == 1 {
                B::rows(&head.v, 0, head.num_keys, padded, v, layout.ld_wide);
            } else {
                B::pairs(&head.v, 0, head.num_keys, padded, v, layout.ld_wide);
            }
        }
        let mut work = each_tile(queries, tiles).peekable();
        while let Some((queries, tile)) = work.next() {
            let mut ahead = Ahead(match work.peek() {
                Some((queries, tile)) => vec![(queries.q, tile.range())],
                None => next.to_vec(),
            });
            ahead.0.push((queries.out, tile.range()));
            // SAFETY: by the contract of this function; the buffers are as long as above.
            unsafe {
                B::rows(&queries.q, tile.first, tile.rows, QT, q, layout.ld);
                B::transposed(q, layout.ld, layout.depth, qt);
            }
            for from in (0..tile.rows).step_by(group) {
                // SAFETY: as above, for a group of the tile.
                unsafe {
                    attend_group::<B>(head, queries, tile, from, layout, &buffers, &mut ahead);
                }
            }
        }
    });
}

/// All tiles of one head of queries, then those of the next.
pub(super) fn each_tile<'a, Q>(
    queries: &'a [Q],
    tiles: &'a [Tile],
) -> impl Iterator<Item = (&'a Q, &'a Tile)> {
    queries
        .iter()
        .flat_map(move |queries| tiles.iter().map(move |tile| (queries, tile)))
}

/// Queries `from .. from + NV * W` of a tile.
///
/// # Safety
/// As [`forward`].
unsafe fn attend_group<B: Backend>(
    head: &Head,
    queries: &Queries,
    tile: &Tile,
    from: usize,
    layout: Layout,
    buffers: &Buffers,
    ahead: &mut Ahead,
) {
    let group = NV * B::W;
    let ld_wide = layout.ld_wide;
    let [_, max, sum, _, factor] = buffers.lanes;
    // SAFETY: pieces of `group` values and rows.
    unsafe {
        buffers.out.write_bytes(0, group * ld_wide);
        sum.write_bytes(0, group);
        for i in 0..group {
            *max.add(i) = B::FLOOR;
        }
    }
    for stream in &tile.streams {
        for part in stream.parts(from, group / GRAIN, B::PAIR, FORWARD_STEP) {
            // SAFETY: as above.
            unsafe { attend_part::<B>(head, stream, from, part, layout, buffers, ahead) };
        }
    }
    let rows = group.min(tile.rows - from);
    // SAFETY: `rows` lanes and rows of this group, which exist in `out` and `lse`.
    unsafe {
        for i in 0..rows {
            let (max, sum) = (*max.add(i), *sum.add(i));
            let seen = sum > 0.0 || sum.is_nan();
            *factor.add(i) = if seen { 1.0 / sum } else { 0.0 };
            let lse = if seen {
                (max + sum.log2()) * LN_2
            } else {
                f32::NEG_INFINITY
            };
            *queries.lse.add(tile.first + from + i) = lse;
        }
        B::unpack(
            buffers.out,
            ld_wide,
            &queries.out,
            tile.first + from,
            rows,
            factor,
        );
    }
}

/// Some keys against the queries of a group that see them.
///
/// # Safety
/// As [`forward`], with `from` a group of the tile that `stream` belongs to.
unsafe fn attend_part<B: Backend>(
    head: &Head,
    stream: &Stream,
    from: usize,
    part: Part,
    layout: Layout,
    buffers: &Buffers,
    ahead: &mut Ahead,
) {
    let group = NV * B::W;
    let Layout {
        ld,
        ld_wide,
        wide,
        depth,
    } = layout;
    // First lane of the group that takes part, and how many do.
    let (lane, lanes) = (part.grain * GRAIN, part.grains * GRAIN);
    let span = stream.span(from + lane, lanes);
    let mut key = part.keys.start;
    while key < part.keys.end {
        let keys = KEYS.min((part.keys.end - key).next_multiple_of(FORWARD_STEP));
        let run = Run {
            keys,
            vectors: lanes / B::W,
            first: key as i32,
            full: (span.full_lo, span.full_hi),
            lo: stream.lo[from + lane..].as_ptr(),
            hi: stream.hi[from + lane..].as_ptr(),
            depth,
            scale: head.scale * LOG2_E,
        };
        // SAFETY: fewer than FORWARD_STEP keys lie beyond the last, and that many rows of zeros
        // follow K and V; `lanes` lanes of the group begin at `lane`.
        unsafe {
            let [block_max, max, sum, shrink, _] = buffers.lanes.map(|x| x.add(lane));
            let state = Softmax { max, sum, shrink };
            let (qt, s) = (buffers.qt.add(from * ld + lane), buffers.s.add(lane));
            B::scores(&run, ld, buffers.k.add(key * ld), qt, s, block_max);
            if B::softmax(&run, s, block_max, &state) {
                let out = buffers.out.add(lane * ld_wide);
                B::rescale(out, lanes, ld_wide, wide, state.shrink);
            }
            let v = buffers.v.add(key / B::PAIR * ld_wide);
            for row in (0..lanes).step_by(ROWS) {
                ahead.step();
                let a = Operand {
                    a: s.add(row),
                    transposed: true,
                    ld: group,
                    depth: keys / B::PAIR,
                };
                let out = buffers.out.add((lane + row) * ld_wide);
                B::accumulate(a, v, out, ld_wide, wide);
            }
        }
        key += keys;
    }
}
