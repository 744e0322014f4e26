//! Tables of the `count` estimator, computed on demand.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// Tables by n, the noisable tokens of a block; copies share them.
#[derive(Clone, Debug, Default)]
pub(super) struct CountTables(Arc<Mutex<HashMap<usize, Arc<CountTable>>>>);

/// Table of one n; entry k−1 belongs to a count k.
#[derive(Debug)]
pub(super) struct CountTable {
    /// Cumulative q(k); `None` where q is uniform.
    pub(super) cumulative: Option<Vec<f64>>,
    /// Loss weight.
    pub(super) weight: Vec<f32>,
}

impl CountTables {
    /// The table of n, from `make` the first time.
    pub(super) fn get(&self, n: usize, make: impl FnOnce() -> CountTable) -> Arc<CountTable> {
        let mut tables = self.0.lock().unwrap_or_else(|e| e.into_inner());
        tables.entry(n).or_insert_with(|| Arc::new(make())).clone()
    }
}
