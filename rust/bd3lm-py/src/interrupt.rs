//! Ctrl-C during calls that take long.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use bd3lm_core::Error;
use pyo3::prelude::*;

use crate::errors::to_py;

/// Longest time until a signal is seen.
const PATIENCE: Duration = Duration::from_millis(100);

/// Runs `work` on a thread of its own, while this one looks for signals.
///
/// A signal whose handler raises sets `stop`, which ends the work soon.
///
/// # Errors
/// The exception of a signal handler, or the error of the work.
pub fn interruptible<T: Send>(
    py: Python<'_>,
    stop: &AtomicBool,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> PyResult<T> {
    let mut raised = None;
    let outcome = py.detach(|| {
        thread::scope(|scope| {
            let (send, done) = sync_channel::<()>(0);
            let run = move || {
                let _closed_at_the_end = send;
                work()
            };
            let running = thread::Builder::new().spawn_scoped(scope, run)?;
            while done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                if raised.is_none() {
                    raised = Python::attach(|py| py.check_signals()).err();
                    stop.store(raised.is_some(), Ordering::Relaxed);
                }
            }
            Ok::<_, std::io::Error>(running.join())
        })
    })?;
    match raised {
        Some(error) => Err(error),
        None => outcome
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            .map_err(to_py),
    }
}
