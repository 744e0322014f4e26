//! Roots of increasing functions.

/// Where an increasing function of p in [lo, hi] is zero: Newton steps, halving the bracket where
/// one would leave it, so that it always ends.
///
/// `f` gives the value and the slope, `start` the first guess.
pub(super) fn root(f: impl Fn(f64) -> (f64, f64), (lo, hi): (f64, f64), start: f64) -> f64 {
    let (mut lo, mut hi) = (lo, hi);
    let mut p = start.clamp(lo, hi);
    while hi - lo > 1e-15 {
        let (excess, slope) = f(p);
        if excess < 0.0 {
            lo = p;
        } else {
            hi = p;
        }
        let newton = p - excess / slope;
        let next = if lo < newton && newton < hi {
            newton
        } else {
            0.5 * (lo + hi)
        };
        if (next - p).abs() < 1e-14 {
            return next;
        }
        p = next;
    }
    p
}
