//! Backward: gradients of one head of keys, summed over the heads of queries that read it.
//!
//! One thread computes all tiles of a head of keys, so that the order of sums does not depend on
//! the number of threads.

use super::backend::{
    BACKWARD_STEP, Backend, Gradients, NV, Operand, QT, ROWS, Run, ZIP_ROW, tile_row,
};
use super::forward::{Head, Layout, each_tile};
use super::layout::{Ahead, Rows};
use super::tiles::{GRAIN, Part, Stream, Tile, split};
use crate::cpu::scratch::{self, Scratch};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Keys whose P and dS are held at once; a multiple of BACKWARD_STEP and ROWS.
const KEYS: usize = 48;
const GRAINS: usize = QT / GRAIN;

/// One head of queries, its gradients and its results of the forward pass.
pub(super) struct Queries {
    pub q: Rows,
    pub out: Rows,
    pub d_out: Rows,
    pub lse: *const f32,
    pub dq: Rows,
}

/// Operands of one tensor's rows: broadcast and, for pairs, interleaved.
#[derive(Clone, Copy)]
struct Packed {
    rows: *mut f32,
    pairs: *mut f32,
}

struct Buffers {
    k: Packed,
    v: *mut f32,
    dk: *mut f32,
    dv: *mut f32,
    q: Packed,
    qt: *mut f32,
    d_out: Packed,
    d_out_t: *mut f32,
    dq: *mut f32,
    p: *mut f32,
    ds: *mut f32,
    ds_zip: *mut f32,
    lse: *mut f32,
    delta: *mut f32,
    factor: *mut f32,
}

/// # Safety
/// As [`super::forward::forward`], `next` too; nothing else writes the gradients of this head.
pub(super) unsafe fn backward<B: Backend>(
    head: &Head,
    queries: &[Queries],
    tiles: &[Tile],
    dk: &Rows,
    dv: &Rows,
    next: &[(Rows, Range<usize>)],
) {
    let layout = Layout::new::<B>(head.k.width);
    let Layout { ld, ld_wide, .. } = layout;
    let keys = head.num_keys;
    let padded = keys + KEYS;
    let double = B::PAIR - 1; // interleaved copies exist for pairs only
    let lengths = [
        padded * ld,
        double * padded.div_ceil(2) * ld_wide,
        padded * ld,
        padded * ld_wide,
        padded * ld_wide,
        QT * ld,
        double * QT / 2 * ld_wide,
        QT * ld,
        QT * ld,
        double * QT / 2 * ld_wide,
        QT * ld,
        QT * ld_wide,
        KEYS * tile_row(B::PAIR),
        KEYS * tile_row(B::PAIR),
        double * KEYS * ZIP_ROW,
        QT,
        QT,
        keys.max(QT),
    ];
    scratch::with(&lengths, |scratch: &mut Scratch<'_>| {
        let [
            k,
            k_pairs,
            v,
            dk_sum,
            dv_sum,
            q,
            q_pairs,
            qt,
            d_out,
            d_out_pairs,
            d_out_t,
            dq,
            p,
            ds,
            ds_zip,
            lse,
            delta,
            factor,
        ] = lengths.map(|len| scratch.take(len));
        let packed = |rows, pairs| Packed {
            rows,
            pairs: if B::PAIR == 1 { rows } else { pairs },
        };
        let buffers = Buffers {
            k: packed(k, k_pairs),
            v,
            dk: dk_sum,
            dv: dv_sum,
            q: packed(q, q_pairs),
            qt,
            d_out: packed(d_out, d_out_pairs),
            d_out_t,
            dq,
            p,
            ds,
            ds_zip: if B::PAIR == 1 { ds } else { ds_zip },
            lse,
            delta,
            factor,
        };
        // SAFETY: the pieces are as long as written above; the rows of K and V exist.
        unsafe {
            pack::<B>(&head.k, (0, keys, padded), layout, buffers.k);
            B::rows(&head.v, 0, keys, padded, v, ld);
            dk_sum.write_bytes(0, padded * ld_wide);
            dv_sum.write_bytes(0, padded * ld_wide);
            for i in 0..keys.max(QT) {
                *factor.add(i) = head.scale;
            }
        }
        let mut work = each_tile(queries, tiles).peekable();
        while let Some((queries, tile)) = work.next() {
            let mut ahead = Ahead(match work.peek() {
                Some((queries, tile)) => [queries.d_out, queries.out, queries.q]
                    .map(|rows| (rows, tile.range()))
                    .into(),
                None => [next, &[(*dv, 0..keys), (*dk, 0..keys)]].concat(),
            });
            ahead.0.push((queries.dq, tile.range()));
            // SAFETY: by the contract of this function.
            unsafe { tile_gradients::<B>(head, queries, tile, layout, &buffers, &mut ahead) };
        }
        // SAFETY: `keys` rows and factors; dV is not scaled.
        unsafe {
            B::unpack(dk_sum, ld_wide, dk, 0, keys, factor);
            for i in 0..keys {
                *factor.add(i) = 1.0;
            }
            B::unpack(dv_sum, ld_wide, dv, 0, keys, factor);
        }
    });
}

/// # Safety
/// The rows `from .. from + n` exist; `to` holds `padded` rows.
unsafe fn pack<B: Backend>(
    src: &Rows,
    (from, n, padded): (usize, usize, usize),
    layout: Layout,
    to: Packed,
) {
    // SAFETY: by the contract of this function.
    unsafe {
        B::rows(src, from, n, padded, to.rows, layout.ld);
        if B::PAIR == 2 {
            B::pairs(src, from, n, padded, to.pairs, layout.ld_wide);
        }
    }
}

/// # Safety
/// As [`backward`], with the buffers it made.
unsafe fn tile_gradients<B: Backend>(
    head: &Head,
    queries: &Queries,
    tile: &Tile,
    layout: Layout,
    buffers: &Buffers,
    ahead: &mut Ahead,
) {
    let Layout {
        ld, ld_wide, depth, ..
    } = layout;
    let rows = (tile.first, tile.rows, QT);
    // SAFETY: QT rows or values in every piece; the tile's rows exist.
    unsafe {
        pack::<B>(&queries.q, rows, layout, buffers.q);
        pack::<B>(&queries.d_out, rows, layout, buffers.d_out);
        B::transposed(buffers.q.rows, ld, depth, buffers.qt);
        B::transposed(buffers.d_out.rows, ld, depth, buffers.d_out_t);
        buffers.delta.write_bytes(0, QT);
        B::row_dots(
            &queries.out,
            &queries.d_out,
            tile.first,
            tile.rows,
            buffers.delta,
        );
        for i in 0..QT {
            // A query that saw nothing, or is absent: P = 2^(s - inf) = 0.
            *buffers.lse.add(i) = match i < tile.rows {
                true if *queries.lse.add(tile.first + i) != f32::NEG_INFINITY => {
                    *queries.lse.add(tile.first + i) * LOG2_E
                }
                _ => f32::INFINITY,
            };
        }
        buffers.dq.write_bytes(0, QT * ld_wide);
    }
    for stream in &tile.streams {
        let all = stream.span(0, QT);
        if all.is_empty() {
            continue;
        }
        let mut key = all.lo as usize / B::PAIR * B::PAIR;
        while key < all.hi as usize {
            // SAFETY: by the contract of this function; at most KEYS rows beyond the last key
            // are touched, and K, V, dK and dV have that many more.
            unsafe { block::<B>(head, tile, stream, key, layout, buffers, ahead) };
            key += KEYS;
        }
    }
    // SAFETY: the tile's rows exist; QT factors.
    unsafe {
        B::unpack(
            buffers.dq,
            ld_wide,
            &queries.dq,
            tile.first,
            tile.rows,
            buffers.factor,
        );
    }
}

/// Keys `key .. key + KEYS` against a tile.
///
/// # Safety
/// As [`tile_gradients`].
unsafe fn block<B: Backend>(
    head: &Head,
    tile: &Tile,
    stream: &Stream,
    key: usize,
    layout: Layout,
    buffers: &Buffers,
    ahead: &mut Ahead,
) {
    let Layout { ld_wide, wide, .. } = layout;
    let grains = tile.rows.div_ceil(GRAIN);
    // Rows of the block that each grain works on; none for those that see no key here.
    let mut live = [const { 0..0 }; GRAINS];
    for (g, live) in live.iter_mut().enumerate().take(grains) {
        let span = stream.span(g * GRAIN, GRAIN);
        let (lo, hi) = (
            (span.lo as usize).max(key),
            (span.hi as usize).min(key + KEYS),
        );
        if lo < hi {
            let first = (lo - key) / BACKWARD_STEP * BACKWARD_STEP;
            *live = first..(hi - key).next_multiple_of(BACKWARD_STEP);
        }
    }
    let end = live
        .iter()
        .map(|l| l.end)
        .max()
        .unwrap_or(0)
        .next_multiple_of(ROWS);
    let q_units = tile_row(B::PAIR);
    let grain_units = GRAIN / B::PAIR;
    let in_group = NV * B::W / GRAIN;
    for g in (0..grains).step_by(in_group) {
        let parts = match in_group {
            2 => split(live[g].clone(), live[g + 1].clone(), BACKWARD_STEP),
            _ => split(live[g].clone(), 0..0, BACKWARD_STEP),
        };
        for part in parts.into_iter().filter(|part| !part.keys.is_empty()) {
            ahead.step();
            // SAFETY: rows below KEYS of P and dS, columns of this group.
            unsafe { part_gradients::<B>(head, stream, key, g, part, layout, buffers) };
        }
    }
    for (g, live) in live.iter().enumerate().filter(|(_, l)| !l.is_empty()) {
        // SAFETY: rows below KEYS of dS, columns of grain g; rows of K and dQ.
        unsafe {
            let zip = buffers
                .ds_zip
                .add(live.start / B::PAIR * ZIP_ROW + g * GRAIN);
            let k = buffers.k.pairs.add((key + live.start) / B::PAIR * ld_wide);
            ahead.step();
            for row in (0..GRAIN).step_by(ROWS) {
                let a = Operand {
                    a: zip.add(row),
                    transposed: true,
                    ld: ZIP_ROW,
                    depth: live.len() / B::PAIR,
                };
                let dq = buffers.dq.add((g * GRAIN + row) * ld_wide);
                B::accumulate(a, k, dq, ld_wide, wide);
            }
        }
    }
    for row in (0..end).step_by(ROWS) {
        // Only grains that see one of these keys, with zeros where they do not see others.
        let sees = |l: &Range<usize>| l.start < row + ROWS && row < l.end;
        let Some(from) = live.iter().position(sees) else {
            continue;
        };
        let to = live.iter().rposition(sees).map_or(0, |g| g + 1);
        for (g, live) in live.iter().enumerate().take(to).skip(from) {
            for row in (row..row + ROWS).filter(|row| !live.contains(row)) {
                let at = row * q_units + g * grain_units;
                // SAFETY: rows below KEYS of P and dS, columns of grain g.
                unsafe {
                    buffers.p.add(at).write_bytes(0, grain_units);
                    buffers.ds.add(at).write_bytes(0, grain_units);
                }
            }
        }
        let (from, units) = (from * grain_units, (to - from) * grain_units);
        ahead.step();
        for (scores, other, sum) in [
            (buffers.p, buffers.d_out.pairs, buffers.dv),
            (buffers.ds, buffers.q.pairs, buffers.dk),
        ] {
            // SAFETY: ROWS rows of P or dS from `row`, ROWS rows of dV or dK from there.
            unsafe {
                let a = Operand {
                    a: scores.add(row * q_units + from),
                    transposed: false,
                    ld: q_units,
                    depth: units,
                };
                let other = other.add(from * ld_wide);
                B::accumulate(a, other, sum.add((key + row) * ld_wide), ld_wide, wide);
            }
        }
    }
}

/// P and dS of some grains of the group that begins at grain `g`.
///
/// # Safety
/// As [`tile_gradients`]; the part's keys are rows of the block.
unsafe fn part_gradients<B: Backend>(
    head: &Head,
    stream: &Stream,
    key: usize,
    g: usize,
    part: Part,
    layout: Layout,
    buffers: &Buffers,
) {
    let Layout { ld, depth, .. } = layout;
    let Part {
        grain,
        grains,
        keys,
    } = part;
    let grains = grains.min(NV * B::W / GRAIN);
    let lane = (g + grain) * GRAIN;
    let span = stream.span(lane, grains * GRAIN);
    let run = Run {
        keys: keys.len(),
        vectors: grains * GRAIN / B::W,
        first: (key + keys.start) as i32,
        full: (span.full_lo, span.full_hi),
        lo: stream.lo[lane..].as_ptr(),
        hi: stream.hi[lane..].as_ptr(),
        depth,
        scale: head.scale * LOG2_E,
    };
    // Transposed operands lie group by group.
    let column = g * GRAIN * ld + grain * GRAIN;
    // SAFETY: rows below KEYS of P and dS, columns of the part's grains; rows of K and V.
    unsafe {
        let at = keys.start * tile_row(B::PAIR) + lane / B::PAIR;
        let gradients = Gradients {
            k: buffers.k.rows.add((key + keys.start) * ld),
            v: buffers.v.add((key + keys.start) * ld),
            q: buffers.qt.add(column),
            d_out: buffers.d_out_t.add(column),
            lse: buffers.lse.add(lane),
            delta: buffers.delta.add(lane),
            p: buffers.p.add(at),
            ds: buffers.ds.add(at),
            ds_zip: buffers.ds_zip.add(keys.start / B::PAIR * ZIP_ROW + lane),
        };
        B::gradients(&run, ld, &gradients);
    }
}
