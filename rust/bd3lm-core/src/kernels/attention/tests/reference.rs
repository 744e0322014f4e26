//! Masked softmax attention and its gradients in float64.

use super::Case;

pub(in super::super) struct Arrays {
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub d_out: Vec<f64>,
}

pub(in super::super) struct Gradients {
    pub out: Vec<f64>,
    pub lse: Vec<f64>,
    pub dq: Vec<f64>,
    pub dk: Vec<f64>,
    pub dv: Vec<f64>,
}

/// Offset of a row [b, h, t] in the layout of the case.
fn row(case: &Case, heads: usize, rows: usize, b: usize, h: usize, t: usize) -> usize {
    let strides = case.tensor(heads, rows).1;
    b * strides[0] as usize + h * strides[1] as usize + t * strides[2] as usize
}

pub(in super::super) fn attention(case: &Case, x: &Arrays) -> Gradients {
    let (width, scale) = (case.width, 1.0 / (case.width as f64).sqrt());
    let mut y = Gradients {
        out: vec![0.0; x.q.len()],
        lse: Vec::new(),
        dq: vec![0.0; x.q.len()],
        dk: vec![0.0; x.k.len()],
        dv: vec![0.0; x.k.len()],
    };
    let per_row = case.ranges[0].len() > case.queries;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    for b in 0..case.batch {
        for h in 0..case.heads {
            for t in 0..case.queries {
                let at = if per_row { b * case.queries + t } else { t };
                let [clean_lo, clean_hi, noised_lo, noised_hi] =
                    case.ranges.each_ref().map(|r| r[at] as isize);
                let offset = case.clean_offset as isize;
                let clean = clean_lo + offset..clean_hi + offset;
                let seen: Vec<usize> = clean
                    .chain(noised_lo..noised_hi)
                    .map(|j| j as usize)
                    .collect();
                let q = row(case, case.heads, case.queries, b, h, t);
                let kv = h / (case.heads / case.kv_heads);
                let keys: Vec<usize> = seen
                    .iter()
                    .map(|&j| row(case, case.kv_heads, case.keys, b, kv, j))
                    .collect();
                let query = &x.q[q..q + width];
                let scores: Vec<f64> = keys
                    .iter()
                    .map(|&k| scale * dot(query, &x.k[k..k + width]))
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let lse = if keys.is_empty() {
                    f64::NEG_INFINITY
                } else {
                    max + sum.ln()
                };
                y.lse.push(lse);
                let p: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
                for (&k, p) in keys.iter().zip(&p) {
                    for c in 0..width {
                        y.out[q + c] += p * x.v[k + c];
                    }
                }
                let d_out = &x.d_out[q..q + width];
                let delta = dot(&y.out[q..q + width], d_out);
                for (&k, p) in keys.iter().zip(&p) {
                    let ds = p * (dot(d_out, &x.v[k..k + width]) - delta) * scale;
                    for c in 0..width {
                        y.dv[k + c] += p * d_out[c];
                        y.dk[k + c] += ds * query[c];
                        y.dq[q + c] += ds * x.k[k + c];
                    }
                }
            }
        }
    }
    y
}
