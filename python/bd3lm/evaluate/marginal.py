"""The exact likelihood of the first-hitting sampler, by dynamic programming over subsets.

First hitting reveals a uniformly random masked position next. With F(U) the probability that it
gives the positions U of a block their true tokens once all others have theirs,

    F(∅) = 1,   F(U) = mean over i in U of p(x_i | the block's tokens outside U, earlier blocks)
                       · F(U without i),

and -log F(all) is the block's exact negative log-likelihood (docs/math.md §9). The 2^S - 1
forwards are those of the exact NELBO, which comes out of the same pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3lm.device import uploaded
from bd3lm.evaluate.draws import beta
from bd3lm.evaluate.row_scorer import RowScorer


@dataclass(frozen=True)
class SubsetScores:
    """Every subset of every block, scored; on the device of the model.

    Attributes:
        marginal: -log F of each block, float64 [B, K], in nats; 0 where nothing is scored.
        nelbo: the exact NELBO, each token's share of it, float64 [B, L].
        correct: whether greedy decoding gives every token of the row in any order, bool [B]; True
            where the scorer does not read that.
    """

    marginal: Tensor
    nelbo: Tensor
    correct: Tensor


def score_subsets(scorer: RowScorer) -> SubsetScores:
    """Run all 2^S - 1 masks of the blocks.

    Args:
        scorer: of rows of a model that is not time-conditioned.
    """
    size = scorer.block_size
    rows, seq_len = scorer.noisable.shape
    noisable = scorer.noisable.view(rows, -1, size)
    num_blocks = noisable.shape[1]
    device = scorer.x0.device
    table = [[beta(k, n) for k in range(size + 1)] for n in range(size + 1)]
    weight = torch.tensor(table, dtype=torch.float64)[noisable.sum(-1)]  # [B, K, k]
    log_f = torch.zeros(1 << size, rows, num_blocks, dtype=torch.float64, device=device)
    nelbo = torch.zeros(rows, num_blocks, size, dtype=torch.float64, device=device)
    correct = torch.ones(rows, dtype=torch.bool, device=device)
    for subset in range(1, 1 << size):  # the subsets of a set have smaller numbers
        inside = [i for i in range(size) if subset >> i & 1]
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[inside] = True
        fits = (noisable | ~chosen).all(-1)  # blocks in which all of these are noisable
        mask = (fits[..., None] & chosen).view(rows, seq_len)
        if not mask.any():
            continue
        found = scorer(mask)
        nats = found.nats.view(noisable.shape)
        nelbo += nats * uploaded(weight[..., len(inside)] * fits, device)[..., None]
        terms = [log_f[subset ^ 1 << i] - nats[..., i] for i in inside]
        log_f[subset] = torch.logsumexp(torch.stack(terms), 0) - math.log(len(inside))
        if found.correct is not None:
            correct &= found.correct.all(1)
    number = (noisable * (1 << torch.arange(size))).sum(-1)  # of each block's whole set
    marginal = -log_f.gather(0, uploaded(number[None], device))[0]
    return SubsetScores(marginal + 0.0, nelbo.view(rows, seq_len), correct)
