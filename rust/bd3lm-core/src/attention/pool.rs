//! Helper threads that sleep between calls.
//!
//! The caller always works too, and waits only for helpers that took part: a helper that wakes
//! late finds the job closed. That also makes a forked child safe, where helpers do not exist.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};

/// A job whose closure outlives every helper's use of it, see [`Pool::run`].
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn() + Sync));

// SAFETY: the closure is Sync, and `run` keeps it alive until no helper holds the job.
unsafe impl Send for Job {}

struct State {
    helpers: usize,
    job: Option<Job>,
    /// Helpers that may still join the job.
    seats: usize,
}

struct Pool {
    state: Mutex<State>,
    work: Condvar,
    /// Helpers inside the job.
    inside: AtomicUsize,
    panicked: AtomicUsize,
    /// Held by the one caller that uses the helpers.
    caller: Mutex<()>,
}

static POOL: Pool = Pool {
    state: Mutex::new(State {
        helpers: 0,
        job: None,
        seats: 0,
    }),
    work: Condvar::new(),
    inside: AtomicUsize::new(0),
    panicked: AtomicUsize::new(0),
    caller: Mutex::new(()),
};

/// Calls `f` with every item below `items`, on up to `threads` threads, in no fixed order.
///
/// A call while another thread uses the helpers runs on its own thread alone.
pub(crate) fn parallel(threads: usize, items: usize, f: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                break;
            }
            f(item);
        }
    };
    match threads.min(items) {
        0 => {}
        1 => work(),
        threads => POOL.run(threads - 1, &work),
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&'static self, helpers: usize, work: &(dyn Fn() + Sync)) {
        let _turn = match self.caller.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return work(),
        };
        // SAFETY: only the lifetime changes; this function returns after the job was closed and
        // every helper that held it has left.
        let job: *const (dyn Fn() + Sync + 'static) = unsafe { std::mem::transmute(work) };
        {
            let mut state = self.lock();
            while state.helpers < helpers {
                let started = std::thread::Builder::new()
                    .name("bd3lm-attention".into())
                    .spawn(move || self.help());
                if started.is_err() {
                    break; // fewer threads do the same work
                }
                state.helpers += 1;
            }
            state.job = Some(Job(job));
            state.seats = helpers;
        }
        for _ in 0..helpers {
            self.work.notify_one();
        }
        let mine = catch_unwind(AssertUnwindSafe(work));
        {
            let mut state = self.lock();
            state.job = None;
            state.seats = 0;
        }
        let mut spins = 0u32;
        while self.inside.load(Ordering::Acquire) > 0 {
            // The rest is at most one item long: not worth sleeping, but let others run.
            spins += 1;
            if spins.is_multiple_of(64) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        assert!(
            self.panicked.swap(0, Ordering::Relaxed) == 0,
            "a helper thread of the attention kernel panicked"
        );
    }

    fn help(&self) {
        loop {
            let job = {
                let mut state = self.lock();
                loop {
                    match state.job {
                        Some(job) if state.seats > 0 => {
                            state.seats -= 1;
                            // Under the lock: the caller closes the job before it looks.
                            self.inside.fetch_add(1, Ordering::Relaxed);
                            break job;
                        }
                        _ => {
                            state = self
                                .work
                                .wait(state)
                                .unwrap_or_else(PoisonError::into_inner);
                        }
                    }
                }
            };
            // SAFETY: the caller does not return while `inside` counts this thread.
            let result = catch_unwind(AssertUnwindSafe(|| unsafe { (*job.0)() }));
            if result.is_err() {
                self.panicked.store(1, Ordering::Relaxed);
            }
            self.inside.fetch_sub(1, Ordering::Release);
        }
    }
}
