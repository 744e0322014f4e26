//! Tokens of a data set that is elsewhere: copies of the runs that a batch reads.

use std::ops::Range;

use super::{BIN, TokenStore, Tokens};
use crate::error::{Error, Result};

/// Copies of runs of tokens. Nothing else of the data set can be read.
#[derive(Debug)]
pub struct Staged<'a> {
    ids: Tokens<'a>,
    /// Each run, and where its ids begin, in order.
    runs: Vec<(Range<usize>, usize)>,
    /// Tokens of the data set.
    len: usize,
}

impl<'a> Staged<'a> {
    /// Takes the ids of runs of a data set, one run after the other.
    ///
    /// # Errors
    /// Ids of another number than those of the runs, an id outside the vocabulary, or the mask id.
    pub fn new(store: &TokenStore, runs: &[Range<usize>], ids: Tokens<'a>) -> Result<Self> {
        let mut at = 0;
        let mut placed = Vec::with_capacity(runs.len());
        for run in runs {
            placed.push((run.clone(), at));
            at += run.len();
        }
        if ids.len() != at {
            return Err(Error::config(
                "ids",
                ids.len(),
                format!("the {at} of the runs"),
            ));
        }
        let vocab = store.vocab;
        let is_bad = |id: u32| id >= vocab.vocab_size || id == vocab.mask_id;
        // One pass that the compiler can vectorize, as in a verification.
        let bad = match ids {
            Tokens::U16(x) => first(x, |id| is_bad(u32::from(id))).map(i64::from),
            Tokens::I32(x) => first(x, |id| is_bad(id as u32)).map(i64::from),
            Tokens::Joined(_) | Tokens::Staged(_) => None, // checked already
        };
        match bad {
            None => {}
            Some(id) if id == i64::from(vocab.mask_id) => {
                return Err(Error::Corrupt {
                    path: BIN.into(),
                    reason: format!("it holds the mask id {id}, which no text may hold"),
                });
            }
            Some(id) => return Err(store.out_of_range(id)),
        }
        placed.sort_unstable_by_key(|(run, _)| (run.start, run.end));
        Ok(Staged {
            ids,
            runs: placed,
            len: store.num_tokens(),
        })
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn copy_to(&self, start: usize, out: &mut [i64]) {
        if out.is_empty() {
            return;
        }
        // Of runs that begin together the longest is last.
        let next = self.runs.partition_point(|(run, _)| run.start <= start);
        let (run, at) = &self.runs[next - 1];
        assert!(start + out.len() <= run.end, "tokens that were not staged");
        self.ids.copy_to(at + start - run.start, out);
    }
}

fn first<T: Copy>(ids: &[T], is_bad: impl Fn(T) -> bool) -> Option<T> {
    let any = ids.iter().fold(false, |any, id| any | is_bad(*id));
    any.then(|| ids.iter().copied().find(|id| is_bad(*id)))?
}
