//! The order in which rows are seen.

use crate::random::{Domain, Permutation, key_of};

/// The order in which rows are seen: shuffled anew each epoch, a function of (seed, index) alone.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    seed: u64,
    rows: u64,
}

impl Order {
    /// The order of `rows >= 1` rows under a seed.
    pub fn new(seed: u64, rows: u64) -> Self {
        Order { seed, rows }
    }

    /// Fills `out` with the rows at places `first..first + out.len()` of the endless sequence of
    /// epochs.
    pub fn fill(&self, first: u64, out: &mut [u64]) {
        let mut done = 0;
        while done < out.len() {
            let place = first.wrapping_add(done as u64);
            let (epoch, start) = (place / self.rows, place % self.rows);
            let n = (self.rows - start).min((out.len() - done) as u64) as usize;
            self.epoch(epoch).fill(start, &mut out[done..done + n]);
            done += n;
        }
    }

    fn epoch(&self, epoch: u64) -> Permutation {
        Permutation::new(self.rows, key_of(self.seed, Domain::Order, epoch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_sees_every_row_once_in_another_order() {
        let order = Order::new(9, 50);
        let mut two = vec![0; 100];
        order.fill(0, &mut two);
        for epoch in two.chunks(50) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<u64>>());
        }
        assert_ne!(two[..50], two[50..]);
        let mut late = vec![0; 30];
        order.fill(40, &mut late);
        assert_eq!(late, two[40..70], "a place alone decides");
    }
}
