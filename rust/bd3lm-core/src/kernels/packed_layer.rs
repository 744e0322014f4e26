//! A decoder layer for cached decoding on a CPU, in two calls: norm, projection and rotation before
//! attention, then projection, norm and MLP after it. For a few rows, separate operations would
//! cost as much as the matrix products.
//!
//! Rows are independent here, so a row gives the same bits in any batch.

use crate::cpu::buffers::check_len;
use crate::cpu::scratch;
use crate::error::{Error, Result, named};
use crate::kernels::activation::{Activation, silu_times};
use crate::kernels::norm::normalise;
use crate::kernels::packed_linear::{Epilogue, Packed};
use crate::kernels::rotary::rotate;
use std::sync::Arc;

/// LayerNorm (`centred`) or RMSNorm of rows as wide as the weight.
pub struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    centred: bool,
    eps: f32,
}

impl Norm {
    /// # Errors
    /// A bias of another width than the weight.
    pub fn new(weight: &[f32], bias: Option<&[f32]>, centred: bool, eps: f32) -> Result<Self> {
        check_len(
            "bias",
            weight.len(),
            bias.map_or(weight.len(), <[f32]>::len),
        )?;
        Ok(Norm {
            weight: weight.to_vec(),
            bias: bias.map_or_else(|| vec![0.0; weight.len()], <[f32]>::to_vec),
            centred,
            eps,
        })
    }

    fn apply(&self, rows: &mut [f32]) {
        normalise(rows, &self.weight, &self.bias, self.centred, self.eps);
    }
}

/// Operation between the two matrices of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlp {
    /// An activation of each feature.
    Plain(Activation),
    /// SiLU of the first half of the features times the second.
    SwiGlu,
}

impl Mlp {
    /// The form of this name: `swiglu`, or an activation's.
    ///
    /// # Errors
    /// An unknown name.
    pub fn parse(name: &str) -> Result<Self> {
        let [gelu, relu2] = Activation::ALL.map(|(name, f)| (name, Mlp::Plain(f)));
        named("mlp", name, &[gelu, relu2, ("swiglu", Mlp::SwiGlu)])
    }
}

/// Weights of a layer without conditioning.
pub struct Block {
    /// Norm before attention.
    pub norm1: Norm,
    /// Projection to queries, keys and values, concatenated.
    pub qkv: Arc<Packed>,
    /// Norms of the queries and keys of each head.
    pub qk_norm: Option<(Norm, Norm)>,
    /// Projection after attention.
    pub out: Arc<Packed>,
    /// Norm before the MLP.
    pub norm2: Norm,
    /// First matrix of the MLP.
    pub up: Arc<Packed>,
    /// Between its matrices.
    pub mlp: Mlp,
    /// Second matrix of the MLP.
    pub down: Arc<Packed>,
    /// Dh, features of a head.
    pub head_width: usize,
}

/// The KV cache of B rows, each buffer [B, Hkv, capacity, Dh].
pub struct Cache<'a> {
    /// Rotated keys.
    pub k: &'a mut [f32],
    /// Values.
    pub v: &'a mut [f32],
    /// Positions of a row.
    pub capacity: usize,
    /// Position of the first new token.
    pub first: usize,
}

impl Block {
    /// Checks that the parts fit together.
    ///
    /// # Errors
    /// Two sizes that differ.
    pub fn checked(self) -> Result<Self> {
        let width = self.qkv.inputs();
        check_len("norm1", width, self.norm1.weight.len())?;
        check_len("norm2", width, self.norm2.weight.len())?;
        check_len("out", width, self.out.outputs())?;
        check_len("up", width, self.up.inputs())?;
        check_len("down", width, self.down.outputs())?;
        let halves = if self.mlp == Mlp::SwiGlu { 2 } else { 1 };
        check_len("mlp", halves * self.down.inputs(), self.up.outputs())?;
        if let Some((q, k)) = &self.qk_norm {
            check_len("q_norm", self.head_width, q.weight.len())?;
            check_len("k_norm", self.head_width, k.weight.len())?;
        }
        let queries = self.out.inputs();
        let others = self.qkv.outputs().saturating_sub(queries);
        let even = self.head_width > 0 && self.head_width.is_multiple_of(2);
        if !even
            || others == 0
            || !queries.is_multiple_of(self.head_width)
            || !others.is_multiple_of(2 * self.head_width)
        {
            let given = format!("{} features for {queries} queries", self.qkv.outputs());
            let allowed = format!("whole heads of {}, an even width", self.head_width);
            return Err(Error::config("qkv", given, allowed));
        }
        Ok(self)
    }

    /// Norm, projection and rotation: queries out, keys and values into the cache.
    ///
    /// * `h` [B·T, D]: the residual stream.
    /// * `cos`, `sin` [T, Dh]: of every position; the first half of a sine is negated.
    /// * `q` [B·T, H·Dh] receives the queries.
    ///
    /// # Errors
    /// Buffers of other sizes, or a cache without room.
    pub fn project(
        &self,
        h: &[f32],
        (cos, sin): (&[f32], &[f32]),
        q: &mut [f32],
        cache: Cache<'_>,
        threads: usize,
    ) -> Result<()> {
        let (width, head) = (self.qkv.inputs(), self.head_width);
        let (queries, all) = (self.out.inputs(), self.qkv.outputs());
        let keys = (all - queries) / 2;
        let (rows, length) = (h.len() / width, cos.len() / head);
        check_len("h", rows * width, h.len())?;
        check_len("cos", length * head, cos.len())?;
        check_len("sin", length * head, sin.len())?;
        check_len("q", rows * queries, q.len())?;
        if rows == 0 || length == 0 {
            return check_len("rows", length, rows);
        }
        check_len("h", rows / length * length, rows)?;
        let cached = (rows / length * keys).checked_mul(cache.capacity);
        check_len("k", cached.unwrap_or(usize::MAX), cache.k.len())?;
        check_len("v", cache.k.len(), cache.v.len())?;
        let end = cache.first.checked_add(length);
        if end.is_none_or(|end| end > cache.capacity) {
            let given = format!("{length} positions from {} on", cache.first);
            let allowed = format!("within {} positions", cache.capacity);
            return Err(Error::config("cache", given, allowed));
        }
        scratch::with(&[h.len(), rows * all], |scratch| {
            let (normed, features) = (scratch.slice(h.len()), scratch.slice(rows * all));
            normed.copy_from_slice(h);
            self.norm1.apply(normed);
            self.qkv.apply(normed, features, Epilogue::Write, threads)?;
            for (row, features) in features.chunks_exact_mut(all).enumerate() {
                let (own_q, rest) = features.split_at_mut(queries);
                let (own_k, own_v) = rest.split_at_mut(keys);
                if let Some((q_norm, k_norm)) = &self.qk_norm {
                    q_norm.apply(own_q);
                    k_norm.apply(own_k);
                }
                let (batch, t) = (row / length, row % length);
                let angle = t * head..(t + 1) * head;
                rotate(own_q, &cos[angle.clone()], &sin[angle.clone()]);
                rotate(own_k, &cos[angle.clone()], &sin[angle]);
                q[row * queries..][..queries].copy_from_slice(own_q);
                for (h, (k, v)) in own_k.chunks(head).zip(own_v.chunks(head)).enumerate() {
                    let line = (batch * keys / head + h) * cache.capacity + cache.first + t;
                    cache.k[line * head..][..head].copy_from_slice(k);
                    cache.v[line * head..][..head].copy_from_slice(v);
                }
            }
            Ok(())
        })
    }

    /// Output projection of attention, norm and MLP, added to `h`.
    ///
    /// * `attended` [M, H·Dh], `h` [M, D].
    ///
    /// # Errors
    /// Buffers with different numbers of rows.
    pub fn finish(&self, attended: &[f32], h: &mut [f32], threads: usize) -> Result<()> {
        self.out.apply(attended, h, Epilogue::Add, threads)?;
        let rows = h.len() / self.out.outputs();
        let (up, down) = (self.up.outputs(), self.down.inputs());
        let gates = self.mlp == Mlp::SwiGlu;
        let inner = if gates { rows * down } else { 0 };
        scratch::with(&[h.len(), rows * up, inner], |scratch| {
            let (normed, features) = (scratch.slice(h.len()), scratch.slice(rows * up));
            normed.copy_from_slice(h);
            self.norm2.apply(normed);
            let epilogue = match self.mlp {
                Mlp::Plain(activation) => Epilogue::Activate(activation),
                Mlp::SwiGlu => Epilogue::Write,
            };
            self.up.apply(normed, features, epilogue, threads)?;
            let inner = if gates {
                let gated = scratch.slice(inner);
                for (both, gated) in features.chunks_exact(up).zip(gated.chunks_exact_mut(down)) {
                    gated.copy_from_slice(&both[..down]);
                    silu_times(gated, &both[down..]);
                }
                gated
            } else {
                features
            };
            self.down.apply(inner, h, Epilogue::Add, threads)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_differ_are_named() {
        let packed = |outputs: usize, inputs: usize| {
            Arc::new(Packed::new(&vec![0.5; outputs * inputs], None, inputs, false).unwrap())
        };
        let norm = |width: usize| Norm::new(&vec![1.0; width], None, true, 1e-5).unwrap();
        let block = |up: usize, head_width: usize| {
            Block {
                norm1: norm(4),
                qkv: packed(12, 4),
                qk_norm: None,
                out: packed(4, 4),
                norm2: norm(4),
                up: packed(up, 4),
                mlp: Mlp::Plain(Activation::Gelu),
                down: packed(4, 8),
                head_width,
            }
            .checked()
        };
        let text = |e: Result<Block>| e.err().unwrap().to_string();
        assert!(text(block(16, 4)).contains("mlp = 16"));
        assert!(text(block(8, 3)).contains("heads of 3"));
        let block = block(8, 2).unwrap();
        let (mut q, mut k, mut v) = (vec![0.0; 8], vec![0.0; 12], vec![0.0; 12]);
        let mut run = |rows: usize, first: usize, capacity: usize| {
            let cache = Cache {
                k: &mut k,
                v: &mut v,
                capacity,
                first,
            };
            let angles = vec![1.0; 4];
            block.project(&vec![0.0; rows * 4], (&angles, &angles), &mut q, cache, 1)
        };
        assert!(run(2, 1, 3).is_ok());
        for first in [2, usize::MAX - 1] {
            let refused = run(2, first, 3).unwrap_err().to_string();
            assert!(refused.contains("within 3 positions"), "{refused}");
        }
        // Times 4 features it wraps to the 12 numbers that there are.
        let refused = run(2, 0, (1 << 62) + 3).unwrap_err().to_string();
        assert!(refused.contains("k = 12 elements"), "{refused}");
        assert!(run(1, 0, 3).is_err());
        assert!(block.finish(&[0.0; 4], &mut [0.0; 8], 1).is_err());
        assert!(Norm::new(&[1.0; 2], Some(&[0.0]), true, 0.0).is_err());
    }
}
