"""Quality against diversity: samples at several temperatures, judged side by side.

One figure at one temperature can be traded for another; two samplers compare by their curves.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bd3lm.config import SampleConfig, check
from bd3lm.evaluate.divergence import ngram_divergence
from bd3lm.evaluate.generative import Evaluator, generative_perplexity
from bd3lm.sample import Sampler
from bd3lm.sample.prompts import Prompt
from bd3lm.sample.stopping import token_entropy


@dataclass(frozen=True)
class FrontierPoint:
    """Samples of one temperature.

    Attributes:
        temperature: of the draws.
        entropy: of each sample's own tokens, in nats, averaged over samples.
        gen_ppl: generative perplexity; None without an evaluator.
        divergence: Jensen-Shannon divergence of word n-grams from the reference by n, in nats;
            empty without one.
        forwards: a sampled token.
        texts: the samples.
    """

    temperature: float
    entropy: float
    gen_ppl: float | None
    divergence: dict[int, float]
    forwards: float
    texts: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types."""
        return asdict(self)


def frontier(
    sampler: Sampler,
    cfg: SampleConfig,
    temperatures: Sequence[float] = (0.7, 0.8, 0.9, 1.0, 1.1),
    *,
    prompts: Sequence[Prompt] = ("",),
    evaluator: Evaluator | None = None,
    reference: Sequence[str] = (),
    orders: Sequence[int] = (1, 2),
) -> list[FrontierPoint]:
    """Draw and judge samples at each temperature, from the same random numbers.

    Args:
        sampler: with a tokenizer.
        cfg: how to sample; its temperature is not read.
        temperatures: 0 is greedy.
        prompts: ``cfg.num`` samples of each.
        evaluator: judges by generative perplexity; None: not.
        reference: held-out texts to compare n-grams with; empty: not.
        orders: the n.

    Raises:
        ConfigError: a sampler without a tokenizer, no temperature, or settings that the sampler
            refuses.
    """
    check(sampler.tokenizer is not None, "sampler", "without a tokenizer", "one with a tokenizer")
    check(len(temperatures) > 0, "temperatures", temperatures, "at least one number")
    points = []
    for temperature in temperatures:
        samples = sampler.generate(replace(cfg, temperature=temperature), prompts)
        texts = [sample.text or "" for sample in samples]
        judged = None if evaluator is None else generative_perplexity(evaluator, texts)
        filled = [sample for sample in samples if sample.ids]
        points.append(
            FrontierPoint(
                temperature=temperature,
                entropy=statistics.fmean([token_entropy(s.ids) for s in filled] or [0.0]),
                gen_ppl=None if judged is None else judged.gen_ppl,
                divergence={n: ngram_divergence(texts, reference, n).nats for n in orders}
                if reference
                else {},
                forwards=sum(s.nfe for s in samples) / max(sum(len(s.ids) for s in samples), 1),
                texts=texts,
            )
        )
    return points
