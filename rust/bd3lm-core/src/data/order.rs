//! The order in which rows are seen.

use crate::error::{Error, Result};
use crate::random::{Domain, Permutation, key_of};

/// The order in which rows are seen: shuffled anew each epoch, a function of (seed, index) alone.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    seed: u64,
    rows: u64,
}

impl Order {
    /// The order of `rows` rows under a seed.
    ///
    /// # Errors
    /// No row, or more than 2⁶³.
    pub fn new(seed: u64, rows: u64) -> Result<Self> {
        if rows == 0 || rows > 1 << 63 {
            return Err(Error::config("num_rows", rows, "from 1 to 2^63"));
        }
        Ok(Order { seed, rows })
    }

    /// The rows at places `first..first + out.len()` of the endless sequence of epochs.
    ///
    /// # Errors
    /// A place beyond 2⁶⁴.
    pub fn fill(&self, first: u64, out: &mut [u64]) -> Result<()> {
        if first.checked_add(out.len() as u64).is_none() {
            let allowed = format!("at most 2^64 - 1 - {}", out.len());
            return Err(Error::config("first", first, allowed));
        }
        let mut done = 0;
        while done < out.len() {
            let place = first + done as u64;
            let (epoch, start) = (place / self.rows, place % self.rows);
            let n = (self.rows - start).min((out.len() - done) as u64) as usize;
            self.epoch(epoch).fill(start, &mut out[done..done + n]);
            done += n;
        }
        Ok(())
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
        let order = Order::new(9, 50).unwrap();
        let mut two = vec![0; 100];
        order.fill(0, &mut two).unwrap();
        for epoch in two.chunks(50) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<u64>>());
        }
        assert_ne!(two[..50], two[50..]);
        let mut late = vec![0; 30];
        order.fill(40, &mut late).unwrap();
        assert_eq!(late, two[40..70], "a place alone decides");
    }

    #[test]
    fn numbers_without_an_order_are_refused() {
        for rows in [0, u64::MAX] {
            let refused = Order::new(1, rows).unwrap_err().to_string();
            assert!(refused.contains("num_rows = "), "{refused}");
        }
        let order = Order::new(1, 1 << 63).unwrap();
        order.fill(u64::MAX - 4, &mut [0; 4]).unwrap();
        let refused = order.fill(u64::MAX - 3, &mut [0; 4]).unwrap_err();
        assert!(
            refused
                .to_string()
                .contains("first = 18446744073709551612: must be at most")
        );
    }
}
