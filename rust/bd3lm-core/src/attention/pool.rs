//! Helper threads that sleep between calls, after a moment in which they wait for the next one:
//! waking a thread takes as long as a small product.
//!
//! The caller always works too, and waits only for helpers that took part: a helper that wakes
//! late finds the job closed. A forked child has no helpers, and locks that one of them may have held
//! when it was forked: it works alone.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How long a helper waits awake. Decoding calls again within some tens of microseconds; whoever
/// else needs the core gets it, as the helper yields.
const AWAKE: Duration = Duration::from_micros(50);

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
    /// Helpers that have to be woken.
    asleep: usize,
}

struct Pool {
    state: Mutex<State>,
    work: Condvar,
    /// Jobs so far; changes under the lock of `state`.
    jobs: AtomicUsize,
    /// The process that started the helpers; 0: none has.
    owner: AtomicU32,
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
        asleep: 0,
    }),
    work: Condvar::new(),
    jobs: AtomicUsize::new(0),
    owner: AtomicU32::new(0),
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
        let me = std::process::id();
        let owner = self
            .owner
            .compare_exchange(0, me, Ordering::Relaxed, Ordering::Relaxed);
        if owner.is_err_and(|owner| owner != me) {
            return work();
        }
        let _turn = match self.caller.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return work(),
        };
        // SAFETY: only the lifetime changes; this function returns after the job was closed and
        // every helper that held it has left.
        let job: *const (dyn Fn() + Sync + 'static) = unsafe { std::mem::transmute(work) };
        let asleep = {
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
            self.jobs.fetch_add(1, Ordering::Release);
            state.asleep
        };
        for _ in 0..helpers.min(asleep) {
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

    fn next_job(&self) -> Job {
        let mut awake = true;
        let mut state = self.lock();
        loop {
            if let Some(job) = state.job
                && state.seats > 0
            {
                state.seats -= 1;
                // Under the lock: the caller closes the job before it looks.
                self.inside.fetch_add(1, Ordering::Relaxed);
                return job;
            }
            if awake {
                let known = self.jobs.load(Ordering::Relaxed);
                drop(state);
                self.await_job(known);
                awake = false;
                state = self.lock();
                continue;
            }
            state.asleep += 1;
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.asleep -= 1;
        }
    }

    /// Returns when there is another job than those `known`, or when it has taken too long.
    fn await_job(&self, known: usize) {
        let start = Instant::now();
        while start.elapsed() < AWAKE {
            for _ in 0..16 {
                if self.jobs.load(Ordering::Acquire) != known {
                    return;
                }
                std::hint::spin_loop();
            }
            std::thread::yield_now();
        }
    }

    fn help(&self) {
        loop {
            let job = self.next_job();
            // SAFETY: the caller does not return while `inside` counts this thread.
            let result = catch_unwind(AssertUnwindSafe(|| unsafe { (*job.0)() }));
            if result.is_err() {
                self.panicked.store(1, Ordering::Relaxed);
            }
            self.inside.fetch_sub(1, Ordering::Release);
        }
    }
}
