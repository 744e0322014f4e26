//! Rotary position embedding of the heads of queries and keys.

use crate::cpu::buffers::{Parts, check_len, in_groups, whole_rows};
use crate::cpu::multiversion::multiversion;
use crate::cpu::number::Stored;
use crate::error::{Error, Result};

multiversion! {
    /// Rotates the heads of one row in place, the first half of each against the second.
    pub(crate) fn rotate(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
        let half = cos.len() / 2;
        let (cos_low, cos_high) = cos.split_at(half);
        let (sin_low, sin_high) = sin.split_at(half);
        for head in heads.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for i in 0..half {
                let (x, y) = (low[i], high[i]);
                low[i] = x * cos_low[i] + y * sin_low[i];
                high[i] = y * cos_high[i] + x * sin_high[i];
            }
        }
    }
}

/// Angles of T positions; the rows of a buffer repeat them.
#[derive(Clone, Copy)]
pub struct Angles<'a> {
    /// Cosines [T, Dh].
    pub cos: &'a [f32],
    /// Sines [T, Dh], the first half of each negated.
    pub sin: &'a [f32],
    /// Dh, features of a head.
    pub head_width: usize,
    /// Rotates back.
    pub inverse: bool,
}

/// A range of features of every row.
#[derive(Clone, Copy)]
pub struct Columns {
    /// Features of a row.
    pub width: usize,
    /// The first feature of the range.
    pub first: usize,
}

/// Rotates `count` features of every row in place.
///
/// # Errors
/// Columns outside the rows, or features that are no whole heads.
pub fn rotate_heads<T: Stored>(
    heads: &mut [T],
    columns: Columns,
    count: usize,
    angles: Angles<'_>,
    threads: usize,
) -> Result<()> {
    columns.check("heads", heads.len(), count)?;
    angles.check(count, heads.len())?;
    let (len, heads) = (heads.len(), Parts::new(heads));
    in_groups(len, columns.width, threads, |_, span| {
        // SAFETY: groups are disjoint ranges of rows, and the buffer is borrowed for the whole call.
        let part = unsafe { heads.part(span.start, span.len()) };
        rotate_rows(part, columns, count, angles, span.start / columns.width);
    });
    Ok(())
}

/// Copies `count` features of every row to another buffer, rotated if there are `angles`.
///
/// # Errors
/// Buffers or columns that do not fit together, or features that are no whole heads.
pub fn move_heads<T: Stored>(
    (from, source): (&[T], Columns),
    (to, target): (&mut [T], Columns),
    count: usize,
    angles: Option<Angles<'_>>,
    threads: usize,
) -> Result<()> {
    source.check("from", from.len(), count)?;
    target.check("to", to.len(), count)?;
    check_len("to", from.len() / source.width, to.len() / target.width)?;
    if let Some(angles) = angles {
        angles.check(count, from.len())?;
    }
    let to = Parts::new(to);
    in_groups(from.len(), source.width, threads, |_, span| {
        let (first, rows) = (span.start / source.width, span.len() / source.width);
        // SAFETY: groups are disjoint ranges of rows, of which both buffers have as many, and
        // `to` is borrowed for the whole call.
        let to = unsafe { to.part(first * target.width, rows * target.width) };
        let rows = from[span]
            .chunks_exact(source.width)
            .zip(to.chunks_exact_mut(target.width));
        for (row, (from, to)) in rows.enumerate() {
            let to = &mut to[target.first..target.first + count];
            to.copy_from_slice(&from[source.first..source.first + count]);
            if let Some(angles) = angles {
                let whole = Columns {
                    width: count,
                    first: 0,
                };
                rotate_rows(to, whole, count, angles, first + row);
            }
        }
    });
    Ok(())
}

impl Columns {
    fn check(self, name: &'static str, len: usize, count: usize) -> Result<()> {
        whole_rows(name, len, self.width)?;
        if self
            .first
            .checked_add(count)
            .is_some_and(|end| end <= self.width)
        {
            return Ok(());
        }
        let given = format!("{count} features from {} on", self.first);
        Err(Error::config(
            name,
            given,
            format!("within rows of {}", self.width),
        ))
    }
}

impl Angles<'_> {
    fn check(&self, count: usize, len: usize) -> Result<()> {
        let width = self.head_width;
        if width == 0 || !width.is_multiple_of(2) || !count.is_multiple_of(width) {
            let allowed = format!("whole heads of {width}, an even width");
            return Err(Error::config("count", count, allowed));
        }
        whole_rows("cos", self.cos.len(), width)?;
        check_len("sin", self.cos.len(), self.sin.len())?;
        if self.cos.is_empty() && len > 0 {
            let allowed = "an angle for every position";
            return Err(Error::config("cos", "0 elements", allowed));
        }
        Ok(())
    }
}

/// Heads of one row; `HALF` is known to the compiler for the usual widths.
#[inline(always)]
fn rotate_heads_of_row<T: Stored, const HALF: usize>(
    heads: &mut [T],
    cos: &[f32],
    sin: &[f32],
    sign: f32,
) {
    let half = if HALF == 0 { cos.len() / 2 } else { HALF };
    let (cos_low, cos_high) = (&cos[..half], &cos[half..][..half]);
    let (sin_low, sin_high) = (&sin[..half], &sin[half..][..half]);
    for head in heads.chunks_exact_mut(2 * half) {
        let (low, high) = head.split_at_mut(half);
        let high = &mut high[..half];
        for i in 0..half {
            let (x, y) = (low[i].get(), high[i].get());
            low[i] = T::of(x * cos_low[i] + y * (sign * sin_low[i]));
            high[i] = T::of(y * cos_high[i] + x * (sign * sin_high[i]));
        }
    }
}

multiversion! {
    /// Rotates `count` features of rows; `first_row` is the index of the first row.
    fn rotate_rows<T: Stored>(
        rows: &mut [T],
        columns: Columns,
        count: usize,
        angles: Angles<'_>,
        first_row: usize,
    ) {
        let width = angles.head_width;
        let sign = if angles.inverse { -1.0 } else { 1.0 };
        for (row, heads) in rows.chunks_exact_mut(columns.width).enumerate() {
            let heads = &mut heads[columns.first..columns.first + count];
            let at = (first_row + row) % (angles.cos.len() / width) * width;
            let (cos, sin) = (&angles.cos[at..at + width], &angles.sin[at..at + width]);
            match width {
                32 => rotate_heads_of_row::<T, 16>(heads, cos, sin, sign),
                64 => rotate_heads_of_row::<T, 32>(heads, cos, sin, sign),
                128 => rotate_heads_of_row::<T, 64>(heads, cos, sin, sign),
                _ => rotate_heads_of_row::<T, 0>(heads, cos, sin, sign),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|i| (i * i % 37) as f32 - 11.5).collect()
    }

    /// Cosines and signed sines of T positions.
    fn angles(length: usize, head_width: usize) -> (Vec<f32>, Vec<f32>) {
        let half = head_width / 2;
        let angle = |t: usize, i: usize| (t as f32 + 0.3) / (1.0 + (i % half) as f32);
        let each = || (0..length).flat_map(|t| (0..head_width).map(move |i| (t, i)));
        let cos = each().map(|(t, i)| angle(t, i).cos()).collect();
        let turned = |i: usize| if i < half { -1.0 } else { 1.0 };
        let sin = each().map(|(t, i)| turned(i) * angle(t, i).sin()).collect();
        (cos, sin)
    }

    #[test]
    fn rotations_keep_the_length() {
        let (c, s) = (0.6f32, 0.8f32);
        let mut heads = vec![1.0, 2.0, 3.0, 4.0];
        rotate(&mut heads, &[c; 2], &[-s, s]);
        let wanted = [
            c - 2.0 * s,
            s + 2.0 * c,
            3.0 * c - 4.0 * s,
            3.0 * s + 4.0 * c,
        ];
        for (x, y) in heads.iter().zip(wanted) {
            assert!((x - y).abs() < 1e-6);
        }
    }

    #[test]
    fn heads_are_moved_and_moved_back() {
        for head_width in [2, 6, 32, 64, 128] {
            let (length, batch, heads) = (3, 2, 2);
            let (rows, count) = (length * batch, heads * head_width);
            let (cos, sin) = angles(length, head_width);
            let whole = Columns {
                width: count + 5,
                first: 4,
            };
            let part = Columns {
                width: count,
                first: 0,
            };
            let x = numbers(rows * whole.width);
            let there = Angles {
                cos: &cos,
                sin: &sin,
                head_width,
                inverse: false,
            };
            let mut moved = vec![0f32; rows * count];
            move_heads((&x[..], whole), (&mut moved, part), count, Some(there), 2).unwrap();
            for row in 0..rows {
                let mut want = x[row * whole.width + 4..][..count].to_vec();
                let at = row % length * head_width;
                rotate(
                    &mut want,
                    &cos[at..at + head_width],
                    &sin[at..at + head_width],
                );
                assert_eq!(moved[row * count..][..count], want);
            }
            let mut there_and_copied = x.clone();
            rotate_heads(&mut there_and_copied, whole, count, there, 2).unwrap();
            let mut copied = vec![0f32; rows * count];
            let from = (&there_and_copied[..], whole);
            move_heads(from, (&mut copied, part), count, None, 1).unwrap();
            assert_eq!(copied, moved);
            let mut back = vec![7f32; x.len()];
            let inverse = Angles {
                inverse: true,
                ..there
            };
            move_heads(
                (&moved[..], part),
                (&mut back, whole),
                count,
                Some(inverse),
                1,
            )
            .unwrap();
            for (i, (got, want)) in back.iter().zip(&x).enumerate() {
                if (4..4 + count).contains(&(i % whole.width)) {
                    assert!((got - want).abs() < 1e-4, "{got} {want}");
                } else {
                    assert_eq!(*got, 7.0); // other features are untouched
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for head_width in [6, 32] {
            let (cos, sin) = angles(5, head_width);
            let x: Vec<i16> = numbers(10 * head_width).into_iter().map(i16::of).collect();
            let whole = Columns {
                width: head_width,
                first: 0,
            };
            let turn = Angles {
                cos: &cos,
                sin: &sin,
                head_width,
                inverse: false,
            };
            let results = crate::cpu::multiversion::tests::at_each(|| {
                let mut out = vec![0i16; x.len()];
                move_heads(
                    (&x[..], whole),
                    (&mut out, whole),
                    head_width,
                    Some(turn),
                    1,
                )
                .unwrap();
                out
            });
            assert!(results.iter().all(|r| *r == results[0]));
        }
    }

    /// Heads lie between inaccessible pages.
    #[test]
    fn nothing_beside_the_buffers_is_touched() {
        use crate::cpu::guarded::Guarded;
        for (head_width, at_end) in [(2, true), (6, false), (32, true)] {
            let (rows, count) = (7, 3 * head_width);
            let (mut x, mut out) = (
                Guarded::new(&vec![1; 2 * rows * count], at_end),
                Guarded::new(&vec![1; 2 * rows * count], at_end),
            );
            let (cos, sin) = angles(rows, head_width);
            let turn = Angles {
                cos: &cos,
                sin: &sin,
                head_width,
                inverse: true,
            };
            let whole = Columns {
                width: count,
                first: 0,
            };
            move_heads((x.i16s(), whole), (out.i16s(), whole), count, Some(turn), 2).unwrap();
        }
    }

    #[test]
    fn wrong_input_is_named() {
        let angles = Angles {
            cos: &[1.0; 4],
            sin: &[0.0; 4],
            head_width: 4,
            inverse: false,
        };
        let run = |from: (usize, usize), first: usize, count: usize, angles| {
            let x = vec![0f32; from.0];
            let source = Columns {
                width: from.1,
                first,
            };
            let target = Columns { width: 8, first: 0 };
            move_heads(
                (&x[..], source),
                (&mut [0f32; 16], target),
                count,
                angles,
                1,
            )
            .unwrap_err()
            .to_string()
        };
        assert!(run((17, 8), 0, 4, None).contains("from = 17 elements: must be whole rows of 8"));
        assert!(
            run((16, 8), 5, 4, None)
                .contains("from = 4 features from 5 on: must be within rows of 8")
        );
        assert!(run((16, 8), usize::MAX - 3, 4, None).contains("from = 4 features"));
        assert!(run((24, 8), 0, 4, None).contains("to = 2 elements"));
        assert!(run((16, 8), 0, 6, Some(angles)).contains("whole heads of 4"));
        let other = Angles {
            sin: &[0.0; 8],
            ..angles
        };
        assert!(run((16, 8), 0, 4, Some(other)).contains("sin = 8"));
        let none = Angles {
            cos: &[],
            sin: &[],
            ..angles
        };
        assert!(run((16, 8), 0, 4, Some(none)).contains("an angle for every position"));
    }
}
