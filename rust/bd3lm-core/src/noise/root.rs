//! Roots of increasing functions.

/// Zero of an increasing function on [lo, hi]: Newton steps, or a bisection where one would leave
/// the bracket, so that the search always ends.
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
