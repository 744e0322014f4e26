//! Working memory of each thread, reused from call to call.

use std::cell::RefCell;

/// Vectors start on cache lines.
const LINE: usize = 16;
/// Longer buffers are freed after the call that needed them.
const KEEP: usize = 1 << 24;

thread_local! {
    /// Buffers not in use; a nested call takes the next.
    static BUFFERS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Pieces of one allocation.
pub(crate) struct Scratch<'a> {
    rest: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    /// A piece of `len` values, at the start of a cache line; its content is arbitrary.
    ///
    /// # Panics
    /// If more is taken than [`with`] was given.
    pub fn slice(&mut self, len: usize) -> &'a mut [f32] {
        let room = len.next_multiple_of(LINE);
        assert!(room <= self.rest.len(), "scratch memory is too short");
        let (piece, rest) = std::mem::take(&mut self.rest).split_at_mut(room);
        self.rest = rest;
        &mut piece[..len]
    }

    /// The start of [`Self::slice`].
    pub fn take(&mut self, len: usize) -> *mut f32 {
        self.slice(len).as_mut_ptr()
    }
}

/// Runs `f` with scratch for pieces of the given lengths.
pub(crate) fn with<R>(lengths: &[usize], f: impl FnOnce(&mut Scratch<'_>) -> R) -> R {
    let left: usize = lengths.iter().map(|len| len.next_multiple_of(LINE)).sum();
    let mut buffer = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < left + LINE {
        buffer = vec![0.0; left + LINE];
    }
    let skip = buffer.as_ptr().align_offset(LINE * size_of::<f32>());
    let rest = &mut buffer[skip..skip + left];
    let result = f(&mut Scratch { rest });
    if buffer.len() > KEEP {
        buffer = Vec::new();
    }
    BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
    result
}
