//! Rows of a data set that is larger than memory.
//!
//! A token file is memory-mapped: a page that is not in memory is read when it is touched. Shuffled
//! rows would be read one after the other, each with a hundred kilobytes around it that are not
//! needed. Where rows come slowly, all rows of a batch are announced to the system (`madvise`)
//! before the first is read. Where they come fast, that would cost more than the rows themselves.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::data::pack::RowPlan;
use crate::data::store::TokenStore;

/// Time of a row, and of each of its tokens, above which the row was not in memory: a disk needs
/// more, a copy with its noise less.
const SLOW: (Duration, Duration) = (Duration::from_micros(20), Duration::from_nanos(50));
/// Batches that are announced after a slow one.
const ANNOUNCED: u32 = 16;

/// Announces rows after batches that came slowly.
#[derive(Debug, Default)]
pub struct ReadAhead(AtomicU32);

impl ReadAhead {
    /// Runs `read`, which reads these rows, and announces them first if the last ones came slowly.
    pub fn around<R>(
        &self,
        store: &TokenStore,
        plan: &RowPlan,
        rows: &[u64],
        read: impl FnOnce() -> R,
    ) -> R {
        let left = self.0.load(Ordering::Relaxed);
        if left > 0 {
            self.0.store(left - 1, Ordering::Relaxed);
            for row in rows.iter().filter(|row| **row < plan.num_rows() as u64) {
                plan.spans(store, *row as usize, |tokens| store.will_need(tokens));
            }
        }
        let start = Instant::now();
        let result = read();
        let slow = SLOW.0 + SLOW.1 * plan.seq_len() as u32;
        if !rows.is_empty() && start.elapsed() > slow * rows.len() as u32 {
            self.0.store(ANNOUNCED, Ordering::Relaxed);
        }
        result
    }
}
