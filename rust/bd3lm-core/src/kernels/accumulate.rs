//! Sums of gradients, kept in float32.

use crate::cpu::buffers::{Parts, check_len, in_groups};
use crate::cpu::multiversion::multiversion;
use crate::cpu::number::Stored;
use crate::error::Result;

/// `sum` += `x`, or `sum` = `x` if it is the `first`.
///
/// # Errors
/// Buffers of different sizes.
pub fn add_to<T: Stored>(sum: &mut [f32], x: &[T], first: bool, threads: usize) -> Result<()> {
    check_len("sum", x.len(), sum.len())?;
    let sum = Parts::new(sum);
    in_groups(x.len(), 1, threads, |_, span| {
        // SAFETY: groups are disjoint and inside `sum`, which is borrowed for the whole call.
        let sum = unsafe { sum.part(span.start, span.len()) };
        add(sum, &x[span], first);
    });
    Ok(())
}

multiversion! {
    fn add<T: Stored>(sum: &mut [f32], x: &[T], first: bool) {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum = if first { x.get() } else { *sum + x.get() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_put_and_the_others_are_added() {
        let (x, mut total) = ([i16::of(1.5), i16::of(-2.0)], [9.0f32, f32::NAN]);
        add_to(&mut total, &x, true, 1).unwrap();
        assert_eq!(total, [1.5, -2.0]);
        add_to(&mut total, &[1.0f32, 0.25], false, 1).unwrap();
        assert_eq!(total, [2.5, -1.75]);
    }

    #[test]
    fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
        let x: Vec<i16> = (0..40_000)
            .map(|i| i16::of(i as f32 / 7.0 - 900.0))
            .collect();
        let run = |threads| {
            let mut total: Vec<f32> = (0..x.len()).map(|i| i as f32).collect();
            add_to(&mut total, &x, false, threads).unwrap();
            total
        };
        let results = crate::cpu::multiversion::tests::at_each(|| run(1));
        assert!(results.iter().all(|r| *r == results[0]));
        assert!(run(3) == results[0]);
    }

    /// All buffers lie between inaccessible pages.
    #[test]
    fn nothing_beside_the_buffers_is_touched() {
        use crate::cpu::guarded::Guarded;
        for (count, at_end) in [(1, true), (1275, false), (3009, true)] {
            let mut total = Guarded::new(&vec![1; 4 * count], at_end);
            let mut x = Guarded::new(&vec![1; 2 * count], at_end);
            add_to(total.f32s(), x.i16s(), false, 2).unwrap();
        }
    }
}
