//! Each thread's working memory, kept from call to call.

use std::cell::RefCell;

/// Vectors start on cache lines.
const LINE: usize = 16;
/// Longer scratch is given back after the call that needed it.
const KEEP: usize = 1 << 24;

thread_local! {
    static BUFFER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Hands out pieces of one allocation.
pub(super) struct Scratch {
    next: *mut f32,
    left: usize,
}

impl Scratch {
    /// A piece of `len` values, at the start of a cache line; its content is arbitrary.
    ///
    /// # Panics
    /// If more is taken than was asked for.
    pub fn take(&mut self, len: usize) -> *mut f32 {
        let len = len.next_multiple_of(LINE);
        assert!(
            len <= self.left,
            "scratch of the attention kernel is too short"
        );
        let piece = self.next;
        self.left -= len;
        // SAFETY: `left` values of the allocation begin at `next`, and len <= left.
        self.next = unsafe { piece.add(len) };
        piece
    }
}

/// Runs `f` with scratch for pieces of the given lengths.
pub(super) fn with<R>(lengths: &[usize], f: impl FnOnce(&mut Scratch) -> R) -> R {
    let left: usize = lengths.iter().map(|len| len.next_multiple_of(LINE)).sum();
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < left + LINE {
            *buffer = vec![0.0; left + LINE];
        }
        let next = buffer.as_mut_ptr();
        let skip = next.align_offset(LINE * size_of::<f32>());
        // SAFETY: fewer than LINE values are skipped, and LINE more than `left` were allocated.
        let next = unsafe { next.add(skip) };
        let result = f(&mut Scratch { next, left });
        if buffer.len() > KEEP {
            *buffer = Vec::new();
        }
        result
    })
}
