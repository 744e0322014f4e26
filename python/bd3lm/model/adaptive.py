"""Adaptive softmax: frequent tokens in a shortlist, rarer ones in clusters (Grave et al., 2017).

The head first predicts a token of the shortlist or a cluster, then the token within the cluster.
The second product runs only where the target lies in that cluster, forward and backward. The
distribution over the whole vocabulary stays exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3lm.model.head import HeadInputs, head_cross_entropy, whole_tiles


def new_clusters(width: int, cutoffs: Sequence[int], vocab_size: int) -> nn.Linear:
    """Output layer of the clusters' logits, all of whose tokens are equally likely at first.

    Args:
        width: D.
        cutoffs: first id of every cluster, in increasing order.
        vocab_size: V.
    """
    clusters = nn.Linear(width, len(cutoffs))
    with torch.no_grad():
        nn.init.zeros_(clusters.weight)
        sizes = [float(high - low) for low, high in ranges(cutoffs, vocab_size)]
        clusters.bias.copy_(torch.tensor(sizes).log())
    return clusters


def ranges(cutoffs: Sequence[int], vocab_size: int) -> list[tuple[int, int]]:
    """First id of every cluster, and the id after its last.

    Examples:
        >>> ranges((2, 5), 9)
        [(2, 5), (5, 9)]
    """
    return list(itertools.pairwise((*cutoffs, vocab_size)))


def adaptive_cross_entropy(
    inputs: HeadInputs, clusters: nn.Linear, cutoffs: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Compute :func:`bd3lm.model.head.head_cross_entropy` of an adaptive softmax.

    Args:
        inputs: features, head and targets.
        clusters: logits of the clusters (:func:`new_clusters`).
        cutoffs: first id of every cluster.

    Returns:
        ``(sum, nll)``, as without clusters.
    """
    features, head, bias, target, weight, mask_id = inputs
    places = torch.tensor(cutoffs, device=target.device)
    cluster = torch.bucketize(target, places, right=True)  # 0 is the shortlist
    sizes = [high - low for low, high in ranges((0, *cutoffs), len(head))]
    matrices = head.split(sizes)
    offsets: Sequence[Tensor | None] = [None] * len(sizes) if bias is None else bias.split(sizes)
    shortlist = torch.cat([matrices[0], clusters.weight])
    of_shortlist = head.new_zeros(sizes[0]) if bias is None else bias[: sizes[0]]
    offset = torch.cat([of_shortlist, clusters.bias])
    first = torch.where(cluster > 0, sizes[0] - 1 + cluster, target)
    masked = partial(_inside, mask_id)
    total, nll = head_cross_entropy(
        HeadInputs(features, shortlist, offset, first, weight, masked(0, sizes[0]))
    )
    for index, (low, high) in enumerate(ranges(cutoffs, len(head)), start=1):
        rows = (cluster == index).nonzero().squeeze(1)
        rows, of_rows = whole_tiles(rows, weight[rows])
        more, values = head_cross_entropy(
            HeadInputs(
                features.index_select(0, rows),
                matrices[index],
                offsets[index],
                target[rows] - low,
                of_rows,
                masked(low, high),
            )
        )
        total = total + more
        nll = nll.index_copy(0, rows, nll[rows] + values)
    return total, nll


def _inside(mask_id: int | None, low: int, high: int) -> int | None:
    """Place of the mask token in a range of ids; None where it is elsewhere."""
    return mask_id - low if mask_id is not None and low <= mask_id < high else None


def adaptive_logits(scores: Tensor, clusters: Tensor, cutoffs: Sequence[int]) -> Tensor:
    """Log-probabilities, up to a constant of each row, of all tokens.

    Args:
        scores: products of features and head [..., V]; -inf for a token without probability.
        clusters: logits of the clusters [..., C].
        cutoffs: first id of every cluster.

    Returns:
        [..., V]: scores of the shortlist; in cluster c, its logit plus the log-softmax within it.
    """
    parts = [scores[..., : cutoffs[0]]]
    for index, (low, high) in enumerate(ranges(cutoffs, scores.shape[-1])):
        within = F.log_softmax(scores[..., low:high], dim=-1, dtype=torch.float32)
        parts.append((within + clusters[..., index, None]).to(scores.dtype))
    return torch.cat(parts, dim=-1)
