//! Tiles of queries, and the runs of keys that each group of them sees.

use super::backend::QT;
use crate::{Error, Result};
use std::ops::Range;

/// Smallest group of queries over all backends; spans are kept at this grain.
pub(super) const GRAIN: usize = 16;
const GRAINS: usize = QT / GRAIN;

/// Keys seen by every query of one batch row, as positions of the clean stream and of the noised
/// one, which comes first in the key tensor. Four slices of Tq.
#[derive(Clone, Copy)]
pub struct Ranges<'a> {
    /// First clean position seen.
    pub clean_lo: &'a [i32],
    /// One past the last clean position seen.
    pub clean_hi: &'a [i32],
    /// First noised position seen.
    pub noised_lo: &'a [i32],
    /// One past the last noised position seen.
    pub noised_hi: &'a [i32],
}

/// Keys of a group of queries, `lo <= j < hi` for some and `full_lo <= j < full_hi` for all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub lo: i32,
    pub hi: i32,
    pub full_lo: i32,
    pub full_hi: i32,
}

impl Span {
    const EMPTY: Span = Span {
        lo: i32::MAX,
        hi: 0,
        full_lo: 0,
        full_hi: i32::MAX,
    };

    pub fn is_empty(&self) -> bool {
        self.hi <= self.lo
    }

    fn join(self, other: &Span) -> Span {
        Span {
            lo: self.lo.min(other.lo),
            hi: self.hi.max(other.hi),
            full_lo: self.full_lo.max(other.full_lo),
            full_hi: self.full_hi.min(other.full_hi),
        }
    }
}

/// One of the two ranges of keys, for the queries of a tile.
pub(super) struct Stream {
    /// Interval of each query; absent queries repeat the last one.
    pub lo: [i32; QT],
    pub hi: [i32; QT],
    grains: [Span; GRAINS],
}

impl Stream {
    fn new(lo: &[i32], hi: &[i32], offset: i32) -> Stream {
        let mut stream = Stream {
            lo: [0; QT],
            hi: [0; QT],
            grains: [Span::EMPTY; GRAINS],
        };
        for i in 0..QT {
            let from = i.min(lo.len() - 1);
            let (lo, hi) = match (lo[from], hi[from]) {
                (lo, hi) if lo < hi => (lo + offset, hi + offset),
                _ => (0, 0),
            };
            stream.lo[i] = lo;
            stream.hi[i] = hi;
            let span = &mut stream.grains[i / GRAIN];
            if lo < hi {
                let seen = Span {
                    lo,
                    hi,
                    full_lo: lo,
                    full_hi: hi,
                };
                *span = span.join(&seen);
            } else {
                span.full_hi = 0; // nothing is seen by all
            }
        }
        stream
    }

    /// The keys of a group of one or two grains from query `from` on, in parts that begin at a
    /// multiple of `align`; parts may be empty.
    pub fn parts(&self, from: usize, grains: usize, align: usize, step: usize) -> [Part; 3] {
        let keys = |grain: usize| {
            let span = self.span(from + grain * GRAIN, GRAIN);
            match span.is_empty() {
                true => 0..0,
                false => span.lo as usize / align * align..span.hi as usize,
            }
        };
        if grains == 2 {
            return split(keys(0), keys(1), step);
        }
        let empty = Part {
            grain: 0,
            grains: 1,
            keys: 0..0,
        };
        [
            Part {
                grain: 0,
                grains: 1,
                keys: keys(0),
            },
            empty.clone(),
            empty,
        ]
    }

    /// Keys of queries `from .. from + count` of the tile, widened to whole grains.
    pub fn span(&self, from: usize, count: usize) -> Span {
        self.grains[from / GRAIN..(from + count).div_ceil(GRAIN)]
            .iter()
            .fold(Span::EMPTY, Span::join)
    }
}

/// Keys for some neighbouring grains of a group of queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// First grain, counted from the group's.
    pub grain: usize,
    pub grains: usize,
    /// Keys; the last step may reach beyond the end.
    pub keys: Range<usize>,
}

/// Splits the keys of two neighbouring grains into those of the one that begins earlier, of
/// both, and of the one that ends later: at block edges, and between documents, half of the
/// work of a common run would be masked away.
///
/// Steps that reach beyond a part's end are not repeated by the next part.
pub(super) fn split(a: Range<usize>, b: Range<usize>, step: usize) -> [Part; 3] {
    let part = |grain, grains, keys| Part {
        grain,
        grains,
        keys,
    };
    if a.is_empty() || b.is_empty() {
        let only = usize::from(a.is_empty());
        let keys = if a.is_empty() { b } else { a };
        return [part(only, 1, keys), part(0, 2, 0..0), part(0, 2, 0..0)];
    }
    let early = usize::from(b.start < a.start);
    let late = usize::from(b.end > a.end);
    let start = a.start.min(b.start);
    let lead = (a.start.max(b.start) - start) / step * step;
    // Where the two are far apart, the first ends before the second begins.
    let lead_end = (start + lead).min([a.end, b.end][early]);
    let alone = start..lead_end;
    let common = start + lead..a.end.min(b.end).max(start + lead);
    let rest = common.start + common.len().next_multiple_of(step);
    let end = a.end.max(b.end);
    [
        part(early, 1, alone),
        part(0, 2, common),
        part(late, 1, rest..end.max(rest)),
    ]
}

/// Up to QT neighbouring queries.
pub(super) struct Tile {
    pub first: usize,
    pub rows: usize,
    pub streams: [Stream; 2],
}

impl Tile {
    pub fn range(&self) -> Range<usize> {
        self.first..self.first + self.rows
    }
}

/// The tiles of one batch row.
pub(super) struct Plan {
    pub tiles: Vec<Tile>,
}

impl Plan {
    /// Cuts the queries where their ranges start anew (xt, then x0), then every QT.
    pub fn new(ranges: Ranges<'_>, clean_offset: usize, num_keys: usize) -> Result<Plan> {
        let queries = ranges.clean_lo.len();
        let offset = clean_offset as i32;
        for (lo, hi, limit) in [
            (ranges.clean_lo, ranges.clean_hi, num_keys as i32 - offset),
            (ranges.noised_lo, ranges.noised_hi, offset),
        ] {
            for (&lo, &hi) in lo.iter().zip(hi) {
                if lo < hi && (lo < 0 || hi > limit) {
                    return Err(Error::config(
                        "mask",
                        format!("{lo}..{hi}"),
                        format!("inside 0..{limit}"),
                    ));
                }
            }
        }
        let mut tiles = Vec::with_capacity(queries / QT + 2);
        let mut first = 0;
        while first < queries {
            let limit = (first + QT).min(queries);
            // Inside a stream the ends of ranges rise; where one falls, a new stream begins.
            let falls = |i: &usize| {
                let (here, before) = (*i, *i - 1);
                ranges.clean_lo[here] < ranges.clean_hi[here]
                    && ranges.clean_hi[here] < ranges.clean_hi[before]
            };
            let end = (first + 1..limit).find(falls).unwrap_or(limit);
            let part = first..end;
            let stream = |lo: &[i32], hi: &[i32], offset| {
                Stream::new(&lo[part.clone()], &hi[part.clone()], offset)
            };
            tiles.push(Tile {
                first,
                rows: end - first,
                streams: [
                    stream(ranges.clean_lo, ranges.clean_hi, offset),
                    stream(ranges.noised_lo, ranges.noised_hi, 0),
                ],
            });
            first = end;
        }
        Ok(Plan { tiles })
    }
}
