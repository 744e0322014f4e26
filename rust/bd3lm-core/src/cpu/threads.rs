//! Threads that share the items of a job.
//!
//! Jobs run on the process's OpenMP team where there is one, see [`use_openmp`]: its threads are
//! awake after a matrix product of PyTorch, and a second set of threads would share their cores.
//! Otherwise they run on helpers of this module, which sleep between calls. The caller always works
//! too, and waits only for helpers that joined: a helper that wakes late finds the job closed.
//!
//! A forked child has no helpers, and its locks may be held by threads that no longer exist, so it
//! works alone.

use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
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
    panicked: AtomicBool,
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
    panicked: AtomicBool::new(false),
    caller: Mutex::new(()),
};

/// The process that owns the helpers; 0 before the first job.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// `GOMP_parallel(function, data, threads, flags)`: every thread of a team calls the function.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// Address of `GOMP_parallel`; 0 where there is none.
static OPENMP: AtomicUsize = AtomicUsize::new(0);

/// Runs all later jobs on the threads of an OpenMP runtime.
///
/// # Safety
/// `parallel` is the address of its `GOMP_parallel`, and the runtime is never unloaded.
pub unsafe fn use_openmp(parallel: usize) {
    OPENMP.store(parallel, Ordering::Release);
}

/// Approximate number of times that a thread takes items.
const TURNS: usize = 16;
/// Most threads of a job.
pub const MOST_THREADS: usize = 1024;

/// Calls `f` with every item below `items`, on up to `threads` threads, in no fixed order.
///
/// A call while another thread uses our own helpers runs on its own thread alone.
pub(crate) fn parallel(threads: usize, items: usize, f: impl Fn(usize) + Sync) {
    let threads = threads.min(items).min(MOST_THREADS);
    // Neighbouring items lie in neighbouring memory, so a thread takes several at a time, but few
    // enough that all threads finish together.
    let together = (items / (TURNS * threads.max(1))).max(1);
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let first = next.fetch_add(together, Ordering::Relaxed);
            if first >= items {
                break;
            }
            (first..items.min(first + together)).for_each(&f);
        }
    };
    if threads < 2 || !is_owner() {
        return work();
    }
    match OPENMP.load(Ordering::Acquire) {
        0 => POOL.run(threads - 1, &work),
        // SAFETY: by the contract of `use_openmp`.
        address => in_team(
            unsafe { std::mem::transmute::<usize, Parallel>(address) },
            threads,
            &work,
        ),
    }
}

/// Threads that this process may run at once, by its affinity and the quota of its control group.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Returns whether this process may use the threads of its pools. A forked child may not: it has
/// copies of their locks, and no threads.
pub(crate) fn is_owner() -> bool {
    let me = std::process::id();
    match OWNER.compare_exchange(0, me, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => true,
        Err(owner) => owner == me,
    }
}

/// A job for a team.
struct Call<'a> {
    work: &'a (dyn Fn() + Sync),
    panicked: AtomicBool,
}

fn in_team(parallel: Parallel, threads: usize, work: &(dyn Fn() + Sync)) {
    extern "C" fn enter(call: *mut c_void) {
        // SAFETY: `in_team` waits for the whole team before its call ends.
        let call = unsafe { &*call.cast::<Call<'_>>() };
        // A panic must not unwind into the runtime.
        if catch_unwind(AssertUnwindSafe(call.work)).is_err() {
            call.panicked.store(true, Ordering::Relaxed);
        }
    }
    let panicked = AtomicBool::new(false);
    let mut call = Call { work, panicked };
    // SAFETY: the function and its data are as the runtime wants them; it returns after all
    // threads have left the function.
    unsafe { parallel(enter, (&raw mut call).cast(), threads as c_uint, 0) };
    assert!(!call.panicked.into_inner(), "{PANICKED}");
}

const PANICKED: &str = "a thread of a kernel panicked";

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
                    .name("bd3lm-kernel".into())
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
            // At most the rest of one piece: not worth sleeping, but yield to others.
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
        let panicked = self.panicked.swap(false, Ordering::Relaxed);
        assert!(!panicked, "{PANICKED}");
    }

    fn next_job(&self) -> Job {
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
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn help(&self) {
        loop {
            let job = self.next_job();
            // SAFETY: the caller does not return while `inside` counts this thread.
            let result = catch_unwind(AssertUnwindSafe(|| unsafe { (*job.0)() }));
            if result.is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.inside.fetch_sub(1, Ordering::Release);
        }
    }
}
