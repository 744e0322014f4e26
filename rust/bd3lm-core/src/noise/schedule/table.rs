//! Tabulated schedules.
//!
//! A monotone cubic interpolates log(p − p(0)) over log t. A power law is a straight line there, so
//! that w = p′/p, which grows as 1/t, keeps its digits down to t = 0. w is the exact derivative of
//! the interpolated p, so the bound holds for any points.

use super::super::root::root;
use crate::error::{Error, Result};

/// p(t) through given points: increasing, with a continuous slope.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// p(0).
    start: f64,
    /// log t of every point but the first.
    x: Vec<f64>,
    /// log(p − p(0)) of each.
    y: Vec<f64>,
    /// dy/dx at each.
    slope: Vec<f64>,
}

/// A cubic between two points, on s in [0, 1].
struct Cell {
    y: f64,
    rise: f64,
    /// dy/ds at both ends.
    slopes: (f64, f64),
}

impl Cell {
    /// y and dy/ds.
    #[inline]
    fn at(&self, s: f64) -> (f64, f64) {
        let (a, b) = self.slopes;
        let (square, cube) = (3.0 * self.rise - 2.0 * a - b, a + b - 2.0 * self.rise);
        (
            self.y + s * (a + s * (square + s * cube)),
            a + s * (2.0 * square + s * 3.0 * cube),
        )
    }
}

impl Table {
    /// A table of (t, p), from t = 0 to t = 1, both strictly increasing, with p(1) = 1.
    ///
    /// Where p(0) is above 0, the bound misses the mass below it, as under the cosine schedule.
    ///
    /// # Errors
    /// Points that are no such table.
    pub fn new(points: &[(f64, f64)]) -> Result<Self> {
        check(points)?;
        let start = points[0].1;
        let last = points.len() - 1;
        let x: Vec<f64> = points[1..].iter().map(|(t, _)| t.ln()).collect();
        let y: Vec<f64> = points[1..=last]
            .iter()
            .enumerate()
            .map(|(i, (_, p))| (if i + 1 == last { 1.0 } else { *p } - start).ln())
            .collect();
        let slope = slopes(&x, &y);
        Ok(Table { start, x, y, slope })
    }

    /// p(0), below which there is no level.
    pub fn start(&self) -> f64 {
        self.start
    }

    /// The cell that begins at point `i`, and its width.
    #[inline]
    fn cell(&self, i: usize) -> (Cell, f64) {
        let width = self.x[i + 1] - self.x[i];
        let cell = Cell {
            y: self.y[i],
            rise: self.y[i + 1] - self.y[i],
            slopes: (self.slope[i] * width, self.slope[i + 1] * width),
        };
        (cell, width)
    }

    /// p(t) − p(0) and d log(p − p(0)) / d log t.
    fn above_start(&self, t: f64) -> (f64, f64) {
        let x = t.ln();
        if x < self.x[0] {
            // The power law of the first point.
            return (
                (self.y[0] + (x - self.x[0]) * self.slope[0]).exp(),
                self.slope[0],
            );
        }
        let cells = self.x.len() - 1;
        let i = self.x[1..cells].partition_point(|known| *known <= x);
        let (cell, width) = self.cell(i);
        let (y, dy) = cell.at(((x - self.x[i]) / width).min(1.0));
        (y.exp(), dy / width)
    }

    /// p(t).
    pub fn mask_prob(&self, t: f64) -> f64 {
        (self.start + self.above_start(t).0).min(1.0)
    }

    /// w(t) = p′(t)/p(t).
    pub fn loss_weight(&self, t: f64) -> f64 {
        let (above, exponent) = self.above_start(t);
        above / (self.start + above) * exponent / t
    }

    /// t(p); 0 up to p(0).
    pub fn inverse(&self, p: f64) -> f64 {
        if p <= self.start {
            return 0.0;
        }
        self.level(p).0
    }

    /// w at the level of p; 0 where there is no level.
    pub fn loss_weight_at(&self, p: f64) -> f64 {
        if p <= self.start {
            return if self.start > 0.0 { 0.0 } else { f64::INFINITY };
        }
        let (t, exponent) = self.level(p);
        (p - self.start) / p * exponent / t
    }

    /// t(p) and d log(p − p(0)) / d log t there.
    fn level(&self, p: f64) -> (f64, f64) {
        let y = (p - self.start).ln();
        let cells = self.x.len() - 1;
        if y < self.y[0] {
            let x = self.x[0] + (y - self.y[0]) / self.slope[0];
            return (x.exp(), self.slope[0]);
        }
        if y >= self.y[cells] {
            return (1.0, self.slope[cells]);
        }
        let i = self.y[1..cells].partition_point(|known| *known <= y);
        let (cell, width) = self.cell(i);
        let excess = |s: f64| {
            let (at, slope) = cell.at(s);
            (at - y, slope)
        };
        let s = root(excess, (0.0, 1.0), (y - cell.y) / cell.rise);
        ((self.x[i] + s * width).exp(), cell.at(s).1 / width)
    }
}

fn check(points: &[(f64, f64)]) -> Result<()> {
    let refuse =
        |value: String, allowed: &str| Err(Error::config("schedule_table", value, allowed));
    let n = points.len();
    if n < 3 {
        return refuse(
            format!("{n} points"),
            "three or more (t, p), from t = 0 to t = 1",
        );
    }
    let ((first, start), (last, end)) = (points[0], points[n - 1]);
    if first != 0.0 || last != 1.0 {
        return refuse(format!("t from {first} to {last}"), "t from 0 to 1");
    }
    if !(0.0..1.0).contains(&start) {
        return refuse(format!("p(0) = {start}"), "0, or a missing mass below 1");
    }
    if (end - 1.0).abs() > 1e-9 || end.is_nan() {
        let allowed = format!("p(1) = 1: a mass of {} is missing", 1.0 - end);
        return refuse(format!("p(1) = {end}"), &allowed);
    }
    for (i, pair) in points.windows(2).enumerate() {
        let ((t, p), (next_t, next_p)) = (pair[0], pair[1]);
        let next_p = if i + 2 == n { 1.0 } else { next_p };
        if !(t < next_t && p < next_p) {
            return refuse(
                format!("({next_t}, {next_p}) after ({t}, {p})"),
                "strictly increasing in t and in p",
            );
        }
    }
    Ok(())
}

/// Slopes through points: those of the parabola of fourth degree through five neighbours, where
/// they keep the cubics increasing (Fritsch and Carlson 1980); else a weighted harmonic mean of the
/// two secants.
fn slopes(x: &[f64], y: &[f64]) -> Vec<f64> {
    const POINTS: usize = 5;
    let n = x.len();
    let secant = |i: usize| (y[i + 1] - y[i]) / (x[i + 1] - x[i]);
    (0..n)
        .map(|i| {
            let near = i.saturating_sub(POINTS / 2).min(n.saturating_sub(POINTS));
            let near = near..n.min(near + POINTS);
            let smooth = polynomial_slope(&x[near.clone()], &y[near.clone()], i - near.start);
            let (left, right) = match i {
                0 => (secant(0), secant(0)),
                i if i == n - 1 => (secant(n - 2), secant(n - 2)),
                i => (secant(i - 1), secant(i)),
            };
            if 0.0 < smooth && smooth <= 3.0 * left.min(right) {
                return smooth;
            }
            if i == 0 || i == n - 1 {
                return left;
            }
            let (before, after) = (x[i] - x[i - 1], x[i + 1] - x[i]);
            let (v, w) = (2.0 * after + before, after + 2.0 * before);
            (v + w) / (v / left + w / right)
        })
        .collect()
}

/// Slope at point `i` of the polynomial through all points (Lagrange's form).
fn polynomial_slope(x: &[f64], y: &[f64], i: usize) -> f64 {
    let others = |j: usize| (0..x.len()).filter(move |k| *k != j);
    let mut slope = y[i] * others(i).map(|k| 1.0 / (x[i] - x[k])).sum::<f64>();
    for j in others(i) {
        let up: f64 = others(j).filter(|k| *k != i).map(|k| x[i] - x[k]).product();
        let down: f64 = others(j).map(|k| x[j] - x[k]).product();
        slope += y[j] * up / down;
    }
    slope
}
